"""One convolution on a grid of ranks beside the whole one: its numbers, its bytes, its time; and a picture.

row = compare(grid, size=256, channels=24, kernel=3, device=device)
picture(engine, task, run.dir / "denoised")
"""

import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from rich.table import Table
from torch import Tensor

from studies.spatial import Grid, SpatialConv2d, halo_bytes
from toolkit.job import ranks
from toolkit.report import figures
from toolkit.run.table import table

REPEATS = 15


def compare(grid: Grid, *, size: int, channels: int, kernel: int, device: str) -> dict[str, Any]:
    """A forward and backward pass of an image of ``size`` x ``size`` pixels, split on ``grid`` and whole.

    ``difference`` as below, in float64. ``halo_bytes``: what all ranks sent in float32, beside the formula. Seconds
    in float32, best of several on the slowest rank: ``whole`` on every rank by itself, ``split``, and ``tile``, the
    same work on the tile without an exchange.
    """
    torch.manual_seed(0)
    conv = SpatialConv2d(channels, channels, kernel).to(device)
    grid.refuse_small(size, size, conv.halo[0])
    image, upstream = torch.randn(2, 1, channels, size, size, device=device)
    tile = grid.tile(size, size)
    found = {"size": size, "difference": difference(grid, conv.double(), image.double(), upstream.double())}
    conv.float()
    conv.grid, grid.sent_bytes = grid, 0
    passes(conv, image[tile], upstream[tile])
    sent = sum(ranks.gathered(grid.sent_bytes))
    formula = 2 * halo_bytes(grid, conv, (1, size, size))
    found |= {"halo_bytes": sent, "halo_bytes_formula": formula, "halo_share": formula / 2 / image.nbytes}
    variants = {
        "whole": (None, image, upstream),
        "split": (grid, image[tile], upstream[tile]),
        "tile": (Grid(1, 1), image[tile], upstream[tile]),
    }
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(REPEATS):
        for name, (conv.grid, part, gradient) in variants.items():
            seconds[name].append(timed(conv, part, gradient))
    best = ranks.largest([min(s) for s in seconds.values()])
    return found | {f"{name}_seconds": s for name, s in zip(variants, best, strict=True)}


def passes(conv: SpatialConv2d, image: Tensor, upstream: Tensor) -> list[Tensor]:
    """The output, and the gradients of input, weight and bias where ``upstream`` is that of the output."""
    image = image.detach().requires_grad_()
    output = conv(image)
    return [output.detach(), *torch.autograd.grad(output, [image, *conv.parameters()], upstream)]


def difference(grid: Grid, conv: SpatialConv2d, image: Tensor, upstream: Tensor) -> float:
    """Between split and whole on any rank, as a share of the largest value: of the output or one of the gradients."""
    tile = grid.tile(*image.shape[-2:])
    conv.grid = None
    output, to_image, *whole = passes(conv, image, upstream)
    conv.grid = grid
    *mine, weight, bias = passes(conv, image[tile], upstream[tile])
    for part in (weight, bias):
        dist.all_reduce(part)
    pairs = zip([*mine, weight, bias], [output[tile], to_image[tile], *whole], strict=True)
    (largest,) = ranks.largest([max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)])
    return largest


def timed(conv: SpatialConv2d, image: Tensor, upstream: Tensor) -> float:
    """Seconds of one forward and backward pass; all ranks begin together."""
    ranks.wait()
    start = time.perf_counter()
    passes(conv, image, upstream)
    if image.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def listing(rows: list[dict[str, Any]], title: str) -> Table:
    """A line for each size of image."""
    columns = {
        "pixels": ">", "difference": ".1e", "sent bytes": ",", "formula": ",", "share": ".1%",
        "whole ms": ".1f", "split ms": ".1f", "tile ms": ".1f",
    }  # fmt: skip
    keys = ("difference", "halo_bytes", "halo_bytes_formula", "halo_share")
    milliseconds = [[1000 * row[f"{n}_seconds"] for n in ("whole", "split", "tile")] for row in rows]
    cells = [[f"{r['size']}²", *(r[k] for k in keys), *ms] for r, ms in zip(rows, milliseconds, strict=True)]
    return table(columns, cells, title)


