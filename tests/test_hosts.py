"""Two hosts, really two addresses: DeepSpeed's own multi-node launcher over pdsh and ssh, and what ends a job there."""

import re
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hosts import Host, hosts, needs_hosts
from launching import ROOT, TINY, Job, Result, data_cache, launch

from toolkit.errors import LOST

pytestmark = needs_hosts
# What toolkit launch sets, too: ssh ends when the other side is silent, and pdsh with it.
KEEPALIVE = "-o ServerAliveInterval=2 -o ServerAliveCountMax=3"


@pytest.fixture
def pair() -> Iterator[list[Host]]:
    with hosts("n1", "n2") as both:
        yield both


@contextmanager
def started(pair: list[Host], tmp_path: Path, *overrides: str, recipe: str = "recipes/pretrain.py") -> Iterator[Job]:
    """`deepspeed --hostfile …` typed on the first host."""
    (tmp_path / "hostfile").write_text("".join(f"{host.name} slots=1\n" for host in pair))
    (tmp_path / "env").write_text("GLOO_SOCKET_IFNAME=eth0\nOMP_NUM_THREADS=1\n")
    variables = ["env", f"DS_ENV_FILE={tmp_path}/env", f"PDSH_SSH_ARGS_APPEND={KEEPALIVE}"]
    command = [str(Path(sys.executable).parent / "deepspeed"), "--hostfile", f"{tmp_path}/hostfile", recipe]
    arguments = [o for o in TINY if o.split("=")[0] not in {x.split("=")[0] for x in overrides}]
    arguments += ["name=x", f"output_dir={tmp_path}", f"data.cache_dir={data_cache()}", *overrides]
    output = tmp_path / f"launch-{time.monotonic_ns()}"
    output.mkdir()
    job = Job(pair[0].inside(*variables, *command, *arguments), output, tmp_path / "x")
    try:
        yield job
    finally:
        job.kill()


def on(pair: list[Host], tmp_path: Path, *overrides: str, recipe: str = "recipes/pretrain.py") -> Result:
    with started(pair, tmp_path, *overrides, recipe=recipe) as job:
        return job.wait(120)


def test_two_hosts_train_as_one_does(pair: list[Host], tmp_path: Path) -> None:
    """By `toolkit launch`, which checks and saves the configuration once."""
    here = launch(tmp_path, "name=one")
    (tmp_path / "hosts").write_text("n1 slots=1\nn2 slots=1\n")
    cluster = [f"cluster.hostfile={tmp_path}/hosts", "cluster.interface=eth0", "cluster.accelerator=cpu"]
    own = [
        "name=x",
        f"output_dir={tmp_path}",
        f"data.cache_dir={data_cache()}",
        "cluster.environment.OMP_NUM_THREADS='1'",
    ]
    toolkit = str(Path(sys.executable).parent / "toolkit")
    command = [toolkit, "launch", "recipes/pretrain.py", *TINY, *own, *cluster, "--on", "deepspeed", "--submit"]
    (tmp_path / "launch").mkdir()
    there = Job(pair[0].inside(*command), tmp_path / "launch", tmp_path / "x").wait(120)
    assert there.code == 0, there.stderr
    assert [r["loss"] for r in there.steps] == [r["loss"] for r in here.steps]


def test_a_host_that_disappears_ends_the_run_and_the_next_goes_on(pair: list[Host], tmp_path: Path) -> None:
    with started(pair, tmp_path, "train.steps=1000000", "train.save_every=5", "train.lost_seconds=5") as job:
        job.until_step(7)
        pair[1].cut()
        cut = time.monotonic()
        result = job.wait(60)
    assert time.monotonic() - cut < 25
    assert result.code in (LOST, 255), result.stderr  # 255: ssh's own word of the lost host
    assert "error: rank 1 on n2: last heard of" in result.stderr
    pair[1].join()
    kept = max(int(p.name.split("-")[1]) for p in (tmp_path / "x/checkpoints").glob("step-*"))
    again = on(pair, tmp_path, f"train.steps={kept + 2}", "train.save_every=5")
    assert again.code == 0, again.stderr
    assert [r["step"] for r in again.steps][-2:] == [kept + 1, kept + 2]


def test_a_rank_that_fails_ends_the_job_with_its_code_and_last_words(pair: list[Host], tmp_path: Path) -> None:
    script = tmp_path / "broken.py"
    script.write_text(
        "import os, time\nfrom toolkit.errors import DataError\nfrom toolkit.run.recipe import recipe\n"
        "@recipe()\ndef main(config):\n    from toolkit.job import ranks\n"
        "    if os.environ['RANK'] == '1':\n        raise DataError('train.jsonl, line 3: no text')\n"
        "    ranks.wait()\nmain()\n"
    )
    started_at = time.monotonic()
    result = on(pair, tmp_path, recipe=str(script))
    assert result.code == 2
    assert time.monotonic() - started_at < 40
    assert "error: rank 1 on n2 failed:" in result.stderr
    assert "train.jsonl, line 3" in "".join(x for x in result.stderr.splitlines() if "n1: error:" in x)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_is_killed_ends_the_job(rank: int, pair: list[Host], tmp_path: Path) -> None:
    with started(pair, tmp_path, "train.steps=1000000", "train.lost_seconds=5") as job:
        job.until_step(3)
        here = [p for p in pair[rank].processes() if p.environ().get("RANK") == str(rank)]
        next(p for p in here if "recipes/pretrain.py" in p.cmdline()).kill()  # not a worker of its
        result = job.wait(60)
    assert result.code not in (0, 1)
    assert re.search(rf"n{2 - rank}: error: .*rank {rank} on n{rank + 1}\b.*: last heard of", result.stderr)


def test_what_one_host_refuses_before_the_ranks_meet_is_said(pair: list[Host], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    pair[1].run("mount", "--bind", str(tmp_path / "empty"), str(ROOT / "conf/zero"))
    with started(pair, tmp_path, "zero=stage1") as job:
        errors = job.output / "stderr"
        said = "n2: error: rank 1 on n2: zero=stage1: no such option."
        job.until(lambda: said in errors.read_text(), "a word of n2's")


def test_a_host_with_other_code_is_named(pair: list[Host], tmp_path: Path) -> None:
    changed = tmp_path / "errors.py"
    shutil.copy(ROOT / "toolkit/errors.py", changed)
    changed.write_text(changed.read_text() + "# an old checkout\n")
    pair[1].run("mount", "--bind", str(changed), str(ROOT / "toolkit/errors.py"))
    result = on(pair, tmp_path)
    assert result.code == 2
    assert "error: host n2 (rank 1): code " in result.stderr and "rank 0's host n1 has" in result.stderr
