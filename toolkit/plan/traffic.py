"""What a rank sends in a step, in bytes on the wire, as DeepSpeed 0.19.8 does it.

for sent in traffic(shape, layout, pipe_stage=0): sent.name, sent.bytes, sent.formula

A ring of n ranks sends S (n-1)/n of S bytes for a reduce-scatter or an all-gather, twice that for an all-reduce: the
ZeRO paper's convention, whose volumes (2, 2, 2, 3 times the model) are toolkit.plan.paper.zero_volume. DeepSpeed
differs. At stages 1 and 2 it all-reduces gradients where the paper scatters them (use_multi_rank_bucket_allreduce in
stage_1_and_2.py, average_tensor): 3 times the model. At stages 2 and 3 it reduces them in each micro-batch. At stage 3
it gathers weights once a micro-batch, not twice, as long as stage3_max_live_parameters lets them stay.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from toolkit.plan.activations import BLOCKS
from toolkit.plan.layout import BYTES, Elements, Layout, elements
from toolkit.plan.shapes import ModelShape


@dataclass(frozen=True)
class Sent:
    """``among``: data, pipe or tensor ranks; ``hidden``: computing can go on meanwhile."""

    name: str
    among: str
    bytes: float
    hidden: bool
    formula: str


def traffic(shape: ModelShape, layout: Layout, pipe_stage: int = 0) -> list[Sent]:
    """Of a rank of this pipe stage, in one optimizer step."""
    own = elements(shape, layout, pipe_stage)
    shared = _stage3 if layout.stage == 3 else _below3
    found = (*shared(own, shape, layout), *_pipe(shape, layout, pipe_stage), *_tensor(own, shape, layout))
    return [sent for sent in found if sent.bytes]


def _below3(own: Elements, shape: ModelShape, layout: Layout) -> Iterator[Sent]:
    share, count, size = (layout.data - 1) / layout.data, own.count, layout.bytes
    wire = 4 if layout.bf16_optimizer else BYTES[layout.communication_dtype]
    times = layout.accumulation if layout.stage == 2 else 1
    said = f"2 x {share:.3g} x {count:,} x {wire} B x {times}"
    hidden = layout.stage > 0 and layout.overlap
    yield Sent("gradients, all-reduce", "data", 2 * share * count * wire * times, hidden, said)
    if layout.stage:
        yield Sent("weights, all-gather", "data", share * count * size, False, f"{share:.3g} x {count:,} x {size} B")


def _stage3(own: Elements, shape: ModelShape, layout: Layout) -> Iterator[Sent]:
    share, count, size, micro = (layout.data - 1) / layout.data, own.count, layout.bytes, layout.accumulation
    wire = BYTES[layout.communication_dtype]
    said = f"{share:.3g} x {count:,} x {wire} B x {micro}"
    yield Sent("gradients, reduce-scatter", "data", share * count * wire * micro, layout.overlap, said)
    threshold = layout.zero["stage3_param_persistence_threshold"]
    whole = sum(s for s in own.sizes if s <= threshold)
    gathered = count - whole
    if gathered > layout.zero["stage3_max_live_parameters"]:
        words = shape.words
        gathered = 2 * gathered + 2 * words * (shape.tied and words > threshold)  # at both its places, on both ways
    said = f"{share:.3g} x {gathered:,} x {size} B x {micro}"
    yield Sent("weights, all-gather", "data", share * gathered * size * micro, True, said)
    yield Sent("small weights, all-gather", "data", share * whole * size, False, f"{share:.3g} x {whole:,} x {size} B")


def _pipe(shape: ModelShape, layout: Layout, pipe_stage: int) -> Iterator[Sent]:
    last, micro, entry = layout.pipe - 1, layout.accumulation, layout.entry_bytes(shape.hidden)
    if pipe_stage < last:
        # The mask, and what is predicted
        more = entry + 8 * (layout.tokens + layout.rows * layout.predictions)
        yield Sent("activations to the next stage", "pipe", micro * more, False, f"{micro} x {more:,} B")
    if pipe_stage > 0:
        yield Sent("gradients to the stage before", "pipe", micro * entry, False, f"{micro} x {entry:,} B")
    if last and shape.tied and pipe_stage in (0, last):
        words = shape.words * (4 if layout.bf16_optimizer else layout.bytes)
        yield Sent("tied embedding, all-reduce", "pipe", words, False, f"{words:,} B between first and last stage")


def _tensor(own: Elements, shape: ModelShape, layout: Layout) -> Iterator[Sent]:
    # Forward after attention and after the feed-forward part; backward before that part, and for query, key and value
    # each, where Megatron-LM has one (Shoeybi et al. 2019, arXiv 1909.08053)
    count = 6 * sum(layer.kind in BLOCKS for layer in own.layers) * layout.accumulation
    share, entry = (layout.tensor - 1) / layout.tensor, layout.entry_bytes(shape.hidden)
    said = f"2 x {share:.3g} x {count} x {entry:,} B"
    yield Sent("activations, all-reduce", "tensor", 2 * share * count * entry, False, said)
