"""Recipes as commands: launchers, overrides, refusals before any process group, sweeps, replay."""

import json
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from launching import ROOT, launch, start

from toolkit.config.compose import compose
from toolkit.errors import LOST

RECIPE = [sys.executable, "recipes/pretrain.py"]


def python(*arguments: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([*RECIPE, *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == code, f"{done.stdout}\n{done.stderr}"
    return done


def test_the_composed_config_can_be_seen_quickly_and_without_training() -> None:
    shown = python("model=bert_large", "zero=stage3", "--cfg", "job").stdout
    assert "num_hidden_layers: 24" in shown and "stage3_prefetch_bucket_size" in shown


REFUSED = [
    ("zero=stage9", "zero=stage9: no such option. Did you mean 'stage3'? zero has: stage0, stage1, stage2, stage3."),
    ("zero=2", "zero=2: no such option. zero has: stage0, stage1, stage2, stage3."),
    ("zer=stage2", "zer: unknown key."),
    ("train.step=3", "train.step: unknown key. Did you mean 'steps'?"),
    ("train.steps=0", "train.steps=0: Input should be greater than 0."),
    ("train.steps=many", "train.steps='many': Input should be a valid integer"),
    ("batch.global_size=250", "batch.global_size=250"),
    ("deepspeed.zero_optimization.overlap_com=true", "Did you mean 'overlap_comm'?"),
    ("precision=fp16", "fp16"),
    ("data.max_length=1024", "data.max_length=1024"),
    ("schedule.warmup=2.5", "schedule.warmup=2.5: a warm-up of 1 or more counts steps and must be whole."),
]


@pytest.mark.parametrize(("override", "message"), REFUSED)
def test_a_wrong_override_is_one_line_and_exit_code_2(override: str, message: str, tmp_path: Path) -> None:
    done = launch(tmp_path, "experiment=smoke", override, ranks=0, bare=True, check=False)
    assert done.code == 2 and message in done.error, done.stderr
    assert "Traceback" not in done.stderr and not done.dir.exists()


def test_under_the_launcher_only_rank_0_speaks(tmp_path: Path) -> None:
    result = launch(tmp_path, "batch.global_size=3", check=False, launcher="deepspeed")
    assert result.code == 2
    assert len(result.error.splitlines()) == 1 and "batch.global_size=3" in result.error


def test_keys_that_no_option_mentions_reach_deepspeed() -> None:
    config = compose(["deepspeed.zero_optimization.round_robin_gradients=true", "deepspeed.wall_clock_breakdown=true"])
    assert config.deepspeed["zero_optimization"]["round_robin_gradients"] is True
    assert config.deepspeed["zero_optimization"]["stage"] == 2


def test_what_is_noted_of_the_environment_holds_no_secrets(tmp_path: Path) -> None:
    env = json.loads((launch(tmp_path, "train.steps=2").dir / "env.json").read_text())
    assert env["world_size"] == 2
    assert not any("TOKEN" in key or "HOME" in key for key in env)


def test_no_shared_memory_is_left_behind(tmp_path: Path) -> None:
    """Fails, too, once DeepSpeed keeps it under another name; without ranks._forget_shared_memory it stays."""
    before = set(Path("/dev/shm").iterdir())
    with start(tmp_path, "train.steps=1000000", "train.log_every=1000000") as job:
        job.until_step(1)
        mapped = Path(f"/proc/{job.ranks()[0].pid}/maps").read_text()
        assert "deepspeed_allreduce_buffer" in mapped, (
            "DeepSpeed does without it now: ranks._forget_shared_memory can go"
        )
        assert not {p for p in set(Path("/dev/shm").iterdir()) - before if "deepspeed" in p.name}


def test_the_terminal_is_rank_0s_and_the_rest_is_in_the_logs(tmp_path: Path) -> None:
    result = launch(tmp_path, "train.steps=2")
    assert "step 2/2" in result.stdout and str(result.dir) in result.stdout
    ours = [line for line in result.stdout.splitlines() if "WARNING" not in line]
    assert not any("DeepSpeed" in line or "deepspeed" in line for line in ours if "op '" not in line)
    logs = [(result.dir / f"log.rank{r}.txt").read_text() for r in (0, 1)]
    assert all("DeepSpeed" in log for log in logs)


def test_a_run_can_be_replayed_from_its_config(tmp_path: Path) -> None:
    first = launch(tmp_path, "train.steps=2", "name=first", ranks=0)
    saved = ["--config-path", str(first.dir), "--config-name", "config"]
    again = launch(tmp_path, *saved, "name=again", ranks=0, bare=True)
    assert [r["loss"] for r in again.steps] == [r["loss"] for r in first.steps]
    assert (again.dir / "ds_config.json").read_text() == (first.dir / "ds_config.json").read_text()


def test_a_bug_keeps_its_traceback_on_the_terminal_and_in_the_log(tmp_path: Path) -> None:
    script = tmp_path / "broken.py"
    script.write_text(
        "from toolkit.run.directory import Run\nfrom toolkit.run.recipe import recipe\n"
        "@recipe()\ndef main(config):\n    Run.open(config)\n    raise KeyError('of ours')\nmain()\n"
    )
    done = launch(tmp_path, ranks=0, recipe=str(script), check=False)
    assert done.code == 1 and "KeyError: 'of ours'" in done.stderr
    assert "Traceback" in (done.dir / "log.rank0.txt").read_text()


def test_ranks_that_wait_for_one_that_hangs_end_and_say_where_they_stood(tmp_path: Path) -> None:
    """Suspended, a rank beats no more, but its peers hear of that late: the step is due before."""
    with start(tmp_path, "train.steps=100000", "train.hang_minutes=0.1") as job:
        job.until_step(4)
        alive, lost = job.ranks()
        lost.suspend()
        job.until(lambda: not psutil.pid_exists(alive.pid), "the end of rank 0")  # a zombie may have threads yet
        log = (job.dir / "log.rank0.txt").read_text()
        assert "made no step in time" in log and "train.py" in log and "in fit" in log
        lost.kill()
        result = job.wait()
    assert result.code == LOST
    assert "error: rank 0 on " in result.stderr and "log.rank*.txt" in result.stderr
