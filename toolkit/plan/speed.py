"""How long a step takes on a machine: computing, communication, offload, bubbles, and what hides behind what.

speed = speed_of(shape, layout, machine, memory_of(shape, layout), tf32=True)
speed.step_seconds, speed.mfu            # None where the machine's sheet lacks a number: speed.unknown says which
"""

from dataclasses import dataclass
from typing import cast

from toolkit.config.schema import Dtype, Machine
from toolkit.plan import flops, machines
from toolkit.plan.assumptions import ADAM_BYTES, LINK_EFFICIENCY, OVERLAP, efficiency, host_gbs
from toolkit.plan.layout import Layout
from toolkit.plan.memory import Memory
from toolkit.plan.shapes import ModelShape
from toolkit.plan.traffic import Sent, traffic


@dataclass(frozen=True)
class Share:
    """One part of a step's time; ``hidden`` seconds of it pass while the device computes."""

    name: str
    seconds: float
    hidden: float
    formula: str


@dataclass(frozen=True)
class Speed:
    """``flops`` are useful ones of a step over all devices; ``unknown`` names the machine's missing keys."""

    flops: float
    shares: tuple[Share, ...]
    sent: tuple[Sent, ...]
    unknown: tuple[str, ...]
    peak_tflops: float | None
    samples: int
    tokens: int
    devices: int

    @property
    def step_seconds(self) -> float | None:
        return None if self.unknown else sum(s.seconds - s.hidden for s in self.shares)

    @property
    def samples_per_second(self) -> float | None:
        return None if self.step_seconds is None else self.samples / self.step_seconds

    @property
    def tokens_per_second(self) -> float | None:
        return None if self.step_seconds is None else self.tokens / self.step_seconds

    @property
    def mfu(self) -> float | None:
        if self.step_seconds is None or self.peak_tflops is None:
            return None
        return self.flops / self.step_seconds / self.devices / self.peak_tflops / 1e12


def speed_of(shape: ModelShape, layout: Layout, machine: Machine, memory: Memory, *, tf32: bool) -> Speed:
    """``memory`` is that of a rank: what it holds on host and NVMe moves in every step."""
    dtype = product_dtype(layout, machine, tf32=tf32)
    peak = machine.peak_tflops.get(dtype)
    useful, again = step_flops(shape, layout)
    sent = traffic(shape, layout)
    unknown = _unknown(layout, machine, memory, sent, dtype)
    devices = layout.ranks
    tokens = layout.samples * layout.sequences * layout.length * (2 if shape.type == "marian" else 1)
    shares: tuple[Share, ...] = ()
    if not unknown and peak:
        share = efficiency(machine, dtype)
        rate = peak * share * 1e12
        said = f"{useful + again:.3g} FLOP / {devices} / ({peak:.4g} TFLOP/s x {share:.3g})"
        computing = Share("computing", (useful + again) / devices / rate, 0.0, said)
        shares = (computing, *_bubble(layout, computing), *_links(layout, machine, sent, computing),
                  *_optimizer(layout, machine, memory), *_offload(layout, machine, memory))  # fmt: skip
    return Speed(useful, shares, tuple(sent), unknown, _sheet_peak(machine, dtype), layout.samples, tokens, devices)


def product_dtype(layout: Layout, machine: Machine, *, tf32: bool) -> Dtype:
    """What matrix products are computed in."""
    return cast(Dtype, "tf32" if tf32 and layout.dtype == "fp32" and "tf32" in machine.peak_tflops else layout.dtype)


def _sheet_peak(machine: Machine, dtype: Dtype) -> float | None:
    """MFU's: of a GPU that of its data sheet, as a run's meter has it, though the plan takes what was measured."""
    name = machine.device_name if "peak_tflops" in machine.measured else None
    sheet = machines.known(name) if name else None
    return (sheet or machine).peak_tflops.get(dtype)


@dataclass
class _Sizes:
    hidden_size: int
    num_hidden_layers: int
    intermediate_size: int


def step_flops(shape: ModelShape, layout: Layout) -> tuple[float, float]:
    """(useful, recomputed) of an optimizer step over all devices."""
    sequences, length = layout.samples * layout.sequences, layout.length
    if shape.type == "marian":
        sizes = flops.Seq2SeqShape(
            shape.hidden,
            shape.hidden,
            shape.intermediate,
            shape.count("encoder"),
            shape.count("decoder"),
            shape.vocab_size,
        )
        names = ("source_source", "target_target", "target_source")
        counts = {"source": sequences * length, "target": sequences * length}
        total = flops.seq2seq(sizes).step(counts | dict.fromkeys(names, sequences * length**2))
        layers = total - 6 * shape.hidden * shape.vocab_size * counts["target"]
    else:
        bert = flops.bert(_Sizes(shape.hidden, shape.count("encoder"), shape.intermediate), vocab_size=shape.vocab_size,
                          length=length)  # fmt: skip
        layers = bert.step(sequences=sequences, predictions=0)
        total = layers + bert.prediction * sequences * layout.predictions
    return total, layers / 3 if layout.recompute else 0.0


