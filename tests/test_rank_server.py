"""What a job finds on the warm server is what DeepSpeed's launcher gives it; nothing of one job is left to the next."""

import json
import signal
from pathlib import Path

import pytest
from launching import ROOT, python, start

SHOW = """
import json, os, signal, sys, time
names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR")
with open(f"{sys.argv[-1]}/shown.{os.environ['RANK']}", "w") as file:
    json.dump([sys.argv[1:], os.getcwd(), sys.path[0], __name__, {name: os.environ[name] for name in names}], file)
print("said by rank", os.environ["RANK"], flush=True)
while not os.path.exists(f"{sys.argv[-1]}/shown.{1 - int(os.environ['RANK'])}"):
    time.sleep(0.05)
if os.environ["RANK"] == "1":
    sys.exit(7)
time.sleep(60)
"""


@pytest.mark.parametrize("launcher", ["deepspeed", "forked"])
def test_ranks_see_and_leave_the_same(launcher: str, tmp_path: Path) -> None:
    """The first that fails ends the others, and its code is the job's."""
    (tmp_path / "show.py").write_text(SHOW)
    with start(tmp_path, str(tmp_path), recipe=str(tmp_path / "show.py"), launcher=launcher, bare=True) as job:
        result = job.wait(60)
    assert result.code == 7
    assert {line for line in result.stdout.splitlines() if "said" in line} == {"said by rank 0", "said by rank 1"}
    for rank in (0, 1):
        arguments, folder, path, name, variables = json.loads((tmp_path / f"shown.{rank}").read_text())
        assert arguments[0] == f"--local_rank={rank}" and arguments[-1] == str(tmp_path)
        assert (folder, path, name) == (str(ROOT), str(tmp_path), "__main__")
        assert variables == {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_SIZE": "2", "MASTER_ADDR": "127.0.0.1"
        }  # fmt: skip


def test_a_process_ends_as_pythons_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OWN", "of this test")
    done = python("-c", "import os, atexit; atexit.register(print, 'bye'); print(os.environ['OWN'], os.getcwd())",
                  cwd=tmp_path)  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, f"of this test {tmp_path}\nbye\n", "")
    done = python("-c", "import sys; sys.exit('no')")
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "no\n")
    done = python("-c", "import torch; torch.no_such_thing")
    assert done.returncode == 1 and "Traceback" in done.stderr and "no_such_thing" in done.stderr
    assert python("-c", f"import os; os.kill(os.getpid(), {signal.SIGKILL})").returncode == signal.SIGKILL


def test_a_job_starts_without_threads_and_without_what_another_left() -> None:
    code = "import os, sys, threading; print(len(os.listdir('/proc/self/task')), hasattr(sys, 'mark')); sys.mark = 1"
    assert [python("-c", code).stdout for _ in range(2)] == ["1 False\n"] * 2
