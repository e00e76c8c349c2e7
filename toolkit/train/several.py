"""Several trainings in one launch: every task of GLUE, every seed; their scores as a table with mean and deviation.

    train_all(config, list(HydraConfig.get().overrides.task))

Each has a run directory of its own and goes on where it was stopped; the table is written to that of the launch.
"""

import gc
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from toolkit.checkpoint.export import export
from toolkit.config.compose import compose
from toolkit.config.schema import RunConfig
from toolkit.engine.start import start_engine
from toolkit.job import nvme, ranks
from toolkit.models.build import build_model
from toolkit.run.directory import Run
from toolkit.tasks import build_task
from toolkit.train.loop import fit
from toolkit.train.own_plan import begin

# The columns of table 1 of Devlin et al. 2018, and WNLI, which the paper leaves out of the average.
GLUE = {
    "mnli": "MNLI-m", "mnli/mismatched": "MNLI-mm", "qqp": "QQP", "qnli": "QNLI", "sst2": "SST-2", "cola": "CoLA",
    "stsb": "STS-B", "mrpc": "MRPC", "rte": "RTE", "wnli": "WNLI",
}  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """One finished training."""

    task: str
    seed: int
    zero: int
    scores: dict[str, float]  # eval_accuracy, …
    best: str  # the metric that counts
    seconds: float  # wall time with evaluation and saving, without starting up
    samples_per_second: float | None
    padding: float | None


def train_all(config: RunConfig, overrides: list[str]) -> list[Outcome]:
    """Train what the configuration asks for: once, or for every task of GLUE and every one of ``seeds``."""
    if config.task.name != "glue" and not config.seeds:
        return [train(config)]
    whole = Run.open(config)
    outcomes = []
    for one in _each(config, overrides, whole.dir.name):
        whole.console.print(f"--- {one.name}", highlight=False)
        outcomes.append(train(one))
    rows = [vars(outcome) for outcome in outcomes]
    whole.write_json("scores.json", rows)
    tables = [table(outcomes), *([glue(outcomes)] if config.task.name == "glue" else [])]
    for found in tables:
        whole.console.print(found)
    whole.console.print(f"Run directory: {whole.dir}")
    return outcomes


def train(config: RunConfig) -> Outcome:
    """One training from its run directory to its last evaluation."""
    start = time.perf_counter()
    run = Run.open(config)
    _export(config.model.weights)
    task = build_task(run)
    plan = begin(run, task)
    model = build_model(run, task, plan.ds)
    engine = start_engine(model, task, run, plan.ds)
    result = fit(engine, task, run, plan)
    engine.close()
    nvme.release()
    del engine
    gc.collect()
    rates, padding = ([r[key] for r in run.records() if key in r] for key in ("samples_per_second", "padding"))
    return ranks.from_rank0(  # type: ignore[no-any-return]
        Outcome(
            task=config.task.name,
            seed=config.seed,
            zero=int(config.deepspeed.get("zero_optimization", {}).get("stage", 0)),
            scores={k: v for k, v in result.items() if k.startswith("eval_") and k != "eval_seconds"},
            best=f"eval_{task.best}",
            seconds=time.perf_counter() - start,
            samples_per_second=statistics.median(rates) if rates else None,
            padding=statistics.mean(padding) if padding else None,
        )
    )


def _export(weights: str | None) -> None:
    """Where ``model.weights`` is a run that was not exported yet, export it."""

    def missing() -> None:
        place = Path(weights or "")
        if weights and ranks.rank() == 0 and (place / "metrics.jsonl").exists() and not (place / "export").exists():
            export(place)

    ranks.agreed(missing)


def _each(config: RunConfig, overrides: list[str], name: str) -> Iterator[RunConfig]:
    """The configuration of every single training."""
    tasks = [t for t in GLUE if "/" not in t] if config.task.name == "glue" else [None]
    for task in tasks:
        one = config if task is None else compose([_of_task(o, task) for o in overrides])
        for seed in config.seeds or (config.seed,):
            parts = [name, *([task] if task else []), *([f"seed{seed}"] if config.seeds else [])]
            yield one.model_copy(update={"name": "-".join(parts), "seed": seed, "seeds": ()})


def _of_task(override: str, task: str) -> str:
    """``task=glue`` and ``data=files/glue`` as those of one task."""
    of_one = {"task=glue": f"task={task}"} | {
        f"data={place}/glue": f"data={place}/{task}" for place in ("files", "hub")
    }
    return of_one.get(override, override)


def table(outcomes: list[Outcome]) -> Table:
    """A row for each task: its metrics, mean and standard deviation over the seeds."""
    found = Table("task", "metric", "mean ± std", "seeds", "ZeRO", "samples/s", "padding", "wall s", title="Scores")
    for task in dict.fromkeys(o.task for o in outcomes):
        mine = [o for o in outcomes if o.task == task]
        for key in mine[0].scores:
            if key.endswith("loss"):
                continue
            rates = [o.samples_per_second for o in mine if o.samples_per_second]
            found.add_row(
                task,
                key.removeprefix("eval_").replace("_", " "),
                _spread([o.scores[key] for o in mine]),
                str(len(mine)),
                str(mine[0].zero),
                f"{statistics.mean(rates):,.0f}" if rates else "",
                f"{mine[0].padding:.0%}" if mine[0].padding is not None else "",
                f"{statistics.mean(o.seconds for o in mine):,.0f}",
            )
    return found


def glue(outcomes: list[Outcome]) -> Table:
    """Table 1 of the BERT paper: one metric a task, times 100, and the average of all but WNLI."""
    means: dict[str, float] = {}
    for column, title in GLUE.items():
        task, _, part = column.partition("/")
        mine = [o for o in outcomes if o.task == task]
        key = mine[0].best.replace("eval_", f"eval_{part}_") if part and mine else mine[0].best if mine else ""
        if mine and key in mine[0].scores:
            means[title] = 100 * statistics.mean(o.scores[key] for o in mine)
    found = Table(
        *means, "Average", title="GLUE, as table 1 of Devlin et al. 2018 (held-out parts, not the test server)"
    )
    average = statistics.mean(v for title, v in means.items() if title != "WNLI")
    found.add_row(*(f"{v:.1f}" for v in means.values()), f"{average:.1f}")
    return found


def _spread(values: list[float]) -> str:
    mean = statistics.mean(values)
    return f"{mean:.4f}" + (f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else "")
