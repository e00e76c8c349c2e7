"""The loop: train, log, evaluate, save, and stop cleanly when asked to; and what a person at the terminal sees of it.

fit(engine, task, run, plan)
"""

import functools
import math
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from toolkit.checkpoint import checkpoint
from toolkit.engine.pipe_events import Timeline, bubble_share, formula
from toolkit.engine.plain import Engine, Step, loss_key
from toolkit.errors import Stopped, ToolkitError, go_on
from toolkit.job import ranks, watchdog
from toolkit.run.directory import Run
from toolkit.run.table import table
from toolkit.tasks import metrics
from toolkit.tasks.task import Task, Watch
from toolkit.train import own_plan
from toolkit.train.meter import Meter


def fit(engine: Engine, task: Task, run: Run, plan: own_plan.OwnPlan) -> dict[str, Any]:
    """Train to the end, from the newest checkpoint if there is one. Returns the evaluation of the best weights."""
    config, total = run.config, task.steps
    # with batch.tokens later epochs differ by a step or so
    eval_every = task.epoch_steps if config.train.eval_every == "epoch" else config.train.eval_every
    watchdog.expect(config.train.hang_minutes)
    state = checkpoint.resume(run, engine)
    step, samples = state.step, state.samples
    run.rewind(step)
    best = find_best(run, task, step)
    if step >= total:
        run.console.print(f"{run.dir} has its {step} steps already (train.steps={total}): evaluating only.")
    elif best.ended:
        run.console.print(f"{run.dir} ended early after step {step}: evaluating only.")
    meter = Meter(config, task, engine.dtype)  # before the data workers are busy: it measures a CPU's peak
    watch = functools.partial(watched, minutes=config.train.hang_minutes)
    batches = watch(task.train_batches(start_sample=samples))
    result: dict[str, Any] = {}
    with stop_signals() as stopping, progress(run.console, step, total) as bar:
        while step < total and not best.ended:
            logged = due(step + 1, config.train.log_every, total) or step == 0
            done = engine.train_batch(batches, stop=stopping(), trace=logged)
            step, samples = step + 1, samples + config.batch.global_size
            watchdog.expect(config.train.hang_minutes, step)
            meter.add(done)
            bar(step)
            if logged:
                log(run, engine, meter, total, step, done)
            with meter.paused():
                result = {}
                wanted = (eval_every and step % eval_every == 0) or (step == total and task.best)
                if wanted and not done.stop:  # launchers give the ranks 30 s to save
                    result = evaluate(engine, task, run, step, watch)
                    best = find_best(run, task, step)
                if due(step, config.train.save_every, total) or done.stop or step == best.step or best.ended:
                    refuse_nan(run, step, sum(global_losses(done).values()))  # never saved
                    checkpoint.save(run, engine, checkpoint.State(step, samples), keep=best.step)
            if done.stop and step < total:
                raise Stopped(f"Stopped by a signal after step {step}; saved in {run.dir}. {go_on()}")
    if best.step not in (None, step):
        checkpoint.load_best(run, engine, best.step)
        result = {}
    step = step if best.step is None else best.step
    result = result or evaluate(engine, task, run, step, watch)
    if predicted := task.predict(engine, watch):
        record(run, engine, {"step": step, **predicted})
    watchdog.expect(None)
    rates = meter.overall()
    own_plan.finish(run, plan, meter.peak_gib, rates)
    summary(run, task.notes, rates, result)
    return result


@dataclass(frozen=True)
class Best:
    """The step with the highest ``task.best``, if the task has one, and whether training has waited long enough."""

    step: int | None = None
    ended: bool = False


def find_best(run: Run, task: Task, now: int) -> Best:
    """The first of the best evaluations whose weights are kept, or are those of step ``now``; and whether
    ``train.patience`` evaluations have come since."""
    if task.best is None:
        return Best()
    key, patience = f"eval_{task.best}", run.config.train.patience
    scores = {r["step"]: r[key] for r in run.records() if r.get(key) is not None}  # each step's latest
    there = {now, *(int(p.name.partition("-")[2]) for p in checkpoint.list_checkpoints(run.dir / "checkpoints"))}
    candidates = there & set(scores)
    mine = Best()
    if candidates:
        sign = -1 if task.best in metrics.LOWER_IS_BETTER else 1
        step = max(candidates, key=lambda s: (sign * scores[s], -s))
        mine = Best(step, patience is not None and sum(s > step for s in scores) >= patience)
    found: Best = ranks.from_rank0(mine)
    if found.step is not None:
        run.write_json("best.json", {"step": found.step, "metric": task.best, "value": scores.get(found.step)})
    elif ranks.rank() == 0:
        (run.dir / "best.json").unlink(missing_ok=True)
    return found


def watched(batches: Iterable[Any], minutes: float | None) -> Iterator[Any]:
    """``batches``; if the next is not asked for in time, the job ends and every rank's log tells where it stood."""
    for batch in batches:
        watchdog.expect(minutes)
        yield batch


def due(step: int, every: int | None, total: int) -> bool:
    """On every ``every``-th step, and on the last."""
    return step == total or (every is not None and step % every == 0)


def record(run: Run, engine: Engine, found: dict[str, Any]) -> None:
    """One line of metrics.jsonl, and DeepSpeed's monitors."""
    run.log(found)
    engine.report(found)


