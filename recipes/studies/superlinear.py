"""ZeRO's super-linear speed-up: more devices free memory, larger batches fill it and need fewer reductions a sample.

points = curve(published("zero_superlinear"))       # a Point for each number of GPUs, at the largest batch that fits
points[1].throughput / points[0].throughput         # above 2

Memory and traffic are the paper's: 16 bytes a parameter, gradients scattered and weights gathered (2 elements a
parameter), the input of each layer shared out over the tensor ranks (its P_a). Activations, computing and the tensor
ranks' all-reduces are the planner's. Each of a node's tensor ranks reduces with its like on the other nodes, so they
share the node's ports. Nothing of it is hidden (overlap_comm is off below stage 3 unless it is asked for).
"""

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from studies.published import Row
from toolkit.config.compose import compose
from toolkit.config.schema import Machine
from toolkit.config.units import GIB
from toolkit.deepspeed import ds_config
from toolkit.plan.activations import activations
from toolkit.plan.assumptions import CONTEXT_GIB, LINK_EFFICIENCY, SLACK
from toolkit.plan.layout import Layout
from toolkit.plan.memory import memory_of
from toolkit.plan.paper import zero_bytes, zero_volume
from toolkit.plan.shapes import ModelShape, model_shape
from toolkit.plan.speed import speed_of, step_flops
from toolkit.report import figures


@dataclass(frozen=True)
class Point:
    """``batch`` is a model copy's; throughput in TFLOP/s counts recomputation, as ZeRO-Infinity, section 4, does."""

    gpus: int
    batch: int
    throughput: float

    @property
    def each(self) -> float:
        return self.throughput / self.gpus


@dataclass(frozen=True)
class Study:
    """The model on its machine, laid out for any number of GPUs."""

    shape: ModelShape
    layout: Layout
    machine: Machine

    @classmethod
    def of(cls, data: Mapping[str, Any]) -> "Study":
        ranks, tensor = max(data["gpus"]), data["tensor_parallel"]
        config = compose([
            "machine=dgx2", f"machine.nodes={ranks // 16}", "zero=stage2", "precision=fp16", "activation=recompute",
            "model.attention=eager", "parallel=tensor", f"deepspeed.tensor_parallel.autotp_size={tensor}",
            "batch.micro_size=1", f"batch.global_size={ranks // tensor}", *gpt2(data, tensor),
        ])  # fmt: skip
        shape = model_shape(config)
        ds = ds_config.complete(config, world=ranks, device="cuda", vocab_size=shape.vocab_size)
        return cls(shape, Layout.of(config, ds, world=ranks, device="cuda"), config.machine)

    def on(self, gpus: int, batch: int) -> Layout:
        copies = gpus // self.layout.tensor
        return replace(self.layout, data=copies, micro=batch, accumulation=1, samples=batch * copies)

    def paper_bytes(self, layout: Layout) -> float:
        """Of a device, at its fullest."""
        kept = activations(self.shape, layout, self.shape.layers)
        states = zero_bytes(self.shape.parameters / layout.tensor, stage=2, world=layout.data)
        return states + kept.each / layout.tensor + max(kept.head + kept.loss, kept.once + kept.backward)

    def deepspeed_bytes(self, layout: Layout) -> float:
        """The same of DeepSpeed 0.19.8, every tensor rank with the whole input of each layer."""
        return memory_of(self.shape, layout).peak

    def largest_batch(self, gpus: int, limit: float, bytes_of: Callable[[Layout], float]) -> int:
        return bisect_left(range(1, 4096), True, key=lambda batch: bytes_of(self.on(gpus, batch)) > limit)

    def at(self, gpus: int, batch: int) -> Point:
        layout = self.on(gpus, batch)
        speed = speed_of(self.shape, layout, self.machine, memory_of(self.shape, layout), tf32=False)
        own = {share.name: share.seconds for share in speed.shares}
        sent = zero_volume(self.shape.parameters / layout.tensor, stage=2) * layout.bytes * (1 - 1 / layout.data)
        rate = (self.machine.node_link_gbs or 0) * LINK_EFFICIENCY * 1e9 / self.machine.devices_per_node
        seconds = own["computing"] + own["activations, all-reduce"] + sent / rate
        return Point(gpus, batch, sum(step_flops(self.shape, layout)) / seconds / 1e12)


def usable(machine: Machine) -> float:
    """Bytes of a device for tensors."""
    return ((machine.memory_gib or 0) - CONTEXT_GIB) / (1 + SLACK) * GIB


def gpt2(data: Mapping[str, Any], tensor: int = 1) -> list[str]:
    """A BERT with the matrices of a GPT-2: as many parameters a layer, and every position predicted.

    Megatron-LM splits the vocabulary over tensor ranks, which is as if each predicted its share of the positions.
    """
    hidden, length = data["hidden_size"], data["length"]
    return [
        f"model.hidden_size={hidden}", f"model.intermediate_size={4 * hidden}",
        f"model.num_hidden_layers={data.get('layers', 1)}", f"model.num_attention_heads={data['heads']}",
        "model.vocab_size=50257", f"model.max_position_embeddings={length}", f"data.max_length={length}",
        f"data.max_predictions={length // tensor}", "task.objective=mlm",
    ]  # fmt: skip


