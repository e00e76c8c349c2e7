"""What fits and how fast, before any device is rented; and what devices can do.

toolkit plan model=bert_large machine=a100_80gb
toolkit plan machine=h100 --search
toolkit machines
"""

import sys
from json import dumps as as_json
from pathlib import Path
from typing import TYPE_CHECKING

from toolkit.cli import OVERRIDES, Commands, add, console, stem
from toolkit.errors import ConfigError, nearest

if TYPE_CHECKING:
    from toolkit.config.schema import Dtype

DTYPES = ("fp32", "tf32", "bf16", "fp16")  # as toolkit.config.schema.Dtype, whose import is most of a command's start


def add_to(commands: Commands) -> None:
    command = add(
        commands, plan, "memory and time of a configuration on a machine",
        "toolkit plan model=bert_large machine=a100_80gb     # what fits and how fast",
        "toolkit plan machine=h100 --search                  # what fits of ZeRO stage, offload, …, fastest first",
        "toolkit plan model=bert_mini --world 2 --calibrate  # of this host, whose rates are measured first, and kept",
        "toolkit plan runs/bert                              # what a run has measured beside its plan",
    )  # fmt: skip
    command.add_argument("overrides", nargs="*", help=OVERRIDES.format("zero=stage3 machine=h100; or a run directory"))
    command.add_argument("--world", type=int, help="ranks of the job (default: all devices of the machine)")
    command.add_argument("--explain", action="store_true", help="the formula behind each number")
    command.add_argument("--json", action="store_true", help="everything as one JSON object")
    measuring = "first measure this host, in three steps of 8 micro-batches at most (4 a pipe stage); it is kept"
    command.add_argument("--calibrate", action="store_true", help=measuring)
    command.add_argument("--search", action="store_true", help="rank every legal layout that the overrides leave open")
    command.add_argument("--top", type=int, help="with --search: so many layouts in table and plot (default: 20)")
    command.add_argument("--csv", type=Path, help="with --search: a file for all of them, a line each")
    command.add_argument("--plot", type=Path, help="with --search: a file for memory and speed, as .png and .svg")

    command = add(
        commands, machines, "the devices of conf/machine, what they can do and who says so",
        "toolkit machines", "toolkit machines h100 --dtype bf16",
    )  # fmt: skip
    command.add_argument("name", nargs="?", help="only this one, e.g. h100")
    command.add_argument("--dtype", choices=DTYPES, default="fp32", help="of the column FLOP/byte (default: fp32)")


def plan(
    overrides: list[str], world: int | None, explain: bool, json: bool, calibrate: bool, search: bool,
    top: int | None, csv: Path | None, plot: Path | None,
) -> None:  # fmt: skip
    """One configuration, a run directory, or with ``search`` all that the overrides leave open."""
    if not search and (alone := [n for n, v in {"top": top, "csv": csv, "plot": plot}.items() if v is not None]):
        raise ConfigError(f"--{alone[0]} without --search: there is one configuration only. Add --search.")
    if search and explain:
        raise ConfigError("--explain with --search: formulas are of one configuration. Plan it without --search.")
    for option, path in (("--csv", csv), ("--plot", plot)):
        if path and (not path.name or path.is_dir()):
            raise ConfigError(f"{option} {path}: a folder. Name a file in it.")
    for option, number in (("--top", top), ("--world", world)):
        if number is not None and number < 1:
            raise ConfigError(f"{option} {number}: must be 1 or more.")
    told = console(soft_wrap=True)
    if not search and len(overrides) == 1 and Path(overrides[0]).is_dir():
        from toolkit.train.own_plan import beside

        told.print(beside(Path(overrides[0])))
        return
    if calibrate:
        from toolkit.cluster.calibrate import calibrate as measured

        world = measured(overrides, world, console(stderr=True, soft_wrap=True))
    if search:
        _search(overrides, world, json, top or 20, csv, plot)
        return
    from toolkit.config.compose import compose
    from toolkit.plan.plan import plan
    from toolkit.report.plan import show

    found = plan(compose(overrides), world=world)
    if json:
        print(as_json(found.as_json(), indent=1))
    else:
        show(found, told, explain=explain)


def _search(overrides: list[str], world: int | None, json: bool, top: int, csv: Path | None, plot: Path | None) -> None:
    from toolkit.plan.search import search
    from toolkit.report import search as report

    found = search(overrides, world=world)
    if json:
        print(as_json(report.as_json(found), indent=1))
    else:
        report.show(found, console(width=250), top=top)  # a terminal breaks lines so that they can be copied
    try:
        files = report.plot(found, stem(plot), top=top) if plot else []
        files += [report.write_csv(found, csv)] if csv else []
    except OSError as error:
        raise ConfigError(f"{error.filename}: {error.strerror}. Name a file where it can be written.") from error
    if files:
        print("Written:", *files, file=sys.stderr)


def machines(name: str | None, dtype: "Dtype") -> None:
    from toolkit.plan.machines import table
    from toolkit.report.plan import machines, source

    every = {m.name: m for m in table()}
    if name and name not in every:
        raise ConfigError(f"{name}: no such machine.{nearest(name, every)} Known: {', '.join(every)}.")
    chosen = [every[name]] if name else list(every.values())
    told = console(soft_wrap=True)
    told.print(machines(chosen, dtype))
    told.print(*map(source, chosen), sep="\n", highlight=False)
