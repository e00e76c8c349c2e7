"""A tiny all-reduce over the ranks of a job, each host starting its own: who is missing, and how fast it is.

here(request)       # what `python -m toolkit.cluster.doctor` answers, where a host's ranks are asked for
"""

import json
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

from toolkit.cluster.doctor.disk import existing
from toolkit.config.units import MIB
from toolkit.job.ranks import until

BYTES = 64 * MIB
REPEATS = 5
Say = Callable[[dict[str, Any]], None]


def bus_gbs(size: int, seconds: float, world: int) -> float:
    """GB/s that each link carries, however many ranks there are: nccl-tests' bus bandwidth."""
    return 2 * (world - 1) / world * size / seconds / 1e9


def here(request: dict[str, Any], _: Any) -> dict[str, Any] | None:
    """What rank 0 says of all, where it is one of this host's; the ranks end with it. Raises what a rank raises."""
    from torch.multiprocessing import get_context
    from torch.multiprocessing.spawn import start_processes

    said, slots = get_context("fork").SimpleQueue(), request.pop("slots")
    # torch is imported and CUDA not yet touched: a fork is safe here, and saves every rank the import
    start_processes(partial(_rank, said.put, **request), (), slots, start_method="fork")  # type: ignore[no-untyped-call]
    return None if said.empty() else said.get()


def _rank(
    say: Say, local: int, device: str, first: int, world: int, address: str, port: int, output_dir: str, patience: int
) -> None:
    """This host's ranks begin at ``first``, rank 0 listens at ``address``:``port``, all wait ``patience`` seconds."""
    import torch
    import torch.distributed as dist

    rank, limit, place, backend = first + local, timedelta(seconds=patience), torch.device("cpu"), "gloo"
    store = dist.TCPStore(address, port, is_master=rank == 0, timeout=limit, wait_for_workers=False)  # type: ignore[attr-defined]
    if missing := _missing(store, rank, world, limit):
        if rank == 0:
            say({"missing": missing})
        return
    if device == "cuda":
        place, backend = torch.device("cuda", local), "nccl"
        torch.cuda.set_device(place)
    torch.set_num_threads(1)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=limit)
    seconds = timed(torch.ones(BYTES // 4, device=place), world)
    blind = _blind(store, rank, world, Path(output_dir))
    if rank == 0:
        say({"missing": [], "seconds": seconds, "bytes": BYTES, "backend": backend, "blind": blind})
    dist.destroy_process_group()


def _missing(store: Any, rank: int, world: int, patience: timedelta) -> list[int]:
    """Ranks that did not come; rank 0 waits for all and tells the others. Rank 0 leaves last: the store is its own."""
    store.set(f"here/{rank}", "")
    if rank > 0:
        store.wait(["missing"], 2 * patience)
        missing: list[int] = json.loads(store.get("missing"))
        store.set(f"told/{rank}", "")
        return missing
    with suppress(Exception):  # torch has no class of its own for a store's timeout
        store.wait([f"here/{r}" for r in range(world)], patience)
    missing = [r for r in range(world) if not store.check([f"here/{r}"])]
    store.set("missing", json.dumps(missing))
    for r in set(range(1, world)) - set(missing) if missing else ():
        store.wait([f"told/{r}"], patience)
    return missing


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
    seen = until(path.exists, 5)  # a network file system looks again only after a while
    store.set(f"sees/{rank}", "yes" if seen else "no")
    return []
