"""``Engine`` over DeepSpeed's own engine: ZeRO, offload, tensor parallel.

engine = start_engine(model, task, run, plan.ds)    # start.py
step = engine.train_batch(batches, stop=False)     # one optimizer step
"""

import gc
import math
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from deepspeed.utils import groups
from torch import Tensor

from toolkit.config.schema import Dtype
from toolkit.data.batch import Batch
from toolkit.engine.pipe_events import Event
from toolkit.job import nvme, ranks
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
        """One optimizer step over accumulation-many micro-batches; ``trace`` asks a pipeline for its passes' times.

        The loss is the mean over all predictions of the global batch, so counts are added up over the ranks first:
        the same number and gradient however the batch is split.
        """
        self.ds.train()
        micro, step = self._draw(batches, stop)
        for batch in micro:
            self.ds.backward(self._share(*self._forward(batch), step))
            self.ds.step()
        return replace(step, losses={name: share / self.replica.split for name, share in step.losses.items()})

    def _draw(self, batches: Iterator[Batch], stop: bool) -> tuple[list[Batch], Step]:
        """The micro-batches of a step, and what is known of it before: nothing of its losses yet."""
        start = time.perf_counter()
        micro = [next(batches) for _ in range(self.ds.gradient_accumulation_steps())]
        waited = time.perf_counter() - start
        counts = Counter[str]()
        for batch in micro:
            counts.update(self.task.counts(batch))
        *sums, stops = ranks.total([*counts.values(), float(stop)])
        self.last_learning_rate = float(self.ds.get_lr()[0])
        # all copies of the model draw together, and the ranks that share one draw the same
        drawn = {name: total / self.replica.split for name, total in zip(counts, sums, strict=True)}
        return micro, Step({}, drawn, waited, stops > 0)

    def _share(self, outputs: Batch, batch: Batch, step: Step) -> Tensor:
        """What DeepSpeed minimises of a micro-batch: its shares of the global means; ``step`` keeps what people see."""
        losses = self.task.losses(outputs, batch)
        shares = {name: loss / max(1.0, step.counts[name]) for name, loss in losses.items()}
        for name, share in shares.items():
            step.losses[name] = step.losses.get(name, 0) + self.task.unit * share.detach()
        # DeepSpeed divides by accumulation steps and averages over the copies of the model: this undoes both.
        scale = int(self.ds.gradient_accumulation_steps()) * self.replica.world
        return sum(shares.values()) * scale  # type: ignore[return-value]

    @torch.no_grad()
    def evaluate(self, batches: Iterator[Batch], collect: Collect | None = None) -> dict[str, float]:
        """Mean losses and accuracies over all ranks' batches, each sample counted once; {} without a batch. On the
        ranks that have it, ``collect(outputs, batch)`` sees what the model says of each micro-batch."""
        self.ds.eval()
        sums: dict[str, Tensor] = {}  # on the device: no step waits for the host
        counts = Counter[str]()
        for batch in batches:
            counts.update(self.task.counts(batch))
            outputs, batch = self._forward(batch)
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
        names, result = self.task.predicted, dict[str, float]()
        rows = [(sums.get(f"{n}_loss", 0), sums.get(f"{n}_right", 0), counts.get(n, 0)) for n in names]
        mine = [float(x) for row in rows for x in row]
        totals = iter(ranks.total(mine))
        for name, loss, right, count in zip(names, totals, totals, totals, strict=True):  # three of each
            if count:
                result[loss_key(name)] = self.task.unit * loss / count
                result |= {f"{name}_accuracy": right / count} if name in self.task.judged else {}
        return {"loss": sum(v for k, v in result.items() if k.endswith("loss")), **result} if result else {}

    def _forward(self, batch: Batch) -> tuple[Batch, Batch]:
        """What the model says of ``batch``, and it, on the device."""
        batch = {name: tensor.to(self.device, non_blocking=True) for name, tensor in batch.items()}
        return self.ds(**{name: batch[name] for name in self.task.inputs}), batch

    def report(self, record: Mapping[str, Any]) -> None:
        """The finite numbers of a record to DeepSpeed's monitors."""
        monitor = self.ds.monitor
        if ranks.rank() == 0 and monitor.enabled:
            numbers = {k: v for k, v in record.items() if isinstance(v, int | float) and math.isfinite(v)}
            monitor.write_events([(f"toolkit/{k}", v, record["step"]) for k, v in numbers.items() if k != "step"])

    def close(self) -> None:
        """Give up what the next engine of this process would find in its way: groups, memory, folders on NVMe."""
        self.ds.destroy()
        groups.mpu = None  # of split layers or stages, which the next engine would take for its own
        del self.ds
        nvme.release()
        gc.collect()

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
