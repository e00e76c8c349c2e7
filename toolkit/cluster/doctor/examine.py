"""Every host asked at once, what must be the same on all compared, and an all-reduce over all ranks.

report = examine(config, [Host("node-1", slots=8)], build=True, told=print)
report.fits
"""

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from shutil import which
from typing import Any

from rich.table import Table
from rich.text import Text

from toolkit.cluster.doctor.allreduce import bus_gbs
from toolkit.cluster.doctor.finding import Finding, State, rated
from toolkit.cluster.doctor.ssh import Answer, Host, ask, reach
from toolkit.config.schema import RunConfig
from toolkit.config.units import gib
from toolkit.job.fingerprint import differences
from toolkit.run.table import table

HOST_SECONDS = 1800  # three ops, each minutes on a busy host
REDUCE_SECONDS = 180
PATIENCE_SECONDS = 45
STYLES = {"ok": "green", "warn": "yellow", "fail": "bold red"}
Told = Callable[[str], None]
Placed = tuple[str, Finding]


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

    def count(self, state: State) -> int:
        return sum(finding.state == state for _, finding in self.findings)

    @property
    def fits(self) -> bool:
        return not self.count("fail")

    @property
    def verdict(self) -> str:
        warnings = f"{self.count('warn')} warning{'s' * (self.count('warn') != 1)}"
        return f"Fits, {warnings}." if self.fits else f"Does not fit: {self.count('fail')} failed, {warnings}."

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
    answer = ask(host, "host", request | {"slots": host.slots}, seconds=HOST_SECONDS, told=told)
    if answer.result is None:
        way = "Put the same environment and checkout, of this very version, at the same paths there."
        rule = "this Python and toolkit, in this folder"
        return Visit(host, [*reached, Finding("toolkit", "fail", answer.error, rule, way)])
    findings = [Finding(**finding) for finding in answer.result["findings"]]
    return Visit(host, reached + findings, answer.result, address)


def _software(visits: list[Visit]) -> list[Placed]:
    """Python, packages, code and device of every host against the first's."""
    found = [(v.host.name, v.answer["fingerprint"]) for v in visits if v.answer for _ in range(v.host.slots)]
    if len({name for name, _ in found}) < 2:
        return []
    found = [(name, dict.fromkeys(found[0][1], "unknown") | prints) for name, prints in found]  # an older toolkit's
    wrong = differences(found)
    rule, first = "Python, packages, code and device as on the first host", found[0][0]
    of_host = {name: [line for line in wrong if line.startswith(f"host {name} (")] for name, _ in found}
    placed: list[Placed] = [
        (name, Finding("software", "fail", text.rsplit(". ", 1)[0], rule, text.rsplit(". ", 1)[1]))
        for name, lines in of_host.items()
        for text in lines
    ]
    same = [name for name, lines in of_host.items() if not lines and name != first]
    return placed + [(name, Finding("software", "ok", f"as on {first}", rule)) for name in same]


def _all_reduce(config: RunConfig, visits: list[Visit], world: int, address: str | None, told: Told) -> list[Placed]:
    if why := _no_all_reduce(visits, world):
        return [("all", Finding("all-reduce", "skipped", why))]
    first = visits[0].answer or {}
    request = {"world": world, "output_dir": config.output_dir, "device": first["device"], "patience": PATIENCE_SECONDS}
    request |= {"address": address or visits[0].address, "port": first["port"]}
    request["environment"] = config.cluster.variables

    def start(visit: Visit) -> Answer:
        before = sum(v.host.slots for v in visits[: visits.index(visit)])
        mine = request | {"first": before, "slots": visit.host.slots}
        return ask(visit.host, "all-reduce", mine, seconds=REDUCE_SECONDS, told=told)

    with ThreadPoolExecutor(len(visits)) as pool:
        answers = list(pool.map(start, visits))
    return _judged(visits, answers, request)


def _no_all_reduce(visits: list[Visit], world: int) -> str:
    if world == 1:
        return "not needed: one rank"
    if silent := [v.host.name for v in visits if v.answer is None]:
        return f"without {', '.join(silent)} there is no job"
    if len({v.answer["device"] for v in visits if v.answer}) > 1:
        return "the hosts have different devices"
    few = [v.host.name for v in visits for f in v.findings if f.name in ("GPUs", "configuration") and f.state == "fail"]
    return f"first mend the failure above on {', '.join(dict.fromkeys(few))}" if few else ""


def _judged(visits: list[Visit], answers: list[Answer], request: dict[str, Any]) -> list[Placed]:
    owner = [visit.host.name for visit in visits for _ in range(visit.host.slots)]
    result = answers[0].result
    rule = "2 (n - 1) / n x bytes / time, one rank a device"
    way = "Open all ports between the hosts; name the network: cluster.interface=eth0."
    if result and result["missing"]:
        text = f"did not reach {request['address']}:{request['port']}"
        lost = dict.fromkeys(owner[rank] for rank in result["missing"])
        return [(name, Finding("all-reduce", "fail", text, "all ranks meet", way)) for name in lost]
    broken = [(v.host.name, a.error) for v, a in zip(visits, answers, strict=True) if a.error]
    if result is None and not broken:
        broken = [(owner[0], "no answer")]
    if broken or result is None:
        return [(name, Finding("all-reduce", "fail", error, "all ranks meet", way)) for name, error in broken]
    speed = bus_gbs(result["bytes"], result["seconds"], request["world"])
    value = f"{speed:.2f} GB/s bus bandwidth, {gib(result['bytes'])} in {1000 * result['seconds']:.0f} ms"
    value += f", {request['world']} ranks, {result['backend']}"
    blind = dict.fromkeys(owner[rank] for rank in result["blind"])
    text, mend = f"not the folder of {owner[0]}", "Name one shared disk as output_dir: checkpoints need it."
    return [("all", Finding("all-reduce", "ok", value, rule))] + [
        (name, Finding("output_dir", "fail", f"{request['output_dir']}: {text}", "one shared disk", mend))
        for name in blind
    ]