def curve(data: Mapping[str, Any], *, batch: int | None = None) -> list[Point]:
    """At the largest batch within what the paper's first takes, or at the same ``batch`` everywhere.

    That is 22.5 of 32 GiB: the rest went into buffers and fragments, which the paper's accounting does not have.
    """
    study = Study.of(data)
    used = study.paper_bytes(study.on(data["gpus"][0], data["batch"][0]))
    return [study.at(gpus, batch or study.largest_batch(gpus, used, study.paper_bytes)) for gpus in data["gpus"]]


def implied(data: Mapping[str, Any]) -> list[float]:
    """TFLOP/s a GPU at each number, from the two times that the first two published rates imply.

    A sample's time on a copy is a + c (n - 1) / n / batch: computing, and a step's gradients between n copies.
    """
    copies = [gpus / data["tensor_parallel"] for gpus in data["gpus"]]
    shares = [(n - 1) / n / batch for n, batch in zip(copies, data["batch"], strict=True)]
    first, second = (1 / rate for rate in data["tflops"][:2])
    c = (first - second) / (shares[0] - shares[1])
    a = first - c * shares[0]
    return [1 / (a + c * share) for share in shares]


def rows(data: Mapping[str, Any]) -> list[Row]:
    """Batches by three accountings, throughput at the paper's batch, what each step gains, what the paper implies.

    The first batch by the paper's accounting is not among them: it sets the limit, see ``curve``.
    """
    gpus, batches, rates = data["gpus"], data["batch"], data["tflops"]
    study, points = Study.of(data), curve(data)
    device = usable(study.machine)
    found: list[Row] = []
    for n, batch, rate, point in zip(gpus, batches, rates, points, strict=True):
        found += [Row(f"{n} GPUs: batch", batch, point.batch, "samples")] if n != gpus[0] else []
        found += [
            Row(f"{n} GPUs: batch by bytes alone", batch, study.largest_batch(n, device, study.paper_bytes), "samples"),
            Row(f"{n} GPUs: batch by DeepSpeed 0.19.8", batch, study.largest_batch(n, device, study.deepspeed_bytes),
                "samples"),
            Row(f"{n} GPUs: throughput", rate, study.at(n, batch).each, "TFLOP/s each"),
        ]  # fmt: skip
    for (m, low, before), (n, high, after) in pairwise(zip(gpus, rates, points, strict=True)):
        found.append(Row(f"{n} over {m} GPUs", n * high / m / low, after.throughput / before.throughput, "times"))
    for n, rate, ours in list(zip(gpus, rates, implied(data), strict=True))[2:]:
        found.append(Row(f"{n} GPUs: as 64 and 128 imply", rate, ours, "TFLOP/s each"))
    return found


def plot(data: Mapping[str, Any], stem: Path, title: str) -> None:
    """``stem``.png and .svg: all GPUs against a linear line, and each of them."""
    gpus: Sequence[int] = data["gpus"]
    ours = curve(data)
    fixed = curve(data, batch=ours[0].batch)
    figure, (total, each) = figures.new(2, title, width=5)
    blue, orange, green = figures.COLOURS[:3]
    batches = (data["batch"], [point.batch for point in ours])
    rates = (data["tflops"], [point.each for point in ours])
    for name, used, mine, colour in zip(("published", "planned"), batches, rates, (orange, blue), strict=True):
        label = f"{name}, batches of {', '.join(map(str, used))}"
        each.plot(gpus, mine, "o-", color=colour, label=label)
        total.plot(gpus, [n * rate for n, rate in zip(gpus, mine, strict=True)], "o-", color=colour, label=label)
        total.plot(gpus, [n * mine[0] for n in gpus], "--", color=colour, alpha=0.5, label="linear from there")
    each.plot(gpus, [p.each for p in fixed], ":", color=blue, label=f"planned, batches of {ours[0].batch}")
    each.plot(gpus, implied(data), ":", color=green, label="as the first two published points imply")
    total.set(xscale="log", yscale="log", ylabel="TFLOP/s of all GPUs")
    total.set_yticks([2048, 4096, 8192, 16384], ["2,048", "4,096", "8,192", "16,384"])
    each.set(ylabel="TFLOP/s of a GPU", ylim=(0, None))
    for axes in (total, each):
        axes.set_xticks(gpus, [str(n) for n in gpus])
        axes.minorticks_off()
        axes.set_xlabel("V100 GPUs")
        axes.legend(frameon=False, fontsize=8, loc="lower right")
    figures.save(figure, stem)
