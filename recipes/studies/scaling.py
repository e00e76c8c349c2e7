"""One recipe started on several numbers of ranks, and what its records say of the speed-up.

children = plan(of_recipe(config, recipe), ("strong",), (1, 2, 4), run.dir)
for child in children: launch(child, launcher, recipe, prepare(children, …))
rows(children)                      # a dict for each, from their run directories alone

Linear scaling asks for three things (work even, memory even, little communication): toolkit.train.meter.conditions.
"""

import os
import re
import shlex
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from toolkit.cluster.launchers.job import load_recipe
from toolkit.config.compose import compose, rebased
from toolkit.config.schema import RunConfig
from toolkit.deepspeed import ds_config
from toolkit.errors import ConfigError, ToolkitError, nearest
from toolkit.job import fingerprint, ranks
from toolkit.report import figures
from toolkit.run import sweep
from toolkit.run.files import as_yaml, read_metrics, replace
from toolkit.run.table import table

OF_A_RANK = (
    "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT",
)  # fmt: skip
CONDITIONS = ("work_balance", "memory_balance", "comm_share")


@dataclass(frozen=True)
class Child:
    """One start of the recipe; both modes begin with the same run."""

    mode: str
    ranks: int
    config: RunConfig

    @property
    def label(self) -> str:
        return str(self.config.name)

    @property
    def dir(self) -> Path:
        return Path(self.config.output_dir) / self.label


@dataclass(frozen=True)
class Environment:
    """The variables that a child starts with, and what it runs on in words."""

    variables: dict[str, str]
    device: str


def find_recipe(name: str, folder: Path) -> Path:
    """The file of a recipe that trains once. Raises ConfigError naming those.

    Not spatial_conv, whose batch counts tiles: more ranks are more of them.
    """
    files = [p for p in sorted(folder.glob("*.py")) if p.stem != "spatial_conv"]
    known = {p.stem: p for p in files if re.search(r"^    (fit|train|train_all)\(", p.read_text(), re.MULTILINE)}
    if name not in known:
        raise ConfigError(
            f"scaling.recipe={name}: no recipe that trains with DeepSpeed's engine.{nearest(name, known)} "
            f"There are: {', '.join(known)}."
        )
    return known[name]


def of_recipe(config: RunConfig, path: Path) -> RunConfig:
    """What of ours is for the recipe, on the preset that it begins from where no task was chosen."""
    own = RunConfig.model_validate(config.model_dump(exclude={"scaling", "resume"}))
    kinds, plain = load_recipe(path).kinds, compose([])
    if len(kinds) != 1 or own.task.kind in kinds or own.task.name != plain.task.name:
        return own
    return rebased(own, plain, compose([f"task={kinds[0]}"]))


def plan(config: RunConfig, modes: Sequence[str], numbers: Sequence[int], run_dir: Path) -> list[Child]:
    """What to start: ``config`` with the batch of each number of ranks."""
    if not numbers:
        raise ConfigError("scaling.ranks=[]: there is nothing to start. Use scaling.ranks=[1,2].")
    fewest, batch = min(numbers), config.batch
    children = []
    for mode in modes:
        for number in sorted(set(numbers)):
            times = number / fewest if mode == "weak" else 1
            given = {"global_size": batch.global_size, "tokens": batch.tokens}
            sizes = {key: round(size * times) for key, size in given.items() if size}
            own = {
                "batch": batch.model_copy(update=sizes),
                "train": config.train.model_copy(update={"communication": True}),
                "output_dir": str(run_dir),
                "name": f"ranks-{number}-batch-{sizes['global_size']}",
            }
            children.append(Child(mode, number, config.model_copy(update=own)))
    return children


