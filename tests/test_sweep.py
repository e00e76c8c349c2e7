"""A --multirun goes on past what fails, says so, and the same command takes it up again; here and on Slurm."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from threading import Timer

import pytest
from launching import ROOT, TINY, data_cache, read
from slurm_cluster import needs_slurm, slurm_cluster

from toolkit.errors import OutOfMemory
from toolkit.run import sweep as sweeps
from toolkit.run.sweep import Begin, finish

# Fails by its seed, until the file `mended` is there; a recipe of its own, for a training takes longer.
RECIPE = """
import os, pathlib, signal, torch
from toolkit.run.recipe import recipe
@recipe(engine=False)
def main(config):
    mended = pathlib.Path(config.output_dir, 'mended').exists()
    with pathlib.Path(config.output_dir, 'ran').open('a') as ran:
        print(config.seed, config.name, file=ran)
    if config.seed == 2 and not mended:
        torch.empty(10**18)
    if config.seed == 3 and not mended:
        os.kill(os.getpid(), signal.SIGKILL)
    if config.seed == 4 and not mended:
        raise KeyError('of ours')
    if config.seed == 6:
        signal.signal(signal.SIGTERM, lambda *_: (pathlib.Path(config.output_dir, 'saved').touch(), os._exit(75)))
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        pathlib.Path(config.output_dir, 'ready').touch()
        signal.pause()
