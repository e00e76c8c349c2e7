"""What a check found, and the job that it looks at.

rated("open files", limit >= 1024, f"{limit}", "1024", "ulimit -n 65536")    # ok, or fail with its way out
unneeded("libaio", "no NVMe offload")
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from toolkit.config.schema import RunConfig
from toolkit.deepspeed import ds_config
from toolkit.deepspeed.facts import Facts

State = Literal["ok", "warn", "fail", "skipped"]


@dataclass(frozen=True)
class Finding:
    """One check on one host: what was found, what it was held against, and what mends it."""

    name: str
    state: State
    value: str
    rule: str = ""
    way_out: str = ""


@dataclass(frozen=True)
class Job:
    """The configuration as one host sees it: its device, its ranks of how many, on how many hosts."""

    config: RunConfig
    device: str
    world: int
    slots: int
    hosts: int
    build: bool

    @property
    def run_dir(self) -> Path:
        return Path(self.config.output_dir) / (self.config.name or self.config.task.name)

    @cached_property
    def ds(self) -> dict[str, Any]:
        """Exactly what DeepSpeed would get. Raises ConfigError."""
        return ds_config.complete(self.config, world=self.world, device=self.device, run_dir=self.run_dir)

    @property
    def facts(self) -> Facts:
        return Facts(self.ds, self.world, self.device)

    @property
    def ops(self) -> list[str]:
        """The class names of the op builders that the job loads."""
        return ds_config.required_ops(self.ds, device=self.device, world=self.world)


def rated(name: str, good: bool, value: str, rule: str, way_out: str, bad: State = "fail") -> Finding:
    """``ok``, or ``bad`` with the way out."""
    return Finding(name, "ok" if good else bad, value, rule, "" if good else way_out)


def unneeded(name: str, why: str) -> Finding:
    return Finding(name, "skipped", f"not needed: {why}")


def existing(path: Path) -> Path:
    """``path``, or the nearest folder above it that is there."""
    path = path.absolute()
    return next(p for p in (path, *path.parents) if p.exists())
