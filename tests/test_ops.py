"""DeepSpeed's ops: built once, whoever asks, and no killed build blocks the next."""

import os
import shutil
import subprocess
import sys
import threading
import time
from contextlib import suppress
from io import StringIO
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from toolkit.config.compose import compose
from toolkit.deepspeed import ds_config
from toolkit.errors import ConfigError, PlanError
from toolkit.job import ops, ranks

BUILD = "from rich.console import Console; from toolkit.job import ops; ops.ensure(['CPUAdagradBuilder'], Console())"


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    return ops.directory()


def test_a_lock_left_by_a_killed_build_is_said_and_removed(directory: Path) -> None:
    folder = directory / "deepspeed_shm_comm"
    folder.mkdir()
    (folder / "lock").touch()
    out = StringIO()
    ops._clear_stale_lock(folder, Console(file=out, width=300))
    assert "a build was killed" in out.getvalue() and str(folder / "lock") in out.getvalue()
    assert not (folder / "lock").exists()
    ops._clear_stale_lock(folder, Console(file=out))


def test_a_killed_build_does_not_block_the_next(directory: Path) -> None:
    """Killed for real while it compiles; then two at once build, one of them, and both have the op."""
    command = [sys.executable, "-c", BUILD]
    first = subprocess.Popen(command, start_new_session=True)
    lock = directory / "cpu_adagrad" / "lock"
    end = time.monotonic() + 60
    while not lock.exists() and time.monotonic() < end:
        time.sleep(0.05)
    time.sleep(1)
    subprocess.run(["pkill", "-KILL", "-s", str(first.pid)], check=True)
    first.wait()
    assert lock.exists(), "the kill came too late to leave the lock"
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate(timeout=300)[0] for process in both]
    assert all(process.returncode == 0 for process in both), said
    assert sum("Built DeepSpeed's op 'cpu_adagrad'" in text for text in said) == 1, said
    assert sum("a build was killed" in text for text in said) == 1, said


class HostRanks:
    """Ranks of one host as threads, and an op whose build takes a moment; ``broken``: the ranks that cannot build."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, broken: tuple[int, ...] = ()) -> None:
        self.own, self.broken, self.said = threading.local(), broken, [StringIO(), StringIO()]
        monkeypatch.setattr(ranks, "local_rank", lambda: self.own.rank)
        places = lambda builders: [(op, ops.directory()) for op in builders]  # noqa: E731
        for name, instead in (("_places", places), ("_load", lambda op, root: None), ("_build", self.build)):
            monkeypatch.setattr(ops, name, instead)

    def build(self, op: SimpleNamespace, console: Console) -> None:
        console.print("Building")
        time.sleep(0.5)
        if self.own.rank in self.broken:
            raise PlanError("no compiler")
        (ops.directory() / op.name).mkdir()
        (ops.directory() / op.name / f"{op.name}.so").touch()

    def ensure(self, rank: int, after: float) -> None:
        self.own.rank = rank
        time.sleep(after)
        with suppress(PlanError):
            ops.ensure([SimpleNamespace(name="tiny")], Console(file=self.said[rank]))

    def come(self, *after: float) -> list[str]:
        """What each rank says that comes after so many seconds."""
        threads = [threading.Thread(target=self.ensure, args=place) for place in enumerate(after)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=20)
        assert not any(thread.is_alive() for thread in threads) and ops._built(ops.directory(), "tiny")
        return [text.getvalue() for text in self.said]


def test_the_first_rank_of_a_host_builds_however_late_it_comes(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is the one that speaks, and shall not begin with `Waiting for another process`."""
    assert HostRanks(monkeypatch).come(0.5, 0.0) == ["Building\n", ""]


def test_a_first_rank_that_fails_or_never_comes_is_not_waited_for(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ops, "HEAD_START_SECONDS", 0.3)
    assert HostRanks(monkeypatch, broken=(0,)).come(0.0, 0.0) == [
        "Building\n",
        "Waiting for another process that builds DeepSpeed's ops.\nBuilding\n",
    ]
    shutil.rmtree(ops.directory() / "tiny")
    assert HostRanks(monkeypatch).come(1.5, 0.0)[1] == "Building\n"


