"""Every host asked at once, what must be the same on all compared, and an all-reduce over all ranks.

examine(config, [Host("node-1", slots=8)], build=True, told=print).fits

Hosts are reached as DeepSpeed's launcher over pdsh would do it: ports, keys and users are those of ~/.ssh/config, or
options in PDSH_SSH_ARGS_APPEND.
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
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from shutil import which
from typing import Any

from rich.table import Table
from rich.text import Text

from toolkit.cluster.doctor.allreduce import bus_gbs
from toolkit.cluster.doctor.host_job import Finding, rated
from toolkit.config.schema import RunConfig
from toolkit.config.units import gib
from toolkit.errors import ConfigError
from toolkit.job.fingerprint import differences
from toolkit.run.table import table

HOST_SECONDS = 1800  # three ops, each minutes on a busy host
REDUCE_SECONDS = 180
PATIENCE_SECONDS = 45
STYLES = {"ok": "green", "warn": "yellow", "fail": "bold red"}
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
Told = Callable[[str], None]
Placed = tuple[str, Finding]
Answer = tuple[dict[str, Any] | None, str]  # what a command on a host answered, if it did, and why it failed, if so


@dataclass(frozen=True)
class Host:
    """A line of the hostfile; not ``remote``: this host, without ssh."""

    name: str
    slots: int
    remote: bool = True


@dataclass(frozen=True)
class Visit:
    """One host: what was found there, its answer if it gave one, its address."""

    host: Host
    findings: list[Finding]
    answer: dict[str, Any] | None = None
    address: str = "127.0.0.1"


@dataclass(frozen=True)
class Report:
    """All findings, in the order of the hosts; those of the whole job last."""

    world: int
    findings: list[Placed]

    @property
    def fits(self) -> bool:
        return all(finding.state != "fail" for _, finding in self.findings)

    @property
    def verdict(self) -> str:
        failed, warned = (sum(f.state == state for _, f in self.findings) for state in ("fail", "warn"))
        warnings = f"{warned} warning{'s' * (warned != 1)}"
        return f"Does not fit: {failed} failed, {warnings}." if failed else f"Fits, {warnings}."

    def as_json(self) -> str:
        """{"fits": …, "world": …, "findings": [{"host": …, "name", "state", "value", "rule", "way_out"}]}"""
        findings = [{"host": host, **asdict(finding)} for host, finding in self.findings]
        return json.dumps({"fits": self.fits, "world": self.world, "findings": findings}, indent=2)

    def listing(self) -> Table:
        """The hosts one after the other, a row for each check; what mends it stands below what was found."""
        rows: list[tuple[str | Text, ...]] = []
        for host in dict.fromkeys(host for host, _ in self.findings):
            findings, label = [f for name, f in self.findings if name == host], host
            rows += [()] if rows else []
            for f in (f for f in findings if f.state != "skipped"):
                found = Text.assemble(f.value, (f"\n{f.way_out}" if f.way_out else "", "bold"))
                rows.append((label, f.name, Text(f.state, STYLES[f.state]), found, f.rule))
                label = ""
            if skipped := ", ".join(f.name for f in findings if f.state == "skipped"):
                rows.append((label, Text("skipped", "dim"), "", Text(skipped, "dim"), ""))
        return table(dict.fromkeys(("host", "check", "state", "found", "against"), ""), rows)


def examine(config: RunConfig, hosts: list[Host], *, build: bool, address: str | None, told: Told) -> Report:
    """Ask every host at once. ``address``: of the first host, as deepspeed's --master_addr."""
    world = sum(host.slots for host in hosts)
    request = {"config": config.model_dump(mode="json"), "world": world, "hosts": len(hosts), "build": build}
    request["environment"] = config.cluster.variables
    with ThreadPoolExecutor(len(hosts)) as pool:
        visits = list(pool.map(lambda host: _visit(host, request, told), hosts))
    placed = [(visit.host.name, finding) for visit in visits for finding in visit.findings]
    if len(hosts) > 1:  # what the deepspeed command itself needs, here, to reach them
        way, path = "apt install pdsh, or launch otherwise (torchrun, Slurm).", which("pdsh")
        pdsh = rated("pdsh", bool(path), path or "missing", "for deepspeed --hostfile", way, bad="warn")
        placed.append(("this host", pdsh))
    return Report(world, [*placed, *_software(visits), *_all_reduce(config, visits, world, address, told)])


def _visit(host: Host, request: dict[str, Any], told: Told) -> Visit:
    reached, address = reach(host) if host.remote else ([], "127.0.0.1")
    if any(finding.state == "fail" for finding in reached):
        return Visit(host, reached)
    answer, error = ask(host, "host", request | {"slots": host.slots}, seconds=HOST_SECONDS, told=told)
    if answer is None:
        way = "Put the same environment and checkout, of this very version, at the same paths there."
        rule = "this Python and toolkit, in this folder"
        return Visit(host, [*reached, Finding("toolkit", "fail", error, rule, way)])
    return Visit(host, reached + [Finding(**finding) for finding in answer["findings"]], answer, address)


