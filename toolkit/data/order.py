"""The order of training: which samples each step takes, and which of them a rank's micro-batches.

    order = Grouped(lengths, seed, size=32)                   # 32 samples a step, or tokens=25000
    split = Split(global_size=32, micro_size=4, rank=0, world=2)
    for step in order.from_sample(0): ...                     # the keys of each step's samples, for ever
    split.micro_batches(step)                                 # those of this rank's micro-batches
    uniform(mix(seed, salt, index))                           # many random choices at once, each in [0, 1)
    generator(seed, split, epoch, index)                      # a numpy Generator for one sample

A key is (epoch, index of a sample); index -1 is an empty sample, which nothing counts. Random choices are functions of
whole numbers without a state, so any rank or worker draws the same, and resuming is starting at another place. What
that place depends on besides, ``rests_on`` says: checkpoints keep it, and none is gone on with where it differs.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import count, islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

POOL = 64  # batches' worth of shuffled samples that are sorted by length together
U64 = NDArray[np.uint64]
Indices = NDArray[np.int64]
Keys = NDArray[np.int64]  # [samples, 2]: epoch, index


def mix(*parts: int | U64) -> U64:
    """Hash the parts, broadcast against each other, to 64 bits (SplitMix64, Steele et al. 2014)."""
    state = np.zeros(1, np.uint64)
    for part in parts:
        state = state ^ np.asarray(part, np.uint64)
        state = state + np.uint64(0x9E3779B97F4A7C15)
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        state = state ^ (state >> np.uint64(31))
    return state


def uniform(bits: U64) -> NDArray[np.float64]:
    """The upper 53 bits as floats in [0, 1)."""
    return np.asarray((bits >> np.uint64(11)) * 2.0**-53, np.float64)


def generator(seed: int, split: int, epoch: int, index: int) -> np.random.Generator:
    """The generator of one sample; seed < 2^32, epoch < 2^24 and index < 2^40 give distinct keys."""
    key = np.array([seed | split << 32, epoch << 40 | index], np.uint64)
    return np.random.Generator(np.random.Philox(key=key))


def shuffled(n: int, seed: int, epoch: int, positions: NDArray[np.int64]) -> NDArray[np.int64]:
    """The images of ``positions`` under a permutation of ``range(n)`` for one seed and epoch, in O(1) memory. A
    four-round Feistel network permutes the next power of two; values outside the range walk on along their cycle until
    they fall inside (Black and Rogaway 2002), fewer than two steps on average."""
    bits = (n - 1).bit_length()
    keys = mix(seed, epoch, np.arange(4, dtype=np.uint64))
    widths = np.array([bits // 2, bits - bits // 2], np.uint64)
    masks = (np.uint64(1) << widths) - np.uint64(1)

    def permuted(values: U64) -> U64:
        left, right = values >> widths[1], values & masks[1]
        for number in range(4):  # the halves swap sizes each round and are back after an even number
            left, right = right, left ^ (mix(keys[number], right) & masks[number % 2])
        return np.asarray(left << widths[1] | right)

    values = permuted(np.asarray(positions, np.uint64))
    while (outside := values >= n).any():
        values[outside] = permuted(values[outside])
    return values.astype(np.int64)


def keyed(epoch: int, indices: Indices) -> Keys:
    return np.stack([np.full_like(indices, epoch), indices], 1)


def filled(keys: Keys, size: int) -> Keys:
    """With empty samples up to ``size``."""
    return np.concatenate([keys, np.full((max(0, size - len(keys)), 2), [0, -1])])


@dataclass(frozen=True)
class Stream:
    """Every sample once an epoch, and no end between epochs: a step takes ``size`` samples, of two epochs perhaps.
    Position p is sample ``shuffled(n, seed, epoch, p % n)`` of epoch ``p // n``, whatever the steps' size."""

    n: int
    seed: int
    size: int

    @property
    def rests_on(self) -> dict[str, Any]:
        return {"seed": self.seed}

    def steps(self, epochs: float) -> int:
        return max(1, round(epochs * self.n / self.size))

    def from_sample(self, start: int) -> Iterator[Keys]:
        return (self.keys(position, self.size) for position in count(start, self.size))

    def keys(self, start: int, number: int) -> Keys:
        """Those at positions ``start`` to ``start + number``."""
        epochs, positions = np.divmod(np.arange(start, start + number), self.n)
        parts = []
        for epoch in np.unique(epochs).tolist():
            parts.append(keyed(epoch, shuffled(self.n, self.seed, epoch, positions[epochs == epoch])))
        return np.concatenate(parts)


