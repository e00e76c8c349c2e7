"""``Engine`` over DeepSpeed's own engine: ZeRO, offload, tensor parallel.

engine = start_engine(model, task, run, plan.ds)    # start.py
step = engine.train_batch(batches, stop=False)     # one optimizer step
"""

import math
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from toolkit.config.schema import Dtype
from toolkit.data.batch import Batch
from toolkit.engine.pipe_events import Event
from toolkit.job import ranks
from toolkit.tasks.task import Collect, Task


@dataclass(frozen=True)
class Step:
    """One optimizer step. ``losses`` are this rank's shares of the global means: their sum over ranks."""

    losses: dict[str, Tensor]
    counts: dict[str, float]  # over all ranks
    data_seconds: float  # this rank waited for its micro-batches
    stop: bool  # some rank wants to stop
    events: tuple[Event, ...] = ()  # of a traced step: what each pipe stage did when


class Engine:
    """DeepSpeed's engine (``ds``) with the toolkit's normalisation of losses."""

    def __init__(self, ds: Any, task: Task, replica: ranks.Replica) -> None:
        self.ds = ds
        self.task = task
        self.replica = replica
        self.device = ds.device
        self.last_learning_rate: float | None = None  # the one the last step used

    def train_batch(self, batches: Iterator[Batch], *, stop: bool = False, trace: bool = False) -> Step:
        """One optimizer step over accumulation-many micro-batches.

        The loss is the mean over all predictions of the global batch, so counts are added up over
        the ranks first: the same number and gradient however the batch is split. ``trace`` asks a
        pipeline for the times of its forward and backward passes.
        """
        self.ds.train()
        micro, counts, waited, stopping = self._draw(batches, stop)
        losses: dict[str, Tensor] = {}
        for batch in micro:
            batch = self._to_device(batch)
            shares = self._shares(self.task.losses(self._forward(batch), batch), counts)
            self.ds.backward(sum(shares.values()) * self._scale)
            self.ds.step()
            self._note(losses, shares)
        losses = {name: share / self.replica.split for name, share in losses.items()}
        return Step(losses, counts, waited, stopping)

    def _draw(self, batches: Iterator[Batch], stop: bool) -> tuple[list[Batch], dict[str, float], float, bool]:
        """The step's micro-batches, what all copies of the model draw together, the wait, and whether to stop."""
        start = time.perf_counter()
        micro = [next(batches) for _ in range(self.ds.gradient_accumulation_steps())]
        waited = time.perf_counter() - start
        counts = _added(self.task.counts(b) for b in micro)
        *sums, stops = ranks.total([*counts.values(), float(stop)])
        counts = {name: total / self.replica.split for name, total in zip(counts, sums, strict=True)}
        self.last_learning_rate = float(self.ds.get_lr()[0])
        return micro, counts, waited, stops > 0

    @property
    def _scale(self) -> int:
        """DeepSpeed divides by accumulation steps and averages over the copies of the model: this undoes both."""
        return int(self.ds.gradient_accumulation_steps()) * self.replica.world

    @torch.no_grad()
    def evaluate(self, batches: Iterator[Batch], collect: Collect | None = None) -> dict[str, float]:
        """Mean losses and accuracies over all ranks' batches, each sample counted once; {} without a batch.

        ``collect(outputs, batch)`` sees what the model says of each micro-batch, on the ranks that have it.
        """
        self.ds.eval()
        sums: dict[str, Tensor] = {}  # on the device: no step waits for the host
        counts: dict[str, float] = {}
        for batch in batches:
            counts = _added([counts, self.task.counts(batch)])
            batch = self._to_device(batch)
            outputs = self._forward(batch)
            self._tally(sums, outputs, batch)
            if collect is not None:
                collect(outputs, batch)
        return self._means(sums, counts)

    def _tally(self, sums: dict[str, Tensor], outputs: Batch, batch: Batch) -> Batch:
        """Add ``<name>_loss`` and ``<name>_right`` of one micro-batch to ``sums``. Returns its losses."""
        losses = self.task.losses(outputs, batch)
        for kind, values in (("loss", losses), ("right", self.task.correct(outputs, batch))):
            for name, value in values.items():
                sums[f"{name}_{kind}"] = sums.get(f"{name}_{kind}", 0) + value.double()
        return losses

    def _means(self, sums: Mapping[str, Tensor], counts: Mapping[str, float]) -> dict[str, float]:
        """Mean losses and accuracies from this rank's ``<name>_loss``, ``<name>_right`` and counts; {} of nothing."""
        mine = [
            float(x)
            for n in self.task.predicted
            for x in (sums.get(f"{n}_loss", 0), sums.get(f"{n}_right", 0), counts.get(n, 0))
        ]
        totals = iter(ranks.total(mine))
        result: dict[str, float] = {}
        for name in self.task.predicted:
            loss, right, count = next(totals), next(totals), next(totals)
            if count:
                result[loss_key(name)] = self.task.unit * loss / count
                result |= {f"{name}_accuracy": right / count} if name in self.task.judged else {}
        return {"loss": sum(v for k, v in result.items() if k.endswith("loss")), **result} if result else {}

    def _forward(self, batch: Batch) -> Batch:
        return self.ds(**{name: batch[name] for name in self.task.inputs})  # type: ignore[no-any-return]

    def _shares(self, losses: Mapping[str, Tensor], counts: Mapping[str, float]) -> dict[str, Tensor]:
        return {name: loss / max(1.0, counts[name]) for name, loss in losses.items()}

    def _note(self, noted: dict[str, Tensor], shares: Mapping[str, Tensor]) -> None:
        """Add the shares of one micro-batch to those that people see."""
        for name, share in shares.items():
            noted[name] = noted.get(name, 0) + self.task.unit * share.detach()

    def _to_device(self, batch: Batch) -> Batch:
        return {name: tensor.to(self.device, non_blocking=True) for name, tensor in batch.items()}

    def report(self, record: Mapping[str, Any]) -> None:
        """The finite numbers of a record to DeepSpeed's monitors."""
        monitor = self.ds.monitor
        if ranks.rank() == 0 and monitor.enabled:
            numbers = {k: v for k, v in record.items() if isinstance(v, int | float) and math.isfinite(v)}
            monitor.write_events([(f"toolkit/{k}", v, record["step"]) for k, v in numbers.items() if k != "step"])

    def close(self) -> None:
        """Give up what the next engine of this process would find in its way."""
        from deepspeed.utils import groups

        self.ds.destroy()
        groups.mpu = None  # of split layers or stages, which the next engine would take for its own

    @property
    def dtype(self) -> Dtype:
        """What the matrix products are computed in: fp32, bf16 or fp16."""
        return "bf16" if self.ds.bfloat16_enabled() else "fp16" if self.ds.fp16_enabled() else "fp32"

    @property
    def grad_norm(self) -> float | None:
        """The norm before clipping of the last step, over all parameters and ranks."""
        norm = self.ds.get_global_grad_norm()
        return None if norm is None else float(norm)

    @property
    def loss_scale(self) -> float | None:
        return float(self.ds.optimizer.cur_scale) if self.ds.fp16_enabled() else None


def loss_key(name: str) -> str:
    """What records call a loss: ``mlm_loss``; a task's only one is ``loss``."""
    return name if name == "loss" else f"{name}_loss"


def _added(rows: Iterable[Mapping[str, float]]) -> dict[str, float]:
    total: dict[str, float] = {}
    for row in rows:
        total = {name: total.get(name, 0) + value for name, value in row.items()}
    return total
