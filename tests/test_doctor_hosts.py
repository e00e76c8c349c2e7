"""toolkit doctor over ssh: hosts that agree fit, and what is wrong on one host is said of that host."""

import json
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from launching import ROOT
from sshd import Fake, hosts, needs_mounts, needs_sshd

from toolkit.doctor import job, ssh
from toolkit.errors import ConfigError

Findings = dict[tuple[str, str], dict[str, str]]


def doctor(folder: Path, fakes: Mapping[str, Fake], *overrides: str) -> tuple[int, dict[str, Any], Findings]:
    """Exit code, the whole JSON, and its findings by host and name."""
    hostfile = folder / "hosts"
    hostfile.write_text("".join(f"{name} slots=1\n" for name in fakes))
    toolkit = str(Path(sys.executable).parent / "toolkit")
    words = [toolkit, "doctor", "experiment=smoke", f"output_dir={folder / 'runs'}", *overrides]
    with hosts(folder / "ssh", fakes) as env:
        words += ["--hostfile", str(hostfile), "--master-addr", "127.0.0.1", "--json"]
        env |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        done = subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True, timeout=200, check=False)
    assert done.stdout, done.stderr
    report = json.loads(done.stdout)
    return done.returncode, report, {(f["host"], f["name"]): f for f in report["findings"]}


@needs_sshd
def test_two_hosts_that_agree_fit(tmp_path: Path) -> None:
    code, report, found = doctor(tmp_path, {"alpha": Fake(), "beta": Fake()})
    assert code == 0, [f for f in report["findings"] if f["state"] == "fail"]
    assert set(report) == {"fits", "world", "findings"} and report["fits"] is True and report["world"] == 2
    assert all(set(f) == {"host", "name", "state", "value", "rule", "way_out"} for f in report["findings"])
    assert {f["state"] for f in report["findings"]} <= {"ok", "warn", "skipped"}
    for host in ("alpha", "beta"):
        for name in ("ssh", "clock", "configuration", "shared memory", "checkpoints", "ops"):
            assert found[host, name]["state"] == "ok"
    assert found["beta", "software"]["state"] == "ok"
    assert found["this host", "pdsh"]["state"] == ("ok" if shutil.which("pdsh") else "warn")
    assert "2 ranks, gloo" in found["all", "all-reduce"]["value"] and "GB/s" in found["all", "all-reduce"]["value"]


@needs_sshd
@needs_mounts
def test_what_is_wrong_on_one_host_is_said_of_that_host(tmp_path: Path) -> None:
    """Another code, a /dev/shm too small for a batch, an output_dir of its own, a clock that is ahead."""
    changed, late, runs = tmp_path / "changed", tmp_path / "late", tmp_path / "runs"
    shutil.copytree(ROOT / "toolkit", changed)
    with (changed / "train.py").open("a") as file:
        file.write("# drifted\n")
    late.mkdir()
    (late / "date").write_text("#!/bin/sh\nexec /bin/date -d '+90 seconds' \"$@\"\n")
    (late / "date").chmod(0o755)
    runs.mkdir()
    mounts = (
        f"mount --bind {changed} {ROOT}/toolkit\nmount -t tmpfs -o size=16k tmpfs /dev/shm\nmount -t tmpfs t {runs}"
    )
    beta = Fake(mounts=mounts, environment=f"PATH={late}:/usr/bin:/bin")
    code, report, found = doctor(tmp_path, {"alpha": Fake(), "beta": beta})
    assert code == 2 and report["fits"] is False
    wrong = {key: f["state"] for key, f in found.items() if f["state"] not in ("ok", "skipped")}
    expected = {"software": "fail", "shared memory": "fail", "output_dir": "fail", "clock": "warn"}
    assert {key: state for key, state in wrong.items() if key[0] != "alpha" and key[1] != "host name"} == {
        ("beta", name): state for name, state in expected.items()
    }
    assert not [key for key, state in wrong.items() if key[0] == "alpha" and state == "fail"]
    assert "code" in found["beta", "software"]["value"] and "checkout" in found["beta", "software"]["way_out"]
    assert found["beta", "clock"]["value"].startswith(("+89", "+90"))


