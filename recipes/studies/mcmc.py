"""Metropolis chains for a Bayesian linear regression, spread over ranks, and three ways to give them random numbers.

    target = posterior(table, prior=1.0)                            # N(mean, covariance) in closed form too
    chains = sample(target, Counter(seed, mine, target.size), steps=10_000)        # [steps, size, chains]

Every sum of the chains is taken in a fixed order: a matrix product of BLAS rounds a column differently when there
are fewer columns beside it, and then a chain would depend on how many others its rank has.
"""

import hashlib
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from studies.random_numbers import KINDS, Floats, Generator, Numbers, numbers
from toolkit.data.regression import Synthetic, Table
from toolkit.errors import DataError

MOST = 2**26  # numbers of the table
BLOCK = 100  # steps whose numbers are drawn at once
SHOWN = 200  # first steps of a chain for the plot


@dataclass(frozen=True)
class Posterior:
    """log density(w) = w'(linear - precision w / 2) + constant, of ``size`` coefficients, and its closed form."""

    names: tuple[str, ...]
    precision: Floats  # [size, size]
    linear: Floats  # [size]
    mean: Floats  # [size]
    covariance: Floats  # [size, size]
    factor: Floats  # [size, size], the covariance's Cholesky factor
    noise: float  # standard deviation of the target around the line, from ordinary least squares
    prior: float

    @property
    def size(self) -> int:
        return len(self.names)

    @property
    def deviations(self) -> Floats:
        found: Floats = np.sqrt(np.diag(self.covariance))
        return found


def posterior(table: Table | Synthetic, prior: float) -> Posterior:
    """Of target = intercept + features w + noise of known size, with w ~ N(0, prior²) and all of it standardised.

    precision = X'X / noise² + I / prior², linear = X'y / noise² (Bishop 2006, eq. 3.50 and 3.51). Raises DataError.
    """
    from threadpoolctl import threadpool_limits

    rows, size = table.size, len(table.names) + 1
    if rows <= size:
        raise DataError(f"{rows} rows for {size} coefficients: the noise can't be estimated. Give more rows.")
    if rows * size > MOST:
        raise DataError(
            f"{rows:,} rows of {size - 1} features: the posterior is computed from at most {MOST:,} numbers."
        )
    columns = np.column_stack(table.take(np.arange(rows)))
    flat = [name for name, size in zip([*table.names, "the target"], np.ptp(columns, axis=0), strict=True) if size == 0]
    if flat:
        raise DataError(f"{', '.join(flat)}: the same value in every row, which tells nothing. Leave it out.")
    columns = (columns - columns.mean(axis=0)) / columns.std(axis=0)
    x, y = np.column_stack([np.ones(rows), columns[:, :-1]]), columns[:, -1]
    with threadpool_limits(1):  # for the same bits however many threads a rank has
        residual = y - x @ np.linalg.lstsq(x, y)[0]
        noise = float(np.sqrt(residual @ residual / (rows - size)))
        if noise < 1e-6:
            raise DataError(f"the line misses the target by {noise:.0e} deviations: no noise is left to sample under.")
        precision = x.T @ x / noise**2 + np.eye(size) / prior**2
        linear = x.T @ y / noise**2
        covariance = np.linalg.inv(precision)
        mean, factor = covariance @ linear, np.linalg.cholesky(covariance)
    return Posterior(("intercept", *table.names), precision, linear, mean, covariance, factor, noise, prior)


def times(matrix: Floats, vectors: Floats) -> Floats:
    """matrix [n, n] times vectors [n, any], the sums from the first term to the last: the same bits for any number."""
    return _added(matrix.T[:, :, None] * vectors[:, None])


def _added(terms: Floats) -> Floats:
    total: Floats = np.add.accumulate(terms, axis=0)[-1]  # add.reduce sums a lone column in another order
    return total


def log_density(posterior: Posterior, w: Floats) -> Floats:
    """[chains] of w [size, chains], but for a constant."""
    return _added(w * (posterior.linear[:, None] - 0.5 * times(posterior.precision, w)))


