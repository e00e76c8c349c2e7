"""Several trainings in one launch: every task of GLUE, every seed; their scores as a table with mean and deviation.

train_all(config)
runs = in_turn(whole, {"random": config, …})      # any others, below the run directory that compares them

Each has a run directory of its own, one that is done is left out, and any other goes on where it was stopped. All run
in this process: ranks of one launch share their process group, and to start them again would take ten seconds a run.
"""

import json
import math
import statistics
from collections.abc import Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from rich.table import Table

from toolkit.checkpoint.export import export
from toolkit.config.compose import compose, rebased
from toolkit.config.overrides import setting
from toolkit.config.schema import RunConfig, load
from toolkit.engine.start import start_engine
from toolkit.job import fingerprint, ranks
from toolkit.models.build import build_model
from toolkit.run import sweep
from toolkit.run.directory import Run
from toolkit.run.files import read_metrics
from toolkit.run.table import table
from toolkit.tasks import build_task
from toolkit.train.loop import fit
from toolkit.train.own_plan import begin

SCORES = ("eval_", "test_")
# The columns of table 1 of Devlin et al. 2018, and WNLI, which the paper leaves out of the average.
GLUE = {
    "mnli": "MNLI-m", "mnli/mismatched": "MNLI-mm", "qqp": "QQP", "qnli": "QNLI", "sst2": "SST-2", "cola": "CoLA",
    "stsb": "STS-B", "mrpc": "MRPC", "rte": "RTE", "wnli": "WNLI",
}  # fmt: skip


def train_all(config: RunConfig) -> None:
    """Train what the configuration asks for: once, or for every task of GLUE and every one of ``seeds``."""
    if config.task.name != "glue" and not config.seeds:
        train(config)
        return
    whole = Run.open(config)
    runs = in_turn(whole, {str(one.name): one for one in each(whole.config)})
    if ranks.rank() == 0:
        rows = [row(run) for run in runs]
        whole.write_json("scores.json", rows)
        whole.console.print(listing(rows), *([glue(rows)] if config.task.name == "glue" else []))
    whole.console.print(f"Run directory: {whole.dir}")


def each(config: RunConfig) -> Iterator[RunConfig]:
    """The configuration of every single training; ``config`` has a name."""
    for task, one in _tasks(config) if config.task.name == "glue" else [("", config)]:
        for seed in config.seeds or (config.seed,):
            parts = [config.name, *([task] if task else []), *([f"seed{seed}"] if config.seeds else [])]
            yield one.model_copy(update={"name": "-".join(map(str, parts)), "seed": seed, "seeds": ()})


def _tasks(config: RunConfig) -> Iterator[tuple[str, RunConfig]]:
    """Each task of GLUE, its preset with what ``config`` has changed of that of all."""
    place = "hub" if config.data.format == "hub" else "files"
    whole = compose(["task=glue", f"data={place}/glue"])
    path = [setting("data.path", config.data.path)] if isinstance(config.data.path, str) else []
    for task in GLUE:
        if "/" not in task:
            yield task, rebased(config, whole, compose([f"task={task}", f"data={place}/{task}", *path]))


def in_turn(whole: Run, configs: Mapping[str, RunConfig]) -> list[Path]:
    """Train each, under the name it is shown by, unless it was done before; their run directories."""
    runs = []
    for label, one in configs.items():
        whole.console.print(f"--- {label}", highlight=False)
        runs.append(Path(one.output_dir) / str(one.name))
        record, mine = runs[-1] / "job.json", fingerprint.of(one)
        if one.resume != "never" and ranks.from_rank0(sweep.done(sweep.read(record), mine)):
            whole.console.print(f"done before, in {runs[-1]}", highlight=False)
            continue
        with sweep.recorded(record, {"run": one.name, "config": mine}):
            train(one)
    return runs


def train(config: RunConfig) -> None:
    """One training from its run directory to its last evaluation."""
    run = Run.open(config)
    if config.model.weights:
        place = Path(config.model.weights)
        missing = (place / "metrics.jsonl").exists() and not (place / "export").exists()
        ranks.agreed(lambda: export(place) if missing and ranks.rank() == 0 else None)
    task = build_task(run)
    plan = begin(run, task)
    model = build_model(run, task, plan.ds)
    engine = start_engine(model, task, run, plan.ds)
    fit(engine, task, run, plan)
    engine.close()


def row(run: Path) -> dict[str, Any]:
    """One finished training; ``seconds`` are its wall time with evaluation and saving, without starting up."""
    config, records = load(OmegaConf.load(run / "config.yaml")), read_metrics(run / "metrics.jsonl")
    best = run / "best.json"
    last = [[r for r in records if key in r][-1:] for key in ("eval_seconds", "test_loss")]  # those of the best weights
    found = {k: math.nan if v is None else v for r in chain(*last) for k, v in r.items() if k.startswith(SCORES)}
    rates, padding = ([r[key] for r in records if key in r] for key in ("samples_per_second", "padding"))
    return {
        "task": config.task.name,
        "seed": config.seed,
        "zero": int(config.deepspeed.get("zero_optimization", {}).get("stage", 0)),
        "scores": {k: v for k, v in found.items() if k != "eval_seconds"},
        "best": f"eval_{json.loads(best.read_text())['metric'] if best.exists() else None}",
        "seconds": sweep.read(run / "job.json").get("seconds", 0.0),
        "samples_per_second": statistics.median(rates) if rates else None,
        "padding": statistics.mean(padding) if padding else None,
    }


def listing(rows: list[dict[str, Any]]) -> Table:
    """A line for each task and metric: its mean and standard deviation over the seeds."""
    columns = {"task": "", "metric": "", "mean ± std": "s", "seeds": "d", "ZeRO": "d", "samples/s": ",.0f",
               "padding": ".0%", "wall s": ",.0f"}  # fmt: skip
    lines: list[tuple[Any, ...]] = []
    for task in dict.fromkeys(row["task"] for row in rows):
        mine = [row for row in rows if row["task"] == task]
        rates = [row["samples_per_second"] for row in mine if row["samples_per_second"]]
        rate, seconds = statistics.mean(rates) if rates else None, statistics.mean(row["seconds"] for row in mine)
        for key in (key for key in mine[0]["scores"] if not key.endswith("loss")):
            metric, values = key.removeprefix("eval_").replace("_", " "), [row["scores"][key] for row in mine]
            spread = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
            told = f"{statistics.mean(values):.4f}{spread}"
            lines.append((task, metric, told, len(mine), mine[0]["zero"], rate, mine[0]["padding"], seconds))
    return table(columns, lines, "Scores")


def glue(rows: list[dict[str, Any]]) -> Table:
    """Table 1 of the BERT paper: one metric a task, times 100, and the average of all but WNLI."""
    means: dict[str, float] = {}
    for column, title in GLUE.items():
        task, _, part = column.partition("/")
        mine = [row for row in rows if row["task"] == task]
        key = mine[0]["best"].replace("eval_", f"eval_{part}_" if part else "eval_") if mine else ""
        if mine and key in mine[0]["scores"]:
            means[title] = 100 * statistics.mean(row["scores"][key] for row in mine)
    average = statistics.mean(v for title, v in means.items() if title != "WNLI")
    title = "GLUE, as table 1 of Devlin et al. 2018 (held-out parts, not the test server)"
    return table(dict.fromkeys([*means, "Average"], ".1f"), [(*means.values(), average)], title)
