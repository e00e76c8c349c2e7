"""The folders that DeepSpeed swaps to on NVMe: large enough, one per run, and gone when the run is.

    nvme.claim(ds, lambda: 110_000_000)     # before the model is built; given back when the process ends
    nvme.release()                          # … or before

DeepSpeed names its files by rank and parameter only (runtime/swap_tensor, 0.19.8) and never removes them, so ds_config
gives each run its own folder. A rank's lock in it ends with the process: where all are free, a run was killed.
"""

import atexit
import ctypes
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from filelock import FileLock

from toolkit.config.schema import cache_dir
from toolkit.config.units import GIB
from toolkit.deepspeed.facts import Facts
from toolkit.errors import PlanError
from toolkit.job import ranks

PATIENCE_SECONDS = 30.0  # the workers of a killed rank hold its lock until they have noticed
PADDING = 1.1  # of tensors to whole blocks: 1.3 % seen with 3 million parameters
_held: dict[Path, FileLock] = {}  # this process's folders


def require_libaio() -> None:
    """DeepSpeed's op async_io links it. Raises PlanError."""
    for name in ("libaio.so.1", "libaio.so.1t64"):
        with suppress(OSError):
            ctypes.CDLL(name)
            return
    raise PlanError(
        "device=nvme in deepspeed.zero_optimization needs the library libaio, which is not installed: "
        "apt install libaio-dev. Or use offload=cpu_params."
    )


def claim(ds: Mapping[str, Any], parameters: Callable[[], int]) -> None:
    """Take the folders that ``ds`` names, empty, and remove what killed runs left beside them; ``parameters`` counts
    the model's. Raises PlanError on every rank if a disk is too small or a folder in use."""
    release()
    if sizes := bytes_per_parameter(ds):
        count = parameters()
        atexit.register(release)
        ranks.in_turn(lambda: _held.update((folder, _claimed(folder, size * count)) for folder, size in sizes.items()))


def bytes_per_parameter(ds: Mapping[str, Any]) -> dict[Path, float]:
    """folder -> bytes that the ranks of this host write there for each of the model's parameters, at most."""
    facts = Facts(ds, ranks.world(), ranks.device())
    # fp32 master weight, two Adam states and gradient (swap_tensor/optimizer_utils.py); the weight in its own type
    written = {"offload_optimizer": 16, "offload_param": 4 if facts.dtype == "fp32" else 2}
    sizes: dict[Path, float] = {}
    for key, size in written.items():
        if facts[f"zero_optimization.{key}.device"] == "nvme":
            folder = Path(facts[f"zero_optimization.{key}.nvme_path"])
            sizes[folder] = sizes.get(folder, 0) + PADDING * size * ranks.local_size() / ranks.world()
    return sizes


def _claimed(folder: Path, needed: float) -> FileLock:
    """This rank's lock in ``folder``, which the host's first rank makes anew, with ``needed`` bytes free; it also
    removes the neighbours of dead runs. Raises PlanError, while ``folder``'s own run lives, too."""
    key = f"deepspeed.zero_optimization.offload_*.nvme_path={folder.parent}"
    try:
        with _guard():
            if ranks.local_rank() == 0:
                folder.parent.mkdir(parents=True, exist_ok=True)
                if not ranks.until(lambda: _removed(folder), PATIENCE_SECONDS):
                    raise PlanError(f"{folder} is in use: this run runs already. End it, or choose another name=….")
                for neighbour in {lock.parent for lock in folder.parent.glob("swap-*/rank*.lock")}:
                    _removed(neighbour)
                free = shutil.disk_usage(folder.parent).free
                if free < needed:
                    raise PlanError(
                        f"{key}: {needed / GIB:.2f} GiB will be written there and {free / GIB:.2f} GiB are free. "
                        "Name another disk, or use offload=cpu_params."
                    )
            folder.mkdir(exist_ok=True)
            lock = FileLock(folder / f"rank{ranks.rank()}.lock")
            lock.acquire(timeout=0)
    except OSError as error:
        raise PlanError(
            f"{key}: {error.strerror or error}. Name a folder on an NVMe drive that you can write to."
        ) from error
    return lock


def _removed(folder: Path) -> bool:
    """Remove ``folder`` unless some process holds a lock in it, or may hold one: another user's is left alone."""
    for path in folder.glob("rank*.lock"):
        try:
            with FileLock(path, timeout=0):
                pass
        except OSError:  # filelock's Timeout is one
            return False
    shutil.rmtree(folder, ignore_errors=True)
    return True


def release() -> None:
    """Give back this process's folders; the last rank of a run removes them."""
    while _held:
        folder, lock = _held.popitem()
        with _guard():
            lock.release()
            _removed(folder)


def _guard() -> FileLock:
    """Between a look at a folder's locks and what follows from it, no other run takes or removes one."""
    path = cache_dir("swap") / "toolkit.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(path)