def plot(rows: list[dict[str, Any]], stem: Path, title: str) -> None:
    """``stem``.png and .svg: time and the halo's share by the image's size."""
    figure, (seconds, share) = figures.new(2, title)
    sizes = [row["size"] for row in rows]
    labels = {"whole": "one process, whole image", "split": "tile, with its halo", "tile": "tile, no exchange"}
    for (name, label), colour, style in zip(labels.items(), figures.COLOURS, ("-", "-", "--"), strict=False):
        seconds.plot(
            sizes, [1000 * r[f"{name}_seconds"] for r in rows], style, color=colour, marker="o", ms=4, label=label
        )
    seconds.set(yscale="log", ylabel="ms, forward and backward")
    seconds.legend(frameon=False)
    share.plot(sizes, [100 * r["halo_share"] for r in rows], color=figures.COLOURS[0], marker="o", ms=4)
    share.set(ylim=(0, None), ylabel="halo, % of the image's bytes")
    for axes in (seconds, share):
        axes.set_xscale("log", base=2)
        axes.set_xticks(sizes, [f"{s}²" for s in sizes])
        axes.set_xlabel("pixels of the image")
    figures.save(figure, stem)


def picture(engine: Any, task: Any, stem: Path) -> None:
    """``stem``.png: an image noisy, denoised in tiles and clean, drawn on rank 0; a held-out one if there is any."""
    parts: list[Any] = []
    pair = task.images.picture()
    engine.evaluate(iter([task.batch([pair])]), lambda outputs, _: parts.append(outputs["clean"][0].float().cpu()))
    tiles = ranks.gathered_on_rank0(parts[0].numpy())
    if ranks.rank() == 0:
        denoised = np.empty_like(pair.clean)
        for rank, tile in enumerate(tiles):
            denoised[Grid(task.grid.rows, task.grid.columns, rank).tile(*pair.clean.shape[1:])] = tile
        images = {"noisy": pair.noisy, "denoised": denoised, "clean": pair.clean}
        _draw(images, task.grid, task.hf_config.layers * (task.hf_config.kernel // 2), stem)


def _draw(images: dict[str, Any], grid: Grid, reach: int, stem: Path) -> None:
    from matplotlib.patches import Rectangle

    title = (
        f"{grid.rows} x {grid.columns} tiles; dashed: what the first one depends on, {reach} pixels of its neighbours"
    )
    figure, panels = figures.new(3, title, width=3.2, height=3.7)
    for axes, (name, image) in zip(panels, images.items(), strict=True):
        error = np.square(image - images["clean"]).mean()
        psnr = f", {-10 * math.log10(error):.1f} dB" if error else ""
        axes.imshow(image.transpose(1, 2, 0).clip(0, 1), interpolation="nearest")
        axes.set_title(name + psnr, fontsize=10)
        axes.set_axis_off()
        if name == "clean":
            continue
        height, width = image.shape[1:]
        for rank in range(grid.size):
            rows, columns = Grid(grid.rows, grid.columns, rank).tile(height, width)[1:]
            box = (columns.start - 0.5, rows.start - 0.5), columns.stop - columns.start, rows.stop - rows.start
            axes.add_patch(Rectangle(*box, fill=False, color="black", lw=1))
        rows, columns = Grid(grid.rows, grid.columns).tile(height, width)[1:]
        seen = min(width, columns.stop + reach), min(height, rows.stop + reach)
        axes.add_patch(Rectangle((-0.5, -0.5), *seen, fill=False, color=figures.COLOURS[1], lw=1.5, ls="--"))
    figures.write(figure, stem, "png")
