"""The hosts of a hostfile, and commands on them as DeepSpeed's launcher over pdsh would start them.

answer = ask(Host("node-1", slots=8), "host", request, seconds=60, told=print)

Ports, keys and users are those of ~/.ssh/config, or options in PDSH_SSH_ARGS_APPEND, which pdsh reads too.
"""

import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolkit.cluster.doctor.finding import Finding, rated
from toolkit.errors import ConfigError

MARK = "toolkit.cluster.doctor: "  # before the one line of an answer; all other lines are said on the way
SSH = ["ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=10", "-o", "ServerAliveInterval=15"]
FORWARDED = ("PYTHON", "NCCL", "UCX", "MV2")  # deepspeed/launcher/runner.py, 0.19.8, without MLFLOW's tokens
SKEW_SECONDS = 1.0
CLOCK = "echo ready; read _; date +%s.%N; hostname -I"  # asked once the connection stands: milliseconds
WAYS = {
    "Permission denied": "Let this user in by key: ssh-copy-id {host}. Passwords are not asked for.",
    "Host key verification failed": "Make its key known once you trust it: ssh-keyscan {host} >> ~/.ssh/known_hosts.",
    "Could not resolve": "Add {host} to /etc/hosts, DNS or ~/.ssh/config.",
    "": "Start sshd there; another port or key: ~/.ssh/config, or PDSH_SSH_ARGS_APPEND='-p 2222'.",
}


@dataclass(frozen=True)
class Host:
    """A line of the hostfile; not ``remote``: this host, without ssh."""

    name: str
    slots: int
    remote: bool = True


@dataclass(frozen=True)
class Answer:
    """What a command on a host answered, if it did, and why it failed, if it did."""

    result: dict[str, Any] | None
    error: str


def forwarded() -> dict[str, str]:
    """What the launcher takes along: some variables, and the lines of .deepspeed_env. Raises ConfigError."""
    found = {k: v for k, v in os.environ.items() if k.startswith(FORWARDED)}
    for folder in (Path.home(), Path.cwd()):
        path = folder / os.environ.get("DS_ENV_FILE", ".deepspeed_env")
        for number, line in enumerate(path.read_text().splitlines() if path.is_file() else [], 1):
            key, equals, value = line.partition("=")
            if not equals:
                raise ConfigError(f"{path}:{number}: {line!r}: DeepSpeed takes only lines of KEY=VALUE. Remove it.")
            found[key.strip()] = value.strip()
    path_of_python = [str(Path.cwd()), *filter(None, [os.environ.get("PYTHONPATH")])]
    return found | {"PYTHONPATH": os.pathsep.join(path_of_python)}


def command(host: Host, words: list[str], seconds: int) -> list[str]:
    """``words`` on ``host``, in this folder; they end by themselves, whatever becomes of the connection."""
    bounded = ["timeout", "-k", "5", str(seconds), *words]
    if not host.remote:
        return bounded
    python = [f"{k}={v}" for k, v in forwarded().items() if k.startswith("PYTHON")]
    return _ssh(host, f"cd {shlex.quote(str(Path.cwd()))} && exec env {shlex.join([*python, *bounded])}")


def _ssh(host: Host, line: str) -> list[str]:
    more = os.environ.get("PDSH_SSH_ARGS_APPEND", "")
    try:
        return [*SSH, *shlex.split(more), host.name, line]
    except ValueError as error:
        raise ConfigError(f"PDSH_SSH_ARGS_APPEND={more}: {error}. Write it as on a shell's line.") from error


def ask(host: Host, asked: str, request: dict[str, Any], *, seconds: int, told: Callable[[str], None]) -> Answer:
    """Run toolkit.cluster.doctor there with this interpreter's path; ``request`` goes in, its answer comes out."""
    request = request | {"asked": asked, "environment": (forwarded() if host.remote else {}) | request["environment"]}
    words = command(host, [sys.executable, "-m", "toolkit.cluster.doctor"], seconds)
    result = None
    with tempfile.TemporaryFile("w+", errors="replace") as errors:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": errors}
        with subprocess.Popen(words, text=True, errors="replace", **pipes) as process:  # type: ignore[call-overload]
            with suppress(BrokenPipeError), process.stdin as stdin:
                stdin.write(json.dumps(request))
            for line in process.stdout:
                if line.startswith(MARK):
                    result = json.loads(line.removeprefix(MARK))
                elif line.strip():
                    told(f"{host.name}: {line.rstrip()}")
        errors.seek(0)
        said = [line.strip() for line in errors if line.strip()]
    if process.returncode == 0:
        return Answer(result, "")
    last = f"no answer within {seconds} s" if process.returncode in (124, 137) else (said or ["no answer"])[-1]
    return Answer(result, f"{last} (exit code {process.returncode})")


def reach(host: Host) -> tuple[list[Finding], str]:
    """Whether ssh gets there without a question, how far its clock is off, and its first address."""
    rule, start = "by key, within 10 s", time.monotonic()
    words = ["timeout", "60", *_ssh(host, f"sh -c {shlex.quote(CLOCK)}")]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with subprocess.Popen(words, text=True, errors="replace", bufsize=1, **pipes) as process:  # type: ignore[call-overload]
        while (line := process.stdout.readline()) and line != "ready\n":
            pass  # a greeting of the shell's
        took, sent = time.monotonic() - start, time.time()
        with suppress(BrokenPipeError):
            process.stdin.write("\n")
        clock, received = process.stdout.readline(), time.time()
        addresses, errors = process.communicate()
    if process.returncode or not re.fullmatch(r"\d+\.\d+\n", clock):
        text = (errors.strip().splitlines() or [f"exit code {process.returncode}"])[-1]
        way = next(way for part, way in WAYS.items() if part in text)
        return [Finding("ssh", "fail", text, rule, way.format(host=host.name))], ""
    offset, error = float(clock) - (sent + received) / 2, (received - sent) / 2
    return [Finding("ssh", "ok", f"{took:.2f} s", rule), clock_finding(offset, error)], (addresses.split() or [""])[0]


def clock_finding(offset: float, error: float) -> Finding:
    """``offset`` from this host's clock, known to ``error`` seconds: half the round trip."""
    value, rule = f"{offset:+.2f} s (+-{error:.2f})", f"within {SKEW_SECONDS:g} s of this host's"
    way = "Run chrony or systemd-timesyncd: logs and timelines of hosts do not fit together, TLS may refuse."
    return rated("clock", abs(offset) - error <= SKEW_SECONDS, value, rule, way, bad="warn")
