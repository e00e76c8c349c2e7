"""DeepSpeed's C++/CUDA ops, built once and ahead of training in a directory of the toolkit's own.

    toolkit build-ops zero=stage2 offload=cpu     # what this configuration needs, before a job starts

Left to itself DeepSpeed compiles at first use, silently and for minutes, and waits for ever for a killed build's lock.
Two variables serve images: TOOLKIT_CPU_ARCH (x86-64-v3) compiles for that architecture instead of this very CPU, and
TOOLKIT_PREBUILT_OPS is where ops that were built so lie ready; only what is missing there is built, in directory().
"""

import hashlib
import importlib.util
import os
import platform
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest.mock import patch

from filelock import FileLock, Timeout

from toolkit.config.schema import cache_dir
from toolkit.errors import PlanError
from toolkit.job import nvme, ranks

V3 = {"avx2", "bmi1", "bmi2", "f16c", "fma", "movbe", "abm"}  # the x86-64 psABI's levels, as /proc/cpuinfo names them
CPU_FLAGS = {"x86-64-v3": V3, "x86-64-v4": V3 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}}
HEAD_START_SECONDS = 20.0  # for the host's first rank to take the lock; a build takes longer, and then it is held
SIMD = {"x86-64-v3": "-D__AVX256__", "x86-64-v4": "-D__AVX512__"}  # DeepSpeed's csrc/includes/simd.h


def directory() -> Path:
    """Where ops are built: under TORCH_EXTENSIONS_DIR or the toolkit's cache, a folder per version and CPU."""
    base = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or cache_dir("ops"))
    path = base if base.name == _name() else base / _name()
    path.mkdir(parents=True, exist_ok=True)
    os.environ["TORCH_EXTENSIONS_DIR"] = str(path)
    return path


def prebuilt() -> Path | None:
    """The folder in TOOLKIT_PREBUILT_OPS, if that is set. Raises PlanError if none is for this stack and CPU."""
    if not (base := os.environ.get("TOOLKIT_PREBUILT_OPS")):
        return None
    folder = Path(base) / _name()
    if not folder.is_dir():
        found = ", ".join(sorted(p.name for p in Path(base).glob("torch*"))) or "nothing"
        raise PlanError(
            f"TOOLKIT_PREBUILT_OPS={base} holds ops for {found}, but this is {folder.name}. Build the image again, or "
            "unset the variable: ops are then compiled at first use."
        )
    if lacking := sorted(CPU_FLAGS.get(march(), set()) - set(_cpu_flags().split())):
        raise PlanError(
            f"TOOLKIT_CPU_ARCH={march()}: this CPU lacks {', '.join(lacking)}. Build the image for an older CPU "
            "(--build-arg CPU_ARCH=x86-64-v2), or unset TOOLKIT_CPU_ARCH and TOOLKIT_PREBUILT_OPS to compile here."
        )
    return folder


def march() -> str:
    """What ops are compiled for: TOOLKIT_CPU_ARCH, or this very CPU."""
    return os.environ.get("TOOLKIT_CPU_ARCH") or "native"


def _name() -> str:
    """What ops depend on. A home directory may serve several kinds of CPU; fused_adam is another op on each device."""
    machine = hashlib.sha256((platform.machine() + _cpu_flags()).encode()).hexdigest()[:8]
    kind = machine if march() == "native" else march()
    device = "" if ranks.device() == "cpu" else f"-{ranks.device()}"
    return f"torch{version('torch')}-deepspeed{version('deepspeed')}-py{sys.version_info.minor}-{kind}{device}"


def _cpu_flags() -> str:
    info = Path("/proc/cpuinfo")
    return next((x for x in info.read_text().splitlines() if x.startswith("flags")), "") if info.exists() else ""


def ensure(builders: Sequence[Any], console: Any) -> None:
    """Build what is missing of ``builders``, load all: class names of DeepSpeed's, e.g. ``CPUAdamBuilder``, or objects.

    Safe to call on every rank at once: the first of a host builds and says so, the others wait for it. The
    file lock belongs to the operating system, so it ends with the process that holds it. Loaded here, an op is
    found loaded by DeepSpeed, whose own way to load takes the lock that may be stale and asks ninja first.
    """
    if "AsyncIOBuilder" in builders:
        nvme.require_libaio()
    for op, root in _places(builders):
        # The host's first rank, which speaks, has a head start; one that fails is not missed
        patience = 0 if ranks.local_rank() == 0 else HEAD_START_SECONDS
        if not ranks.until(partial(_built, root, op.name), patience):
            with _locked(root / "toolkit.lock", console):
                _clear_stale_lock(root / op.name, console)
                if not _built(root, op.name):
                    _build(op, console)
        _load(op, root)


