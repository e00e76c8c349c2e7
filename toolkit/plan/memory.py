"""What DeepSpeed 0.19.8 really holds on a device, its host and NVMe, in bytes by part, each with its formula.

memory = memory_of(shape, layout, pipe_stage=0)
memory.peak, memory.at_peak                     # bytes of the device at the worst moment, and its parts

Any of four moments can be the worst: the backward pass begins (all activations are there), its first gradients are
made (the buckets are there, too), the first bucket is reduced (at stage 0: all gradients are), the optimizer works.
Files in comments are DeepSpeed's.

The ZeRO paper's accounting of 16 bytes a parameter is toolkit/plan/paper.py. In half precision DeepSpeed sums gradients
in fp32 where it is told to (4 bytes instead of 2: 18), keeps those in bf16 beside them (ZeRO 1: 20), or turns those in
half precision into fp32 for the optimizer (20).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from math import ceil, prod

from toolkit.plan.activations import activations
from toolkit.plan.layout import BYTES, Elements, Layout, elements
from toolkit.plan.shapes import ModelShape

MOMENTS = {
    "b": "the loss begins the backward pass",
    "g": "the last layer's gradients are made",
    "r": "gradients are reduced",
    "o": "the optimizer works",
}
ALL = "bgro"
PLACE = {"none": "device", "cpu": "host", "nvme": "nvme"}
ALLREDUCE = 500_000_000  # elements that stage 0 flattens at a time (runtime/engine.py, MEMORY_OPT_ALLREDUCE_SIZE)


@dataclass(frozen=True)
class Part:
    """``place``: device, host or nvme; ``moments``: letters of MOMENTS at which it is there."""

    name: str
    group: str  # weights, gradients, optimizer, buffers, activations, workspace
    place: str
    bytes: int
    formula: str
    moments: str = ALL
    pinned: bool = False


@dataclass(frozen=True)
class Memory:
    """Of one rank: every part, wherever and whenever it is there."""

    parts: tuple[Part, ...]

    def at(self, moment: str) -> tuple[Part, ...]:
        return tuple(p for p in self.parts if p.place == "device" and moment in p.moments)

    @cached_property
    def moment(self) -> str:
        """When the device holds most."""
        return max(MOMENTS, key=lambda m: sum(p.bytes for p in self.at(m)))

    @property
    def at_peak(self) -> tuple[Part, ...]:
        return self.at(self.moment)

    @property
    def groups(self) -> dict[str, int]:
        """Bytes at the peak by group."""
        groups = dict.fromkeys(p.group for p in self.at_peak)
        return {group: sum(p.bytes for p in self.at_peak if p.group == group) for group in groups}

    @property
    def peak(self) -> int:
        return sum(p.bytes for p in self.at_peak)

    def total(self, place: str, *, pinned: bool = False) -> int:
        """Bytes on the host (pinned ones only, where asked for) or on NVMe."""
        return sum(p.bytes for p in self.parts if p.place == place and (p.pinned or not pinned))

    def named(self, name: str) -> int:
        """Bytes of all parts of that name, wherever they are."""
        return sum(p.bytes for p in self.parts if p.name == name)


def memory_of(shape: ModelShape, layout: Layout, pipe_stage: int = 0) -> Memory:
    """Of a rank of this pipe stage. What the CUDA context and the allocator take is not in it: see assumptions."""
    own = elements(shape, layout, pipe_stage)
    rules = {0: _stage0, 1: _bf16_optimizer if layout.bf16_optimizer else _stage1_2, 2: _stage1_2, 3: _stage3}
    found = (*rules[layout.stage](own, layout), *_activations(own, shape, layout, pipe_stage))
    return Memory(tuple(p for p in found if p.bytes))


def _part(group: str, name: str, count: float, size: float, why: str = "", moments: str = ALL, place: str = "device",
          pinned: bool = False) -> Part:  # fmt: skip
    formula = f"{int(count):,} x {size:g} B" + (f": {why}" if why else "")
    return Part(name, group, place, int(count * size), formula, moments, pinned)


def _stage0(own: Elements, layout: Layout) -> Iterator[Part]:
    count, size = own.count, layout.bytes
    yield _part("weights", "weights", count + own.frozen, size)
    before = ALL if layout.accumulation > 1 else "ro"
    yield _part("gradients", "gradients", count, size, moments=before)
    if layout.dtype != "fp32":  # runtime/fp16/fused_optimizer.py
        yield _part("optimizer", "master weights", count, 4, "fp32")
        yield _part("workspace", "fp32 gradients", own.group, 4, "one group at a time", "o")
    yield _part("optimizer", "optimizer states", count * own.states, 4, layout.optimizer)
    if layout.data > 1:
        flat = min(count, ALLREDUCE)
        yield _part("buffers", "all-reduce buffer", flat, size, "gradients flattened", "r")
        if layout.communication_dtype != layout.dtype:
            yield _part("buffers", "all-reduce copy", flat, BYTES[layout.communication_dtype], moments="r")
    yield from _torch_work(own, layout, count)


def _stage1_2(own: Elements, layout: Layout) -> Iterator[Part]:
    """runtime/zero/stage_1_and_2.py."""
    count, size, shard, share = own.count, layout.bytes, own.shard(layout), f"of {layout.data} shares"
    sums, wire = BYTES[layout.accumulation_dtype], BYTES[layout.communication_dtype]
    apart = layout.accumulation_dtype != layout.dtype  # sums in a type of their own
    several = layout.accumulation > 1
    yield _part("weights", "weights", count + own.frozen, size, "flat, whole on every rank")
    yield from _master(own, layout, shard)
    bucket, staged = layout.zero["reduce_bucket_size"], sums if layout.stage == 1 and apart else size
    buffers = 2 if layout.overlap or layout.pipe > 1 else 1
    first = 1 if layout.pipe > 1 else buffers  # a pipeline makes the second one when it reduces
    said = f"{first} bucket{'s' * (first > 1)}"
    if several and layout.stage == 1:
        yield _part("gradients", "gradients", count, sums, "summed whole, reduced once a step", "bg")
        left = count - own.touched(layout)  # they go as they are reduced
        yield _part("gradients", "gradients", left, sums, "but for this rank's", "r")
        yield _part("buffers", "reduction buckets", first * bucket, staged, f"{said}, kept", "b")
    yield _part("buffers", "reduction buckets", first * bucket, staged, said, "g")
    yield _part("buffers", "reduction buckets", buffers * bucket, staged, f"{buffers} buckets", "r")
    yield _part("workspace", "bucket while reduced", min(bucket, count), wire, moments="r")
    yield _part("workspace", "largest gradient", own.largest, size, moments="r")
    after = ALL if several and layout.stage == 2 else "ro" if layout.pipe > 1 else "gro"
    if apart:
        yield _part("gradients", "gradient sums", shard, sums, share, after)
    elif layout.offload == "none":
        touched = own.touched(layout)
        yield _part("gradients", "gradient sums", touched, sums, "whole parameters, " + share, after)
        if several and layout.stage == 2:
            yield _part("gradients", "gradients of a micro-batch", touched, size, share, "r")
    if layout.offload == "none":
        yield _part("workspace", "flat gradients", own.group / layout.data, 4, "one group at a time", "o")
        yield from _torch_work(own, layout, shard)
        return
    host = partial(_part, place="host", pinned=layout.pinned)
    yield _part("buffers", "gradient on its way", own.largest, size, "largest parameter")
    yield host("gradients", "host gradients", shard, 4, "fp32, of this rank's share")
    yield host("buffers", "host weights to send", shard, size)
    yield host("buffers", "host gradient on its way", own.largest, size)
    if several and layout.stage == 2 and not apart:
        yield host("gradients", "host gradient sums", own.touched(layout), size, "over micro-batches")


def _bf16_optimizer(own: Elements, layout: Layout) -> Iterator[Part]:
    """runtime/bf16_optimizer.py: gradients in bf16 are kept, too, as zeros (immediate_grad_update is off)."""
    count, shard = own.count, own.shard(layout)
    yield _part("weights", "weights", count + own.frozen, layout.bytes)
    yield from _master(own, layout, shard)
    yield _part("gradients", "gradient sums", count, 4, "fp32, whole on every rank")
    before = ALL if layout.accumulation > 1 else "ro"
    yield _part("gradients", "gradients", count, layout.bytes, moments=before)
    if layout.data > 1:
        yield _part("buffers", "all-reduce buffer", min(count, ALLREDUCE), 4, moments="r")
    yield from _torch_work(own, layout, shard)


def _stage3(own: Elements, layout: Layout) -> Iterator[Part]:
    """runtime/zero/stage3.py and partitioned_param_coordinator.py; runtime/swap_tensor for NVMe."""
    size, shard, zero, share = layout.bytes, own.shard(layout), layout.zero, f"of {layout.data} shares"
    sums, wire = BYTES[layout.accumulation_dtype], BYTES[layout.communication_dtype]
    whole = sum(s for s in own.sizes if s <= zero["stage3_param_persistence_threshold"])
    pinned = layout.offload_params == "cpu" and layout.pinned
    yield _part("weights", "weights", shard + ceil(own.frozen / layout.data), size, share,
                place=PLACE[layout.offload_params], pinned=pinned)  # fmt: skip
    yield _part("weights", "whole weights", whole, size, "never shared: below the persistence threshold")
    # The prefetcher passes over weights that are there and keeps them for their next use: all stay to the end
    live = min(own.count - whole, max(zero["stage3_max_live_parameters"], own.largest))
    yield _part("weights", "gathered weights", live, size, "up to stage3_max_live_parameters", "bg")
    ahead = min(live, own.largest + zero["stage3_prefetch_bucket_size"])
    still = max(ahead, live * _left(own, layout))
    yield _part("weights", "gathered weights", still, size, "for the rest of the backward pass", "r")
    yield from _master(own, layout, shard)
    summed = "device" if layout.offload == "none" else "host"
    yield _part("gradients", "gradient sums", shard, sums, share, place=summed, pinned=layout.pinned)
    yield _part("buffers", "reduction buckets", zero["reduce_bucket_size"], wire, "one bucket")
    yield _part("workspace", "bucket while reduced", min(zero["reduce_bucket_size"], own.count), wire, moments="r")
    yield _part("workspace", "largest gradient", own.largest, size, moments="r")
    if layout.offload == "cpu":
        yield _part("gradients", "host gradients", shard, 4, "fp32", place="host", pinned=layout.pinned)
    elif layout.offload == "none":
        yield _part("workspace", "flat gradients", own.group / layout.data, 4, "one group at a time", "o")
        yield from _torch_work(own, layout, shard)
    # Pinned memory through which everything goes to and from NVMe
    host = partial(_part, "buffers", place="host", pinned=True)
    if layout.offload == "nvme":
        yield host("swap buffers", layout.swap_buffers * ceil(own.largest / layout.data), 4, "optimizer")
    if layout.offload_params == "nvme":
        yield host("weight swap buffers", prod(layout.param_swap), size)


def _master(own: Elements, layout: Layout, shard: int) -> Iterator[Part]:
    """Weights in fp32 and the optimizer's states; on NVMe the gradients lie beside them."""
    place, share = PLACE[layout.offload], f"of {layout.data} shares"
    pinned = place == "host" and layout.pinned and layout.stage < 3
    yield _part("optimizer", "master weights", shard, 4, f"fp32, {share}", place=place, pinned=pinned)
    yield _part("optimizer", "optimizer states", shard * own.states, 4, f"{layout.optimizer}, {share}", place=place)
    if place == "nvme":
        yield _part("gradients", "swapped gradients", shard, 4, share, place=place)


