"""A run's data, and what is made of a run: its weights as a folder, its curves, a pipeline's schedule.

toolkit prepare data=text data.path='texts/*.txt'    # corpus -> token ids, with an audit
toolkit export runs/bert
toolkit curves runs/multi30k
toolkit timeline runs/bert
"""

import os
from pathlib import Path

from toolkit.cli import OVERRIDES, Commands, add, console, stem
from toolkit.errors import ConfigError, nearest


def add_to(commands: Commands) -> None:
    command = add(
        commands, prepare, "prepare a task's data and print what is in it",
        "toolkit prepare data=text data.path='texts/*.txt'", "toolkit prepare experiment=multi30k data.path=multi30k",
    )  # fmt: skip
    command.add_argument("overrides", nargs="*", help=OVERRIDES.format("data.max_length=512"))

    command = add(
        commands, export, "write a run's best or newest checkpoint as a Hugging Face folder",
        "toolkit export runs/bert", "toolkit export runs/bert --out models/bert",
    )  # fmt: skip
    command.add_argument("run", type=Path, help="the run directory, e.g. runs/bert")
    command.add_argument("--out", type=Path, help="where to (default: <run>/export)")

    command = add(
        commands, curves, "draw how runs learned: loss and metrics by step",
        "toolkit curves runs/multi30k", "toolkit curves runs/a runs/b --key eval_loss --out both",
    )  # fmt: skip
    command.add_argument("runs", type=Path, nargs="+", help="run directories, e.g. runs/multi30k")
    command.add_argument("--key", action="append", help="of metrics.jsonl, repeatable (default: all of loss, eval_*)")
    command.add_argument("--out", type=Path, help="where to, without suffix (default: <first run>/curves)")

    command = add(
        commands, timeline, "draw pipeline schedules as stages over time, or what a run measured of its own",
        "toolkit timeline runs/bert                                    # below its schedule",
        "toolkit timeline --stages 4 --micro-batches 8                 # all schedules that these numbers allow",
        "toolkit timeline --schedule gpipe --schedule 1f1b --out fig   # fig.png and fig.svg",
    )  # fmt: skip
    command.add_argument("run", type=Path, nargs="?", help="a run directory that holds timeline.json")
    command.add_argument("--schedule", action="append", help="1f1b, gpipe or dualpipev, repeatable (default: all)")
    command.add_argument("--stages", type=int, help="pipe stages of the schedules (default: 4)")
    command.add_argument("--micro-batches", type=int, help="micro-batches of a step (default: 8)")
    command.add_argument("--out", type=Path, help="where to, without suffix (default: <run>/timeline or ./timeline)")


def prepare(overrides: list[str]) -> None:
    from toolkit.config.compose import compose
    from toolkit.data.text import format_audit
    from toolkit.deepspeed.ds_config import refuse_unread
    from toolkit.tasks import task_class

    told, config = console(), compose(overrides)
    refuse_unread(config)
    kind = task_class(config.task.kind)
    prepared = kind.prepare(config, told)
    lines = [format_audit(prepared.audit)] if "entropy" in prepared.audit else prepared.notes
    lines += [f"Warning: {line}" for line in prepared.warnings]
    told.print(*lines, f"Prepared {kind.prepares}: {prepared.path}", sep="\n", highlight=False)


def export(run: Path, out: Path | None) -> None:
    from toolkit.checkpoint import export

    print(f"Exported to {export.export(run, out)}")


def curves(runs: list[Path], key: list[str] | None, out: Path | None) -> None:
    from toolkit.report import figures

    found = figures.keys(runs)
    if missing := [k for k in key or [] if k not in found]:
        raise ConfigError(
            f"--key {missing[0]}: no record has it.{nearest(missing[0], found)} Known: {', '.join(found)}."
        )
    drawn = [k for k in found if k == "loss" or (k.startswith("eval_") and k != "eval_seconds")]
    chosen = key or [k for k in drawn if any(len(figures.curve(run, k)) > 1 for run in runs)]
    if not chosen:
        raise ConfigError(f"{runs[0]}: no run with records (metrics.jsonl). Name a run directory.")
    place = out or runs[0] / "curves"
    figures.curves({run.name: run for run in runs}, chosen, place)
    print(f"Drawn: {place}.png, {place}.svg")


def timeline(
    run: Path | None, schedule: list[str] | None, stages: int | None, micro_batches: int | None, out: Path | None
) -> None:
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # nothing is computed here; DeepSpeed warns when it finds no GPU
    place = stem(out) if out else (run or Path()) / "timeline"
    if run is None:
        files = _draw_schedules(
            schedule, 4 if stages is None else stages, 8 if micro_batches is None else micro_batches, place
        )
    elif schedule or stages is not None or micro_batches is not None:
        raise ConfigError(
            f"{run} has its own schedule, stages and micro-batches: give a run or these options, not both."
        )
    else:
        files = _draw_run(run, place)
    print(f"Drawn: {', '.join(map(str, files))}")


def _draw_run(run: Path, out: Path) -> list[Path]:
    from toolkit.engine.pipe_events import bubble_share, load, mean_seconds, span
    from toolkit.report.timeline import LABELS, draw

    measured = load(run / "timeline.json")
    from toolkit.engine.pipe_schedule import ideal  # DeepSpeed comes with it

    stages, micro_batches, label = measured.stages, measured.micro_batches, LABELS[measured.schedule]
    forward, backward = mean_seconds(measured, "forward"), mean_seconds(measured, "backward")
    equal = ideal(measured.schedule, stages, micro_batches, forward=forward, backward=backward)
    timelines = {f"{label}, stages of equal speed": equal, f"{label}, measured": measured.events}
    for name, events in timelines.items():
        start, end = span(events)
        print(f"{name}: {100 * bubble_share(events, stages):.1f} % bubbles in {end - start:.4g} s")
    title = f"{run.name}, step {measured.step}: {stages} stages, {micro_batches} micro-batches"
    return draw(timelines, out, title=title, unit="seconds")


def _draw_schedules(names: list[str] | None, stages: int, micro_batches: int, out: Path) -> list[Path]:
    from toolkit.engine.pipe_events import bubble_share
    from toolkit.engine.pipe_schedule import SCHEDULES, ideal
    from toolkit.report.timeline import LABELS, draw

    timelines = {}
    for name in names or SCHEDULES:
        try:
            events = ideal(name, stages, micro_batches)
        except ConfigError as error:
            if names or name == "1f1b":
                raise
            print(f"Left out: {error}")
            continue
        timelines[LABELS[name]] = events
        print(f"{LABELS[name]}: {100 * bubble_share(events, stages):.1f} % bubbles")
    title = f"{stages} stages, {micro_batches} micro-batches"
    return draw(timelines, out, title=title, unit="forward of a stage = 1, backward = 2")
