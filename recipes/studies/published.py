"""Numbers that papers print, beside ours: as far as they were printed, with what explains a difference.

published("zero_table1")["gb"]               # of conf/reproduce/zero_table1.yaml
Row("ZeRO 1", 31.4, 31.41, "GB").verdict({})                 # equal
"""

import math
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import islice
from typing import Any

from toolkit.config.schema import conf_dir
from toolkit.errors import ConfigError, nearest


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
