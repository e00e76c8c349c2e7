"""What the stages of a pipeline do and when: the passes of one step, their bubbles, and the file that keeps them.

timeline = load(Path("runs/bert/timeline.json"))
bubble_share(timeline.events, timeline.stages)    # 0.27: 27 % of the stages' time is idle
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, FiniteFloat, NonNegativeInt, PositiveInt, ValidationError, model_validator

from toolkit.errors import ToolkitError

Direction = Literal["forward", "backward"]
DIRECTIONS: tuple[Direction, ...] = ("forward", "backward")
CLOCK = 1e-5  # seconds by which two readings may disagree: CUDA events tell half a microsecond


@dataclass(frozen=True)
class Event:
    """One pass of one micro-batch through one stage; times in seconds or in units of a forward pass. ``phase`` is 1 on
    the way back of DualPipeV, whose ranks hold two parts of the model each, else 0."""

    stage: int
    kind: Direction
    micro_batch: int
    start: FiniteFloat
    end: FiniteFloat
    phase: int = 0


class Timeline(BaseModel):
    """``runs/<name>/timeline.json``: every pass of one optimizer step, in seconds since the step began."""

    model_config = ConfigDict(frozen=True)
    schedule: Literal["1f1b", "gpipe", "dualpipev"]
    stages: PositiveInt
    micro_batches: PositiveInt
    step: NonNegativeInt
    events: tuple[Event, ...]

    @model_validator(mode="after")
    def _complete(self) -> "Timeline":
        """Every micro-batch passes every stage once in each direction, and a stage does one thing at a time."""
        found = sorted((e.stage, e.phase, e.kind, e.micro_batch) for e in self.events)
        phases = range(2 if self.schedule == "dualpipev" else 1)
        wanted = list(product(range(self.stages), phases, sorted(DIRECTIONS), range(self.micro_batches)))
        if found != wanted:
            odd = next((f for f, w in zip(found, wanted, strict=False) if f != w), None)
            at = "; the first that is odd: stage {}, phase {}, {} of micro-batch {}".format(*odd) if odd else ""
            raise ValueError(f"{len(found)} events where {self.schedule} has {len(wanted)} passes{at}")
        for stage in range(self.stages):
            mine = sorted((e.start, e.end) for e in self.events if e.stage == stage)
            empty = any(end <= start for start, end in mine)
            if empty or any(next_start < end - CLOCK for (_, end), (next_start, _) in pairwise(mine)):
                raise ValueError(f"stage {stage} has passes that overlap or take no time")
        return self


def load(path: Path) -> Timeline:
    """The timeline of a run; ToolkitError in one line where it is missing or broken."""
    if not path.is_file():
        raise ToolkitError(f"{path}: no such file. Runs with pipeline stages write it; {path.parent} has none.")
    try:
        return Timeline.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ToolkitError(
            f"{path}: {where + ': ' if where else ''}{first['msg']}. Let the run write it anew."
        ) from None


def span(events: Sequence[Event]) -> tuple[float, float]:
    """The first start and the last end."""
    return min(e.start for e in events), max(e.end for e in events)


def bubble_share(events: Sequence[Event], stages: int) -> float:
    """The share of the stages' time without work, between the first start and the last end of any of them."""
    start, end = span(events)
    return 1 - sum(e.end - e.start for e in events) / (stages * (end - start))


def formula(stages: int, micro_batches: int) -> float:
    """The bubble share of GPipe and 1F1B with equal stages: ``(S - 1) / (M + S - 1)`` (GPipe, section 2.3)."""
    return (stages - 1) / (micro_batches + stages - 1)


def mean_seconds(timeline: Timeline, kind: Direction) -> float:
    """What one micro-batch takes on one stage, on average over both; the two phases of DualPipeV together."""
    total = sum(e.end - e.start for e in timeline.events if e.kind == kind)
    return total / (timeline.stages * timeline.micro_batches)
