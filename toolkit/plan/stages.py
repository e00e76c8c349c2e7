"""Which layers each pipe stage holds: the cut that toolkit/models/pipeline.py and DeepSpeed make, without torch.

stages(shape, count=2, how="parameters")[1]       # the layers of the second stage
"""

from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate, pairwise
from typing import Any

from toolkit.errors import PlanError
from toolkit.plan.shapes import LayerShape, ModelShape


def stages(shape: ModelShape, *, count: int, how: Any) -> list[tuple[LayerShape, ...]]:
    """Every stage's layers; a tied embedding is in the first and, with the head, in the last. Raises PlanError."""
    if count == 1:
        return [shape.layers]
    embeddings, *blocks, head = shape.layers
    words = embeddings.parameters[0]
    tied = LayerShape("head", (*head.parameters, words)) if shape.tied else head
    items = [LayerShape("embeddings", (words,)), LayerShape("positions", embeddings.parameters[1:]), *blocks, tied]
    parts = _parts([layer.size for layer in items], count, how) if count <= len(items) else []
    if len(parts) != count + 1 or any(a >= b for a, b in pairwise(parts)):
        raise PlanError(
            f"pipeline.stages={count}: {len(items)} layers cannot be cut so that each stage has one "
            f"(pipeline.partition={how}). Use fewer stages, or another pipeline.partition."
        )
    return [tuple(items[a:b]) for a, b in pairwise(parts)]


def _parts(sizes: Sequence[int], count: int, how: Any) -> list[int]:
    if how == "uniform":
        chunk, rest = divmod(len(sizes), count)
        return [0, *accumulate(chunk + (i < rest) for i in range(count))]
    if isinstance(how, tuple):
        return [0, *how, len(sizes)]
    return _balanced(tuple(sizes), count)  # by time it is measured; layers of one size make much the same cut


def balanced(sizes: Sequence[int], count: int) -> list[int]:
    """The first item of each part, and the end: largest and smallest part as close as dynamic programming gets them.

    Step by step DeepSpeed's runtime/utils.py, partition_balanced, so that ties fall the same way.
    """
    ends = [0, *accumulate(sizes)]
    best: dict[tuple[int, int], tuple[float, float, int]] = {(0, 0): (0, float("inf"), 0)}  # largest, smallest, cut
    for i in range(1, len(ends)):
        for j in range(1, min(i, count) + 1):
            found, cost = None, float("inf")
            for k in range(i):
                if (k, j - 1) not in best:
                    continue
                largest, smallest, _ = best[k, j - 1]
                part = ends[i] - ends[k]
                spread = max(largest, part) - min(smallest, part)
                if spread <= cost:
                    found, cost = (max(largest, part), min(smallest, part), k), spread
            if found:
                best[i, j] = found
    parts = [len(sizes)]
    for j in range(count, 0, -1):
        parts.append(best[parts[-1], j][2])
    return parts[::-1]


_balanced = lru_cache(balanced)  # a search asks the same again and again
