"""A convolution of an image that lies in tiles on a grid of ranks, equal to that of the whole image.

    grid = Grid(rows=2, columns=2, rank=ranks.rank())
    conv = SpatialConv2d(3, 16, kernel_size=3, padding="same")
    conv.grid = grid                                     # None, the default: the whole image is here
    tile = conv(image[grid.tile(*image.shape[-2:])])     # this rank's part of the output

Before a convolution each tile gets a border of its neighbours' pixels, the halo; in the backward pass the halo's
gradient goes back to them. Weights are whole on every rank, and so the sum over ranks of their gradients is the
gradient: what data parallelism adds up already.

torch 2.13's DTensor does not do this. On two gloo ranks ``conv2d`` of a DTensor with ``Shard(2)`` or ``Shard(3)``
gives a DTensor that is said to be replicated and holds, with wrong border pixels, this rank's half only:
``full_tensor()`` has half the shape, and the backward pass raises.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import conv2d

from toolkit.errors import ConfigError

HEIGHT, WIDTH = -2, -1


@dataclass
class Grid:
    """``rows`` x ``columns`` ranks in reading order, of which this is ``rank``; counts the bytes that it sends."""

    rows: int
    columns: int
    rank: int = 0
    sent_bytes: int = 0

    @property
    def size(self) -> int:
        return self.rows * self.columns

    def neighbours(self, dim: int) -> tuple[int | None, int | None]:
        """The ranks above and below (``HEIGHT``) or left and right (``WIDTH``); None beyond the image."""
        row, column = divmod(self.rank, self.columns)
        place, last, step = (row, self.rows - 1, self.columns) if dim == HEIGHT else (column, self.columns - 1, 1)
        return self.rank - step if place > 0 else None, self.rank + step if place < last else None

    def tile(self, height: int, width: int) -> tuple[Any, ...]:
        """This rank's part of images [..., height, width], as an index; tiles differ by a row or a column at most."""
        row, column = divmod(self.rank, self.columns)
        return ..., _part(height, self.rows, row), _part(width, self.columns, column)

    def refuse_small(self, height: int, width: int, halo: int) -> None:
        """Raises ConfigError, on all ranks alike, if a halo of ``halo`` pixels is larger than the smallest tile."""
        least = (height // self.rows, width // self.columns)
        if min(least) < max(1, halo):
            raise ConfigError(
                f"an image of {height} x {width} pixels on a grid of {self.rows} x {self.columns} ranks has tiles of "
                f"{least[0]} x {least[1]}: the halo of {halo} would reach beyond the neighbour. Use larger images, a "
                "smaller kernel or fewer ranks."
            )

    def swap(self, first: Tensor, last: Tensor, dim: int) -> tuple[Tensor, Tensor]:
        """Send ``first`` to the neighbour before and ``last`` to the one after; what they sent, zeros from none."""
        give = first.contiguous(), last.contiguous()
        got = torch.zeros_like(give[0]), torch.zeros_like(give[1])
        operations = []
        for rank, mine, theirs in zip(self.neighbours(dim), give, got, strict=True):
            if rank is not None:
                operations += [dist.P2POp(dist.isend, mine, rank), dist.P2POp(dist.irecv, theirs, rank)]
                self.sent_bytes += mine.nbytes
        for work in dist.batch_isend_irecv(operations) if operations else ():
            work.wait()
        return got


def _part(size: int, parts: int, index: int) -> slice:
    return slice(index * size // parts, (index + 1) * size // parts)


class Halo(torch.autograd.Function):
    """A tile with ``width`` more pixels on both sides of ``dim``: the neighbours', zeros at the image's border."""

    @staticmethod
    def forward(ctx: Any, tile: Tensor, grid: Grid, dim: int, width: int) -> Tensor:
        ctx.grid, ctx.dim, ctx.width = grid, dim, width
        size = tile.shape[dim]
        before, after = grid.swap(tile.narrow(dim, 0, width), tile.narrow(dim, size - width, width), dim)
        return torch.cat([before, tile, after], dim)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """The halo's gradient is of the neighbours' pixels: it goes back and is added to their borders."""
        (gradient,), dim, width = gradients, ctx.dim, ctx.width
        size = gradient.shape[dim] - 2 * width
        before, own, after = torch.split(gradient, [width, size, width], dim)
        own = own.clone()
        from_before, from_after = ctx.grid.swap(before, after, dim)
        own.narrow(dim, 0, width).add_(from_before)
        own.narrow(dim, size - width, width).add_(from_after)
        return own, None, None, None


class SpatialConv2d(nn.Conv2d):
    """``nn.Conv2d`` of an odd kernel, stride 1 and padding "same" with zeros, of a tile [images, channels, h, w]."""

    grid: Grid | None = None

    def __init__(self, inputs: int, outputs: int, kernel_size: int | tuple[int, int], **options: Any) -> None:
        options = {"stride": 1, "padding": "same", "padding_mode": "zeros", **options}
        kernels = kernel_size if isinstance(kernel_size, tuple) else (kernel_size,)
        given = options["stride"], options["padding"], options["padding_mode"]
        if given != (1, "same", "zeros") or not all(k % 2 for k in kernels):
            raise ConfigError(
                f"kernel {kernel_size}, stride {given[0]}, padding {given[1]} with {given[2]}: a convolution over "
                "tiles has an odd kernel, stride 1 and padding same with zeros. Use a kernel of 1, 3, 5, …"
            )
        super().__init__(inputs, outputs, kernel_size, **options)

    @property
    def halo(self) -> tuple[int, int]:
        """Pixels that a result depends on above and below, and left and right of it."""
        vertical, horizontal = (d * (k - 1) // 2 for d, k in zip(self.dilation, self.kernel_size, strict=True))
        return vertical, horizontal

    def forward(self, tile: Tensor) -> Tensor:
        if self.grid is None:
            return super().forward(tile)
        for dim, width in zip((HEIGHT, WIDTH), self.halo, strict=True):  # corners come with the second exchange
            if tile.shape[dim] < width:
                raise ConfigError(f"a halo of {width} pixels is larger than this rank's tile {list(tile.shape)}.")
            if width:
                tile = Halo.apply(tile, self.grid, dim, width)  # type: ignore[no-untyped-call]
        return conv2d(tile, self.weight, self.bias, dilation=self.dilation, groups=self.groups)


def halo_bytes(grid: Grid, conv: SpatialConv2d, shape: tuple[int, int, int], itemsize: int = 4) -> int:
    """What all ranks together send before one convolution of images [images, height, width]; backward again as much.

    Two ranks send p rows to each other across each border between rows of tiles, W pixels long; then p columns across
    each border between columns of tiles, as high as H and what the first exchange has added, 2p to each of the tiles
    in it: ``2 p W (rows - 1) + 2 p (H + 2 p rows) (columns - 1)`` pixels of all input channels.
    """
    (images, height, width), (p, q) = shape, conv.halo
    pixels = 2 * p * width * (grid.rows - 1) + 2 * q * (height + 2 * p * grid.rows) * (grid.columns - 1)
    return images * conv.in_channels * pixels * itemsize
