"""What a check found on a host.

rated("open files", limit >= 1024, f"{limit}", "1024", "ulimit -n 65536")    # ok, or fail with its way out
enough("checkpoints", free, needed, f"{gib(free)} free", "3 x 1.2 GiB", "Make room.")
unneeded("libaio", "no NVMe offload")
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

State = Literal["ok", "warn", "fail", "skipped"]


@dataclass(frozen=True)
class Finding:
    """One check on one host: what was found, what it was held against, and what mends it."""

    name: str
    state: State
    value: str
    rule: str = ""
    way_out: str = ""


def rated(name: str, good: bool, value: str, rule: str, way_out: str, bad: State = "fail") -> Finding:
    """``ok``, or ``bad`` with the way out."""
    return Finding(name, "ok" if good else bad, value, rule, "" if good else way_out)


def enough(name: str, free: float, needed: float | None, value: str, rule: str, way_out: str) -> Finding:
    """Of room for the model: what it needs may be unknown (None), which is said and not taken for good."""
    if needed is None:
        return Finding(name, "warn", value, "the model's size is not known here")
    return rated(name, free >= needed, value, rule, way_out)


def unneeded(name: str, why: str) -> Finding:
    return Finding(name, "skipped", f"not needed: {why}")


def existing(path: Path) -> Path:
    """``path``, or the nearest folder above it that is there."""
    path = path.absolute()
    return next(p for p in (path, *path.parents) if p.exists())
