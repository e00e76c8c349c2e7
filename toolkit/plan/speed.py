"""How long an optimizer step takes on a machine, and what of it is computing, sending and waiting.

speed = speed_of(shape, layout, machine, memory_of(shape, layout), tf32=True)
speed.step_seconds, speed.mfu            # None where the machine's sheet lacks a number: speed.unknown says which

Computing is matrix products, each a roofline with a launch. Softmax, LayerNorm and other element-wise work is left
out, as in Narayanan et al. 2021 (arXiv 2104.04473, appendix).
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import cast

from toolkit.config.schema import Dtype, Machine
from toolkit.plan import machines
from toolkit.plan.activations import BLOCKS, fused
from toolkit.plan.assumptions import ADAM_BYTES, LINK_EFFICIENCY, OVERLAP, efficiency, host_gbs, launch_us
from toolkit.plan.layout import Layout
from toolkit.plan.memory import Memory
from toolkit.plan.shapes import ModelShape
from toolkit.plan.traffic import Sent, traffic

RATES = ("step_seconds", "samples_per_second", "tokens_per_second", "mfu")  # of Speed, and of a run's records


@dataclass(frozen=True)
class Span:
    """One part of a step's time; ``hidden`` seconds of it pass while the device computes."""

    name: str
    seconds: float
    hidden: float
    formula: str


@dataclass(frozen=True)
class Speed:
    """``flops`` are useful ones of a step over all devices; ``unknown`` names the machine's missing keys."""

    flops: float
    shares: tuple[Span, ...]
    sent: tuple[Sent, ...]
    unknown: tuple[str, ...]
    peak_tflops: float | None
    samples: int
    tokens: int
    devices: int
    step_seconds: float | None
    samples_per_second: float | None
    tokens_per_second: float | None
    mfu: float | None

    @property
    def rates(self) -> dict[str, float | None]:
        return {name: getattr(self, name) for name in RATES}


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
    kinds = [layer.kind for layer in shape.layers if layer.kind in BLOCKS]
    layers, attentions = len(kinds), len(kinds) + kinds.count("decoder")  # a decoder's layer has two
    yield _product(layout.tokens, hidden, own, 3 * attentions)  # query, key, value
    yield _product(layout.tokens, own, hidden, attentions)
    yield _product(layout.tokens, hidden, inner, layers)
    yield _product(layout.tokens, inner, hidden, layers)
    length, size, heads = layout.length, hidden // shape.heads, layout.rows * shape.heads // layout.tensor
    if fused(layout):
        yield Product(4 * heads * length**2 * size, 4 * heads * length * size, attentions)
    else:
        yield _product(length, size, length, attentions, batch=heads)
        yield _product(length, length, size, attentions, batch=heads)
    if predicted := layout.rows * layout.predictions:
        if shape.type == "bert":
            yield _product(predicted, hidden, hidden, 1, layer=False)
        yield _product(predicted, hidden, shape.vocab_size, 1, layer=False)


def _product(rows: int, inner: int, columns: int, times: int, *, batch: int = 1, layer: bool = True) -> Product:
    elements = rows * inner + inner * columns + rows * columns
    return Product(2 * batch * rows * inner * columns, batch * elements, times, layer)


def step_flops(shape: ModelShape, layout: Layout) -> tuple[int, int]:
    """(useful, recomputed) of an optimizer step over all devices."""
    every, micros = list(products(shape, replace(layout, tensor=1))), layout.samples // layout.micro
    again = sum(p.times * p.flops for p in every if p.layer and layout.recompute)
    return 3 * micros * sum(p.times * p.flops for p in every), micros * again


def product_dtype(layout: Layout, machine: Machine, *, tf32: bool) -> Dtype:
    """What matrix products are computed in."""
    return cast(Dtype, "tf32" if tf32 and layout.dtype == "fp32" and "tf32" in machine.peak_tflops else layout.dtype)


def speed_of(shape: ModelShape, layout: Layout, machine: Machine, memory: Memory, *, tf32: bool) -> Speed:
    """``memory`` is that of a rank: what it holds on host and NVMe moves in every step."""
    dtype = product_dtype(layout, machine, tf32=tf32)
    sent = traffic(shape, layout)
    unknown = _unknown(layout, machine, memory, sent, dtype)
    useful, again = step_flops(shape, layout)
    spans: tuple[Span, ...] = ()
    if not unknown:
        computing = list(_computing(shape, layout, machine, dtype, useful + again))
        busy = sum(span.seconds for span in computing)
        if layout.pipe > 1:
            # (p-1) of (m+p-1) slots are empty (Huang et al. 2019, GPipe, arXiv 1811.06965); 1F1B has as many
            empty = busy * (layout.pipe - 1) / layout.accumulation
            said = f"computing x ({layout.pipe} - 1) / {layout.accumulation}"
            computing.append(Span("pipeline bubble", empty, 0.0, said))
        spans = (*computing, *_links(layout, machine, sent, busy), *_states(layout, machine, memory))
    # MFU is of a GPU's data sheet, as a run's meter has it, though the plan takes what was measured
    name = machine.device_name if "peak_tflops" in machine.measured else None
    sheet = machines.known(name) if name else None
    peak = (sheet or machine).peak_tflops.get(dtype)
    samples, sides = layout.samples, 2 if shape.type == "marian" else 1
    tokens = samples * layout.sequences * layout.length * sides
    seconds = None if unknown else sum(s.seconds - s.hidden for s in spans)
    return Speed(
        useful, spans, tuple(sent), unknown, peak, samples, tokens, layout.ranks, step_seconds=seconds,
        samples_per_second=seconds and samples / seconds, tokens_per_second=seconds and tokens / seconds,
        mfu=useful / seconds / layout.ranks / peak / 1e12 if seconds and peak else None,
    )  # fmt: skip