def sample(
    posterior: Posterior,
    numbers: Numbers,
    steps: int,
    *,
    first: int = 0,
    state: Floats | None = None,
    block: int = BLOCK,
) -> Floats:
    """Steps ``first`` to ``steps`` of random-walk Metropolis as [steps - first, size, chains].

    Step 0 is a draw from the prior; ``state`` [size, chains] is the step before ``first``. A proposal is the state
    plus N(0, (2.38² / size) covariance), the scale of Roberts, Gelman & Gilks 1997.
    """
    from scipy.special import xlogy

    factor = 2.38 / posterior.size**0.5 * posterior.factor
    chains: list[Floats] = []
    for start in range(first, steps, block):
        began = time.perf_counter()
        normals, uniforms = numbers.block(start, min(block, steps - start))
        numbers.seconds += time.perf_counter() - began
        moves = times(factor, normals.reshape(posterior.size, -1)).reshape(normals.shape).swapaxes(0, 1)
        if state is None:
            state, moves, uniforms = posterior.prior * normals[:, 0], moves[1:], uniforms[1:]
            chains.append(state)
        density = log_density(posterior, state)
        # xlogy goes number by number; np.log may take the ends of an array in another way than its middle
        for move, level in zip(moves, xlogy(1.0, uniforms), strict=True):
            proposal = state + move
            proposed = log_density(posterior, proposal)
            accepted = level < proposed - density
            state = np.where(accepted, proposal, state)
            density = np.where(accepted, proposed, density)
            chains.append(state)
    return np.stack(chains)


def digests(chains: Floats) -> list[str]:
    """sha256 of each chain's float64 draws."""
    return [hashlib.sha256(chain.tobytes()).hexdigest() for chain in np.moveaxis(chains, 2, 0)]


@dataclass(frozen=True)
class Timed:
    """One choice of numbers on the ranks of this run; the slowest rank's times, each the best of several rounds."""

    chains: Floats  # [steps, size, this rank's chains]
    seconds: float
    draw_seconds: float


def measure(
    posterior: Posterior, chains: int, steps: int, seed: int, rounds: int, tick: Callable[[], Any]
) -> dict[Generator, Timed]:
    """Every choice in turn, ``rounds`` times, on all ranks at once."""
    from toolkit.job import ranks

    found: dict[Generator, Floats] = {}
    seconds: dict[Generator, list[list[float]]] = {kind: [] for kind in KINDS}
    for kind in KINDS * rounds:
        own = numbers(kind, seed, chains, posterior.size, ranks.rank(), ranks.world())
        ranks.wait()
        began = time.perf_counter()
        found[kind] = sample(posterior, own, steps)
        seconds[kind].append(ranks.largest([time.perf_counter() - began, own.seconds]))
        tick()
    return {kind: Timed(found[kind], *map(min, zip(*seconds[kind], strict=True))) for kind in KINDS}


@dataclass(frozen=True)
class Simulated:
    """The chains that a choice gives at some number of ranks: their digests, and how the last one begins."""

    digests: tuple[str, ...]  # in the order of the chains
    beginning: Floats  # [SHOWN], of the coefficient farthest from 0
    drawn: int  # numbers, by the rank that draws most


def simulate(
    posterior: Posterior, chains: int, steps: int, seed: int, worlds: Iterable[int], tick: Callable[[], Any]
) -> dict[tuple[Generator, int], Simulated]:
    """Every choice as if each of ``worlds`` were the number of ranks; the simulated ranks are shared by the real."""
    from toolkit.job import ranks

    place = int(np.abs(posterior.mean).argmax())
    jobs = [(kind, world, rank) for kind in KINDS for world in worlds for rank in range(world)]
    parts: dict[Any, tuple[list[str], Floats, int]] = {}
    for kind, world, rank in jobs[ranks.rank() :: ranks.world()]:
        own = numbers(kind, seed, chains, posterior.size, rank, world)
        draws = sample(posterior, own, steps)
        parts[kind, world, rank] = digests(draws), draws[:SHOWN, place, -1], own.drawn
        tick()
    parts = {job: part for found in ranks.gathered(parts) for job, part in found.items()}
    result = {}
    for kind, world, _ in jobs:
        found, beginnings, drawn = zip(*(parts[kind, world, rank] for rank in range(world)), strict=True)
        result[kind, world] = Simulated(tuple(d for part in found for d in part), beginnings[-1], max(drawn))
    return result


def compared(timed: dict[Generator, Timed], simulated: dict[tuple[Generator, int], Simulated]) -> list[dict[str, Any]]:
    """A row for each choice: whether the chains are the same at all simulated numbers of ranks, and what it costs."""
    from toolkit.job import ranks

    rows = []
    for kind, one in timed.items():
        real = tuple(d for part in ranks.gathered(digests(one.chains)) for d in part)
        of = {world: s for (name, world), s in simulated.items() if name == kind}
        rows.append(
            {
                "numbers": kind,
                "same_chains": {s.digests for s in of.values()} == {real},
                "sha256": hashlib.sha256("".join(real).encode()).hexdigest(),
                **{f"drawn_at_{world}": s.drawn for world, s in of.items()},
                "seconds": one.seconds,
                "draw_seconds": one.draw_seconds,
                "steps_per_second": len(one.chains) * len(real) / one.seconds,
            }
        )
    return rows
