"""A few real ranks over gloo as forks of the test's own process: for collectives without an engine, in a blink.

results = on_ranks(2, tmp_path, work)      # work(rank) in each: Ended(code, result, said) by rank
"""

import os
import pickle
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolkit.job.ranks import free_port

PATIENCE = 60  # seconds until ranks that do not end are killed


@dataclass(frozen=True)
class Ended:
    """How one rank ended: its exit code (negative: the signal), what ``work`` returned, what was printed."""

    code: int
    result: Any
    printed: str


def on_ranks(world: int, folder: Path, work: Callable[[int], Any]) -> list[Ended]:
    """``work(rank)`` on ``world`` ranks of a gloo group whose store, as torchrun's, lives outside of them."""
    import torch.distributed as dist

    port = free_port()
    store = dist.TCPStore("127.0.0.1", port, world, is_master=True, wait_for_workers=False)
    children = [_fork(rank, world, port, folder, work) for rank in range(world)]
    end = time.monotonic() + PATIENCE
    codes = [_code(child, end) for child in children]
    del store
    if None in codes:
        said = "\n".join((folder / f"said{r}").read_text() for r in range(world))
        raise TimeoutError(f"a rank did not end in {PATIENCE} s\n{said}")
    return [
        Ended(code, _read(folder / f"result{r}"), (folder / f"said{r}").read_text())
        for r, code in enumerate(codes)
        if code is not None
    ]


def _fork(rank: int, world: int, port: int, folder: Path, work: Callable[[int], Any]) -> int:
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        out = os.open(folder / f"said{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(out, 1)
        os.dup2(out, 2)
        sys.stdout = sys.stderr = os.fdopen(os.dup(1), "w", buffering=1)  # not what pytest captures with
        variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_SIZE": world, "MASTER_PORT": port}
        os.environ |= {name: str(value) for name, value in variables.items()} | {"MASTER_ADDR": "127.0.0.1"}
        _join(rank, world, port)
        (folder / f"result{rank}").write_bytes(pickle.dumps(work(rank)))
        code = 0
    except SystemExit as leaving:
        code = int(leaving.code or 0)
    except BaseException:
        traceback.print_exc()
    os._exit(code)


def _join(rank: int, world: int, port: int) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)  # those of OpenMP, which a test before may have started, do not survive a fork
    store = dist.TCPStore("127.0.0.1", port, world, is_master=False)
    dist.init_process_group("gloo", store=dist.PrefixStore("group", store), rank=rank, world_size=world)


def _code(child: int, end: float) -> int | None:
    """None of one that had to be killed."""
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def _read(path: Path) -> Any:
    return pickle.loads(path.read_bytes()) if path.exists() else None