def _unknown(layout: Layout, machine: Machine, memory: Memory, sent: list[Sent], dtype: str) -> tuple[str, ...]:
    """The keys of the machine without which no time can be told."""
    needed = {
        f"peak_tflops.{dtype}": dtype not in machine.peak_tflops,
        "link_gbs": sent and machine.devices_per_node > 1 and not (machine.pcie_gbs or machine.link_gbs),
        "node_link_gbs": sent and layout.ranks > machine.devices_per_node and machine.node_link_gbs is None,
        "pcie_gbs": memory.total("host") and machine.pcie_gbs is None,
        "nvme_gbs": memory.total("nvme") and machine.nvme_gbs is None,
    }
    return tuple(f"machine.{key}" for key, missing in needed.items() if missing)


def _computing(shape: ModelShape, layout: Layout, machine: Machine, dtype: Dtype, flops: int) -> Iterator[Span]:
    """At the rate of large products; and what others take longer, for they begin or wait for memory."""
    peak, share, launch = machine.peak_tflops[dtype], efficiency(machine, dtype), launch_us(machine)
    rate, bandwidth = peak * share * 1e12, (machine.bandwidth_gbs or 0) * 1e9
    said = f"{flops:.3g} FLOP / {layout.ranks} / ({peak:.4g} TFLOP/s x {share:.3g})"
    yield Span("computing", flops / layout.ranks / rate, 0.0, said)
    count, more, each = 0, 0.0, layout.accumulation / layout.pipe
    for one in products(shape, layout):
        times = one.times * (4 if one.layer and layout.recompute else 3)  # backward has two of each
        moving = one.elements * layout.bytes / bandwidth if bandwidth else 0.0
        took = launch / 1e6 + max(one.flops / rate, moving)
        count, more = count + times, more + times * (took - one.flops / rate)
    said = f"{count * each:,.0f} products: {launch:.3g} us each, and their bytes where those take longer"
    yield Span("small products", more * each, 0.0, said)


def _links(layout: Layout, machine: Machine, sent: list[Sent], busy: float) -> Iterator[Span]:
    """A group that leaves a node is as slow as the node's ports, which as many rings share as pass through them.

    DeepSpeed numbers tensor ranks first, then copies, then pipe stages: neighbours are on the same node.
    """
    node, between = machine.devices_per_node, _gbs(machine, "node_link_gbs")
    inside = _gbs(machine, "link_gbs") or _gbs(machine, "pcie_gbs") or between or 1.0
    reach = {"tensor": layout.tensor, "data": layout.tensor * layout.data, "pipe": layout.ranks}
    rings = {"tensor": 1, "data": layout.tensor, "pipe": layout.data}
    # The backward pass is two thirds of computing. On a CPU ranks compute and communicate with the same cores
    room = OVERLAP * busy * 2 / 3 if layout.device != "cpu" else 0.0
    for one in sent:
        rate, where = inside, "within the node"
        if between and reach[one.among] > node:
            many = min(rings[one.among], node)
            rate, where = min(inside, between / many), f"between nodes{f', {many} share the ports' * (many > 1)}"
        seconds = one.bytes / (rate * 1e9)
        hidden = min(seconds, room) if one.hidden else 0.0
        room -= hidden
        yield Span(one.name, seconds, hidden, f"{one.formula} / {rate:.4g} GB/s, {where}")


def _gbs(machine: Machine, key: str) -> float | None:
    """What a link or drive reaches of the sheet's rate, or what was measured."""
    rate: float | None = getattr(machine, key)
    return rate and rate * (1 if key in machine.measured else LINK_EFFICIENCY)


def _states(layout: Layout, machine: Machine, memory: Memory) -> Iterator[Span]:
    """The optimizer on the device, whose memory it waits for. Offloaded: gradients out and weights in over PCIe, the
    optimizer on the node's CPUs, states in and out of its drives."""
    pcie, ranks = (_gbs(machine, "pcie_gbs") or 1.0) * 1e9, min(layout.ranks, machine.devices_per_node)
    if layout.offload == "none" and machine.bandwidth_gbs:
        held = {p.name: p.bytes for p in memory.at("o")}
        shard = (held.get("master weights") or held.get("gradients", 0)) // 4
        # Gradients are read for their norm, read and written to clip them, and read; weights and states both ways
        size = 4 * 4 + 2 * 4 + (layout.bytes if layout.dtype != "fp32" else 0)
        total = size * shard + 2 * held.get("optimizer states", 0)
        said = f"({size} B x {shard:,} + 2 x states) / {machine.bandwidth_gbs:.4g} GB/s"
        yield Span("optimizer", total / machine.bandwidth_gbs / 1e9, 0.0, said)
    if moved := memory.named("moved activations"):
        total = 2 * moved * layout.accumulation
        yield Span("activations to the host and back", total / pcie, 0.0, f"{total:,} B over PCIe")
    if layout.offload != "none":
        shard = memory.named("master weights") // 4
        total = shard * (4 * (layout.accumulation if layout.stage >= 2 else 1) + layout.bytes)
        yield Span("gradients out, weights in", total / pcie, 0.0, f"{total:,} B over PCIe")
        rate = host_gbs(machine, layout.device)
        said = f"{shard * ranks:,} x {ADAM_BYTES} B / {rate:.4g} GB/s"
        yield Span("optimizer on the CPU", shard * ranks * ADAM_BYTES / (rate * 1e9), 0.0, said)
    if nvme := 2 * memory.total("nvme") * ranks:
        rate = (_gbs(machine, "nvme_gbs") or 1.0) * 1e9
        yield Span("NVMe", nvme / rate, 0.0, f"{nvme:,} B read and written by a node")
