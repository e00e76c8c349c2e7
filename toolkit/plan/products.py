"""The matrix products of a micro-batch by their shapes, and how long each takes: a roofline with a launch.

sum(p.times * p.flops for p in products(shape, layout))      # of a forward pass; a multiply-add is two operations
seconds_of(product, rate=140e12, bandwidth=2039e9, size=2, launch=5e-6)

Softmax, LayerNorm and other element-wise work is left out, as in Narayanan et al. 2021 (arXiv 2104.04473, appendix).
"""

from collections.abc import Iterator
from dataclasses import dataclass

from toolkit.plan.activations import fused
from toolkit.plan.layout import Layout
from toolkit.plan.shapes import ModelShape


@dataclass(frozen=True)
class Product:
    """One kernel: ``elements`` are those that it reads and writes; ``layer``: recomputed where layers are."""

    flops: int
    elements: int
    times: int
    layer: bool = True


def products(shape: ModelShape, layout: Layout) -> Iterator[Product]:
    """Of the forward pass of a micro-batch on one tensor rank, through the whole model, without pooler and classifier.

    Causal attention counts in full, as the kernels compute it. The backward pass has two of each, as large.
    """
    hidden, own, inner = shape.hidden, shape.hidden // layout.tensor, shape.intermediate // layout.tensor
    encoders, decoders = shape.count("encoder"), shape.count("decoder")
    attentions, layers, rows = encoders + 2 * decoders, encoders + decoders, layout.micro * layout.sequences
    yield _product(layout.tokens, hidden, own, 3 * attentions)  # query, key, value
    yield _product(layout.tokens, own, hidden, attentions)
    yield _product(layout.tokens, hidden, inner, layers)
    yield _product(layout.tokens, inner, hidden, layers)
    length, size, heads = layout.length, hidden // shape.heads, rows * shape.heads // layout.tensor
    if fused(layout):
        yield Product(4 * heads * length**2 * size, 4 * heads * length * size, attentions)
    else:
        yield _product(length, size, length, attentions, batch=heads)
        yield _product(length, length, size, attentions, batch=heads)
    if predicted := rows * layout.predictions:
        if shape.type == "bert":
            yield _product(predicted, hidden, hidden, 1, layer=False)
        yield _product(predicted, hidden, shape.vocab_size, 1, layer=False)


def _product(rows: int, inner: int, columns: int, times: int, *, batch: int = 1, layer: bool = True) -> Product:
    elements = rows * inner + inner * columns + rows * columns
    return Product(2 * batch * rows * inner * columns, batch * elements, times, layer)


def seconds_of(product: Product, *, rate: float, bandwidth: float, size: int, launch: float) -> float:
    """Of one such product: its launch, then computing or moving ``size`` bytes an element, whichever takes longer.

    ``rate`` in FLOP/s, ``bandwidth`` in bytes/s (0: unknown, then moving takes no time), ``launch`` in seconds.
    """
    moving = product.elements * size / bandwidth if bandwidth else 0.0
    return launch + max(product.flops / rate, moving)
