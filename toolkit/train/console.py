"""What a person at the terminal sees of a training: a bar, a line now and then, a table at the end.

with progress(console, step, total) as bar: bar(step + 1)
console.print(line(record, total), highlight=False)
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from toolkit.run.directory import Run
from toolkit.run.table import table
from toolkit.train.meter import Meter


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


def summary(run: Run, notes: dict[str, float], meter: Meter, result: dict[str, Any]) -> Table | None:
    """The table at the end of a run; None of one without a step."""
    steps = [r for r in run.records() if "loss" in r]
    if not steps:
        return None
    first, last = steps[0], steps[-1]
    losses = [k for k in first if k.endswith("_loss")] or ["loss"]
    rows = [(k.replace("_", " "), first[k], last.get(k), result.get(f"eval_{k}")) for k in losses]
    for key, value in result.items():
        name = key.removeprefix("eval_")
        if key.startswith("eval_") and name not in ("loss", "seconds", *losses):
            rows.append((name.replace("_", " "), None, None, f"{value:.1%}" if name.endswith("accuracy") else value))
    rows += [(name, None, None, value) for name, value in notes.items()]
    if meter.active_seconds:
        unit, key = ("tokens", "positions") if "positions" in meter.active_counts else ("samples", "sequences")
        rows.append((f"{unit}/s (all ranks)", None, f"{meter.active_counts[key] / meter.active_seconds:,.0f}", None))
    numbers = (f"step {first['step']}", f"step {last['step']}", "held out")
    return table([("", ""), *((n, ".3f") for n in numbers)], rows, f"{run.dir.name}: {last['step']} steps")
