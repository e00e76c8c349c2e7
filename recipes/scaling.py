"""Another recipe at 1, 2, 4 … ranks: speed-up against linear, and the three conditions for it, measured.

python recipes/scaling.py scaling.ranks=[1,2,4] scaling.mode=strong experiment=smoke zero=stage2 batch.micro_size=4
python recipes/scaling.py scaling.recipe=finetune scaling.mode=both task=sst2 model=bert_mini model.weights=none
python recipes/scaling.py scaling.ranks=[1,2,4] model=bert_large \
    scaling.launcher="'deepspeed --hostfile hosts --num_nodes %n --num_gpus 1'"       # a rank on each host

All other overrides go to the recipe. The run directory, which all hosts see, gets its runs, each with the configuration
that its ranks start from, and scaling.csv, scaling.png and scaling.svg.
On a CPU every rank gets as many threads, the cores divided by the most ranks, so that ranks are compared and no cores.
"""

from typing import Literal

from toolkit.config.schema import Positive, RunConfig, Strict
from toolkit.run.recipe import recipe


class Scaling(Strict):
    """What is started, on how many ranks, and what grows with them."""

    recipe: str = "pretrain"  # a file of this folder
    ranks: tuple[Positive, ...] = (1, 2)
    # strong: batch.global_size stays. weak: it is that of the fewest ranks and grows with them; a rank's stays
    mode: Literal["strong", "weak", "both"] = "both"
    launcher: str = "deepspeed --num_gpus %n --master_port %p --log_level error"  # %n ranks, %p a free port


class Config(RunConfig):
    scaling: Scaling = Scaling()


@recipe(engine=False)
def main(config: Config) -> None:
    from pathlib import Path

    from rich.progress import Progress
    from studies import scaling

    from toolkit.cluster.launchers.job import load_recipe
    from toolkit.run.directory import Run

    chosen = config.scaling
    path = scaling.find_recipe(chosen.recipe, Path(__file__).parent)
    run = Run.open(config)
    modes = ("strong", "weak") if chosen.mode == "both" else (chosen.mode,)
    own = scaling.of_recipe(config, path)
    load_recipe(path).refuse(own, str(path))
    children = scaling.plan(own, modes, chosen.ranks, run.dir)
    environment = scaling.prepare(children, Scaling().launcher == chosen.launcher, run.console)
    with Progress(console=run.console, disable=not run.console.is_terminal, transient=True) as bar:
        for child in bar.track(children):
            run.console.print(f"--- {child.label}", highlight=False)
            scaling.launch(child, chosen.launcher, path, environment)
    rows = scaling.rows(children)
    run.rewind(0)
    for row in rows:
        run.log({"step": row["ranks"], **row})
    run.write_csv("scaling.csv", rows)
    run.console.print(scaling.listing(rows))
    scaling.plot(rows, run.dir / "scaling", f"{chosen.recipe}: scaling on {environment.device}")
    run.console.print(f"Run directory: {run.dir}")


if __name__ == "__main__":
    main()