def missing(builders: Sequence[Any]) -> list[str]:
    """The names of those of ``builders`` that :func:`ensure` would build."""
    return [op.name for op, root in _places(builders) if not _built(root, op.name)]


def _places(builders: Sequence[Any]) -> Iterator[tuple[Any, Path]]:
    """Each op that DeepSpeed was not installed with (DS_BUILD_OPS=1), and the folder that has it, or shall have it."""
    from deepspeed.accelerator import get_accelerator
    from deepspeed.git_version_info import installed_ops

    ready = prebuilt()
    for builder in builders:
        op = get_accelerator().create_op_builder(builder) if isinstance(builder, str) else builder
        if not installed_ops.get(op.name):
            yield op, ready if ready and _built(ready, op.name) else directory()


def _built(root: Path, name: str) -> bool:
    return (root / name / f"{name}.so").exists() and not (root / name / "lock").exists()


def _load(op: Any, root: Path) -> None:
    from deepspeed.ops.op_builder.builder import OpBuilder

    if op.name in OpBuilder._loaded_ops:
        return
    spec = importlib.util.spec_from_file_location(op.name, root / op.name / f"{op.name}.so")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    OpBuilder._loaded_ops[op.name] = module
    if type(op).load is not OpBuilder.load:  # pin_memory, which comes before async_io, shows it its symbols
        op.load(verbose=False)


def _build(op: Any, console: Any) -> None:
    name = f"DeepSpeed's op '{op.name}'" if type(op).__module__.startswith("deepspeed.") else f"the op '{op.name}'"
    if shutil.which(os.environ.get("CXX", "c++")) is None and shutil.which("g++") is None:
        raise PlanError(f"{name} needs a C++ compiler: apt install g++ (or set CXX).")
    if not op.is_compatible(verbose=True):
        hint = "apt install libaio-dev" if op.name == "async_io" else "see `ds_report`"
        raise PlanError(f"{name} cannot be built on this machine: {hint}. {op.error_log or ''}")
    # ninja, installed by pip, lies beside the interpreter: a host reached by ssh does not look there
    os.environ["PATH"] = os.pathsep.join([os.environ.get("PATH", os.defpath), str(Path(sys.executable).parent)])
    start = time.monotonic()
    console.print(f"Building {name}: once on this machine, a minute or two …")
    with console.status("compiling"), _target(op):
        op.load(verbose=False)
    console.print(f"Built {name} in {time.monotonic() - start:.0f} s.")


def _target(op: Any) -> AbstractContextManager[Any]:
    """Compile for what TOOLKIT_CPU_ARCH and TORCH_CUDA_ARCH_LIST name; DeepSpeed looks at the machine it is on."""
    if march() != "native":
        op.cpu_arch = lambda: f"-march={march()}"
        op.simd_width = lambda: SIMD.get(march(), "-D__SCALAR__")
    if ranks.device() == "cuda" and os.environ.get("TORCH_CUDA_ARCH_LIST"):
        # `docker build` sees no GPU, and jit_load would take CUDA's async_io for one of the CPU: linked without libaio.
        return patch("torch.cuda.is_available", return_value=True)
    return nullcontext()


def _clear_stale_lock(folder: Path, console: Any) -> None:
    """Whoever builds here holds the toolkit's lock, and we hold it: this one belongs to nobody."""
    if (lock := folder / "lock").exists():
        age = (time.time() - lock.stat().st_mtime) / 60
        console.print(f"Removing {lock}: a build was killed {age:.0f} minutes ago and left it behind.")
        lock.unlink()


def _locked(path: Path, console: Any) -> Any:
    """For a ``with``, which gives the lock back."""
    try:
        return FileLock(path).acquire(timeout=0)
    except Timeout:
        console.print("Waiting for another process that builds DeepSpeed's ops.")
        return FileLock(path).acquire()