def _torch_work(own: Elements, layout: Layout, shard: int) -> Iterator[Part]:
    """PyTorch's own optimizers make a new tensor of each group; DeepSpeed's kernels work in place."""
    if layout.optimizer.startswith("torch."):
        yield _part("workspace", "optimizer's work", own.group * shard / max(1, own.count), 4, moments="o")


def _left(own: Elements, layout: Layout) -> float:
    """Of the backward pass, when the first bucket is full; without buckets all is reduced after it."""
    buckets = layout.stage > 0 and layout.pipe == 1 and not layout.bf16_optimizer
    return max(0.0, 1 - layout.zero["reduce_bucket_size"] / own.count) if buckets else 0.0


def _activations(own: Elements, shape: ModelShape, layout: Layout, pipe_stage: int) -> Iterator[Part]:
    kept, left, cuda = activations(shape, layout, own.layers), _left(own, layout), layout.device == "cuda"
    waiting = {"1f1b": min(layout.pipe - pipe_stage, layout.accumulation), "gpipe": layout.accumulation}
    flight = waiting[layout.schedule] if layout.pipe > 1 else 1
    why = f"{flight} micro-batch{'es' * (flight > 1)} of {layout.micro}: {kept.formula}"
    begin = flight * (kept.each + kept.head)
    held = partial(Part, "activations", "activations", "device")
    yield held(begin, why, "b")
    yield held(begin - kept.head + kept.once, why, "g")
    yield held(int(left * kept.each) + kept.once, f"{left:.0%} left: {why}", "r")
    yield Part("moved activations", "activations", "host", flight * kept.moved, why, "bg", cuda)
    yield Part("work of the loss", "workspace", "device", kept.loss, "two gradients of the logits in fp32", "b")
    yield Part("work of a layer", "workspace", "device", kept.backward, "gradients within the last layer", "g")
    if layout.pipe > 1:
        count = (flight if pipe_stage < layout.pipe - 1 else 0) + 1
        yield _part("buffers", "between pipe stages", count, layout.entry_bytes(shape.hidden), "outputs and a gradient",
                    "bgr")  # fmt: skip
