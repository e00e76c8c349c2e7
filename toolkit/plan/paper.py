"""What the ZeRO paper says that its stages need and send (Rajbhandari et al. 2020, arXiv 1910.02054, sections 5 and 7).

zero_bytes(7.5e9, stage=1, world=64) / 1e9        # 31.4 GB
zero_volume(7.5e9, stage=3)                       # elements that a device sends in a step
published("zero_table1")["gb"]                    # printed numbers, of this paper and others

Sixteen bytes a parameter: 2 of weights, 2 of gradients in half precision, 12 of Adam (weights, momentum, variance in
fp32). What DeepSpeed 0.19.8 holds differs, see toolkit/plan/memory.py.
"""

import math
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import islice
from typing import Any

from toolkit.config.schema import conf_dir
from toolkit.errors import ConfigError, nearest


def zero_bytes(parameters: float, *, stage: int, world: int, optimizer: float = 12) -> float:
    """Bytes of model states on each of ``world`` devices; ``optimizer`` is the paper's K."""
    return parameters * zero_bytes_per_parameter(stage=stage, world=world, optimizer=optimizer)


def zero_bytes_per_parameter(*, stage: int, world: int, optimizer: float = 12) -> float:
    """Each stage shares out one thing more: optimizer states, gradients, weights."""
    weights, gradients, states = (
        size / world if stage >= first else size for first, size in ((3, 2), (2, 2), (1, optimizer))
    )
    return weights + gradients + states


def zero_largest(memory: float, *, stage: int, world: int, optimizer: float = 12) -> float:
    """The most parameters whose states fit into ``memory`` bytes of each device."""
    return memory / zero_bytes_per_parameter(stage=stage, world=world, optimizer=optimizer)


def zero_volume(parameters: float, *, stage: int) -> float:
    """Elements each device sends in a step: reduce-scatter and all-gather, at stage 3 one all-gather more."""
    return parameters * (3 if stage == 3 else 2)


@dataclass(frozen=True)
class Row:
    """A published number beside ours."""

    what: str
    published: float
    ours: float
    unit: str

    @property
    def difference(self) -> float:
        return self.ours / self.published - 1

    def verdict(self, data: dict[str, Any]) -> str:
        """``data`` has the tolerance, and why rows differ, by pattern of their names: the first that matches.

        A reason has a ``text`` and excuses differences ``from`` one ``to`` another; outside, the row is unexplained.
        """
        printed = as_printed(self.ours, self.published, cut_off=data.get("integers") == "cut off")
        if printed == self.published or math.isclose(self.ours, self.published):
            return "equal"
        if abs(self.difference) <= data.get("tolerance", 0):
            return f"within {math.ceil(round(100 * abs(self.difference), 6))} %"
        matches = (why for pattern, why in data.get("why", {}).items() if fnmatchcase(self.what, pattern))
        explained = [why["text"] for why in islice(matches, 1) if why["from"] <= self.difference <= why["to"]]
        return f"differs: {explained[0] if explained else 'unexplained'}"


def as_printed(value: float, printed: float, *, cut_off: bool = False) -> float:
    """``value`` to as many digits as ``printed`` has, rounded half up; ``cut_off``: integers are not rounded."""
    places = len(str(printed).partition(".")[2])
    scale = 10.0**places
    return math.floor(value * scale + (0 if cut_off and not places else 0.5)) / scale


def published(name: str) -> dict[str, Any]:
    """The numbers of conf/reproduce/<name>.yaml with their source."""
    from omegaconf import OmegaConf

    files = {f.stem: f for f in sorted((conf_dir() / "reproduce").glob("*.yaml"))}
    if name not in files:
        raise ConfigError(
            f"target={name}: nothing published under that name.{nearest(name, files)} Known: {', '.join(files)}."
        )
    return dict(OmegaConf.to_container(OmegaConf.load(files[name])))  # type: ignore[arg-type]
