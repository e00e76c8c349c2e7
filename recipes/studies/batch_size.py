"""Steps to a loss by batch size, with the learning rate tuned for each, and the regime that each size is in.

rows = judged([best(size, search(trials.of(size), rate, (0.5, 1, 2), 4, 2000)) for size in sizes])

After Shallue et al. 2019, "Measuring the effects of data parallelism on neural network training" (JMLR 20): up to
some size a doubled batch halves the steps (perfect scaling), then it saves less (diminishing returns), at last
nothing (plateau). It is true of tuned rates only, so the best one must lie between others that are worse.
Regimes, by the share of the steps that a doubling saves, at best 50 %: perfect from PERFECT, plateau below PLATEAU.
"""

import dataclasses
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from toolkit.config.schema import Batch, RunConfig, Schedule
from toolkit.deepspeed import ds_config
from toolkit.engine.start import start_engine
from toolkit.errors import ConfigError
from toolkit.job import ranks
from toolkit.models.build import build_model
from toolkit.report import figures
from toolkit.run.directory import Run
from toolkit.run.table import table
from toolkit.tasks import build_task
from toolkit.tasks.task import Task
from toolkit.train.own_plan import begin

PERFECT, PLATEAU = 0.4, 0.25
DIVERGED = 10  # times the loss before training
COLOUR = dict(zip(("", "perfect", "diminishing", "plateau", "not reached"), figures.COLOURS, strict=False))


@dataclass(frozen=True)
class Trial:
    """One training at one rate; ``steps`` is None unless it reached the target, in at most ``limit`` steps."""

    size: int
    rate: float
    target: float
    limit: int
    steps: int | None
    end: str  # reached, not reached, diverged
    loss: float  # the last, inf where it diverged


Attempt = Callable[[float, int], Trial]  # of a rate and a number of steps


def check(config: RunConfig, sizes: Sequence[int], rates: Sequence[float], target: float | None) -> list[int]:
    """The sizes in order. Raises ConfigError before anything is trained."""
    if target is None:
        raise ConfigError("batch_size.target_loss is not set: it is the held-out loss to reach, an eval_loss of a run.")
    if len(set(sizes)) < 2 or len(set(rates)) < 3:
        raise ConfigError("batch_size: there is nothing to compare: give two sizes and three rates, or more.")
    if "lr" not in config.deepspeed["optimizer"].get("params", {}):
        raise ConfigError("deepspeed.optimizer.params.lr is not set: the first learning rates are multiples of it.")
    for size in sizes:
        try:
            ds_config.complete(of_size(config, size, 1), world=ranks.world(), device=ranks.device())
        except ConfigError as error:
            raise ConfigError(f"batch_size.sizes={list(sizes)}: {error}") from error
    return sorted(set(sizes))


def of_size(config: RunConfig, size: int, steps: int) -> RunConfig:
    """The run's configuration for one batch size: a constant rate, no epochs."""
    return config.model_copy(
        update={
            "batch": Batch(global_size=size, micro_size=config.batch.micro_size),
            "train": config.train.model_copy(update={"steps": steps, "epochs": None}),
            "schedule": Schedule(name="constant", warmup=0),
            "data": config.data.model_copy(update={"workers": 0}),
        }
    )


