"""DeepSpeed's C++/CUDA ops, built once and ahead of training in a directory of the toolkit's own.

    toolkit build-ops zero=stage2 offload=cpu     # what this configuration needs, before a job starts

Left to itself DeepSpeed compiles at first use, silently and for minutes, and waits without limit for
the lock file that a killed build leaves behind.
"""

import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from toolkit.config import cache_dir
from toolkit.errors import PlanError


def directory() -> Path:
    """Where ops are built: TORCH_EXTENSIONS_DIR, or the toolkit's cache, one folder per version."""
    if "TORCH_EXTENSIONS_DIR" not in os.environ:
        from importlib.metadata import version

        versions = f"torch{version('torch')}-deepspeed{version('deepspeed')}"
        os.environ["TORCH_EXTENSIONS_DIR"] = str(cache_dir("ops") / versions)
    path = Path(os.environ["TORCH_EXTENSIONS_DIR"])
    path.mkdir(parents=True, exist_ok=True)
    return path


def ensure(builders: Sequence[str], console: Any) -> None:
    """Build what is missing of ``builders`` (DeepSpeed's class names, e.g. ``CPUAdamBuilder``).

    Safe to call on every rank at once: one builds, the others wait for it. The file lock belongs to
    the operating system, so it ends with the process that holds it.
    """
    from deepspeed.accelerator import get_accelerator
    from deepspeed.git_version_info import installed_ops

    ops = [get_accelerator().create_op_builder(name) for name in builders]
    root = directory()
    missing = [op for op in ops if not installed_ops.get(op.name) and not _built(root, op.name)]
    if not missing:
        return
    with _locked(root / "toolkit.lock", console):
        for op in missing:
            _clear_stale_lock(root / op.name, console)
            if not _built(root, op.name):
                _build(op, console)


def _built(root: Path, name: str) -> bool:
    return (root / name / f"{name}.so").exists() and not (root / name / "lock").exists()


def _build(op: Any, console: Any) -> None:
    if shutil.which(os.environ.get("CXX", "c++")) is None and shutil.which("g++") is None:
        raise PlanError(f"DeepSpeed's op '{op.name}' needs a C++ compiler: apt install g++ (or set CXX).")
    if not op.is_compatible(verbose=True):
        hint = "apt install libaio-dev" if op.name == "async_io" else "see `ds_report`"
        raise PlanError(f"DeepSpeed's op '{op.name}' cannot be built on this machine: {hint}. {op.error_log or ''}")
    start = time.monotonic()
    with console.status(f"Building DeepSpeed's op '{op.name}', once, about a minute"):
        op.load(verbose=False)
    console.print(f"Built DeepSpeed's op '{op.name}' in {time.monotonic() - start:.0f} s.")


def _clear_stale_lock(folder: Path, console: Any) -> None:
    """Whoever builds here holds the toolkit's lock, and we hold it: this one belongs to nobody."""
    lock = folder / "lock"
    if lock.exists():
        age = (time.time() - lock.stat().st_mtime) / 60
        console.print(f"Removing {lock}: a build was killed {age:.0f} minutes ago and left it behind.")
        lock.unlink()


@contextmanager
def _locked(path: Path, console: Any) -> Iterator[None]:
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        console.print("Waiting for another process that builds DeepSpeed's ops.")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()
