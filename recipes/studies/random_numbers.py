"""Random numbers for chains that are spread over ranks: from a counter, from one shared stream, from a seed per rank.

source = numbers("counter", seed, chains, size, rank, world)
normals, uniforms = source.block(first, steps)      # for this rank's share of the chains
"""

from collections.abc import Sequence
from typing import Literal, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

Floats: TypeAlias = NDArray[np.float64]
Generator = Literal["counter", "shared", "per_rank"]
KINDS: tuple[Generator, ...] = ("counter", "shared", "per_rank")


class Numbers(Protocol):
    """Where chains get their random numbers from: ``drawn`` so far on this rank, in ``seconds``."""

    drawn: int
    seconds: float

    def block(self, first: int, steps: int) -> tuple[Floats, Floats]:
        """Normals [size, steps, chains] and uniforms in (0, 1) [steps, chains] from step ``first`` on."""


class Counter:
    """Philox 4x64-10 (Salmon et al. 2011) with key (seed, chain) and a fixed range of the counter for each step.

    A number is a function of (seed, chain, step, place): no state to keep, to share or to wait for.
    """

    def __init__(self, seed: int, chains: Sequence[int], size: int) -> None:
        self.seed, self.chains, self.size = seed, chains, size
        self.ticks = -(-(size + 1) // 4)  # of the counter a step; each gives four words
        self.drawn, self.seconds = 0, 0.0

    def words(self, chain: int, first: int, steps: int) -> NDArray[np.uint64]:
        """[steps, 4 ticks] of 64 random bits."""
        # numpy counts up before it generates, so step 0 begins one before counter 0
        philox = np.random.Philox(key=[self.seed, chain], counter=(first * self.ticks - 1) % 2**256)
        return philox.random_raw(4 * self.ticks * steps).reshape(steps, -1)

    def block(self, first: int, steps: int) -> tuple[Floats, Floats]:
        from scipy.special import ndtri

        words = np.stack([self.words(chain, first, steps)[:, : self.size + 1] for chain in self.chains])
        self.drawn += words.size
        uniforms = np.moveaxis(uniform(words), (0, 1, 2), (2, 1, 0))
        # By the inverse of the distribution function: the ziggurat method takes now one word, now several
        return ndtri(uniforms[:-1]), uniforms[-1]


class OneByOne:
    """numpy's usual generator, one number after the other, for the chains ``drawn``; ``kept`` are this rank's."""

    def __init__(self, seed: int | tuple[int, ...], drawn: Sequence[int], kept: Sequence[int], size: int) -> None:
        self.generator = np.random.default_rng(seed)
        self.shape, self.size, self.drawn, self.seconds = len(drawn), size, 0, 0.0
        self.places = [list(drawn).index(chain) for chain in kept]

    def block(self, first: int, steps: int) -> tuple[Floats, Floats]:
        normals = self.generator.standard_normal((self.size, steps, self.shape))
        uniforms = self.generator.random((steps, self.shape))
        self.drawn += normals.size + uniforms.size
        return normals[..., self.places], uniforms[..., self.places]


def numbers(kind: Generator, seed: int, chains: int, size: int, rank: int, world: int) -> Numbers:
    """What ``rank`` of ``world`` draws from for its share of all the chains."""
    mine = share(chains, rank, world)
    if kind == "counter":
        return Counter(seed, mine, size)
    return OneByOne(seed, range(chains), mine, size) if kind == "shared" else OneByOne((seed, rank), mine, mine, size)


def share(chains: int, rank: int, world: int) -> list[int]:
    """The chains of ``rank``: as many as others have, or one more."""
    return [int(chain) for chain in np.array_split(np.arange(chains), world)[rank]]


def uniform(words: NDArray[np.uint64]) -> Floats:
    """The upper 52 bits as a number in (0, 1), in the middle of its interval: neither 0 nor 1 is met."""
    return ((words >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52