def prepare(children: Sequence[Child], on_this_machine: bool, console: Any) -> Environment:
    """Refuse what could not run before anything is started."""
    if ranks.world() > 1:
        raise ConfigError("recipes/scaling.py starts the ranks itself: start it with python, without a launcher.")
    device, most = ranks.device(), max(c.ranks for c in children)
    for child in children:
        try:
            ds_config.complete(child.config, world=child.ranks, device=device)
        except ConfigError as error:
            raise ConfigError(f"{child.label}: {error}") from error
    variables = {k: v for k, v in os.environ.items() if k not in OF_A_RANK}
    variables["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{variables.get('PATH', '')}"
    cores = len(os.sched_getaffinity(0))
    if device == "cuda":
        there = torch.cuda.device_count()
        if on_this_machine and most > there:
            raise ConfigError(f"scaling.ranks: {most} ranks need as many devices, but this machine has {there}.")
        return Environment(variables, torch.cuda.get_device_name())
    if on_this_machine and most > cores:
        console.print(f"{most} ranks share {cores} cores: no speed-up is possible beyond {cores}.", highlight=False)
    threads = variables.setdefault("OMP_NUM_THREADS", str(max(1, cores // most)))
    return Environment(variables, f"{cores} CPU cores, threads per rank: {threads}")


def launch(child: Child, launcher: str, recipe: Path, environment: Environment) -> None:
    """Run the recipe to its end, unless it has been run; what it says goes to <run_dir>/<label>.txt."""
    record, log, mine = child.dir / "job.json", child.dir.with_suffix(".txt"), fingerprint.of(child.config)
    before = sweep.read(record)
    if before.get("config", mine) != mine:
        raise ConfigError(f"name={child.dir.parent.name}: it began with other overrides. Choose another name.")
    if sweep.done(before, mine):
        return
    with sweep.recorded(record, {"run": child.label, "config": mine}) as found:
        saved = _save(child).parent.absolute()
        command = shlex.split(launcher.replace("%n", str(child.ranks)).replace("%p", str(ranks.free_port())))
        with log.open("a") as file:
            code = found["code"] = subprocess.run(
                [*command, str(recipe), "--config-path", str(saved), "--config-name", "config"],
                env=environment.variables, stdout=file, stderr=file, check=False,
            ).returncode  # fmt: skip
        errors = [line.partition(": ")[2] for line in log.read_text().splitlines() if line.startswith("error: ")]
        if code:
            raise ToolkitError(f"{child.label}: {errors[-1] if errors else f'exit code {code}, see {log}'}")
        if not timed(child):
            raise ConfigError(
                f"{child.label}: {child.dir}/metrics.jsonl has no timed step. Raise train.steps (the first two "
                "are warm-up), or choose another scaling.recipe."
            )


def _save(child: Child) -> Path:
    """The configuration that all ranks of a child start from, on a disk that they see."""
    path = child.dir / "launch" / "config.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    replace(path, as_yaml(child.config.model_dump(mode="json")))
    return path


def timed(child: Child) -> list[dict[str, Any]]:
    """The training records after the warm-up."""
    return [r for r in read_metrics(child.dir / "metrics.jsonl") if "comm_share" in r]


def rows(children: Sequence[Child]) -> list[dict[str, Any]]:
    """The medians of each child's records; speed-up in samples a second against the fewest ranks of its mode."""
    found: list[dict[str, Any]] = []
    rates = ("step_seconds", "samples_per_second", "tokens_per_second", "gb_per_second")
    names = (*rates, "peak_gib", "comm_mib", *CONDITIONS)
    for child in children:
        records = timed(child)
        middle = {name: statistics.median(r[name] for r in records) for name in names if name in records[0]}
        row = {"mode": child.mode, "ranks": child.ranks, "global_size": child.config.batch.global_size, **middle}
        first = next((r for r in found if r["mode"] == child.mode), row)
        row["ideal"] = child.ranks / first["ranks"]
        row["speedup"] = row["samples_per_second"] / first["samples_per_second"]
        row["efficiency"] = row["speedup"] / row["ideal"]
        found.append(row)
    return found


def listing(rows: Sequence[dict[str, Any]]) -> Table:
    """A line for each number of ranks."""
    columns = {
        "ranks": "{ranks}", "step s": "{step_seconds:.3f}", "samples/s": "{samples_per_second:,.0f}",
        "speed-up": "{speedup:.2f} of {ideal:g}", "effic.": "{efficiency:.0%}", "work": "{work_balance:.0%}",
        "memory": "{memory_balance:.0%}", "GiB": "{peak_gib:.2f}", "MiB sent": "{comm_mib:,.1f}",
        "comm.": "{comm_share:.0%}",
    }  # fmt: skip
    title = "Speed-up, balance of work and memory; memory, bytes sent and time communicating of a rank's step"
    cells = [[row["mode"], *(form.format(**row) for form in columns.values())] for row in rows]
    return table({"mode": ""} | dict.fromkeys(columns, ">"), cells, title)


def plot(rows: Sequence[dict[str, Any]], stem: Path, title: str) -> None:
    """``stem``.png and .svg: speed-up with the ideal line, and for each mode its efficiency and the conditions."""
    modes = list(dict.fromkeys(r["mode"] for r in rows))
    figure, (speed, *panels) = figures.new(1 + len(modes), title)
    ideal = [r for r in rows if r["mode"] == modes[0]]
    speed.plot([r["ranks"] for r in ideal], [r["ideal"] for r in ideal], "--", color="0.5", label="linear")
    for mode, axes, colour in zip(modes, panels, figures.COLOURS[4:], strict=False):
        mine = [r for r in rows if r["mode"] == mode]
        speed.plot([r["ranks"] for r in mine], [r["speedup"] for r in mine], "o-", color=colour, label=mode)
        names = ("efficiency", *CONDITIONS)
        for i, (name, shade) in enumerate(zip(names, figures.COLOURS, strict=False)):
            label = name.replace("_", " ").replace("comm share", "time communicating")
            places = [x + 0.2 * (i - 1.5) for x in range(len(mine))]
            bars = axes.bar(places, [100 * r[name] for r in mine], 0.19, label=label, color=shade)
            axes.bar_label(bars, fmt="%.0f", fontsize=7)
        marks = [f"{r['ranks']}\n{r['peak_gib']:.2f} GiB\n{r['comm_mib']:.1f} MiB sent" for r in mine]
        axes.set_xticks(range(len(mine)), marks, fontsize=8)
        axes.set_title(f"{mode} scaling", fontsize=10)
        axes.set_xlabel("ranks; memory and bytes sent in a step by each", fontsize=9)
        axes.set_ylabel("%")
    speed.set_xticks([r["ranks"] for r in ideal])
    speed.set_xlabel("ranks")
    speed.set_ylabel("speed-up in samples per second")
    speed.legend(frameon=False)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower right", ncols=4, frameon=False)
    figures.save(figure, stem)
