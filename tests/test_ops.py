"""DeepSpeed's ops: built once, whoever asks, and no killed build blocks the next."""

import subprocess
import sys
import time
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from toolkit import ops

BUILD = "from rich.console import Console; from toolkit import ops; ops.ensure(['CPUAdagradBuilder'], Console())"


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


def test_the_directory_is_the_toolkits_own_and_knows_versions(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = ops.directory()
    assert path.parent == tmp_path / "deepspeed-toolkit" / "ops" and "deepspeed0." in path.name
    assert ops.directory() == path, "asked again, the same one"