def test_the_directory_is_the_toolkits_own_and_knows_versions(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = ops.directory()
    assert path.parent == tmp_path / "deepspeed-toolkit" / "ops" and "deepspeed0." in path.name
    assert ops.directory() == path, "asked again, the same one"


TINY_OP = """
#include <Python.h>
static PyObject* target(PyObject*, PyObject*) {
#if defined(__AVX512F__) || defined(__AVX512__)
    return PyUnicode_FromString("avx512");
#elif defined(__AVX2__) && defined(__AVX256__)
    return PyUnicode_FromString("avx2");
#else
    return PyUnicode_FromString("other");
#endif
}
static PyMethodDef methods[] = {{"target", target, METH_NOARGS, nullptr}, {nullptr, nullptr, 0, nullptr}};
static PyModuleDef module = {PyModuleDef_HEAD_INIT, "tiny", nullptr, -1, methods};
PyMODINIT_FUNC PyInit_tiny() { return PyModule_Create(&module); }
"""
LOAD_TINY = """
import sys
from deepspeed.ops.op_builder.cpu.builder import CPUOpBuilder
from rich.console import Console
from toolkit.job import ops

class TinyBuilder(CPUOpBuilder):
    def __init__(self): super().__init__("tiny")
    def absolute_name(self): return self.name
    def sources(self): return [sys.argv[1]]

ops.ensure([TinyBuilder()], Console(stderr=True))
print(TinyBuilder().load().target())
"""


def test_ops_for_a_named_cpu_are_found_ready_without_a_compiler(tmp_path: Path) -> None:
    """As an image has them: built on one machine for a kind of CPU, loaded on another by a user who cannot write."""
    if not ops.CPU_FLAGS["x86-64-v3"] <= set(ops._cpu_flags().split()):
        pytest.skip("this CPU is no x86-64-v3")
    (tmp_path / "tiny.cpp").write_text(TINY_OP)
    command = [sys.executable, "-c", LOAD_TINY, str(tmp_path / "tiny.cpp")]
    base = os.environ | {"DS_ACCELERATOR": "cpu", "TOOLKIT_CPU_ARCH": "x86-64-v3"}
    build = base | {"TORCH_EXTENSIONS_DIR": str(tmp_path / "image")}
    built = subprocess.run(command, env=build, capture_output=True, text=True, check=True)
    assert built.stdout.splitlines()[-1] == "avx2", "neither this CPU's own instructions nor its vector width"
    assert "Building the op 'tiny'" in built.stderr
    (folder,) = (tmp_path / "image").iterdir()
    assert folder.name.endswith("-x86-64-v3")

    later = base | {"TOOLKIT_PREBUILT_OPS": str(tmp_path / "image"), "TORCH_EXTENSIONS_DIR": str(tmp_path / "cache")}
    found = subprocess.run(command, env=later | {"CXX": "none"}, capture_output=True, text=True, check=True)
    assert found.stdout.splitlines()[-1] == "avx2" and "Building" not in found.stderr
    assert not (tmp_path / "cache").exists(), "nothing was built"


def test_prebuilt_ops_of_other_versions_or_for_another_cpu_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setenv("TOOLKIT_CPU_ARCH", "x86-64-v4")
    assert ops.prebuilt() is None, "no image"
    monkeypatch.setenv("TOOLKIT_PREBUILT_OPS", str(tmp_path))
    (tmp_path / "torch1.0-deepspeed0.1-py9-x86-64-v4").mkdir()
    with pytest.raises(PlanError, match=r"holds ops for torch1\.0-\S+, but this is torch\S+-x86-64-v4\. Build the"):
        ops.prebuilt()
    (tmp_path / ops._name()).mkdir()
    monkeypatch.setattr(ops, "_cpu_flags", lambda: "flags : " + " ".join(ops.CPU_FLAGS["x86-64-v4"] - {"avx512bw"}))
    with pytest.raises(PlanError, match=r"TOOLKIT_CPU_ARCH=x86-64-v4: this CPU lacks avx512bw\. "):
        ops.prebuilt()
    monkeypatch.setattr(ops, "_cpu_flags", lambda: "flags : " + " ".join(ops.CPU_FLAGS["x86-64-v4"]))
    assert ops.prebuilt() == tmp_path / ops._name()
    monkeypatch.setenv("DS_ACCELERATOR", "cuda")
    with pytest.raises(PlanError, match=r"but this is torch.*-x86-64-v4-cuda"):  # its fused_adam is another op
        ops.prebuilt()


def test_all_ops_are_those_of_every_preset() -> None:
    wanted: dict[str, set[str]] = {"cpu": set(), "cuda": set()}
    for optimizer, offload in product(("adamw", "lamb", "lion", "muon"), ("none", "cpu", "nvme")):
        stage = "stage3" if offload == "nvme" else "stage2"
        config = compose([f"optimizer={optimizer}", f"offload={offload}", f"zero={stage}"])
        for device, found in wanted.items():
            with suppress(ConfigError):  # DeepSpeed has no such optimizer there
                ds = ds_config.complete(config, world=2, device=device)
                found |= set(ds_config.required_ops(ds, device=device, world=2))
    for device, found in wanted.items():
        every = ds_config.every_op(device)
        assert found <= set(every) and len(found) >= 5
        assert every.index("PinMemoryBuilder") < every.index("AsyncIOBuilder"), "which loads it"
