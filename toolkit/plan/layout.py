"""How a configuration lies on its ranks: all that memory and time depend on besides the model and the machine.

layout = Layout.of(config, ds, world=8, device="cuda")     # ds: what DeepSpeed gets, see toolkit.deepspeed.ds_config
own = elements(shape, layout, pipe_stage=1)
own.count, own.shard(layout)                               # of all parameters, and of this rank's share of them
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, pairwise, product
from math import ceil
from typing import Any

from toolkit.config.kinds import KINDS
from toolkit.config.schema import RunConfig
from toolkit.deepspeed.facts import Facts, canonical
from toolkit.errors import PlanError
from toolkit.plan.shapes import LayerShape, ModelShape

BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
# DeepSpeed's defaults, in elements (runtime/zero/config.py)
ZERO_DEFAULTS = {
    "reduce_bucket_size": 5e8,
    "stage3_prefetch_bucket_size": 5e7,
    "stage3_param_persistence_threshold": 1e5,
    "stage3_max_reuse_distance": 1e9,
    "stage3_max_live_parameters": 1e9,
}


@dataclass(frozen=True)
class Layout:
    """Sizes in elements and samples; dtypes as fp32, bf16, fp16; devices of offload as none, cpu, nvme."""

    device: str
    data: int  # copies of the model, which ZeRO shares states over
    pipe: int
    tensor: int
    schedule: str
    partition: Any
    stage: int  # ZeRO's
    dtype: str
    accumulation_dtype: str
    communication_dtype: str
    bf16_optimizer: bool  # DeepSpeed's own class for ZeRO 1 in bf16 with fp32 accumulation
    optimizer: str  # its class, as DeepSpeed picks it
    states: int  # fp32 numbers that it keeps for each parameter, at most
    offload: str
    offload_params: str
    pinned: bool
    swap_buffers: int
    param_swap: tuple[int, int]  # buffers of weights on NVMe, and elements of each
    overlap: bool
    zero: Mapping[str, int]  # ZERO_DEFAULTS, or what is given
    micro: int
    accumulation: int
    samples: int  # of an optimizer step, over all ranks
    sequences: int  # that a sample makes: the endings of a choice
    length: int
    predictions: int  # of the vocabulary, of one sequence
    attention: str
    dropout: float
    attention_dropout: float
    act: str
    recompute: bool
    offload_activations: bool

    @classmethod
    def of(cls, config: RunConfig, ds: Mapping[str, Any], *, world: int, device: str) -> "Layout":
        """``ds`` is completed; ``world`` counts all ranks."""
        copies = world // config.split
        facts = Facts(ds, copies, device)
        zero = facts["zero_optimization"] or {}
        swap = zero.get("offload_param") or {}
        can = KINDS[config.task.kind].can
        overlap = zero.get("overlap_comm")
        length = config.data.max_length
        if "decoder" in can and config.batch.tokens:
            length = min(length, max(1, config.batch.tokens // config.batch.global_size))
        return cls(
            device=device, data=copies, pipe=config.pipeline.stages, tensor=config.tensor_size,
            schedule=config.pipeline.schedule, partition=config.pipeline.partition,
            stage=facts.stage, dtype=facts.dtype, accumulation_dtype=facts.accumulation,
            communication_dtype=canonical(facts["communication_data_type"]) or facts.dtype,
            bf16_optimizer=facts.bf16_optimizer, optimizer=facts.optimizer, states=facts.states,
            offload=facts.offload, offload_params=facts.param_offload,
            pinned=bool(facts["zero_optimization.offload_optimizer.pin_memory"]), swap_buffers=facts.swap_buffers,
            param_swap=(int(swap.get("buffer_count", 5)), int(swap.get("buffer_size", 1e8))),
            overlap=(facts.stage == 3 if overlap is None else overlap) and config.pipeline.stages == 1,
            zero={k: int(zero.get(k, zero.get(k.removeprefix("stage3_"), d))) for k, d in ZERO_DEFAULTS.items()},
            micro=config.batch.micro_size, accumulation=int(ds["gradient_accumulation_steps"]),
            samples=config.batch.global_size, length=length,
            sequences=len(config.data.columns.endings) if "choices" in can else 1,
            predictions=length if "decoder" in can else config.data.max_predictions if "masks" in can else 0,
            attention=config.model.attention, dropout=config.model.dropout,
            attention_dropout=0.0 if "decoder" in can else config.model.dropout,  # Marian's own is 0
            act=config.model.hidden_act, recompute=config.activation.recompute,
            offload_activations=config.activation.offload,
        )  # fmt: skip

    @property
    def ranks(self) -> int:
        return self.data * self.pipe * self.tensor

    @property
    def rows(self) -> int:
        """Sequences of a micro-batch."""
        return self.micro * self.sequences

    @property
    def tokens(self) -> int:
        """Of a micro-batch, on one side of an encoder-decoder."""
        return self.rows * self.length

    @property
    def bytes(self) -> int:
        """Of a weight, and of an activation."""
        return BYTES[self.dtype]

    def entry_bytes(self, hidden: int) -> int:
        """Of a layer's input."""
        return self.tokens * hidden * self.bytes


