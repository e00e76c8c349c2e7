"""What several trainings have reached, read from their run directories: a row for each, and the tables of them.

found = [row(run) for run in (Path("runs/sst2-seed1"), Path("runs/sst2-seed2"))]
console.print(listing(found), glue(found))
"""

import json
import math
import statistics
from pathlib import Path
from typing import Any

from rich.table import Table

from toolkit.config.schema import load
from toolkit.run import sweep
from toolkit.run.files import read_metrics
from toolkit.run.table import table

# The columns of table 1 of Devlin et al. 2018, and WNLI, which the paper leaves out of the average.
GLUE = {
    "mnli": "MNLI-m", "mnli/mismatched": "MNLI-mm", "qqp": "QQP", "qnli": "QNLI", "sst2": "SST-2", "cola": "CoLA",
    "stsb": "STS-B", "mrpc": "MRPC", "rte": "RTE", "wnli": "WNLI",
}  # fmt: skip


def row(run: Path) -> dict[str, Any]:
    """One finished training; ``seconds`` are its wall time with evaluation and saving, without starting up."""
    from omegaconf import OmegaConf

    config, records = load(OmegaConf.load(run / "config.yaml")), read_metrics(run / "metrics.jsonl")
    best = run / "best.json"
    last = [r for r in records if "eval_seconds" in r][-1:]  # that of the best weights
    found = {k: math.nan if v is None else v for r in last for k, v in r.items() if k.startswith("eval_")}
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
            metric, spread = key.removeprefix("eval_").replace("_", " "), _spread([row["scores"][key] for row in mine])
            lines.append((task, metric, spread, len(mine), mine[0]["zero"], rate, mine[0]["padding"], seconds))
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


def _spread(values: list[float]) -> str:
    mean = statistics.mean(values)
    return f"{mean:.4f}" + (f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else "")
