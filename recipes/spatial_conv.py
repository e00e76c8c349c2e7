"""A convolution of images that lie in tiles on a grid of ranks, equal to that of the whole; a small CNN trains with it.

deepspeed --num_gpus 2 recipes/spatial_conv.py                                                  # left and right half
deepspeed --num_gpus 4 recipes/spatial_conv.py spatial_conv.rows=2 batch.global_size=32         # 2 x 2 tiles
deepspeed --num_gpus 2 recipes/spatial_conv.py data.path='photos/*.jpg' spatial_conv.noise=0.2

The run directory gets spatial_conv.csv, .png and .svg, which compare one convolution split and whole, and
denoised.png, a held-out image that the trained network has cleaned.
"""

from typing import Annotated, Any

from pydantic import Field

from toolkit.config.kinds import Kind, register
from toolkit.config.schema import Positive, RunConfig, Strict
from toolkit.run.recipe import recipe


class SpatialConv(Strict):
    """The grid, the network, its images, and those on which one convolution is compared."""

    rows: Positive = 1
    columns: Positive | None = None  # None: as many as the ranks leave
    kernel: Positive = 3  # pixels, odd
    channels: Positive = 24  # features between the layers
    layers: Annotated[int, Field(ge=2)] = 5
    size: Positive = 64  # pixels: sides of the crops that are trained on
    noise: float = Field(0.1, gt=0)  # standard deviation, of a brightness of 0 to 1
    sizes: tuple[Positive, ...] = (32, 64, 128, 256, 512)  # pixels: sides of the images of the comparison


class Config(RunConfig):
    spatial_conv: SpatialConv = SpatialConv()


# It can do nothing that other kinds can
register(Kind("denoise", task="studies.denoise:Denoise", reads=frozenset({"data.path"})))


@recipe("denoise")
def main(config: Config) -> None:
    from rich.progress import track
    from studies import spatial_conv as study

    from toolkit.engine.start import start_engine
    from toolkit.job import ranks
    from toolkit.models.build import build_model
    from toolkit.run.directory import Run
    from toolkit.tasks import build_task
    from toolkit.train.loop import fit
    from toolkit.train.own_plan import begin

    run, node = Run.open(config), config.spatial_conv
    task: Any = build_task(run)  # studies.denoise.Denoise, with a grid
    if ranks.from_rank0(not (run.dir / "spatial_conv.csv").exists()):  # a run that goes on has compared already
        sizes = track(node.sizes, "compare", console=run.console, transient=True, disable=not run.console.is_terminal)
        shape = {"channels": node.channels, "kernel": node.kernel, "device": ranks.device()}
        rows = [study.compare(task.grid, size=size, **shape) for size in sizes]
        grid = f"{task.grid.rows} x {task.grid.columns} ranks, {node.channels} channels, kernel {node.kernel}"
        run.console.print(study.listing(rows, grid))
        if ranks.rank() == 0:
            study.plot(rows, run.dir / "spatial_conv", f"One convolution on {grid}")
        run.write_csv("spatial_conv.csv", rows)
        for row in rows:
            run.log({"step": 0, **row})
    plan = begin(run, task)
    model = build_model(run, task, plan.ds).over(task.grid)
    engine = start_engine(model, task, run, plan.ds)
    fit(engine, task, run, plan)
    study.picture(engine, task, run.dir / "denoised")


if __name__ == "__main__":
    main()