@needs_sshd
@needs_mounts
def test_hosts_that_give_no_answer_are_named_with_what_mends_it(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    fakes = {
        "closed": Fake(listens=False),
        "stranger": Fake(key="stranger"),
        "unknown": Fake(known=False),
        "bare": Fake(mounts=f"mount --bind {tmp_path / 'empty'} {ROOT}/toolkit"),
    }
    code, report, found = doctor(tmp_path, fakes)
    ways = {"closed": "Start sshd", "stranger": "ssh-copy-id stranger", "unknown": "ssh-keyscan unknown"}
    for host, way in ways.items():
        assert found[host, "ssh"]["state"] == "fail" and way in found[host, "ssh"]["way_out"]
    assert found["bare", "toolkit"]["state"] == "fail" and "toolkit" in found["bare", "toolkit"]["value"]
    assert code == 2 and report["world"] == 4
    assert found["all", "all-reduce"]["value"] == "without closed, stranger, unknown, bare there is no job"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("alpha slots=2\n-oProxyCommand=reboot slots=1\n", r"hosts:2: '-oProxyCommand=reboot slots=1': must be"),
        ("-l@alpha slots=2\n", r"hosts:1: '-l@alpha slots=2': must be"),
        ("alpha;reboot slots=2\n", r"hosts:1: .*must be `host slots=N`"),
        ("$(reboot) slots=2\n", r"hosts:1: .*must be `host slots=N`"),
        ("alpha\n", r"hosts:1: 'alpha': must be `host slots=N`"),
        ("alpha slots=0\n", r"hosts:1: 'alpha slots=0': must be"),
        ("alpha slots=2\n\nalpha slots=1\n", r"hosts:3: .*a second line for this host"),
        ("# none\n\n", r"hosts: no host in it"),
    ],
)
def test_a_hostfile_that_is_wrong_is_refused_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "hosts").write_text(text)
    with pytest.raises(ConfigError, match=message):
        ssh.read_hostfile(tmp_path / "hosts")


def test_a_hostfile_is_read_as_deepspeed_reads_it(tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("# the cluster\n\n  me@node-1.lan   slots=8 # first\nnode_2 slots=4\n")
    assert ssh.read_hostfile(tmp_path / "hosts") == [ssh.Host("me@node-1.lan", 8), ssh.Host("node_2", 4)]


def test_names_of_folders_and_variables_are_quoted_for_the_other_shell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "a b; touch hacked"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("PYTHONPATH", "$(touch hacked)")
    line = ssh.command(ssh.Host("alpha", 1), ["sh", "-c", 'pwd; echo "$PYTHONPATH"'], 9)[-1]
    done = subprocess.run(["sh", "-c", line], capture_output=True, text=True, check=True, cwd="/")
    assert done.stdout == f"{folder}\n{folder}:$(touch hacked)\n"
    assert not list(folder.iterdir()) and not (tmp_path / "hacked").exists()


def test_lines_that_stop_deepspeeds_launcher_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / ".deepspeed_env").write_text("GLOO_SOCKET_IFNAME=eth0\n")
    assert ssh.forwarded()["GLOO_SOCKET_IFNAME"] == "eth0"
    (tmp_path / ".deepspeed_env").write_text("GLOO_SOCKET_IFNAME=eth0\n# a comment\n")
    with pytest.raises(ConfigError, match=r"\.deepspeed_env:2: '# a comment': .* lines of KEY=VALUE"):
        ssh.forwarded()


@pytest.mark.parametrize(
    ("offset", "error", "state"), [(0.9, 0.1, "ok"), (-1.2, 0.1, "warn"), (1.2, 0.3, "ok"), (90, 0.3, "warn")]
)
def test_a_clock_is_off_only_if_the_round_trip_does_not_explain_it(offset: float, error: float, state: str) -> None:
    assert ssh.clock_finding(offset, error).state == state


def test_a_job_whose_all_reduce_gives_no_answer_does_not_fit() -> None:
    visits = [job.Visit(ssh.Host("alpha", 1), []), job.Visit(ssh.Host("beta", 1), [])]
    ((host, finding),) = job._judged(visits, [ssh.Answer(None, ""), ssh.Answer(None, "")], {})
    assert (host, finding.state) == ("alpha", "fail")


def test_an_older_toolkits_fingerprint_is_a_difference() -> None:
    prints = [{"python": "3.11.7", "torch": "2.13.0"}, {"python": "3.11.7"}]
    visits = [job.Visit(ssh.Host(n, 2), [], {"fingerprint": p}) for n, p in zip(("alpha", "beta"), prints, strict=True)]
    ((host, finding),) = job._software(visits)
    assert (host, finding.state) == ("beta", "fail") and "(rank 2, 3): torch unknown" in finding.value