class Rounds(Stream):
    """As a :class:`Stream`, but that an epoch's last step takes what is left of it, and no more."""

    @property
    def rests_on(self) -> dict[str, Any]:
        return {"seed": self.seed, "batch.global_size": self.size, "training samples": self.n}

    def steps(self, epochs: float) -> int:
        return max(1, round(epochs * -(-self.n // self.size)))

    def from_sample(self, start: int) -> Iterator[Keys]:
        for step in count(start // self.size):
            epoch, number = divmod(step, -(-self.n // self.size))
            first = number * self.size
            yield self.keys(epoch * self.n + first, min(self.size, self.n - first))


class Grouped:
    """Steps of samples of like length: ``size``, or as many as fit in ``tokens``, each as long as the longest. An epoch
    takes each sample once; its last batch is as small as what is left."""

    def __init__(
        self, lengths: NDArray[np.int64], seed: int, *, size: int, tokens: int | None = None, grouped: bool = True
    ) -> None:
        self.lengths, self.seed, self.size, self.tokens, self.grouped = lengths, seed, size, tokens, grouped
        self.epoch = lru_cache(maxsize=2)(self._epoch)

    @property
    def rests_on(self) -> dict[str, Any]:
        return {
            "seed": self.seed,
            "batch.global_size": self.size,
            "batch.tokens": self.tokens,
            "data.group_by_length": self.grouped,
            "training samples": len(self.lengths),
        }

    def _epoch(self, epoch: int) -> list[Indices]:
        n = len(self.lengths)
        order = shuffled(n, self.seed, epoch, np.arange(n))
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
        rest = shuffled(len(batches), self.seed + 1, epoch, np.arange(len(batches)))
        return [first, *(batches[i] for i in rest)]

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
        whole = sum(len(self.epoch(e)) for e in range(int(epochs)))
        rest = epochs - int(epochs)
        return max(1, whole + (round(rest * len(self.epoch(int(epochs)))) if rest else 0))

    def from_sample(self, start: int) -> Iterator[Keys]:
        step = start // self.size
        for epoch in count():
            batches = self.epoch(epoch)
            yield from (keyed(epoch, indices) for indices in islice(batches, step, None))
            step = max(0, step - len(batches))


Order = Stream | Grouped  # or Rounds: what places depend on, steps of so many epochs, their samples from a place on


@dataclass(frozen=True)
class Split:
    """How a global batch is divided: this rank's micro-batches of each, over all copies of the model."""

    global_size: int
    micro_size: int
    rank: int
    world: int

    def micro_batches(self, step: Keys, least: int = 1) -> Iterator[Keys]:
        """This rank's micro-batches of one step: neighbours, almost equally many, none without a sample. Sorted by
        length, neighbours need little padding. ``least``: empty samples fill them up to so many."""
        parts = self.global_size // self.micro_size
        for part in range(self.rank, parts, self.world):
            yield filled(np.array_split(step, parts)[part], least)

    def held_out(self, lengths: NDArray[np.int64], least: int = 1) -> Iterator[Keys]:
        """This rank's micro-batches of samples of these lengths: each once, the longest first, as many on each rank."""
        indices = np.argsort(-lengths, kind="stable")
        for start in range(0, len(indices), self.micro_size * self.world):
            low = start + self.rank * self.micro_size
            yield filled(keyed(0, indices[low : low + self.micro_size]), least)