@dataclass(frozen=True)
class Elements:
    """What one rank holds of the model: its pipe stage's layers, and their elements after tensor parallelism."""

    layers: tuple[LayerShape, ...]
    groups: tuple[tuple[int, ...], ...]  # DeepSpeed's: of trained matrices, which decay, and of trained vectors
    sizes: tuple[int, ...]  # of both groups
    count: int  # of all that is trained
    largest: int  # of a parameter
    group: int  # of the larger of the two groups
    frozen: int
    states: float  # fp32 numbers of optimizer state for each element

    def shard(self, layout: Layout) -> int:
        """A rank's share of flat groups (stages 1, 2), or of parameters each for itself (stage 3), with padding."""
        if layout.stage == 3:
            return sum(ceil(s / layout.data) for s in self.sizes)
        return sum(_flat(group, layout) for group in self.groups)

    def touched(self, layout: Layout) -> int:
        """Elements of all parameters that reach into a rank's flat share, whole ones; of the rank with most."""
        found = [0] * layout.data
        for group in self.groups:
            part = max(1, _flat(group, layout))
            for size, end in zip(group, accumulate(group), strict=True):
                for rank in range((end - size) // part, min((end - 1) // part + 1, layout.data)):
                    found[rank] += size
        return max(found)


def _flat(group: tuple[int, ...], layout: Layout) -> int:
    """A rank's share of a group in one piece, whose length is even."""
    return ceil(sum(group) / layout.data / 2) * 2


def elements(shape: ModelShape, layout: Layout, pipe_stage: int) -> Elements:
    """Of a rank of this pipe stage. Raises PlanError where the model cannot be cut into so many."""
    layers = _stages(shape, layout.pipe, layout.partition)[pipe_stage]
    return _elements(layers, layout.tensor, layout.states, layout.optimizer == "MuonWithAuxAdam")


@lru_cache  # a search asks the same again and again
def _elements(layers: tuple[LayerShape, ...], tensor: int, states: int, muon: bool) -> Elements:
    every = [p for layer in layers for p in layer.parameters]
    split = [(p, p.size if p.split is None else p.size // tensor) for p in every if p.trained]
    groups = tuple(tuple(size for p, size in split if (len(p.shape) > 1) is matrices) for matrices in (True, False))
    sizes, frozen = groups[0] + groups[1], sum(p.size for p in every if not p.trained)
    count, largest, group = sum(sizes), max(sizes, default=0), max(map(sum, groups))
    # One momentum of Muon's for matrices that are no embeddings (set_optimizer_flags), Adam's two for the rest
    once = sum(size for p, size in split if muon and len(p.shape) > 1 and not p.embedding)
    return Elements(layers, groups, sizes, count, largest, group, frozen, states - once / max(1, count))


def _stages(shape: ModelShape, count: int, how: Any) -> list[tuple[LayerShape, ...]]:
    """The cut that toolkit/models/pipeline.py and DeepSpeed make, a tied embedding in the first stage and the last."""
    if count == 1:
        return [shape.layers]
    embeddings, *blocks, head = shape.layers
    words = embeddings.parameters[0]
    tied = LayerShape("head", (*head.parameters, words)) if shape.tied else head
    items = [LayerShape("embeddings", (words,)), LayerShape("positions", embeddings.parameters[1:]), *blocks, tied]
    if isinstance(how, tuple):
        parts = [0, *how, len(items)]
    elif how == "uniform":
        chunk, rest = divmod(len(items), count)
        parts = [0, *accumulate(chunk + (i < rest) for i in range(count))]
    else:  # by time it is measured; layers of one size make much the same cut
        parts = balanced(tuple(layer.size for layer in items), count) if count <= len(items) else []
    if len(parts) != count + 1 or any(a >= b for a, b in pairwise(parts)):
        raise PlanError(
            f"pipeline.stages={count}: {len(items)} layers cannot be cut so that each stage has one "
            f"(pipeline.partition={how}). Use fewer stages, or another pipeline.partition."
        )
    return [tuple(items[a:b]) for a, b in pairwise(parts)]


@lru_cache
def balanced(sizes: tuple[int, ...], count: int) -> list[int]:
    """The first item of each part, and the end: largest and smallest part as close as dynamic programming gets them.

    As DeepSpeed's runtime/utils.py, partition_balanced, does, of equally good cuts the last.
    """
    ends = [0, *accumulate(sizes)]
    best: dict[tuple[int, int], tuple[float, float, int]] = {(0, 0): (0, float("inf"), 0)}  # largest, smallest, cut
    for i, j in product(range(1, len(ends)), range(1, count + 1)):
        before = [(k, *best[k, j - 1][:2]) for k in reversed(range(i)) if (k, j - 1) in best]
        cuts = [(max(most, ends[i] - ends[k]), min(least, ends[i] - ends[k]), k) for k, most, least in before]
        if cuts:
            best[i, j] = min(cuts, key=lambda cut: cut[0] - cut[1])
    parts = [len(sizes)]
    for j in range(count, 0, -1):
        parts.append(best[parts[-1], j][2])
    return parts[::-1]
