"""What autograd keeps of a micro-batch for the backward pass, layer by layer: bytes of one device.

kept = activations(shape, layout, shape.layers)      # of all layers, or of one pipe stage's
kept.each + kept.head, kept.moved, kept.formula

Counted from what each operation of PyTorch 2.13 saves, as Korthikanti et al. 2022 do (arXiv 2205.05198, section 4),
who get s·b·h·(34 + 5·a·s/h) for a layer in half precision whose attention is not fused.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from toolkit.plan.layout import Layout
from toolkit.plan.shapes import LayerShape, ModelShape

BLOCKS = ("encoder", "decoder")
LAYER_NORM = 8  # mean and reciprocal of the deviation of each token, in fp32
ID = 8  # int64
RNG_STATE = {"cpu": 5056, "cuda": 16}  # that recomputing puts back, of each layer


@dataclass(frozen=True)
class Activations:
    """Bytes of one device. ``each``: of every micro-batch whose backward pass is to come; ``head``: of its head.

    ``once``: more of the layer at work, where layers are run again or kept on the host; ``moved``: there, of each.
    ``loss``, ``backward``: workspace while the loss, or the last layer, has its backward pass.
    """

    each: int
    head: int
    once: int
    moved: int
    loss: int
    backward: int
    formula: str


def activations(shape: ModelShape, layout: Layout, layers: Sequence[LayerShape]) -> Activations:
    """Of these layers and one micro-batch, under recomputation and offload if the layout has them."""
    blocks = [block_bytes(shape, layout, layer.kind) for layer in layers if layer.kind in BLOCKS]
    entry = layout.entry_bytes(shape.hidden)
    embedded = _embedding_bytes(shape, layout) if layers[0].kind == "embeddings" else 0
    head, loss = _head_bytes(shape, layout) if layers[-1].kind == "head" else (0, 0)
    operation, backward = _work(shape, layout)
    inside, largest = sum(blocks), max(blocks, default=0)
    each, once, moved = embedded + inside, 0, 0
    said = f"{len(blocks)} layers of {largest:,} B"
    if layout.recompute:
        each, once = embedded + len(blocks) * (entry + RNG_STATE.get(layout.device, 0)), largest - entry
        said = f"{len(blocks)} inputs of {entry:,} B and once the inside of a layer, {once:,} B"
    if layout.offload_activations:
        moved = len(blocks) * entry if layout.recompute else inside
        each, once = embedded, once + entry if layout.recompute else operation
        said = f"{moved:,} B of {len(blocks)} layers on the host, {once:,} B of the layer at work"
    formula = f"{said}; embeddings {embedded:,} B; heads {head:,} B"
    return Activations(each, head, once, moved, loss, backward if blocks else 0, formula)


def block_bytes(shape: ModelShape, layout: Layout, kind: str) -> int:
    """Of an encoder's layer, or of a decoder's, which has attention twice."""
    attention = _attention_bytes(shape, layout)
    return attention * (2 if kind == "decoder" else 1) + _feed_forward_bytes(shape, layout)


def _feed_forward_bytes(shape: ModelShape, layout: Layout) -> int:
    """Input, the activation function's input and output (ReLU's output alone), the sum that LayerNorm reads."""
    inner = shape.intermediate // layout.tensor * (1 if layout.act == "relu" else 2)
    per_token = (inner + 2 * shape.hidden) * layout.bytes + shape.hidden * _mask(layout) + LAYER_NORM
    return layout.tokens * per_token


def _attention_bytes(shape: ModelShape, layout: Layout) -> int:
    """Input, the heads' output, the sum that LayerNorm reads; query, key, value and what else the kernel saves."""
    h, heads, size = shape.hidden, shape.heads // layout.tensor, layout.bytes
    inner, squares = h // layout.tensor, layout.rows * layout.length**2
    per_token = (2 * h + inner) * size + h * _mask(layout) + LAYER_NORM
    if fused(layout):
        # q, k, v; the logarithm of the sums; the padding mask as numbers, made anew in each layer
        kernel = layout.tokens * (3 * inner * size + 4 * heads) + squares * size
    else:
        inside = 4 if layout.device == "cpu" and layout.attention == "sdpa" else size  # its unfused path is fp32
        dropped = inside + _mask(layout, inside) if layout.attention_dropout else 0
        kernel = layout.tokens * 3 * inner * inside + squares * heads * (inside + dropped)
    return layout.tokens * per_token + kernel


def fused(layout: Layout) -> bool:
    """Whether attention never writes its matrix: all kernels but eager, and PyTorch's on a CPU with dropout."""
    return layout.attention != "eager" and not (layout.device == "cpu" and layout.attention_dropout)


def _embedding_bytes(shape: ModelShape, layout: Layout) -> int:
    """The sum that LayerNorm reads, the dropout's mask, and ids: of words, and of BERT's types."""
    if shape.type == "marian":  # both sides, without LayerNorm
        return 2 * layout.tokens * (shape.hidden * _mask(layout) + ID)
    return layout.tokens * (shape.hidden * (layout.bytes + _mask(layout)) + LAYER_NORM + 2 * ID)


def _head_bytes(shape: ModelShape, layout: Layout) -> tuple[int, int]:
    """(kept, and what the loss takes while its backward pass begins)."""
    predicted, hidden = layout.rows * layout.predictions, shape.hidden * layout.bytes
    probabilities = 4 * predicted * shape.vocab_size
    kept = layout.entry_bytes(shape.hidden) + probabilities  # the last hidden states are the head's input
    if shape.type == "bert":
        kept += predicted * (4 * hidden + LAYER_NORM + ID) + 2 * layout.rows * hidden
    return kept, 2 * probabilities  # gradients of the loss and of the logarithm, in fp32


def _work(shape: ModelShape, layout: Layout) -> tuple[int, int]:
    """(What a layer's largest operation has on the device while the rest is on the host, gradients within the last).

    The latter are of its feed-forward part, or of its attention when that part's are gone.
    """
    entry = layout.entry_bytes(shape.hidden)
    inner = layout.tokens * (shape.intermediate // layout.tensor) * layout.bytes
    written = 0 if fused(layout) else 4 if layout.device == "cpu" else layout.bytes
    matrix = layout.rows * layout.length**2 * (shape.heads // layout.tensor) * written
    backward = max(2 * inner + entry, 3 * matrix + 4 * entry - _feed_forward_bytes(shape, layout))
    return entry + max(2 * inner, 2 * matrix + entry), backward


def _mask(layout: Layout, size: int | None = None) -> int:
    """Bytes of one element of a dropout mask: a bool of CUDA's kernel, a factor on a CPU."""
    if not layout.dropout:
        return 0
    return 1 if layout.device == "cuda" else size or layout.bytes
