"""What a larger batch saves: steps to a held-out loss by batch size, each with its best learning rate.

python recipes/batch_size.py task=linear data=synthetic data.rows=20000 zero=stage0 batch.micro_size=8 \
    deepspeed.optimizer.params.lr=0.005 'batch_size.sizes=[8,16,32,64,128,256]' batch_size.target_loss=1.04
deepspeed --num_gpus 8 recipes/batch_size.py model=bert_base batch.micro_size=64 batch_size.target_loss=6 …

A step's samples are accumulated in micro-batches of batch.micro_size, so few ranks stand for any number of them. The
run directory gets trials.jsonl, batch_size.csv, batch_size.png and .svg. Under its name= it goes on where it ended.
"""

from typing import Annotated

from pydantic import Field

from toolkit.config.schema import Positive, RunConfig, Strict
from toolkit.run.recipe import recipe

Rate = Annotated[float, Field(gt=0)]


class BatchSize(Strict):
    """The sweep; a trial ends at the target, after max_steps, or when its loss grows without end."""

    sizes: tuple[Positive, ...] = (16, 32, 64, 128, 256)  # samples a step
    # Learning rates, as factors of the best one of the size before; at first of deepspeed.optimizer.params.lr
    rates: tuple[Rate, ...] = (0.5, 0.7, 1, 1.4, 2)
    extend: Annotated[int, Field(ge=0)] = 4  # more rates, where the best would be the first or the last
    target_loss: float | None = None  # held out, as eval_loss of the task's records
    max_steps: Positive = 2000


class Config(RunConfig):
    batch_size: BatchSize = BatchSize()


@recipe()
def main(config: Config) -> None:
    from rich.progress import Progress
    from studies import batch_size as study

    from toolkit.job import ranks
    from toolkit.run.directory import Run

    chosen = config.batch_size
    sizes = study.check(config, chosen.sizes, chosen.rates, chosen.target_loss)
    run = Run.open(config)
    trials = study.Trials(run, chosen.target_loss, chosen.max_steps)
    rate = config.deepspeed["optimizer"]["params"]["lr"]
    rows = []
    with Progress(console=run.console, disable=not run.console.is_terminal, transient=True) as bar:
        for size in bar.track(sizes):
            found = study.search(trials.of(size), rate, chosen.rates, chosen.extend, chosen.max_steps)
            rows.append(study.best(size, found))
            rate = rows[-1]["rate"]
    rows = study.judged(rows)
    run.rewind(-1)
    for index, row in enumerate(rows):
        run.log({"step": index, **row})
    run.write_csv("batch_size.csv", rows)
    run.console.print(study.listing(rows))
    run.console.print(study.verdict(rows, config.batch.micro_size), highlight=False)
    if ranks.rank() == 0:
        study.plot(rows, trials.all, run.dir / "batch_size", f"{config.task.name}: to a loss of {chosen.target_loss:g}")
    run.console.print(f"Run directory: {run.dir}")


if __name__ == "__main__":
    main()
