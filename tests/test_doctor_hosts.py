"""toolkit doctor over ssh: hosts that agree fit, and what is wrong on one host is said of that host."""

import json
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from launching import ROOT
from sshd import Fake, hosts, needs_mounts, needs_sshd

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
    with (changed / "errors.py").open("a") as file:
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