def log(run: Run, engine: Engine, meter: Meter, total: int, step: int, done: Step) -> None:
    """One training record: losses of this very step over the global batch, rates since the last record."""
    losses = global_losses(done)
    found: dict[str, Any] = {"step": step, "loss": sum(losses.values()), **losses}
    found |= {"lr": engine.last_learning_rate, "grad_norm": engine.grad_norm}
    if engine.loss_scale is not None:
        found["loss_scale"] = engine.loss_scale
    found |= meter.read() | bubbles(run, step, done)
    if "step_seconds" in found:
        found["eta_seconds"] = found["step_seconds"] * (total - step)
    record(run, engine, found)
    run.console.print(line(found, total), highlight=False)
    refuse_nan(run, step, found["loss"])


def bubbles(run: Run, step: int, done: Step) -> dict[str, float]:
    """What share of the pipe stages' time was idle, measured and by the formula; the events go to timeline.json."""
    if not done.events:
        return {}
    schedule, stages = run.config.pipeline.schedule, run.config.pipeline.stages
    number = 1 + max(e.micro_batch for e in done.events)
    timeline = Timeline(schedule=schedule, stages=stages, micro_batches=number, step=step, events=done.events)
    run.write_json("timeline.json", timeline.model_dump())
    return {"bubble": bubble_share(done.events, stages), "bubble_formula": formula(stages, number)}


def global_losses(done: Step) -> dict[str, float]:
    """The means over the global batch; the same on every rank, and the host waits for the device."""
    totals = ranks.total([float(share) for share in done.losses.values()])
    return {loss_key(name): total for name, total in zip(done.losses, totals, strict=True)}


def refuse_nan(run: Run, step: int, loss: float) -> None:
    """A loss that is not finite spoils the weights: end before they are saved."""
    if not math.isfinite(loss):
        raise ToolkitError(
            f"step {step}: the loss is {loss}. Lower deepspeed.optimizer.params.lr or lengthen schedule.warmup: the "
            f"newest checkpoint of {run.dir} is from before. {go_on()}"
        )


def evaluate(engine: Engine, task: Task, run: Run, step: int, watch: Watch) -> dict[str, Any]:
    """One evaluation record: means over the held-out samples, each counted once."""
    start = time.perf_counter()
    # What says itself of which rows it is keeps its name: train_loss, optimum_loss.
    found = task.evaluate(engine, watch)
    result = {k if k.startswith(("train_", "optimum_")) else f"eval_{k}": v for k, v in found.items()}
    if not result:
        return {}  # nothing is held out
    told = {"step": step, **result, "eval_seconds": time.perf_counter() - start}
    record(run, engine, told)
    run.console.print(held_out(step, result), highlight=False)
    return told


@contextmanager
def stop_signals() -> Iterator[Any]:
    """SIGTERM and SIGINT only set a flag here: the ranks agree on it at a step's start and save after it."""
    received: list[int] = []
    handlers = {s: signal.signal(s, lambda number, _: received.append(number)) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


@contextmanager
def progress(console: Console, step: int, total: int) -> Iterator[Callable[[int], None]]:
    """A bar on a terminal, nothing elsewhere: the log lines say it there."""
    columns = (TextColumn("train"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task("train", total=total, completed=step)
        yield lambda done: bar.update(task, completed=done)


def line(record: dict[str, Any], total: int) -> str:
    """A training record as one line."""
    losses = "  ".join(f"{k.removesuffix('_loss')} {v:.3f}" for k, v in record.items() if k.endswith("_loss"))
    text = f"step {record['step']}/{total}  loss {record['loss']:.3f}  {losses}  lr {record['lr']:.2e}"
    if "samples_per_second" in record:
        unit = "tokens" if "tokens_per_second" in record else "samples"
        text += f"  {record[f'{unit}_per_second']:,.0f} {unit}/s"
        if "gb_per_second" in record:
            text += f"  {record['gb_per_second']:.3g} GB/s"
        elif record["mfu"] is not None:
            text += f"  MFU {record['mfu']:.1%}"
        text += f"  ETA {clock(record['eta_seconds'])}"
    return text


def clock(seconds: float) -> str:
    """``1:02:03`` or ``2:03``."""
    hours, rest = divmod(round(seconds), 3600)
    minutes, seconds = divmod(rest, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def held_out(step: int, result: dict[str, Any]) -> str:
    """An evaluation as one line."""
    told = "  ".join(f"{k.removeprefix('eval_').replace('_', ' ')} {v:.3f}" for k, v in result.items())
    return f"step {step}  held out: {told}"


def summary(run: Run, notes: dict[str, float], rates: Mapping[str, Any], result: dict[str, Any]) -> None:
    """Print the table at the end of a run that has a step."""
    steps = [r for r in run.records() if "loss" in r]
    if not steps:
        return
    first, last = steps[0], steps[-1]
    losses = [k for k in first if k.endswith("_loss")] or ["loss"]
    rows = [(k.replace("_", " "), first[k], last.get(k), result.get(f"eval_{k}")) for k in losses]
    held = {k.removeprefix("eval_").replace("_", " "): v for k, v in result.items() if k.startswith("eval_")}
    left_out = ("loss", "seconds", *(name for name, *_ in rows))
    for name, value in ({k: v for k, v in held.items() if k not in left_out} | notes).items():
        rows.append((name, None, None, f"{value:.1%}" if name.endswith("accuracy") else value))
    if rates:
        unit = "tokens" if "tokens_per_second" in rates else "samples"
        rows.append((f"{unit}/s (all ranks)", None, f"{rates[f'{unit}_per_second']:,.0f}", None))
    numbers = (f"step {first['step']}", f"step {last['step']}", "held out")
    found = table([("", ""), *((n, ".3f") for n in numbers)], rows, f"{run.dir.name}: {last['step']} steps")
    run.console.print(found, f"Run directory: {run.dir}", sep="\n")
