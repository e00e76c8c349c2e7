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
from toolkit.plan.shapes import LayerShape

EMBEDDINGS = ("word", "position", "type")  # deepspeed/__init__.py, set_optimizer_flags


@dataclass(frozen=True)
class Elements:
    """The elements of one rank's layers after tensor parallelism."""

    groups: tuple[tuple[int, ...], ...]  # of trained matrices, which decay, and of trained vectors: size by size
    states: float  # fp32 numbers of optimizer state for each element
    frozen: int

    @classmethod
    def of(cls, layers: Sequence[LayerShape], layout: Layout) -> "Elements":
        return _elements(tuple(layers), layout.tensor, layout.states, layout.optimizer == "MuonWithAuxAdam")

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
def _elements(layers: tuple[LayerShape, ...], tensor: int, states: int, muon: bool) -> Elements:
    every = [p for layer in layers for p in layer.parameters]
    split = [(p, p.size if p.split is None else p.size // tensor) for p in every if p.trained]
    groups = tuple(tuple(size for p, size in split if (len(p.shape) > 1) is matrices) for matrices in (True, False))
    # One momentum of Muon's for matrices that are no embeddings, Adam's two for the rest
    once = sum(size for p, size in split if muon and len(p.shape) > 1 and p.name not in EMBEDDINGS)
    mean = states - once / max(1, sum(size for _, size in split))
    return Elements(groups, mean, sum(p.size for p in every if not p.trained))
