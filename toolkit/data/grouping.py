"""The order of fine-tuning: global batches of samples of like length, the same in every layout.

    order = Batches(lengths, seed, size=32)          # 32 samples a step, or tokens=25000
    for epoch, indices in order.from_step(0): ...    # the samples of each step, for ever
    share(indices, parts=8, part=3)                  # the samples of one of 8 micro-batches

An epoch takes each sample once; its last batch is as small as what is left. Everything is a function of
(seed, epoch, lengths), so resuming is starting at another step.
"""

from collections.abc import Iterator
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from toolkit.data.draws import Shuffle

POOL = 64  # batches' worth of shuffled samples that are sorted by length together
Indices = NDArray[np.int64]


class Batches:
    """``size`` samples a step, or as many as fit in ``tokens``, each counted with the longest one's length."""

    def __init__(
        self, lengths: NDArray[np.int64], seed: int, *, size: int = 0, tokens: int | None = None, grouped: bool = True
    ) -> None:
        self.lengths, self.seed, self.size, self.tokens, self.grouped = lengths, seed, size, tokens, grouped
        self.epoch = lru_cache(maxsize=2)(self._epoch)

    def _epoch(self, epoch: int) -> list[Indices]:
        n = len(self.lengths)
        order = Shuffle(n, self.seed, epoch)(np.arange(n))
        if not self.grouped:
            return self._cut(order)
        pool = POOL * (self.size if self.tokens is None else max(1, self.tokens // max(1, int(self.lengths.mean()))))
        batches: list[Indices] = []
        for start in range(0, n, pool):
            some = order[start : start + pool]
            batches += self._cut(some[np.argsort(-self.lengths[some], kind="stable")])
        # The longest first: what does not fit into memory fails at once. The others in any order.
        longest = max(range(len(batches)), key=lambda i: int(self.lengths[batches[i]].max()) * len(batches[i]))
        first = batches.pop(longest)
        return [first, *(batches[i] for i in Shuffle(len(batches), self.seed + 1, epoch)(np.arange(len(batches))))]

    def _cut(self, order: Indices) -> list[Indices]:
        if self.tokens is None:
            return [order[i : i + self.size] for i in range(0, len(order), self.size)]
        batches, start, longest = [], 0, 0
        for end, length in enumerate(self.lengths[order].tolist()):
            longest = max(longest, length)
            if end > start and longest * (end + 1 - start) > self.tokens:
                batches.append(order[start:end])
                start, longest = end, length
        return [*batches, order[start:]]

    def steps(self, epochs: float) -> int:
        """Optimizer steps of so many passes over the data."""
        whole = sum(len(self.epoch(e)) for e in range(int(epochs)))
        rest = epochs - int(epochs)
        return max(1, whole + (round(rest * len(self.epoch(int(epochs)))) if rest else 0))

    def from_step(self, step: int) -> Iterator[tuple[int, Indices]]:
        """(epoch, samples) of every step after ``step`` finished ones."""
        epoch = 0
        while step >= len(self.epoch(epoch)):
            step -= len(self.epoch(epoch))
            epoch += 1
        while True:
            for indices in self.epoch(epoch)[step:]:
                yield epoch, indices
            step, epoch = 0, epoch + 1


def share(indices: Indices, *, parts: int, part: int) -> Indices:
    """One of ``parts`` neighbouring pieces of almost equal number; sorted by length, each needs little padding."""
    return np.array_split(indices, parts)[part]