main()
"""


def sweep(folder: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    script = folder / "toy.py"
    script.write_text(RECIPE)
    command = [sys.executable, str(script), "--multirun", f"output_dir={folder}", "seed=1,2,3,4", *overrides]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def table(folder: Path) -> list[dict[str, str]]:
    with (folder / "sweep/sweep.csv").open() as file:
        return list(csv.DictReader(file))


def test_a_sweep_goes_on_past_what_fails_and_the_same_command_takes_it_up_again(tmp_path: Path) -> None:
    first = sweep(tmp_path)
    assert first.returncode == 1
    assert [(r["state"], r["code"], r["overrides"]) for r in table(tmp_path)] == [
        ("done", "0", "seed=1"),
        ("out of memory", "71", "seed=2"),
        ("killed (out of memory?)", "-9", "seed=3"),
        ("failed", "1", "seed=4"),
    ]
    assert "1 of 4 jobs done" in first.stdout and "out of memory: seed=2" in first.stdout
    assert "error: out of memory: " in first.stderr and "Lower batch.micro_size" in first.stderr
    (tmp_path / "mended").touch()
    again = sweep(tmp_path)
    assert again.returncode == 0, again.stderr
    assert "4 of 4 jobs done" in again.stdout and "done before, in sweep-" in again.stdout
    ran = [line.split() for line in (tmp_path / "ran").read_text().splitlines()]
    assert [seed for seed, _ in ran] == ["1", "2", "3", "4", "2", "3", "4"]
    assert len({name for _, name in ran}) == 4  # under the same name again: checkpoints are found


def test_a_record_says_how_it_ended_and_another_configuration_is_not_done(tmp_path: Path) -> None:
    record = tmp_path / "job.json"
    assert sweeps.read(record) == {}
    with pytest.raises(OutOfMemory), sweeps.recorded(record, {"config": "a"}):
        assert sweeps.read(record)["state"] == "running"
        raise OutOfMemory("no room")
    found = sweeps.read(record)
    assert (found["state"], found["code"]) == ("out of memory", 71) and not sweeps.done(found, "a")
    with pytest.raises(KeyError), sweeps.recorded(record, {}):
        raise KeyError("of ours")
    assert (sweeps.read(record)["state"], sweeps.read(record)["code"]) == ("failed", 1)
    with sweeps.recorded(record, {"config": "a"}):
        pass
    assert sweeps.done(sweeps.read(record), "a") and not sweeps.done(sweeps.read(record), "b")


def test_the_name_of_a_sweep_is_the_beginning_of_its_runs_names(tmp_path: Path) -> None:
    (tmp_path / "mended").touch()
    assert sweep(tmp_path, "name=rates", "seed=1,5").returncode == 0
    assert all(row["run"].startswith("rates-") for row in table(tmp_path)) and len(table(tmp_path)) == 2


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_sweep_lets_its_training_save(number: int, tmp_path: Path) -> None:
    """Ctrl-C, scancel: the signal reaches all of the group at once."""
    (tmp_path / "toy.py").write_text(RECIPE)
    command = [sys.executable, str(tmp_path / "toy.py"), "--multirun", f"output_dir={tmp_path}", "seed=6,1"]
    with subprocess.Popen(command, cwd=ROOT, start_new_session=True) as process:
        while not (tmp_path / "ready").exists():
            assert process.poll() is None
            time.sleep(0.1)
        os.killpg(process.pid, number)
        assert process.wait(30) in (-number, 128 + number, 1, 75)  # 75: a shell's background job ignores Ctrl-C
    assert (tmp_path / "saved").exists()
    (record,) = [json.loads(p.read_text()) for p in (tmp_path / "sweep/jobs").glob("*.json")]
    assert (record["state"], record["code"]) == ("stopped", 75)


def test_a_saved_config_is_refused_in_a_sweep(tmp_path: Path) -> None:
    done = sweep(tmp_path, "--config-name", "config")
    assert done.returncode == 2 and "error: --config-name with --multirun: " in done.stderr


@needs_slurm
def test_a_job_that_slurm_ends_is_waited_for_and_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "jobs").mkdir()
    with slurm_cluster() as cluster:
        number = cluster.run("sbatch", "--parsable", "--output=/dev/null", "--wrap", "sleep 600").strip()
        record = {"sweep": 1, "number": 0, "slurm": number, "state": "running", "overrides": ["seed=1"], "run": "x"}
        (tmp_path / "jobs/a.json").write_text(json.dumps(record))
        for name in ("SLURM_CONF", "PATH"):
            monkeypatch.setenv(name, cluster.environment[name])
        monkeypatch.setattr(Begin, "folder", tmp_path)
        monkeypatch.setattr(Begin, "started", 1)
        Timer(3, cluster.run, ["scancel", number]).start()
        start = time.monotonic()
        assert finish() == 1
        assert 2 < time.monotonic() - start < 60
    assert "ended by Slurm (memory, time or host): seed=1" in capsys.readouterr().out


@needs_slurm
def test_slurm_runs_each_job_on_a_rank_a_task_and_the_sweep_goes_on_past_what_fails(tmp_path: Path) -> None:
    given = [o for o in TINY if not o.startswith(("batch.micro_size", "train.steps"))]
    overrides = [*given, "train.steps=2", "model.dropout=0", f"output_dir={tmp_path}", f"data.cache_dir={data_cache()}"]
    slurm = ["hydra/launcher=submitit_slurm", "hydra.launcher.nodes=2", "hydra.launcher.timeout_min=5"]
    command = [sys.executable, "recipes/pretrain.py", "--multirun", *slurm, *overrides, "batch.micro_size=3,4,8"]
    with slurm_cluster() as cluster:
        variables = cluster.environment | {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, check=False)
        assert done.returncode == 1, f"{done.stderr}\n{cluster.logs()}"
    assert "2 of 3 jobs done" in done.stdout and "refused: batch.micro_size=3" in done.stdout
    runs = [tmp_path / row["run"] for row in table(tmp_path) if row["state"] == "done"]
    assert [json.loads((run / "env.json").read_text())["world_size"] for run in runs] == [2, 2]
    losses = [[r["loss"] for r in read(run / "metrics.jsonl") if "loss" in r] for run in runs]
    assert len(losses[0]) == 2 and losses[0] == pytest.approx(losses[1], rel=1e-6)  # another split of the same batches
