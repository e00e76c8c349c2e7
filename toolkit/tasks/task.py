"""What a task is: what it reads, what it makes of a batch, its losses, counts, metrics and files.

    class Mine(Task): ...     # a new kind: its class, what it can do (toolkit/config/kinds.py), a preset

The engine, the loop and the pipeline know a task by this class alone. Hooks have the default of a task without any.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

from rich.console import Console
from torch import Tensor
from torch.nn.functional import cross_entropy

from toolkit.config.schema import RunConfig
from toolkit.data import loader
from toolkit.data.batch import IGNORED, Batch
from toolkit.data.order import Order, Split
from toolkit.data.prepared import Prepared
from toolkit.errors import ConfigError
from toolkit.run.directory import Run

Watch = Callable[[Iterable[Any]], Iterator[Any]]  # what passes it is waited for no longer than train.hang_minutes
Collect = Callable[[Batch, Batch], None]  # sees (outputs, batch)


class Evaluates(Protocol):
    """The engine as a task sees it; ``ds`` is DeepSpeed's."""

    ds: Any

    def evaluate(self, batches: Iterator[Batch], collect: Collect | None = None) -> dict[str, float]:
        """Mean losses and accuracies over the batches of all ranks, each sample counted once."""


class Task:
    """Losses are sums over what is predicted; the engine divides by the count of the global batch."""

    inputs: tuple[str, ...]  # of a batch, that the model reads
    labels: tuple[str, ...]  # of a batch, that the loss reads
    outputs: tuple[str, ...]  # of the model, in the order of a pipeline's
    predicted: tuple[str, ...] = ("loss",)  # the names of losses and of their counts
    judged: tuple[str, ...] = ()  # those with an accuracy
    best: str | None = None  # the metric that chooses between checkpoints; None: the last is the one
    unit = 1.0  # what people see is so many times the loss that is minimised
    hf_config: Any  # Hugging Face's, of its model
    model_class: Any
    new_head = False  # whether weights may lack the head
    choices = 1  # sequences of a sample
    vocab_size = 1  # of no words
    prepares: str  # what prepare() makes, in a word
    train: loader.Dataset  # once learns() is called
    order: Order
    steps: int  # optimizer steps of the whole run, once lasts() is
    epoch_steps: int

    def __init__(self, run: Run) -> None:
        self.run, self.config, self.replica = run, run.config, run.replica
        batch = run.config.batch
        self.split = Split(batch.global_size, batch.micro_size, run.replica.rank, run.replica.world)
        self.notes: dict[str, float] = {}  # numbers to show beside the held-out results

    @classmethod
    def prepare(cls, config: RunConfig, console: Console) -> Prepared:
        """The data, read, checked and tokenised; found in the cache the next time."""
        raise ConfigError(f"task.kind={config.task.kind}: it has nothing to prepare. Start its recipe.")

    def tell(self, prepared: Prepared) -> None:
        """Say what a person should know of the data before training begins."""
        for line in prepared.notes:
            self.run.console.print(line, highlight=False, markup=False)
        for line in prepared.warnings:
            self.run.warn(line)

    def learns(self, dataset: loader.Dataset, order: Order) -> None:
        """Settle what is trained on, in which order, and how many steps the run has."""
        self.train, self.order = dataset, order
        self.lasts(order.steps)

    def lasts(self, steps_of: Callable[[float], int]) -> None:
        """Settle how many steps the run has, of a function that tells those of so many epochs."""
        train, schedule = self.config.train, self.config.schedule
        self.epoch_steps, by_epochs = steps_of(1), train.epochs and steps_of(train.epochs)
        self.steps = min(n for n in (train.steps, by_epochs) if n)
        if schedule.name != "none" and schedule.warmup > self.steps:
            raise ConfigError(
                f"schedule.warmup={schedule.warmup:g} steps is above the {self.steps} steps of this "
                "run: the rate would never be reached. Lower it; below 1 it is a share of the steps."
            )
        reason = f"train.epochs={train.epochs:g}" if self.steps == by_epochs else f"train.steps={train.steps}"
        self.run.console.print(f"{self.steps:,} steps ({reason}), {self.epoch_steps:,} an epoch.", highlight=False)

    def train_batches(self, start_sample: int) -> Iterator[Batch]:
        """This rank's micro-batches after ``start_sample`` samples, that is whole optimizer steps; for ever."""
        workers = self.config.data.workers
        return loader.train_batches(self.train, self.order, self.split, start_sample=start_sample, workers=workers)

    # What every kind says of itself ----------------------------------------------------------------------------------

    def losses(self, outputs: Batch, batch: Batch) -> Batch:
        """For each of ``predicted`` its loss, summed over the micro-batch."""
        raise NotImplementedError

    def counts(self, batch: Batch) -> dict[str, float]:
        """What the micro-batch holds: predictions by the names of losses, ``sequences``, ``tokens``, ``positions`` …"""
        raise NotImplementedError

    def useful_flops(self, counts: dict[str, float]) -> float:
        """Forward and backward of what was counted; padding is no use to anyone."""
        raise NotImplementedError

    # What some do ----------------------------------------------------------------------------------------------------

    def eval_batches(self) -> Iterator[Batch]:
        """This rank's share of what is held out, the same each time."""
        return iter(())

    def correct(self, outputs: Batch, batch: Batch) -> Batch:
        """How many of the predictions are right, for each of ``judged``."""
        return {}

    def evaluate(self, engine: Evaluates, watch: Watch) -> dict[str, float]:
        """Losses and metrics on what is held out."""
        return engine.evaluate(watch(self.eval_batches()))

    def predict(self, engine: Evaluates, watch: Watch) -> dict[str, float]:
        """Write what the best weights predict. Returns numbers for the records."""
        return {}


def summed_loss(logits: Tensor, labels: Tensor, smoothing: float = 0.0) -> Tensor:
    """Cross-entropy against ``1 - smoothing`` for the label plus ``smoothing`` spread evenly over the classes.

    logits [..., classes], labels [...] with -100 where there is nothing to predict
    (Szegedy et al. 2016, section 7; Vaswani et al. 2017, section 5.4).
    """
    flat, wanted = logits.float().flatten(0, -2), labels.flatten()
    return cross_entropy(flat, wanted, ignore_index=IGNORED, reduction="sum", label_smoothing=smoothing)
