"""Several trainings in one launch: every task of GLUE, every seed; their scores as a table with mean and deviation.

train_all(config)
runs = in_turn(whole, {"random": config, …})      # any others, below the run directory that compares them

Each has a run directory of its own, one that is done is left out, and any other goes on where it was stopped. All run
in this process: ranks of one launch share their process group, and to start them again would take ten seconds a run.
"""

import gc
from collections.abc import Iterator, Mapping
from pathlib import Path

from toolkit.checkpoint.export import export
from toolkit.config.compose import compose, rebased
from toolkit.config.overrides import setting
from toolkit.config.schema import RunConfig
from toolkit.engine.start import start_engine
from toolkit.job import fingerprint, nvme, ranks
from toolkit.models.build import build_model
from toolkit.run import sweep
from toolkit.run.directory import Run
from toolkit.tasks import build_task
from toolkit.train import scores
from toolkit.train.loop import fit
from toolkit.train.own_plan import begin


def train_all(config: RunConfig) -> None:
    """Train what the configuration asks for: once, or for every task of GLUE and every one of ``seeds``."""
    if config.task.name != "glue" and not config.seeds:
        train(config)
        return
    whole = Run.open(config)
    runs = in_turn(whole, {str(one.name): one for one in each(whole.config)})
    if ranks.rank() == 0:
        rows = [scores.row(run) for run in runs]
        whole.write_json("scores.json", rows)
        for table in [scores.listing(rows), *([scores.glue(rows)] if config.task.name == "glue" else [])]:
            whole.console.print(table)
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
    for task in scores.GLUE:
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
    _export(config.model.weights)
    task = build_task(run)
    plan = begin(run, task)
    model = build_model(run, task, plan.ds)
    engine = start_engine(model, task, run, plan.ds)
    fit(engine, task, run, plan)
    engine.close()
    nvme.release()
    del engine
    gc.collect()


def _export(weights: str | None) -> None:
    """Where ``model.weights`` is a run that was not exported yet, export it."""

    def missing() -> None:
        place = Path(weights or "")
        if weights and ranks.rank() == 0 and (place / "metrics.jsonl").exists() and not (place / "export").exists():
            export(place)

    ranks.agreed(missing)
