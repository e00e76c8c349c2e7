"""A report as a table for a person, or as JSON for a script.

print(as_json(report))
"""

import json
from dataclasses import asdict
from typing import Any

from toolkit.cluster.doctor.job import Report

STYLES = {"ok": "green", "warn": "yellow", "fail": "bold red"}


def as_json(report: Report) -> str:
    """{"fits": …, "world": …, "findings": [{"host": …, "name": …, "state": …, "value": …, "rule": …, "way_out": …}]}"""
    findings = [{"host": host, **asdict(finding)} for host, finding in report.findings]
    return json.dumps({"fits": report.fits, "world": report.world, "findings": findings}, indent=2)


def table(report: Report) -> Any:
    """The hosts one after the other, a row for each check; what mends it stands below what was found."""
    from rich.box import SIMPLE_HEAD
    from rich.markup import escape
    from rich.table import Table

    drawn = Table(box=SIMPLE_HEAD, highlight=False)
    for column in ("host", "check", "state"):
        drawn.add_column(column, no_wrap=True)
    drawn.add_column("found", overflow="fold", ratio=3)
    drawn.add_column("against", overflow="fold", ratio=2)
    for host in dict.fromkeys(host for host, _ in report.findings):
        findings, label = [f for name, f in report.findings if name == host], host
        for f in (f for f in findings if f.state != "skipped"):
            found = escape(f.value) + (f"\n[bold]{escape(f.way_out)}[/]" if f.way_out else "")
            drawn.add_row(label, f.name, f"[{STYLES[f.state]}]{f.state}[/]", found, escape(f.rule))
            label = ""
        if skipped := ", ".join(f.name for f in findings if f.state == "skipped"):
            drawn.add_row(label, "[dim]skipped[/]", "", f"[dim]{skipped}[/]")
        drawn.add_section()
    return drawn


def verdict(report: Report) -> str:
    failed = sum(finding.state == "fail" for _, finding in report.findings)
    warned = sum(finding.state == "warn" for _, finding in report.findings)
    warnings = f"{warned} warning{'s' * (warned != 1)}"
    return f"Fits, {warnings}." if report.fits else f"Does not fit: {failed} failed, {warnings}."