def _unknown(layout: Layout, machine: Machine, memory: Memory, sent: list[Sent], dtype: str) -> tuple[str, ...]:
    """The keys of the machine without which no time can be told."""
    nodes = layout.ranks > machine.devices_per_node
    needed = {
        f"peak_tflops.{dtype}": dtype not in machine.peak_tflops,
        "link_gbs": bool(sent)
        and machine.devices_per_node > 1
        and machine.link_gbs is None
        and machine.pcie_gbs is None,
        "node_link_gbs": bool(sent) and nodes and machine.node_link_gbs is None,
        "pcie_gbs": memory.total("host") > 0 and machine.pcie_gbs is None,
        "nvme_gbs": memory.total("nvme") > 0 and machine.nvme_gbs is None,
    }
    return tuple(f"machine.{key}" for key, missing in needed.items() if missing)


def _bubble(layout: Layout, computing: Share) -> list[Share]:
    """(p-1) of (m+p-1) slots are empty (Huang et al. 2019, GPipe, arXiv 1811.06965); 1F1B has as many."""
    if layout.pipe == 1:
        return []
    empty = computing.seconds * (layout.pipe - 1) / layout.accumulation
    return [Share("pipeline bubble", empty, 0.0, f"computing x ({layout.pipe} - 1) / {layout.accumulation}")]


def _links(layout: Layout, machine: Machine, sent: list[Sent], computing: Share) -> list[Share]:
    """A group that leaves a node is as slow as the node's ports, which as many rings share as pass through them.

    DeepSpeed numbers tensor ranks first, then copies, then pipe stages: neighbours are on the same node.
    """
    node, between = machine.devices_per_node, _gbs(machine, "node_link_gbs")
    inside = _gbs(machine, "link_gbs") or _gbs(machine, "pcie_gbs") or between or 1.0
    spans = {"tensor": layout.tensor, "data": layout.tensor * layout.data, "pipe": layout.ranks}
    rings = {"tensor": 1, "data": layout.tensor, "pipe": layout.data}
    # The backward pass is two thirds of computing. On a CPU ranks compute and communicate with the same cores
    room = OVERLAP * computing.seconds * 2 / 3 if layout.device != "cpu" else 0.0
    shares = []
    for one in sent:
        rate, where = inside, "within the node"
        if between and spans[one.among] > node:
            many = min(rings[one.among], node)
            rate, where = min(inside, between / many), f"between nodes{f', {many} share the ports' * (many > 1)}"
        seconds = one.bytes / (rate * 1e9)
        hidden = min(seconds, room) if one.hidden else 0.0
        room -= hidden
        shares.append(Share(one.name, seconds, hidden, f"{one.formula} / {rate:.4g} GB/s, {where}"))
    return shares


def _gbs(machine: Machine, key: str) -> float | None:
    """What a link or drive reaches of the sheet's rate, or what was measured."""
    rate: float | None = getattr(machine, key)
    return rate and rate * (1 if key in machine.measured else LINK_EFFICIENCY)


def _optimizer(layout: Layout, machine: Machine, memory: Memory) -> list[Share]:
    """On the device: its memory is what it waits for. Offloaded it is the host's, see :func:`_offload`."""
    if layout.offload != "none" or not machine.bandwidth_gbs:
        return []
    held = {p.name: p.bytes for p in memory.at("o")}
    shard = (held.get("master weights") or held.get("gradients", 0)) // 4
    # Gradients are read for their norm, read and written to clip them, and read; weights and states read and written
    size = 4 * 4 + 2 * 4 + (layout.bytes if layout.dtype != "fp32" else 0)
    total = size * shard + 2 * held.get("optimizer states", 0)
    said = f"({size} B x {shard:,} + 2 x states) / {machine.bandwidth_gbs:.4g} GB/s"
    return [Share("optimizer", total / machine.bandwidth_gbs / 1e9, 0.0, said)]


def _offload(layout: Layout, machine: Machine, memory: Memory) -> list[Share]:
    """Gradients out and weights in over PCIe, the optimizer on the node's CPUs, states in and out of its drives."""
    shares = []
    pcie = (_gbs(machine, "pcie_gbs") or 1.0) * 1e9
    moved = sum(p.bytes for p in memory.parts if p.name == "moved activations")
    if moved:
        total = 2 * moved * layout.accumulation
        shares.append(Share("activations to the host and back", total / pcie, 0.0, f"{total:,} B over PCIe"))
    if layout.offload != "none":
        shard = sum(p.bytes for p in memory.parts if p.name == "master weights") // 4
        total = shard * (4 * (layout.accumulation if layout.stage >= 2 else 1) + layout.bytes)
        shares.append(Share("gradients out, weights in", total / pcie, 0.0, f"{total:,} B over PCIe"))
        node = shard * min(layout.ranks, machine.devices_per_node)
        rate = host_gbs(machine, layout.device)
        seconds = node * ADAM_BYTES / (rate * 1e9)
        shares.append(Share("optimizer on the CPU", seconds, 0.0, f"{node:,} x {ADAM_BYTES} B / {rate:.4g} GB/s"))
    if nvme := 2 * memory.total("nvme") * min(layout.ranks, machine.devices_per_node):
        rate = (_gbs(machine, "nvme_gbs") or 1.0) * 1e9
        shares.append(Share("NVMe", nvme / rate, 0.0, f"{nvme:,} B read and written by a node"))
    return shares
