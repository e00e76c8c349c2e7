"""Swapping to an NVMe drive: room is checked before, runs share a disk, and nothing stays behind."""

import json
import shutil
import signal
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
from composing import compose
from launching import launch, logs, needs_nvme, start

from toolkit.deepspeed.ds_config import complete
from toolkit.errors import PlanError
from toolkit.job import nvme, ops, ranks

ZERO = "deepspeed.zero_optimization"
# DeepSpeed keeps what is below 1 MiB a rank in memory: wide enough for files, on one rank.
WIDE = (
    "zero=stage3", "offload=nvme", "model.hidden_size=512", "model.intermediate_size=1024", "data.workers=0",
    "model.num_hidden_layers=1", "model.num_attention_heads=8", "train.eval_samples=16", "train.save_every=null",
)  # fmt: skip


def on(disk: Path) -> list[str]:
    return [f"{ZERO}.{block}.nvme_path={disk}" for block in ("offload_param", "offload_optimizer")]


def nvme_config(run_dir: Path, *overrides: str) -> dict[str, Any]:
    return complete(compose(*WIDE, *overrides), world=1, device="cpu", run_dir=run_dir)


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A world of one rank without a process group, and a cache of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(ranks, "in_turn", lambda work: work())
    yield tmp_path
    nvme.release()


def test_a_disk_too_small_is_refused_with_the_numbers(alone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(2**40, 2**40 - 2**30, 2**30))
    ds = nvme_config(alone / "run", *on(alone / "disk"))
    with pytest.raises(PlanError, match=rf"nvme_path={alone}/disk: 2\.05 GiB will be written there and 1\.00 GiB are"):
        nvme.claim(ds, lambda: 10**8)  # 20 bytes each: the weight, its gradient, master copy and two states
    assert not list((alone / "disk").iterdir())


def test_a_path_that_cannot_be_written_is_refused(alone: Path) -> None:
    (alone / "file").write_text("")
    with pytest.raises(PlanError, match=r"nvme_path=.*/file: .* Name a folder"):
        nvme.claim(nvme_config(alone / "run", *on(alone / "file")), lambda: 1)


def test_without_libaio_the_way_out_is_said_before_anything_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise OSError(name)

    monkeypatch.setattr(nvme.ctypes, "CDLL", missing)
    with pytest.raises(PlanError, match="apt install libaio-dev"):
        ops.ensure(["AsyncIOBuilder"], None)


def test_each_run_has_a_folder_of_its_own_on_a_disk_that_several_use(tmp_path: Path) -> None:
    folders = {
        nvme_config(tmp_path / run, *on(tmp_path / "disk"))["zero_optimization"]["offload_param"]["nvme_path"]
        for run in ("a/x", "b/x", "a/y")
    }
    assert len(folders) == 3 and {Path(f).parent for f in folders} == {tmp_path / "disk"}


def test_only_what_dead_runs_left_is_removed(alone: Path) -> None:
    disk = alone / "disk"
    for name, lock in (("swap-dead-1", "rank0.lock"), ("swap-notes", "notes.txt"), ("data", "rank0.lock")):
        (disk / name).mkdir(parents=True)
        (disk / name / lock).touch()
    hold = (
        f"from filelock import FileLock; lock = FileLock('{disk}/swap-live-1/rank1.lock'); lock.acquire(); "
        "print(flush=True); input()"
    )
    (disk / "swap-live-1").mkdir()
    with subprocess.Popen([sys.executable, "-c", hold], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as live:
        live.stdout.readline()
        nvme.claim(nvme_config(alone / "me", *on(disk)), lambda: 1)
        mine = next(p.name for p in disk.glob("swap-me-*"))
        assert {p.name for p in disk.iterdir()} == {"swap-notes", "data", "swap-live-1", mine}
        nvme.release()
        assert {p.name for p in disk.iterdir()} == {"swap-notes", "data", "swap-live-1"}
        live.communicate(b"\n")


def test_a_run_that_lives_is_not_started_twice(alone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvme, "PATIENCE_SECONDS", 0.1)
    folder = alone / "run" / "nvme"
    folder.mkdir(parents=True)
    (folder / "rank1.lock").touch()
    with nvme.FileLock(folder / "rank1.lock"), pytest.raises(PlanError, match="in use: this run runs already"):
        nvme.claim(nvme_config(alone / "run"), lambda: 1)
    assert (folder / "rank1.lock").exists()


@needs_nvme
def test_two_runs_on_one_disk_do_not_meet_and_a_killed_one_is_cleaned_up(tmp_path: Path) -> None:
    """One of two runs is killed: the other goes on to the losses of a run alone; then the disk is empty."""
    disk, more = tmp_path / "disk", [*WIDE, *on(tmp_path / "disk"), "schedule=constant"]
    with (
        start(tmp_path, *more, "name=killed", "train.steps=500", ranks=0) as killed,
        start(tmp_path, *more, "name=kept", "train.steps=500", ranks=0) as kept,
    ):
        killed.until_step(2)
        kept.until_step(1)
        folders = {p.name.split("-")[1]: p for p in disk.glob("swap-*")}
        assert set(folders) == {"killed", "kept"}, logs(kept.dir)
        files = [{p.name for p in folder.rglob("*.swp")} for folder in folders.values()]
        assert files[0] & files[1], "the same file names: in one folder they would overwrite each other"
        needed = nvme.bytes_per_parameter(json.loads((kept.dir / "ds_config.json").read_text()))
        written = sum(p.stat().st_size for p in folders["kept"].rglob("*") if p.is_file())
        assert 0.8 < written / (sum(needed.values()) * 3_156_994) < 1  # parameters
        killed.kill()
        kept.until_step(4)
        kept.ranks()[0].send_signal(signal.SIGTERM)
        end = kept.wait()
    assert end.code == 75 and [p.name.split("-")[1] for p in disk.glob("swap-*")] == ["killed"]
    alone = launch(tmp_path, *more, "name=alone", "train.steps=4", ranks=0)
    assert [r["loss"] for r in alone.steps] == [r["loss"] for r in end.steps][:4]
    assert not list(disk.iterdir()), "neither the killed run's nor those of the runs that ended"
