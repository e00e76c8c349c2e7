"""Noisy images made clean again, each in tiles on a grid of ranks; see recipes/spatial_conv.py."""

import math
from collections.abc import Iterable, Iterator
from itertools import count

import numpy as np
import torch

from studies.denoiser import Denoiser, DenoiserConfig
from studies.images import Images, Noisy
from studies.spatial import Grid
from toolkit.data.batch import Batch
from toolkit.errors import ConfigError
from toolkit.job import ranks
from toolkit.run.directory import Run
from toolkit.tasks.task import Evaluates, Task, Watch


class Denoise(Task):
    """The loss is the mean squared error over the noise's variance: 1 for images left as they are.

    All ranks see tiles of the same images. For DeepSpeed they are data-parallel ones, and a tile is a sample:
    ``batch.global_size`` counts tiles, that is images times ranks, and ``batch.micro_size`` images.
    """

    inputs = ("noisy",)
    labels = ("clean",)
    outputs = ("clean",)
    model_class = Denoiser

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        config, node = self.config, run.config.spatial_conv  # type: ignore[attr-defined]  # the recipe's own
        self.grid = grid(node.rows, node.columns)
        self.grid.refuse_small(node.size, node.size, node.kernel // 2)
        self.hf_config = DenoiserConfig(layers=node.layers, channels=node.channels, kernel=node.kernel)
        self.images = ranks.agreed(
            lambda: Images(
                config.data.path, size=node.size, holdout=config.data.holdout, noise=node.noise, seed=config.seed
            )
        )
        self.step_images = config.batch.global_size // self.grid.size
        self.lasts(lambda epochs: max(1, round(epochs * self.images.crops / self.step_images)))
        run.write_model(self.hf_config, Denoiser.__name__)

    def train_batches(self, start_sample: int) -> Iterator[Batch]:
        """This rank's tiles of micro-batches after ``start_sample`` tiles, that is whole optimizer steps."""
        first, micro = start_sample // self.grid.size, self.config.batch.micro_size
        return (self.batch(map(self.images.train, range(i, i + micro))) for i in count(first, micro))

    def eval_batches(self) -> Iterator[Batch]:
        """This rank's tiles of the held-out crops, the same ones and the same noise each time."""
        total, micro = len(self.images.held_out_crops), self.config.batch.micro_size
        total = min(total, self.config.train.eval_samples or total)
        return (
            self.batch(map(self.images.evaluation, range(i, min(i + micro, total)))) for i in range(0, total, micro)
        )

    def batch(self, pairs: Iterable[Noisy]) -> Batch:
        """``clean`` and ``noisy`` [images, 3, h, w] of this rank's tile."""
        made = list(pairs)
        whole = {"clean": np.stack([p.clean for p in made]), "noisy": np.stack([p.noisy for p in made])}
        tile = self.grid.tile(*whole["clean"].shape[-2:])
        return {name: torch.from_numpy(images[tile].copy()) for name, images in whole.items()}

    def counts(self, batch: Batch) -> dict[str, float]:
        """Predicted values, images (a share of each), and pixels where other tasks count tokens."""
        images, colours, height, width = batch["clean"].shape
        pixels = images * height * width
        return {
            "loss": pixels * colours, "sequences": images / self.grid.size, "tokens": pixels, "positions": pixels,
        }  # fmt: skip

    def losses(self, outputs: Batch, batch: Batch) -> Batch:
        """Summed over the tile; the engine divides by the number of values in the whole batch."""
        return {"loss": ((outputs["clean"].float() - batch["clean"]) / self.images.noise).square().sum()}

    def useful_flops(self, counts: dict[str, float]) -> float:
        """Two operations for each weight and pixel, three times; the image itself needs no gradient."""
        c: DenoiserConfig = self.hf_config
        outer = c.kernel**2 * c.colours * c.channels  # weights of the first layer, and of the last
        inner = c.kernel**2 * c.channels**2 * (c.layers - 2)
        return counts["positions"] * (6 * (2 * outer + inner) - 2 * outer)

    def evaluate(self, engine: Evaluates, watch: Watch) -> dict[str, float]:
        """The loss on the held-out crops, and the peak signal-to-noise ratio in dB that it is."""
        found = super().evaluate(engine, watch)
        return found | {"psnr": -10 * math.log10(found["loss"] * self.images.noise**2)} if found else {}


def grid(rows: int, columns: int | None) -> Grid:
    """This rank's place; ``columns`` None: as many as the ranks leave. Raises ConfigError."""
    found = Grid(rows, columns or ranks.world() // rows, ranks.rank())
    if found.size != ranks.world():
        raise ConfigError(
            f"spatial_conv.rows={rows} x spatial_conv.columns={columns}: {ranks.world()} ranks do not make this grid. "
            "Start rows x columns ranks, or leave columns=null."
        )
    return found
