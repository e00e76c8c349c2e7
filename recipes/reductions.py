"""The mean absolute error of a linear model over threads, summed in four ways: how fast, and how right.

python recipes/reductions.py
python recipes/reductions.py reductions.threads=[1,2,4,8] reductions.rows=50_000_000

Serial, all threads on one sum without protection (wrong), the same under a lock, and a sum of its own for each block
of rows. The run directory gets reductions.csv, reductions.png and reductions.svg.
"""

from typing import Annotated, Any

from pydantic import Field, field_validator

from toolkit.config.schema import Positive, RunConfig, Strict
from toolkit.run.recipe import recipe


class Reductions(Strict):
    """What is summed, and by how many threads; memory for 1.5 times the data is needed."""

    # Numbers of threads, or one; None: 1, 2, 4, … and this machine's cores
    threads: tuple[Annotated[int, Field(gt=0, le=1024)], ...] | None = None
    rows: Positive = 16_000_000  # with 8 features 0.6 GB, far more than caches hold
    features: Annotated[int, Field(gt=0, le=1024)] = 8
    repeats: Positive = 15  # rounds, of which the medians count

    @field_validator("threads", mode="before")
    @classmethod
    def _one_or_several(cls, value: Any) -> Any:
        if value == []:
            raise ValueError("no number of threads. Give at least one, or null")
        return (value,) if isinstance(value, int) else value


class Config(RunConfig):
    """The configuration of this recipe."""

    reductions: Reductions = Reductions()


@recipe(engine=False)
def main(config: Config) -> None:
    from rich.progress import Progress
    from studies import reductions

    from toolkit.errors import ConfigError
    from toolkit.job import ranks
    from toolkit.run.directory import Run

    if ranks.world() > 1:
        raise ConfigError(f"{ranks.world()} ranks: reductions compares threads of one. Launch it with python.")
    chosen = config.reductions
    threads = sorted(set(chosen.threads or reductions.usual_threads()))
    data = reductions.draw(rows=chosen.rows, features=chosen.features, seed=config.seed)
    run = Run.open(config)
    op = reductions.load(run.console)
    with Progress(console=run.console, disable=not run.console.is_terminal, transient=True) as bar:
        task = bar.add_task("summing", total=chosen.repeats * (1 + 3 * len(threads)))
        rows = reductions.measure(data, op, threads=threads, repeats=chosen.repeats, each=lambda: bar.advance(task))
    run.rewind(-1)  # an earlier one of this name
    for step, row in enumerate(rows):
        run.log({"step": step, **row})
    run.write_csv("reductions.csv", rows)
    run.console.print(reductions.listing(rows))
    title = f"{chosen.rows:,} rows x {chosen.features} features, {data.nbytes / 1e9:.2g} GB, {reductions.cores()} cores"
    reductions.plot(rows, run.dir / "reductions", title)
    run.console.print(f"Run directory: {run.dir}")


if __name__ == "__main__":
    main()
