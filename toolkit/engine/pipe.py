"""``Engine`` over DeepSpeed's pipeline engines: the same verb, the same losses, and when each stage did what.

engine = start_engine(model, task, run, plan.ds) # a PipeEngine if pipeline.stages > 1
step = engine.train_batch(batches, trace=True)   # step.events: the timeline of this step
"""

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.pipe.dualpipev import DualPipeVEngine
from torch import Tensor

from toolkit.data.batch import IGNORED, Batch
from toolkit.engine.pipe_events import Direction, Event
from toolkit.engine.pipe_schedule import PASSES, GPipeSchedule
from toolkit.engine.plain import Engine, Step
from toolkit.job import ranks
from toolkit.tasks.task import Collect, Task

KEPT = ("attention_mask",)  # of a micro-batch without anything to predict: the model still reads it


class PipeEngine(Engine):
    """The loss is computed on the last pipe stage only; all ranks draw the micro-batches of their copy."""

    def __init__(self, ds: Any, task: Task, replica: ranks.Replica, schedule: str) -> None:
        super().__init__(ds, task, replica)
        ds.module.loss_fn = self._loss
        self._step = Step({}, {}, 0.0, False)  # the one under way
        self._sums: dict[str, Tensor] = {}
        self._collect: Collect | None = None
        self._events: list[Event] | None = None
        self._done = Counter[tuple[Direction, int]]()
        self._began = 0.0
        if schedule == "gpipe":
            fill_and_drain(ds)
        ds._INSTRUCTION_MAP = {
            what: self._timed(execute, PASSES[what]) if what in PASSES else execute
            for what, execute in ds._INSTRUCTION_MAP.items()
        }

    def train_batch(self, batches: Iterator[Batch], *, stop: bool = False, trace: bool = False) -> Step:
        micro, self._step = self._draw(batches, stop)
        if trace:
            # One zero for all: the ranks of a host share its clock, hosts agree as well as NTP makes them.
            self._events, self._done, self._began = [], Counter(), ranks.from_rank0(time.time())
        self.ds.train_batch(iter([self._pair(batch) for batch in micro]))
        losses = {name: self._step.losses.get(name, torch.zeros(())) for name in self.task.predicted}
        mine, self._events = self._events, None
        # those of the first copy of the model, of all its stages
        parts = [] if mine is None else ranks.gathered(mine if self.replica.rank == 0 else [])
        return replace(self._step, losses=losses, events=tuple(event for part in parts for event in part))

    @torch.no_grad()
    def evaluate(self, batches: Iterator[Batch], collect: Collect | None = None) -> dict[str, float]:
        self._sums, self._collect, counts = {}, collect, Counter[str]()
        # DeepSpeed would report the loss of each few batches as that of an evaluation.
        monitored, self.ds.monitor.enabled = self.ds.monitor.enabled, False
        size = self.ds.gradient_accumulation_steps()
        while some := list(islice(batches, size)):
            for batch in some:
                counts.update(self.task.counts(batch))
            if isinstance(self.ds, DualPipeVEngine):  # it needs 2 x stages micro-batches, and training has them
                some += [self._blank(some[0])] * (size - len(some))
            self.ds.eval_batch(iter([self._pair(b) for b in some]), bcast_loss=False, num_micro_batches=len(some))
        self.ds.monitor.enabled = monitored
        return self._means(self._sums, counts if self._sums else {})

    def _loss(self, outputs: tuple[Tensor, ...], labels: tuple[Tensor, ...]) -> Tensor:
        """On the last stage, of one micro-batch: what the backward pass starts from."""
        named = dict(zip(self.task.outputs, outputs, strict=False))
        batch = dict(zip(self.task.labels, labels, strict=True))
        if not self.ds.module.training:
            if self._collect is not None:
                self._collect(named, batch)
            return sum(self._tally(self._sums, named, batch).values())  # type: ignore[return-value]
        return self._share(named, batch, self._step)

    def _pair(self, batch: Batch) -> tuple[tuple[Tensor, ...], ...]:
        """What the first stage reads, and what the last one does."""
        return tuple(batch[name] for name in self.task.inputs), tuple(batch[name] for name in self.task.labels)

    def _blank(self, batch: Batch) -> Batch:
        """``batch`` without anything to predict: -100, or no number where labels are floats."""
        nothing = {n: math.nan if batch[n].is_floating_point() else IGNORED for n in self.task.labels if n not in KEPT}
        return batch | {name: torch.full_like(batch[name], value) for name, value in nothing.items()}

    def _timed(self, execute: Callable[..., None], kind: Direction) -> Callable[..., None]:
        """``execute`` that notes its times in a traced step."""

        def timed(ds: Any, **where: Any) -> None:
            start = self._now()
            execute(ds, **where)
            if self._events is not None:
                phase, end = where.get("phase", 0), self._now()
                number = self._done[kind, phase]
                self._done[kind, phase] += 1
                self._events.append(Event(ds.stage_id, kind, number, start - self._began, end - self._began, phase))

        return timed

    def _now(self) -> float:
        if self._events is not None:
            get_accelerator().synchronize()
        return time.time()


def fill_and_drain(ds: Any) -> None:
    """GPipe's schedule; the engine keeps one loss, of the last forward pass, so each buffer gets its own."""
    forward, backward = (ds._INSTRUCTION_MAP[what] for what in PASSES)
    losses: dict[int, Tensor] = {}

    def forward_pass(engine: Any, buffer_id: int) -> None:
        forward(engine, buffer_id=buffer_id)
        losses[buffer_id] = engine.loss

    def backward_pass(engine: Any, buffer_id: int) -> None:
        engine.loss = losses.pop(buffer_id)
        backward(engine, buffer_id=buffer_id)

    ds._train_schedule = lambda: GPipeSchedule(ds.micro_batches, ds.num_stages, ds.stage_id)
    ds._INSTRUCTION_MAP = ds._INSTRUCTION_MAP | dict(zip(PASSES, (forward_pass, backward_pass), strict=True))
