"""The `toolkit` command: everything that needs no accelerator.

toolkit prepare data=text data.path='docs/*.txt'    # corpus -> token ids, with an audit
toolkit export runs/bert                            # checkpoint -> Hugging Face folder
toolkit build-ops zero=stage2 offload=cpu           # DeepSpeed's C++ ops, ahead of the first run
toolkit doctor offload=nvme --hostfile hosts        # does it run here: ops, disks, memory, GPUs, hosts, network
toolkit curves runs/multi30k                        # loss and metrics by step, as .png and .svg
toolkit plan model=bert_large machine=a100_80gb     # what fits and how fast, before any device is rented
toolkit check ds_config.json --world 8              # what is wrong with a DeepSpeed file, line by line
toolkit plan model=bert_mini --world 2 --calibrate  # the same of this host, whose rates are measured first, and kept
toolkit plan runs/bert                              # what a run has measured beside its plan
toolkit plan machine=h100 --search                  # which ZeRO stage, offload, micro-batch …: what fits, fastest first
toolkit machines                                    # what devices can do: memory, bandwidth, FLOP/s
toolkit timeline runs/bert                          # a pipeline's schedule beside what the run measured
toolkit launch recipes/pretrain.py --on slurm       # the script, command or manifest that starts a run on a cluster
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from toolkit.config.schema import Dtype
from toolkit.errors import ConfigError, ToolkitError, nearest

TIMELINES = """Draw pipeline schedules as stages over time, as .png and .svg:

