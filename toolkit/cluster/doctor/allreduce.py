"""A tiny all-reduce over the ranks of a job, each host starting its own: who is missing, and how fast it is.

Started by toolkit doctor on every host as `python -m toolkit.cluster.doctor.allreduce`, a request as JSON on its input.

    bus bandwidth = 2 (n - 1) / n x bytes / seconds      # of n ranks; what each link carries, whatever n is
"""

import json
import os
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from toolkit.cluster.doctor.finding import existing

BYTES = 64 * 2**20
REPEATS = 5


@dataclass(frozen=True)
class Request:
    """This host's ranks, from ``first`` on; rank 0 listens at ``address``:``port``."""

    device: str
    first: int
    slots: int
    world: int
    address: str
    port: int
    output_dir: str
    patience: int  # seconds, for all ranks to meet and for a collective


def bus_gbs(size: int, seconds: float, world: int) -> float:
    """GB/s."""
    return 2 * (world - 1) / world * size / seconds / 1e9


def main() -> None:
    from torch.multiprocessing.spawn import start_processes

    given = json.load(sys.stdin)
    os.environ |= given.pop("environment")
    # torch is imported and CUDA not yet touched: a fork is safe here, and saves every rank the import
    start_processes(_rank, (Request(**given),), given["slots"], start_method="fork")  # type: ignore[no-untyped-call]


def _rank(local: int, request: Request) -> None:
    import torch
    import torch.distributed as dist

    rank, world, patience = request.first + local, request.world, timedelta(seconds=request.patience)
    store = dist.TCPStore(  # type: ignore[attr-defined]
        request.address, request.port, is_master=rank == 0, timeout=patience, wait_for_workers=False
    )
    if missing := _missing(store, rank, world, patience):
        if rank == 0:
            _say({"missing": missing})
        return
    device = torch.device(request.device, local) if request.device == "cuda" else torch.device("cpu")
    if request.device == "cuda":
        torch.cuda.set_device(device)
    torch.set_num_threads(1)
    backend = "nccl" if request.device == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=patience)
    seconds = timed(torch.ones(BYTES // 4, device=device), world)
    blind = _blind(store, rank, world, Path(request.output_dir))
    if rank == 0:
        _say({"missing": [], "seconds": seconds, "bytes": BYTES, "backend": backend, "blind": blind})
    dist.destroy_process_group()


def _missing(store: Any, rank: int, world: int, patience: timedelta) -> list[int]:
    """Ranks that did not come; rank 0 waits for all and tells the others. Rank 0 leaves last: the store is its own."""
    store.set(f"here/{rank}", "")
    if rank == 0:
        with suppress(Exception):  # torch has no class of its own for a store's timeout
            store.wait([f"here/{r}" for r in range(world)], patience)
        missing = [r for r in range(world) if not store.check([f"here/{r}"])]
        store.set("missing", json.dumps(missing))
        for r in set(range(1, world)) - set(missing) if missing else ():
            store.wait([f"told/{r}"], patience)
    else:
        store.wait(["missing"], 2 * patience)
        missing = json.loads(store.get("missing"))
        store.set(f"told/{rank}", "")
    return list(missing)


def timed(tensor: Any, world: int) -> float:
    """Seconds of one all-reduce, on the slowest rank, after one that warms up and whose sum is checked."""
    import torch
    import torch.distributed as dist

    dist.all_reduce(tensor)
    if not bool((tensor == world).all()):
        raise ArithmeticError(f"the sum of ones over {world} ranks is not {world} everywhere")
    dist.barrier()
    start = time.perf_counter()
    for _ in range(REPEATS):
        dist.all_reduce(tensor)
    if tensor.is_cuda:
        torch.cuda.synchronize()
    slowest = torch.tensor([(time.perf_counter() - start) / REPEATS], device=tensor.device, dtype=torch.float64)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    return float(slowest)


def _blind(store: Any, rank: int, world: int, folder: Path) -> list[int]:
    """Ranks that do not see in ``folder`` what rank 0 has just written there: it is not one shared disk."""
    if rank == 0:
        with tempfile.NamedTemporaryFile(dir=existing(folder), prefix=".doctor-") as file:
            store.set("probe", file.name)
            return [r for r in range(1, world) if store.get(f"sees/{r}") == b"no"]
    path = Path(store.get("probe").decode())
    end = time.monotonic() + 5  # a network file system looks again only after a while
    while not path.exists() and time.monotonic() < end:
        time.sleep(0.2)
    store.set(f"sees/{rank}", "yes" if path.exists() else "no")
    return []


def _say(result: dict[str, Any]) -> None:
    from toolkit.cluster.doctor.ssh import answer

    print(answer(result), flush=True)


if __name__ == "__main__":
    main()