class Trials:
    """Those of this run, kept in trials.jsonl: each is made once, however often the run is started."""

    def __init__(self, run: Run, target: float, steps: int) -> None:
        self.run, self.target, self.steps = run, target, steps
        self.path = run.dir / "trials.jsonl"
        own = {"name", "output_dir", "resume", "batch_size"}
        given = {"config": run.config.model_dump(mode="json", exclude=own)}
        head, *lines = ranks.from_rank0(self._read()) or [given]
        if head != given:
            raise ConfigError(f"name={run.dir.name}: its trials are of another configuration. Choose another name.")
        run.write_text(self.path.name, "".join(json.dumps(line) + "\n" for line in (head, *lines)))
        self.all = [Trial(**line) for line in lines]

    def _read(self) -> list[dict[str, Any]]:
        lines = self.path.read_text().splitlines(keepends=True) if self.path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]  # a kill can cut the last one

    def of(self, size: int) -> Attempt:
        """A trial of this size by rate and limit: as it was made, or made now."""
        prepared: list[Any] = []

        def attempt(rate: float, limit: int) -> Trial:
            for old in self.all:
                if (old.size, old.rate, old.target) == (size, rate, self.target) and old.limit >= limit:
                    return old
            if not prepared:
                run = Run(self.run.dir, of_size(self.run.config, size, self.steps), Console(quiet=True))
                prepared.extend([build_task(run), run])
            task, run = prepared
            steps, end, loss = self._train(task, run, rate, limit)
            trial = Trial(size, rate, self.target, limit, steps, end, loss)
            said = f"{end} in {steps}" if steps else f"{end} in {limit}" if end == "not reached" else end
            self.run.console.print(f"batch {size}  lr {rate:.3g}  {said}", highlight=False)
            self.all.append(trial)
            if ranks.rank() == 0:
                with self.path.open("a") as file:
                    file.write(json.dumps(dataclasses.asdict(trial)) + "\n")
            return trial

        return attempt

    def _train(self, task: Task, base: Run, rate: float, limit: int) -> tuple[int | None, str, float]:
        """One training from the same weights: steps to the target or None, how it ended, and at what loss."""
        optimizer = base.config.deepspeed["optimizer"]
        ds = base.config.deepspeed | {"optimizer": optimizer | {"params": optimizer["params"] | {"lr": rate}}}
        run = Run(base.dir, base.config.model_copy(update={"deepspeed": ds}), base.console)
        plan = begin(run, task)
        engine = start_engine(build_model(run, task, plan.ds), task, run, plan.ds)
        try:
            return _steps_to(engine, task, self.target, limit)
        finally:
            engine.close()


def _steps_to(engine: Any, task: Any, target: float, limit: int) -> tuple[int | None, str, float]:
    def loss() -> float:
        found: float = ranks.from_rank0(task.evaluate(engine, lambda batches: batches).get("loss", math.nan))
        return found

    first = now = loss()
    if not first > target:
        raise ConfigError(f"batch_size.target_loss={target:g}: the loss before training is {first:g}. Set a lower one.")
    batches, step = task.train_batches(start_sample=0), 0
    for until in evaluations(limit):
        for _ in range(until - step):
            engine.train_batch(batches)
        step, now = until, loss()
        if now <= target:
            return step, "reached", now
        if not now < DIVERGED * first:
            return None, "diverged", math.inf
    return None, "not reached", now