def _software(visits: list[Visit]) -> list[Placed]:
    """Python, packages, code and device of every host against the first's."""
    found = [(v.host.name, v.answer["fingerprint"]) for v in visits if v.answer for _ in range(v.host.slots)]
    first, *others = dict.fromkeys(name for name, _ in found) or [""]
    if not others:
        return []
    wrong = differences([(name, dict.fromkeys(found[0][1], "unknown") | prints) for name, prints in found])
    rule = "Python, packages, code and device as on the first host"
    placed: list[Placed] = []
    for name in others:
        lines = [line.rsplit(". ", 1) for line in wrong if line.startswith(f"host {name} (")]
        placed += [(name, Finding("software", "fail", text, rule, way)) for text, way in lines]
        placed += [] if lines else [(name, Finding("software", "ok", f"as on {first}", rule))]
    return placed


def _all_reduce(config: RunConfig, visits: list[Visit], world: int, address: str | None, told: Told) -> list[Placed]:
    if why := _no_all_reduce(visits, world):
        return [("all", Finding("all-reduce", "skipped", why))]
    first = visits[0].answer or {}
    request = {"world": world, "output_dir": config.output_dir, "device": first["device"], "patience": PATIENCE_SECONDS}
    request |= {"address": address or visits[0].address, "port": first["port"]}
    request["environment"] = config.cluster.variables

    def start(number: int) -> Answer:
        host = visits[number].host
        mine = request | {"first": sum(v.host.slots for v in visits[:number]), "slots": host.slots}
        return ask(host, "all-reduce", mine, seconds=REDUCE_SECONDS, told=told)

    with ThreadPoolExecutor(len(visits)) as pool:
        answers = list(pool.map(start, range(len(visits))))
    return _judged([visit.host for visit in visits], answers, request)


def _no_all_reduce(visits: list[Visit], world: int) -> str:
    if world == 1:
        return "not needed: one rank"
    if silent := [v.host.name for v in visits if v.answer is None]:
        return f"without {', '.join(silent)} there is no job"
    if len({v.answer["device"] for v in visits if v.answer}) > 1:
        return "the hosts have different devices"
    few = [v.host.name for v in visits for f in v.findings if f.name in ("GPUs", "configuration") and f.state == "fail"]
    return f"first mend the failure above on {', '.join(dict.fromkeys(few))}" if few else ""


def _judged(hosts: list[Host], answers: list[Answer], request: dict[str, Any]) -> list[Placed]:
    owner = [host.name for host in hosts for _ in range(host.slots)]
    result = answers[0][0]
    if result and result["missing"]:
        text = f"did not reach {request['address']}:{request['port']}"
        broken = [(name, text) for name in dict.fromkeys(owner[rank] for rank in result["missing"])]
    else:
        broken = [(host.name, error) for host, (_, error) in zip(hosts, answers, strict=True) if error]
    if broken or result is None:
        way = "Open all ports between the hosts; name the network: cluster.interface=eth0."
        broken = broken or [(owner[0], "no answer")]
        return [(name, Finding("all-reduce", "fail", text, "all ranks meet", way)) for name, text in broken]
    speed = bus_gbs(result["bytes"], result["seconds"], request["world"])
    value = f"{speed:.2f} GB/s bus bandwidth, {gib(result['bytes'])} in {1000 * result['seconds']:.0f} ms"
    value += f", {request['world']} ranks, {result['backend']}"
    text, way = f"{request['output_dir']}: not the folder of {owner[0]}", "Name one shared disk as output_dir"
    blind = Finding("output_dir", "fail", text, "one shared disk", f"{way}: checkpoints need it.")
    good = Finding("all-reduce", "ok", value, "2 (n - 1) / n x bytes / time, one rank a device")
    return [("all", good), *((name, blind) for name in dict.fromkeys(owner[rank] for rank in result["blind"]))]


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


def _ssh(host: Host, line: str) -> list[str]:
    more = os.environ.get("PDSH_SSH_ARGS_APPEND", "")
    try:
        return [*SSH, *shlex.split(more), host.name, line]
    except ValueError as error:
        raise ConfigError(f"PDSH_SSH_ARGS_APPEND={more}: {error}. Write it as on a shell's line.") from error


def ask(host: Host, asked: str, request: dict[str, Any], *, seconds: int, told: Told) -> Answer:
    """Run toolkit.cluster.doctor there, in this folder with this interpreter's path; ``request`` goes in, its answer
    comes out. It ends by itself in ``seconds``, whatever becomes of the connection."""
    words = ["timeout", "-k", "5", str(seconds), sys.executable, "-m", "toolkit.cluster.doctor"]
    taken = forwarded() if host.remote else {}
    if host.remote:
        python = [f"{k}={v}" for k, v in taken.items() if k.startswith("PYTHON")]
        words = _ssh(host, f"cd {shlex.quote(str(Path.cwd()))} && exec env {shlex.join([*python, *words])}")
    request, result = request | {"asked": asked, "environment": taken | request["environment"]}, None
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
        return result, ""
    last = f"no answer within {seconds} s" if process.returncode in (124, 137) else (said or ["no answer"])[-1]
    return result, f"{last} (exit code {process.returncode})"


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
    offset, error = float(clock) - (sent + received) / 2, (received - sent) / 2  # half the round trip
    value, near = f"{offset:+.2f} s (+-{error:.2f})", f"within {SKEW_SECONDS:g} s of this host's"
    way = "Run chrony or systemd-timesyncd: logs and timelines of hosts do not fit together, TLS may refuse."
    skew = rated("clock", abs(offset) - error <= SKEW_SECONDS, value, near, way, bad="warn")
    return [Finding("ssh", "ok", f"{took:.2f} s", rule), skew], (addresses.split() or [""])[0]
