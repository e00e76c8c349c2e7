"""A report as a table for a person, or as JSON for a script.

print(as_json(report))
"""

import json
from dataclasses import asdict

from rich.table import Table
from rich.text import Text

from toolkit.cluster.doctor.examine import Report
from toolkit.run.table import table

STYLES = {"ok": "green", "warn": "yellow", "fail": "bold red"}


def as_json(report: Report) -> str:
    """{"fits": …, "world": …, "findings": [{"host": …, "name": …, "state": …, "value": …, "rule": …, "way_out": …}]}"""
    findings = [{"host": host, **asdict(finding)} for host, finding in report.findings]
    return json.dumps({"fits": report.fits, "world": report.world, "findings": findings}, indent=2)


def listing(report: Report) -> Table:
    """The hosts one after the other, a row for each check; what mends it stands below what was found."""
    rows: list[tuple[str | Text, ...]] = []
    for host in dict.fromkeys(host for host, _ in report.findings):
        findings, label = [f for name, f in report.findings if name == host], host
        rows += [()] if rows else []
        for f in (f for f in findings if f.state != "skipped"):
            found = Text.assemble(f.value, (f"\n{f.way_out}" if f.way_out else "", "bold"))
            rows.append((label, f.name, Text(f.state, STYLES[f.state]), found, f.rule))
            label = ""
        if skipped := ", ".join(f.name for f in findings if f.state == "skipped"):
            rows.append((label, Text("skipped", "dim"), "", Text(skipped, "dim"), ""))
    return table(dict.fromkeys(("host", "check", "state", "found", "against"), ""), rows)


def verdict(report: Report) -> str:
    failed = sum(finding.state == "fail" for _, finding in report.findings)
    warned = sum(finding.state == "warn" for _, finding in report.findings)
    warnings = f"{warned} warning{'s' * (warned != 1)}"
    return f"Fits, {warnings}." if report.fits else f"Does not fit: {failed} failed, {warnings}."
