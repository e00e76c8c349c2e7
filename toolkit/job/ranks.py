"""Which rank this process is, and the few collectives that the toolkit itself needs.

    with joined(config): ...        # the process group, up and down again
    ranks.total([tokens, pairs])    # sums over all ranks, on the CPU, without touching the device

Before :func:`joined` only the environment is read, so checks can run first.
"""

import os
import re
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

from toolkit.errors import ConfigError, ToolkitError

T = TypeVar("T")
PATIENCE = timedelta(days=2)  # preparing a corpus may take rank 0 hours while the others wait for it
# What schedulers call these: Open MPI, MPICH and Intel MPI, Slurm (of a step: a batch script is no rank).
SCHEDULERS = (
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NUM_TASKS", "SLURM_STEP_TASKS_PER_NODE"),
    ("PMI_RANK", "MPI_LOCALRANKID", "PMI_SIZE", "MPI_LOCALNRANKS"),
)
_control: Any = None  # a gloo group of all ranks, for small numbers that live on the host


def rank() -> int:
    return int(os.environ.get("RANK", 0))


def world() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", 0))


def local_size() -> int:
    """Ranks on this host; torchrun and the deepspeed launcher name the variable differently."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)


@dataclass(frozen=True)
class Replica:
    """Which copy of the model this rank belongs to, of how many, and on how many ranks each copy is spread."""

    rank: int
    world: int
    split: int


def replica(*, stages: int, tensor: int) -> Replica:
    """DeepSpeed's order of ranks: all of a pipe stage, then the next; the ranks that share layers side by side."""
    copies = world() // (stages * tensor)
    return Replica(rank() % copies if stages > 1 else rank() // tensor, copies, stages * tensor)


def tensor_groups(size: int) -> Any:
    """The ranks that share layers, and those that hold the same shards: DeepSpeed's ``mpu``; None for size 1.

    DeepSpeed makes these groups itself, but only after DeepSpeedConfig.__init__ (runtime/config.py, 0.19.8) has
    counted every rank as a data-parallel one and refused the batch sizes.
    """
    if size == 1:
        return None
    from deepspeed.utils import groups

    groups._init_tp_mesh_device(size)
    return groups


def adopt_scheduler() -> None:
    """Under mpirun or srun, which do not set RANK: take the rank from what they set. A step of one is no launch."""
    for names in SCHEDULERS if "RANK" not in os.environ else ():
        if all(name in os.environ for name in names) and os.environ[names[2]] != "1":
            rank, local, size, tasks = (os.environ[name] for name in names)
            # Slurm's `2(x3),1` is two tasks on each of three nodes and one on a fourth; others give one number
            parts = re.findall(r"(\d+)(?:\(x(\d+)\))?", tasks)
            counts = [count for count, nodes in parts for _ in range(int(nodes or 1))]
            own = counts[int(os.environ.get("SLURM_NODEID", 0)) if len(counts) > 1 else 0]
            os.environ |= {"RANK": rank, "LOCAL_RANK": local, "WORLD_SIZE": size, "LOCAL_SIZE": own}
            return


def complete_environment() -> None:
    """What DeepSpeed would go looking for with mpi4py. Without a launcher this is a world of one."""
    adopt_scheduler()
    if "RANK" not in os.environ:
        os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_SIZE": "1"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    os.environ.setdefault("LOCAL_SIZE", str(local_size()))
    if local_size() == world():
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29500")
    if "MASTER_ADDR" not in os.environ:
        raise ConfigError(
            f"MASTER_ADDR is not set, and {world()} ranks on several hosts need the first one's address. "
            "Export it where the ranks are started; toolkit launch writes such a script."
        )


def free_port() -> int:
    """One that nobody on this host listens at now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def until(condition: Callable[[], bool], seconds: float) -> bool:
    """Whether ``condition`` comes true within ``seconds``; it is asked once at least, then ten times a second."""
    end = time.monotonic() + seconds
    while not (found := condition()) and time.monotonic() < end:
        time.sleep(0.1)
    return found


def device() -> str:
    """``cuda`` or ``cpu``: what DeepSpeed will choose."""
    if chosen := os.environ.get("DS_ACCELERATOR"):
        return chosen
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


@contextmanager
def joined() -> Iterator[None]:
    """Enter the process group (nccl or gloo, as the device wants) and leave it at the end."""
    global _control
    import deepspeed
    import torch
    import torch.distributed as dist

    if device() == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // local_size()))  # with one per core they slow each other
    try:
        deepspeed.init_distributed(verbose=False)
    except dist.DistError as error:  # after DEEPSPEED_TIMEOUT minutes, 10 by default
        raise ToolkitError(
            f"rank {rank()} on {socket.gethostname()}: not all {world()} ranks met at {os.environ['MASTER_ADDR']}:"
            f"{os.environ['MASTER_PORT']}. Where one ended, its host says why on lines of its own; else see "
            f"`toolkit doctor --hostfile`. {str(error).splitlines()[0]}"
        ) from error
    _control = dist.new_group(backend="gloo")
    _forget_shared_memory()
    yield
    # Only on success: after an error the peers may be gone, and the launcher ends them.
    _control = None
    dist.destroy_process_group()


def _forget_shared_memory() -> None:
    """Unlink DeepSpeed's shared memory as soon as all ranks have mapped it: then it ends with them.

    Its op (csrc/cpu/comm/shm.cpp, 0.19.8) never does: after every CPU run 66 MiB of memory a rank stay behind, and the
    next run on this port begins with what it finds (also met in https://github.com/sgl-project/sglang/pull/38638).
    """
    wait()
    address, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    name = f"deepspeed_allreduce_buffer_{os.getuid()}_{address}_{port}_{rank()}"
    Path("/dev/shm", name).unlink(missing_ok=True)


def total(numbers: Sequence[float]) -> list[float]:
    """Element-wise sums over all ranks, as float64."""
    return _reduced(numbers, "SUM")


def largest(numbers: Sequence[float]) -> list[float]:
    """Element-wise maxima over all ranks."""
    return _reduced(numbers, "MAX")


def _reduced(numbers: Sequence[float], how: str) -> list[float]:
    import torch
    import torch.distributed as dist

    values = torch.tensor(numbers, dtype=torch.float64)
    dist.all_reduce(values, op=getattr(dist.ReduceOp, how), group=_control)
    return [float(x) for x in values]


def from_rank0(value: Any) -> Any:
    """Rank 0's ``value`` on every rank (pickled between our own processes)."""
    import torch.distributed as dist

    box = [value]
    dist.broadcast_object_list(box, src=0, group=_control)
    return box[0]


def gathered(value: Any, group: Any = None) -> list[Any]:
    """Every rank's ``value``, in rank order, on every rank."""
    import torch.distributed as dist

    values: list[Any] = [None] * world()
    dist.all_gather_object(values, value, group=group or _control)
    return values


def gathered_on_rank0(value: Any) -> list[Any]:
    """Every rank's ``value``, in rank order, on rank 0; [] elsewhere."""
    import torch.distributed as dist

    values = [None] * world() if rank() == 0 else None
    dist.gather_object(value, values, dst=0, group=_control)
    return values or []


def wait() -> None:
    """A barrier."""
    import torch.distributed as dist

    dist.barrier(group=_control)


def agreed(work: Callable[[], T], group: Any = None) -> T:
    """``work()`` on every rank; a ToolkitError of any is raised on all: none waits for one that has left, and ends with
    an error that hides the first."""
    result: Any = None
    error = None
    try:
        result = work()
    except ToolkitError as raised:
        error = raised
    for found in filter(None, gathered(error, group)):
        raise found
    return result  # type: ignore[no-any-return]


def in_turn(work: Callable[[], T]) -> T:
    """``agreed`` on each host's first rank, then on the others, which wait as long as it takes and find it done."""
    import torch.distributed as dist

    group = dist.new_group(backend="gloo", timeout=PATIENCE)
    first = local_rank() == 0
    earlier, later = (agreed(work if mine else lambda: None, group) for mine in (first, not first))
    dist.destroy_process_group(group)
    return earlier if first else later  # type: ignore[return-value]
