"""Random choices as pure functions of whole numbers: no state, so any rank or worker draws the same.

    uniform(mix(seed, salt, index))       # many choices at once, each in [0, 1)
    generator(seed, split, epoch, index)  # a numpy Generator for one sample

Salts and splits keep the random numbers of different decisions apart.
"""

import numpy as np
from numpy.typing import NDArray

U64 = NDArray[np.uint64]


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


class Shuffle:
    """A permutation of ``range(n)`` for one seed and epoch, as a function in O(1) memory.

    A four-round Feistel network permutes the next power of two; values outside the range walk on
    along their cycle until they fall inside (Black and Rogaway 2002), fewer than two steps on average.
    """

    def __init__(self, n: int, seed: int, epoch: int) -> None:
        bits = (n - 1).bit_length()
        self.n = n
        self.keys = mix(seed, epoch, np.arange(4, dtype=np.uint64))
        self.widths = np.array([bits // 2, bits - bits // 2], np.uint64)
        self.masks = (np.uint64(1) << self.widths) - np.uint64(1)

    def __call__(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """The images of ``positions``, each in [0, n)."""
        values = self._rounds(np.asarray(positions, np.uint64))
        while (outside := values >= self.n).any():
            values[outside] = self._rounds(values[outside])
        return values.astype(np.int64)

    def _rounds(self, values: U64) -> U64:
        left, right = values >> self.widths[1], values & self.masks[1]
        for number in range(4):  # the halves swap sizes each round and are back after an even number
            left, right = right, left ^ (mix(self.keys[number], right) & self.masks[number % 2])
        return np.asarray(left << self.widths[1] | right)