toolkit timeline runs/bert                                    # what a run measured, below its schedule
toolkit timeline --stages 4 --micro-batches 8                 # all schedules that these numbers allow
toolkit timeline --schedule gpipe --schedule 1f1b --out fig   # fig.png and fig.svg
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command; errors are one line and exit code 2."""
    parser = argparse.ArgumentParser(
        prog="toolkit", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="command")

    prepare = commands.add_parser("prepare", help="prepare a corpus and print its audit")
    prepare.add_argument("overrides", nargs="*", help="Hydra overrides, e.g. data.max_length=512")
    prepare.set_defaults(call=lambda a: _prepare(a.overrides))

    export = commands.add_parser("export", help="write a run's best or newest checkpoint as a Hugging Face folder")
    export.add_argument("run", type=Path, help="the run directory, e.g. runs/bert")
    export.add_argument("--out", type=Path, help="where to (default: <run>/export)")
    export.set_defaults(call=lambda a: _export(a.run, a.out))

    ops = commands.add_parser("build-ops", help="build DeepSpeed's C++ ops that a configuration needs")
    ops.add_argument("overrides", nargs="*", help="Hydra overrides, e.g. offload=cpu")
    ops.add_argument("--world", type=int, default=2, help="ranks the job will have (default: 2)")
    ops.add_argument("--all", action="store_true", help="all that the presets can need, for an image")
    ops.set_defaults(call=lambda a: _build_ops(a.overrides, a.world, a.all))

    plan = commands.add_parser("plan", help="memory and time of a configuration on a machine")
    plan.add_argument(
        "overrides",
        nargs="*",
        help="Hydra overrides, e.g. zero=stage3 machine=h100; or a run directory",
    )
    plan.add_argument("--world", type=int, help="ranks of the job (default: all devices of the machine)")
    plan.add_argument("--explain", action="store_true", help="the formula behind each number")
    plan.add_argument("--json", action="store_true", help="everything as one JSON object")
    plan.add_argument("--calibrate", action="store_true", help="first measure this host, with three steps; it is kept")
    plan.add_argument("--search", action="store_true", help="rank every legal layout that the overrides leave open")
    plan.add_argument("--top", type=int, help="with --search: so many layouts in table and plot (default: 20)")
    plan.add_argument("--csv", type=Path, help="with --search: a file for all of them, a line each")
    plan.add_argument("--plot", type=Path, help="with --search: a file for memory and speed, as .png and .svg")
    plan.set_defaults(call=lambda a: (_search if a.search else _plan)(a))

    check = commands.add_parser(
        "check",
        help="what is wrong with a DeepSpeed JSON file, of whatever project, line by line",
        description="Exit code 0: nothing wrong, notes or not. 2: DeepSpeed would refuse the file, or do otherwise.",
    )
    check.add_argument("file", type=Path, help="e.g. ds_config.json")
    check.add_argument("--world", type=int, help="all ranks, by pipe stages if there are any (default: unknown)")
    check.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="to train on (default: cuda)")
    size = check.add_mutually_exclusive_group()
    size.add_argument("--model", help="a preset of conf/model or a local Hugging Face folder, for its size")
    size.add_argument("--parameters", type=float, help="of the model, e.g. 7e9")
    check.add_argument("--json", action="store_true", help="a JSON object instead of lines")
    check.set_defaults(call=_check)

    doctor = commands.add_parser(
        "doctor",
        help="check that a configuration runs here, or on the hosts of a hostfile, and say what mends it",
        description="Exit code 0: it fits, warnings or not. 2: it does not.",
    )
    doctor.add_argument("overrides", nargs="*", help="Hydra overrides, e.g. zero=stage3 offload=nvme")
    doctor.add_argument("--hostfile", type=Path, help="DeepSpeed's: lines of `host slots=N`")
    doctor.add_argument("--world", type=int, help="ranks on this host, without a hostfile (default: its GPUs, or 2)")
    doctor.add_argument("--master-addr", help="the first host's address (default: the first of its `hostname -I`)")
    doctor.add_argument("--no-build", action="store_true", help="only say which ops are not built")
    doctor.add_argument("--json", action="store_true", help="a JSON object instead of the table")
    doctor.set_defaults(call=_doctor)

    machines = commands.add_parser("machines", help="the devices of conf/machine, what they can do and who says so")
    machines.add_argument("name", nargs="?", help="only this one, e.g. h100")
    machines.add_argument(
        "--dtype", choices=get_args(Dtype), default="fp32", help="of the column FLOP/byte (default: fp32)"
    )
    machines.set_defaults(call=lambda a: _machines(a.name, a.dtype))

    timeline = commands.add_parser(
        "timeline",
        help="draw pipeline schedules, or what a run measured of its own",
        description=TIMELINES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    timeline.add_argument("run", type=Path, nargs="?", help="a run directory that holds timeline.json")
    timeline.add_argument(
        "--schedule", action="append", help="1f1b, gpipe or dualpipev; may be repeated (default: all)"
    )
    timeline.add_argument("--stages", type=int, help="pipe stages of the schedules (default: 4)")
    timeline.add_argument("--micro-batches", type=int, help="micro-batches of a step (default: 8)")
    timeline.add_argument("--out", type=Path, help="where to, without suffix (default: <run>/timeline or ./timeline)")
    timeline.set_defaults(call=lambda a: _timeline(a.run, a.schedule, a.stages, a.micro_batches, a.out))

    curves = commands.add_parser("curves", help="draw how runs learned: loss and metrics by step")
    curves.add_argument("runs", type=Path, nargs="+", help="run directories, e.g. runs/multi30k")
    curves.add_argument(
        "--key", action="append", help="of metrics.jsonl, may be repeated (default: all of loss, eval_*)"
    )
    curves.add_argument("--out", type=Path, help="where to, without suffix (default: <first run>/curves)")
    curves.set_defaults(call=lambda a: _curves(a.runs, a.key, a.out))

    launch = commands.add_parser("launch", help="print what starts a recipe on a cluster, or submit it")
    launch.add_argument("recipe", type=Path, help="e.g. recipes/pretrain.py")
    launch.add_argument("overrides", nargs="*", help="Hydra overrides, e.g. zero=stage3 cluster.hostfile=hosts")
    launch.add_argument("--on", required=True, help="deepspeed, torchrun, slurm, mpi, kubernetes or compose")
    launch.add_argument("--submit", action="store_true", help="start it, and pass its exit code on")
    launch.add_argument(
        "--out", type=Path, help="where the files go (default: <run>/launch; a folder that all nodes see)"
    )
    launch.set_defaults(call=lambda a: _launch(a.recipe, a.overrides, a.on, a.submit, a.out))

    chosen, rest = parser.parse_known_args(arguments)
    if wrong := [word for word in rest if word.startswith("-") or "overrides" not in chosen]:
        parser.error(f"unrecognized arguments: {' '.join(wrong)}")
    if rest:
        chosen.overrides += rest  # those after an option: argparse takes them before or after, not both
    try:
        chosen.call(chosen)
    except ToolkitError as error:
        for line in str(error).splitlines():
            print(f"error: {line}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def _prepare(overrides: list[str]) -> None:
    from rich.console import Console

    from toolkit import data
    from toolkit.config.compose import compose

    console, config = Console(), compose(overrides)
    if config.task.kind == "translate":
        from toolkit.data import parallel

        pairs = parallel.prepare(config)
        console.print("\n".join(parallel.told(pairs.audit)), f"Prepared pairs: {pairs.path}", sep="\n", highlight=False)
        return
    if config.task.kind != "pretrain":
        from toolkit.tasks import kind

        if not hasattr(kind(config), "prepare"):
            raise ConfigError(f"task.kind={config.task.kind}: it has nothing to prepare. Start its recipe.")
        labelled = kind(config).prepare(config)
        console.print(*labelled.notes, f"Prepared rows: {labelled.path}", sep="\n", highlight=False)
        return
    prepared = data.prepare(config, console=console, progress=True)
    console.print(data.format_audit(prepared.audit))
    console.print(f"Prepared corpus: {prepared.path}")


def _export(run: Path, out: Path | None) -> None:
    from toolkit.checkpoint.export import export

    print(f"Exported to {export(run, out)}")


def _curves(runs: list[Path], keys: list[str] | None, out: Path | None) -> None:
    from toolkit.report import curves

    found = curves.keys(runs)
    if missing := [key for key in keys or [] if key not in found]:
        raise ConfigError(
            f"--key {missing[0]}: no record has it.{nearest(missing[0], found)} Known: {', '.join(found)}."
        )
    drawn = [k for k in found if k == "loss" or (k.startswith("eval_") and k != "eval_seconds")]
    chosen = keys or [k for k in drawn if any(len(curves.curve(run, k)) > 1 for run in runs)]
    if not chosen:
        raise ConfigError(f"{runs[0]}: no run with records (metrics.jsonl). Name a run directory.")
    stem = out or runs[0] / "curves"
    curves.plot({run.name: run for run in runs}, chosen, stem)
    print(f"Drawn: {stem}.png, {stem}.svg")


def _build_ops(overrides: list[str], world: int, every: bool) -> None:
    from rich.console import Console

    from toolkit.config.compose import compose
    from toolkit.deepspeed import ds_config
    from toolkit.job import ops, ranks

    if every and overrides:
        raise ConfigError(f"--all with {' '.join(overrides)}: all ops are for every configuration. Leave one out.")
    config, device = compose(overrides), ranks.device()
    ds = ds_config.complete(config, world=world, device=device)
    builders = ds_config.every_op(device) if every else ds_config.required_ops(ds, device=device, world=world)
    ops.ensure(builders, Console())
    print(f"Ready in {ops.prebuilt() or ops.directory()}: {', '.join(builders)}")


def _launch(recipe: Path, overrides: list[str], on: str, submit: bool, out: Path | None) -> None:
    from toolkit.cluster.launchers.start import start

    start(recipe, overrides, on=on, submit=submit, out=out)


def _plan(chosen: argparse.Namespace) -> None:
    from rich.console import Console

    from toolkit.config.compose import compose
    from toolkit.plan.plan import plan
    from toolkit.report.plan import show

    if alone := [f"--{name}" for name in ("top", "csv", "plot") if getattr(chosen, name) is not None]:
        raise ConfigError(f"{alone[0]} without --search: there is one configuration only. Add --search.")
    if len(chosen.overrides) == 1 and Path(chosen.overrides[0]).is_dir():
        from toolkit.run.own_plan import beside

        Console(soft_wrap=True).print(beside(Path(chosen.overrides[0])))
        return
    found = plan(compose(chosen.overrides), world=_planned_world(chosen))
    if chosen.json:
        print(json.dumps(found.as_json(), indent=1))
    else:
        show(found, Console(soft_wrap=True), explain=chosen.explain)


def _search(chosen: argparse.Namespace) -> None:
    from rich.console import Console

    from toolkit.plan.search import search
    from toolkit.report import search as report

    if chosen.explain:
        raise ConfigError("--explain with --search: formulas are of one configuration. Plan it without --search.")
    for option, path in (("--csv", chosen.csv), ("--plot", chosen.plot)):
        if path and (not path.name or path.is_dir()):
            raise ConfigError(f"{option} {path}: a folder. Name a file in it.")
    top = _at_least_one("--top", chosen.top) or 20
    found = search(chosen.overrides, world=_planned_world(chosen))
    if chosen.json:
        print(json.dumps(report.as_json(found), indent=1))
    else:
        report.show(found, Console(width=250), top=top)  # a terminal breaks lines so that they can be copied
    stem = chosen.plot and (chosen.plot.with_suffix("") if chosen.plot.suffix in (".png", ".svg") else chosen.plot)
    try:
        files = report.plot(found, stem, top=top) if stem else []
        files += [report.write_csv(found, chosen.csv)] if chosen.csv else []
    except OSError as error:
        raise ConfigError(f"{error.filename}: {error.strerror}. Name a file where it can be written.") from error
    if files:
        print("Written:", *files, file=sys.stderr)


def _planned_world(chosen: argparse.Namespace) -> int | None:
    """What --world says; with --calibrate the ranks that have measured this host."""
    world = _at_least_one("--world", chosen.world)
    if not chosen.calibrate:
        return world
    from rich.console import Console

    from toolkit.cluster.calibrate import calibrate

    return calibrate(chosen.overrides, world, Console(stderr=True, soft_wrap=True))


def _at_least_one(option: str, given: int | None) -> int | None:
    if given is not None and given < 1:
        raise ConfigError(f"{option} {given}: must be 1 or more.")
    return given


def _check(chosen: argparse.Namespace) -> None:
    from toolkit.deepspeed.check import as_json, check, told
    from toolkit.plan.shapes import named_shape

    for option in ("world", "parameters"):
        value = getattr(chosen, option)
        if value is not None and not 1 <= value < float("inf"):
            raise ConfigError(f"--{option} {value}: there is one at least. Leave it out where it is not known.")
    shape = named_shape(chosen.model) if chosen.model else None
    found = check(
        chosen.file,
        world=chosen.world,
        device=chosen.device,
        parameters=shape.parameters if shape else chosen.parameters and int(chosen.parameters),
        largest=max(p.size for p in shape.trained) if shape else None,
    )
    print(as_json(chosen.file, found) if chosen.json else "\n".join(told(chosen.file, found)))
    if any(f.level == "problem" for f in found):
        sys.exit(2)


def _doctor(chosen: argparse.Namespace) -> None:
    from rich.console import Console

    from toolkit.cluster.doctor.job import examine
    from toolkit.cluster.doctor.show import as_json, listing, verdict
    from toolkit.cluster.doctor.ssh import Host
    from toolkit.cluster.hostfile import slots
    from toolkit.config.compose import compose

    config = compose(chosen.overrides)
    hostfile = chosen.hostfile or config.cluster.hostfile
    if hostfile and chosen.world is not None:
        raise ConfigError(f"--world {chosen.world}: the hostfile's slots say how many ranks there are. Drop --world.")
    named = slots("--hostfile" if chosen.hostfile else "cluster.hostfile", Path(hostfile)) if hostfile else {}
    hosts = [Host(*h) for h in named.items()] or [Host("this host", _world(chosen.world), remote=False)]
    told = Console(stderr=True, soft_wrap=True)
    report = examine(
        config, hosts, build=not chosen.no_build, address=chosen.master_addr, told=lambda x: told.print(x, markup=False)
    )
    if chosen.json:
        print(as_json(report))
    else:
        console = Console()
        console.print(listing(report))
        console.print(verdict(report))
    if not report.fits:
        sys.exit(2)


def _world(given: int | None) -> int:
    """Ranks on this host. Raises ConfigError."""
    from toolkit.job import ranks

    if given is not None:
        if given < 1:
            raise ConfigError(f"--world {given}: a job has at least one rank.")
        return given
    if ranks.device() != "cuda":
        return 2
    import torch

    return max(1, torch.cuda.device_count())


def _machines(name: str | None, dtype: Dtype) -> None:
    from rich.console import Console

    from toolkit.plan import machines
    from toolkit.report.machines import listing, source

    every = {m.name: m for m in machines.table()}
    if name and name not in every:
        raise ConfigError(f"{name}: no such machine.{nearest(name, every)} Known: {', '.join(every)}.")
    chosen = [every[name]] if name else list(every.values())
    console = Console(soft_wrap=True)
    console.print(listing(chosen, dtype))
    for machine in chosen:
        console.print(source(machine), highlight=False)


def _timeline(
    run: Path | None, names: list[str] | None, stages: int | None, micro_batches: int | None, out: Path | None
) -> None:
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # nothing is computed here; DeepSpeed warns when it finds no GPU
    out = out.with_suffix("") if out and out.suffix in (".png", ".svg") else out
    if run is None:
        _draw_schedules(
            names,
            4 if stages is None else stages,
            8 if micro_batches is None else micro_batches,
            out or Path("timeline"),
        )
    elif names or stages is not None or micro_batches is not None:
        raise ConfigError(
            f"{run} has its own schedule, stages and micro-batches: give a run or these options, not both."
        )
    else:
        _draw_run(run, out or run / "timeline")


def _draw_run(run: Path, out: Path) -> None:
    from toolkit.engine.pipe_events import bubble_share, load, mean_seconds, span
    from toolkit.report.timeline import LABELS, draw

    measured = load(run / "timeline.json")
    from toolkit.engine.pipe_schedule import ideal

    stages, micro_batches = measured.stages, measured.micro_batches
    forward, backward = mean_seconds(measured, "forward"), mean_seconds(measured, "backward")
    schedule = ideal(measured.schedule, stages, micro_batches, forward=forward, backward=backward)
    label = LABELS[measured.schedule]
    timelines = {f"{label}, stages of equal speed": schedule, f"{label}, measured": measured.events}
    for name, events in timelines.items():
        start, end = span(events)
        print(f"{name}: {100 * bubble_share(events, stages):.1f} % bubbles in {end - start:.4g} s")
    title = f"{run.name}, step {measured.step}: {stages} stages, {micro_batches} micro-batches"
    print(f"Drawn: {', '.join(map(str, draw(timelines, out, title=title, unit='seconds')))}")


def _draw_schedules(names: list[str] | None, stages: int, micro_batches: int, out: Path) -> None:
    from toolkit.engine.pipe_events import bubble_share
    from toolkit.engine.pipe_schedule import SCHEDULES, check, ideal
    from toolkit.report.timeline import LABELS, draw

    timelines = {}
    for name in names or SCHEDULES:
        try:
            check(name, stages, micro_batches)
        except ConfigError as error:
            if names or name == "1f1b":
                raise
            print(f"Left out: {error}")
            continue
        timelines[LABELS[name]] = ideal(name, stages, micro_batches)
        print(f"{LABELS[name]}: {100 * bubble_share(timelines[LABELS[name]], stages):.1f} % bubbles")
    title = f"{stages} stages, {micro_batches} micro-batches"
    files = draw(timelines, out, title=title, unit="forward of a stage = 1, backward = 2")
    print(f"Drawn: {', '.join(map(str, files))}")