def evaluations(limit: int) -> Iterator[int]:
    """The steps to evaluate after: all of the first 40, then at distances of 5 %, and the last."""
    step = 0
    while step < limit:
        step = min(limit, step + max(1, step // 20))
        yield step


def search(attempt: Attempt, centre: float, factors: Sequence[float], extend: int, steps: int) -> list[Trial]:
    """Trials at ``centre`` times each of ``factors``, and up to ``extend`` beyond them while the best is at an end.

    A trial needs not go on for longer than the best so far took.
    """
    rates = sorted({centre * f for f in factors})
    trials: list[Trial] = []

    def run(rate: float) -> None:
        fewest = min((t.steps for t in trials if t.steps), default=steps)
        trials.append(attempt(rate, fewest))

    for rate in sorted(rates, key=lambda r: abs(math.log(r / centre))):
        run(rate)
    while extend and (side := _at_end(trials)):
        trials.sort(key=lambda t: t.rate)
        run(trials[-1].rate ** 2 / trials[-2].rate if side > 0 else trials[0].rate ** 2 / trials[1].rate)
        extend -= 1
    return sorted(trials, key=lambda t: t.rate)


def _best(trials: Sequence[Trial]) -> Trial:
    """The one with the fewest steps, of equals the middle one; where none reached the target, the nearest.

    Where all diverged, the least rate: a lower one may not.
    """
    if all(t.end == "diverged" for t in trials):
        return min(trials, key=lambda t: t.rate)
    best = min((t.steps or math.inf, 0 if t.steps else t.loss) for t in trials)
    equal = [t for t in trials if (t.steps or math.inf, 0 if t.steps else t.loss) == best]
    return sorted(equal, key=lambda t: t.rate)[(len(equal) - 1) // 2]


def _at_end(trials: Sequence[Trial]) -> int:
    """-1 or 1 if the best rate is the least or the largest of those tried, else 0."""
    best, rates = _best(trials).rate, [t.rate for t in trials]
    return (best == max(rates)) - (best == min(rates))


def best(size: int, trials: Sequence[Trial]) -> dict[str, Any]:
    """A row: the best trial of a size; ``inside`` unless a rate beyond those tried may be better."""
    found = _best(trials)
    inside = found.steps is not None and not _at_end(trials)
    return {"batch_size": size, "rate": found.rate, "steps": found.steps, "inside": inside}


def judged(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """``rows`` of batch_size and steps with samples, speedup and ideal against the smallest size, saved, regime."""
    first = next((r for r in rows if r["steps"]), None)
    before, found = first, []
    for row in rows:
        steps, size = row["steps"], row["batch_size"]
        more: dict[str, Any] = dict.fromkeys(("samples", "speedup", "ideal", "saved"))
        if steps and first and before:
            more |= {"samples": steps * size, "speedup": first["steps"] / steps, "ideal": size / first["batch_size"]}
            if row is not first:
                doublings = math.log2(size / before["batch_size"])
                more["saved"] = 1 - (steps / before["steps"]) ** (1 / doublings)
            before = min(row, before, key=lambda r: r["steps"])  # a size that chance made worse is no measure
        found.append(row | more | {"regime": _regime(steps, more["saved"])})
    return found


def _regime(steps: int | None, saved: float | None) -> str:
    if not steps:
        return "not reached"
    if saved is None:
        return ""
    return "perfect" if saved >= PERFECT else "plateau" if saved < PLATEAU else "diminishing"


def useful(rows: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The row of the largest size that reached the target and is not on the plateau; None if there is none."""
    return next((r for r in reversed(rows) if r["steps"] and r["regime"] != "plateau"), None)


def verdict(rows: Sequence[dict[str, Any]], micro: int) -> str:
    """How many ranks are of use, in a sentence."""
    last = useful(rows)
    if last is None:
        return (
            "No batch size reached the target: raise batch_size.target_loss or batch_size.max_steps, or, where trials "
            "diverged, lower deepspeed.optimizer.params.lr."
        )
    size, first = last["batch_size"], next(r for r in rows if r["steps"])
    least = "at least " if last is rows[-1] else ""
    return (
        f"Largest useful data-parallel degree: {least}{max(1, size // micro)} ranks of {micro} samples each, a batch "
        f"of {size:,}: {last['speedup']:.1f} times fewer steps than with {first['batch_size']:,}, where "
        f"{last['ideal']:g} times would be perfect."
    )


def listing(rows: Sequence[dict[str, Any]]) -> Table:
    """A line for each batch size."""
    columns = {
        "batch_size": ",", "rate": ".3g", "steps": ",", "samples": ",", "speedup": ".1f", "ideal": "g",
        "saved": ".0%", "regime": "",
    }  # fmt: skip
    cells = [[*(row[name] for name in columns), "" if row["inside"] else "extend rates"] for row in rows]
    heads = {name.replace("_", " "): form for name, form in columns.items()} | {"": ""}
    return table(heads, cells, "Steps to the target; saved: by a doubling")


def plot(rows: Sequence[dict[str, Any]], trials: Sequence[Trial], stem: Path, title: str) -> None:
    """``stem``.png and .svg: steps by batch size against perfect scaling and learning rates, by batch size."""
    done = [r for r in rows if r["steps"]]
    if not done:
        return  # a logarithmic axis has no place for nothing
    figure, (steps, rates) = figures.new(2, title)
    sizes, fewest = [r["batch_size"] for r in done], min(r["steps"] for r in done)
    steps.plot(sizes, [done[0]["steps"] / r["ideal"] for r in done], "--", color="0.5", label="perfect scaling")
    steps.axhline(fewest, ls=":", color="0.5", label=f"fewest: {fewest:,} steps")
    steps.plot(sizes, [r["steps"] for r in done], color="0.7", zorder=1)
    for regime in dict.fromkeys(r["regime"] for r in done):
        mine = [r for r in done if r["regime"] == regime]
        places = [r["batch_size"] for r in mine], [r["steps"] for r in mine]
        steps.plot(*places, "o", color=COLOUR[regime], label=regime or "smallest batch")
    steps.set_ylabel("steps to the target")
    for end, mark in (("reached", "o"), ("not reached", "_"), ("diverged", "x")):
        tried = [t for t in trials if t.end == end]
        rates.plot([t.size for t in tried], [t.rate for t in tried], mark, ms=5, color="0.6", label=f"tried: {end}")
    rates.plot(sizes, [r["rate"] for r in done], "o-", color=figures.COLOURS[0], label="best")
    rates.set_ylabel("learning rate")
    for axes in (steps, rates):
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks([r["batch_size"] for r in rows], [str(r["batch_size"]) for r in rows])
        axes.set_xlabel("batch size")
        axes.legend(frameon=False, fontsize=8)
    figures.save(figure, stem)
