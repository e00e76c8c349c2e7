"""How many elements a rank holds of its layers: after tensor parallelism, in DeepSpeed's groups, with its padding.

own = Elements.of(stages(shape, count=2, how="parameters")[0], layout)
own.count, own.shard(layout)                 # of all parameters, and of this rank's share of them
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate
from math import ceil

from toolkit.plan.layout import Layout
from toolkit.plan.shapes import Layer, Parameter

EMBEDDINGS = ("word", "position", "type")  # deepspeed/__init__.py, set_optimizer_flags
# fp32 numbers of state for each parameter, besides the master weight
STATES = {
    "FusedAdam": 2, "DeepSpeedCPUAdam": 2, "torch.Adam": 2, "torch.AdamW": 2, "torch.NAdam": 2, "torch.RAdam": 2,
    "FusedLamb": 2, "FusedLion": 1,
    "DeepSpeedCPULion": 2,  # the second is never used (ops/lion/cpu_lion.py)
    "torch.Adagrad": 1, "DeepSpeedCPUAdagrad": 1, "torch.RMSprop": 1, "torch.Adamax": 2, "torch.Adafactor": 0,
    "torch.ASGD": 1,
}  # fmt: skip


@dataclass(frozen=True)
class Elements:
    """The elements of one rank's layers after tensor parallelism."""

    groups: tuple[tuple[int, ...], ...]  # of trained matrices, which decay, and of trained vectors: size by size
    states: float  # fp32 numbers of optimizer state for each element
    frozen: int

    @classmethod
    def of(cls, layers: Sequence[Layer], layout: Layout) -> "Elements":
        name, momentum = layout.optimizer, bool(layout.optimizer_params.get("momentum"))
        return _elements(tuple(layers), layout.tensor, name, momentum)

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        return tuple(size for group in self.groups for size in group)

    @cached_property
    def count(self) -> int:
        return sum(self.sizes)

    @cached_property
    def largest(self) -> int:
        return max(self.sizes, default=0)

    @cached_property
    def group(self) -> int:
        """Elements of the larger of the two groups, with and without weight decay."""
        return max(map(sum, self.groups))

    def shard(self, layout: Layout) -> int:
        """A rank's share of flat groups (stages 1, 2), or of parameters each for itself (stage 3), with padding."""
        if layout.stage == 3:
            return sum(ceil(s / layout.data) for s in self.sizes)
        return sum(ceil(sum(group) / layout.data / 2) * 2 for group in self.groups)

    def touched(self, layout: Layout) -> int:
        """Elements of all parameters that reach into a rank's flat share, whole ones; of the rank with most."""
        found = [0] * layout.data
        for group in self.groups:
            part = max(1, ceil(sum(group) / layout.data / 2) * 2)
            for size, end in zip(group, accumulate(group), strict=True):
                for rank in range((end - size) // part, min((end - 1) // part + 1, layout.data)):
                    found[rank] += size
        return max(found)


@lru_cache  # a search asks the same again and again
def _elements(layers: tuple[Layer, ...], tensor: int, optimizer: str, momentum: bool) -> Elements:
    every = [p for layer in layers for p in layer.parameters]
    trained = [p for p in every if p.trained]
    size = [_split(p, tensor) for p in trained]
    groups = [tuple(s for p, s in zip(trained, size, strict=True) if (len(p.shape) > 1) is m) for m in (True, False)]
    frozen = sum(p.size for p in every if not p.trained)
    return Elements(tuple(groups), _states(trained, size, optimizer, momentum), frozen)


def _split(parameter: Parameter, tensor: int) -> int:
    return parameter.size if parameter.split is None else parameter.size // tensor


def _states(trained: Sequence[Parameter], sizes: Sequence[int], name: str, momentum: bool) -> float:
    if name == "torch.SGD":
        return 1.0 if momentum else 0.0
    if name == "MuonWithAuxAdam":  # one momentum for matrices that are no embeddings, Adam for the rest
        muon = sum(s for p, s in zip(trained, sizes, strict=True) if len(p.shape) > 1 and p.name not in EMBEDDINGS)
        return 2 - muon / max(1, sum(sizes))
    return float(STATES.get(name, 2))
