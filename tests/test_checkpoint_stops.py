"""Runs that are killed and stopped, at once and by launcher: none loses more than since its newest checkpoint."""

import errno
import signal
from pathlib import Path
from typing import Any

import psutil
import pytest
from checkpoint_runs import DROPOUT, assert_same_state, trained
from launching import Job, Result, launch, read, start

from toolkit.checkpoint import checkpoint

STEPS = ["train.steps=80", *DROPOUT]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return launch(tmp_path_factory.mktemp("whole"), *STEPS, "train.save_every=null").dir


def hidden(job: Job, kind: str, beyond: int = 0) -> list[Path]:
    """Checkpoints on their way in (staging) or out (old), of steps beyond this one."""
    found = (job.dir / "checkpoints").glob(f".step-*.{kind}")
    return [p for p in found if int(p.name.split(".")[1].removeprefix("step-")) > beyond]


def last_step(run: Path) -> int:
    return max((r["step"] for r in read(run / "metrics.jsonl")), default=0)


def assert_each_step_once(run: Path) -> None:
    steps = [r["step"] for r in read(run / "metrics.jsonl") if "loss" in r]
    assert steps == list(range(1, 81))
    assert len([r for r in read(run / "metrics.jsonl") if "eval_loss" in r]) == 1


def test_killed_in_the_middle_of_saving_and_resumed_it_ends_as_if_never_stopped(
    tmp_path: Path, uninterrupted: Path
) -> None:
    overrides = [*STEPS, "train.save_every=1", "train.keep_checkpoints=2"]
    moments: list[Any] = [
        lambda job: hidden(job, "staging", beyond=10),
        lambda job: [p for p in hidden(job, "staging", beyond=25) if (p / "rng.rank0.pt").exists()],
        lambda job: hidden(job, "old", beyond=40),
    ]
    left = 0
    for moment in moments:
        with start(tmp_path, *overrides) as job:
            job.until(lambda job=job, moment=moment: moment(job), "the moment to kill", every=0)  # type: ignore[misc]
            job.kill()
        left += len(list((job.dir / "checkpoints").glob(".step-*")))
        newest = checkpoint.list_checkpoints(job.dir / "checkpoints")
        assert newest and all(checkpoint.verify(p) is None for p in newest)
        assert last_step(job.dir) - int(newest[0].name.removeprefix("step-")) <= 1
    assert left, "no kill fell into a save"
    done = launch(tmp_path, *overrides)
    assert "Resuming from" in done.stdout and not list((done.dir / "checkpoints").glob(".*"))
    assert trained(done.dir) == trained(uninterrupted)
    assert_same_state(done.dir, uninterrupted)
    assert_each_step_once(done.dir)


def stop(tmp_path: Path, launcher: str, ranks: int, how: Any) -> Result:
    """Start or go on, and ``how(job)`` after the next few steps."""
    with start(tmp_path, *STEPS, "train.save_every=null", launcher=launcher, ranks=ranks) as job:
        begun = last_step(job.dir)
        job.until(lambda: last_step(job.dir) > begun + 2, "a few steps", every=0)
        how(job)
        return job.wait(90)


def to_ranks(number: int, only: slice = slice(None)) -> Any:
    def how(job: Job) -> None:
        for process in job.ranks()[only]:
            process.send_signal(number)

    return how


def to_everyone(number: int) -> Any:
    """As a terminal does on Ctrl-C, and Slurm on scancel: every process of the job, data workers too."""

    def how(job: Job) -> None:
        for process in job.processes():
            process.send_signal(number)

    return how


def again_while_saving(job: Job) -> None:
    to_ranks(signal.SIGINT, slice(1, 2))(job)  # one rank hears it, all stop
    job.until(lambda: hidden(job, "staging"), "the save", every=0)
    to_ranks(signal.SIGINT)(job)
    to_ranks(signal.SIGTERM)(job)


def test_stopped_by_signals_and_resumed_it_ends_as_if_never_stopped(tmp_path: Path, uninterrupted: Path) -> None:
    stops = [
        ("deepspeed", to_ranks(signal.SIGTERM), {75}),
        ("forked", again_while_saving, {75}),
        # By the signal itself, or 1 if `deepspeed` hears first that its child, which got it too, has ended.
        ("deepspeed", to_everyone(signal.SIGINT), {-signal.SIGINT, 1}),
        ("torchrun", to_everyone(signal.SIGTERM), {1}),
    ]
    for launcher, how, codes in stops:
        result = stop(tmp_path, launcher, 2, how)
        newest = checkpoint.newest(result.dir)
        assert int(newest.name.removeprefix("step-")) == last_step(result.dir) < 80
        assert result.code in codes
    done = launch(tmp_path, *STEPS, "train.save_every=null")
    assert trained(done.dir) == trained(uninterrupted)
    assert_each_step_once(done.dir)


def test_ctrl_c_to_plain_python_saves_and_exits_75(tmp_path: Path) -> None:
    result = stop(tmp_path, "python", 1, to_everyone(signal.SIGINT))
    assert result.code == 75 and "Traceback" not in result.stderr + result.stdout
    assert f"Stopped by a signal after step {last_step(result.dir)}; saved in {result.dir}" in result.stdout
    typed = result.stdout.split("Go on with: python ")[1].splitlines()[0]
    assert typed.split()[0].endswith("recipes/pretrain.py") and " name=x " in typed and " ++" not in typed
    assert checkpoint.newest(result.dir).name == f"step-{last_step(result.dir)}"


def test_one_rank_that_cannot_write_stops_all_of_them_in_one_line(tmp_path: Path) -> None:
    with start(tmp_path, "train.steps=3000", "train.save_every=null") as job:
        job.until_step(3)
        job.ranks()[1].rlimit(psutil.RLIMIT_FSIZE, (200_000, 200_000))  # less than its shard
        to_ranks(signal.SIGTERM)(job)
        result = job.wait(60)
    assert result.code == 2 and "Traceback" not in result.stderr + result.stdout
    assert len(result.error.splitlines()) == 1
    assert f"cannot be saved: rank 1: [Errno {errno.EFBIG}]" in result.error
    assert not list((result.dir / "checkpoints").iterdir())
