"""The rows of a linear regression: a table of numbers from files, scikit-learn's diabetes, or synthetic ones.

table = read(config.data, seed=42)
table.size, table.names, table.target      # 442, ('age', 'sex', …), 'disease progression'
x, y = table.take(np.array([0, 5]))        # float64 [2, features], [2]
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from toolkit.config import Data
from toolkit.data import tables
from toolkit.data.draws import Shuffle, mix, uniform
from toolkit.data.sources import Problems
from toolkit.errors import DataError, nearest

Floats = NDArray[np.float64]
PLAIN = (".txt", ".dat", ".data")  # of whitespace between columns
SPLIT_SEED = 0  # seeds of a run share what is held out


@dataclass(frozen=True)
class Table:
    """Numbers in memory."""

    features: Floats  # [rows, features]
    targets: Floats  # [rows]
    names: tuple[str, ...]
    target: str
    skipped: int = 0
    first_skipped: tuple[str, ...] = ()

    @property
    def size(self) -> int:
        return len(self.targets)

    def take(self, rows: NDArray[np.int64]) -> tuple[Floats, Floats]:
        """Features [n, features] and targets [n] of these rows."""
        return self.features[rows], self.targets[rows]


@dataclass(frozen=True)
class Synthetic:
    """Rows that are functions of (seed, row), so that any number of them takes no memory.

    y = x·w + 1 + noise·e with w of -1, -1/2, -1/3, … of alternating sign; x uniform with variance 1, e Laplace
    with variance 1: its tails are those that the mean absolute error is good for.
    """

    size: int
    width: int
    noise: float
    seed: int
    target: str = "y"

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(f"x{i}" for i in range(self.width))

    @property
    def weights(self) -> Floats:
        """[features]: what the targets are made with."""
        order = np.arange(self.width)
        return np.where(order % 2, 1.0, -1.0) / (order + 1)

    def take(self, rows: NDArray[np.int64]) -> tuple[Floats, Floats]:
        """Features [n, features] and targets [n] of these rows."""
        cells = np.asarray(rows, np.uint64)[:, None], np.arange(self.width + 1, dtype=np.uint64)
        draws = uniform(mix(self.seed, *cells))
        x, u = (2 * draws[:, 1:] - 1) * 3**0.5, draws[:, 0] - 0.5
        laplace = -np.sign(u) * np.log1p(-2 * np.abs(u)) / 2**0.5
        return x, x @ self.weights + 1 + self.noise * laplace


def read(data: Data, seed: int) -> Table | Synthetic:
    """The table that ``data`` names. Raises DataError naming file, row and column of what is no number."""
    if data.format == "synthetic":
        return Synthetic(data.rows, data.features, data.noise, seed)
    return _diabetes() if data.path is None else _read(data)


def _diabetes() -> Table:
    from sklearn.datasets import load_diabetes

    found: Any = load_diabetes()
    return Table(found.data, found.target, tuple(found.feature_names), "disease progression")


def _read(data: Data) -> Table:
    problems = Problems(data.on_error)
    places = [data.path] if isinstance(data.path, str) else list(data.path or ())
    names: tuple[str, ...] = ()
    numbers: list[list[float]] = []
    for place in places:
        columns = data.format is None and place.endswith(PLAIN)
        of = data.model_copy(update={"format": "columns"}) if columns else data
        for where, row in tables.rows(place, of, "train", problems):
            found = tuple(row)
            names = names or found
            if found != names:
                raise DataError(f"{where}: has the columns {', '.join(found)}, the rows before {', '.join(names)}.")
            cells = {name: cell for name, cell in row.items() if name not in data.drop}
            if (values := _numbers(where, cells, problems)) is not None:
                numbers.append(values)
    if unknown := [name for name in data.drop if name not in names]:
        raise DataError(f"data.drop=[{unknown[0]}]: no such column.{nearest(unknown[0], names)} There are: "
                        f"{', '.join(names)}.")  # fmt: skip
    kept = [name for name in names if name not in data.drop]
    if len(kept) < 2 or len(numbers) < 2:
        raise DataError(
            f"{places[0]}: {len(numbers)} rows of numbers in {len(kept)} columns are no regression: it takes two of "
            f"each. Skipped: {problems.skipped}. {' '.join(problems.first[:1])}"
        )
    array, target = np.array(numbers), _target(data, names, kept, places[0])
    at = kept.index(target)
    features, left = np.delete(array, at, axis=1), tuple(kept[:at] + kept[at + 1 :])
    for name, column in zip(left, features.T, strict=True):
        if np.ptp(column) == 0:
            raise DataError(
                f"{places[0]}: column '{name}' is {column[0]:g} in every row: it says nothing beside the intercept. "
                f"Leave it out with data.drop=[{name}]."
            )
    return Table(features, array[:, at], left, target, problems.skipped, tuple(problems.first))


def _numbers(where: str, cells: dict[str, Any], problems: Problems) -> list[float] | None:
    values = []
    for name, cell in cells.items():
        try:
            values.append(float(cell))
            if not np.isfinite(values[-1]):
                raise ValueError
        except (TypeError, ValueError):
            missing = cell is None or not str(cell).strip()
            said = "is empty" if missing else f"{str(cell)[:40]!r} is no number"
            problems.found(f"{where}: column '{name}' {said}", f"Correct it, leave it out with data.drop=[{name}]")
            return None
    return values


def _target(data: Data, names: tuple[str, ...], kept: list[str], place: str) -> str:
    """The column that ``data.target`` means: a name, or a number from 0 (from the end with -1); the last one kept."""
    chosen = data.target
    if chosen is None:
        return kept[-1]
    if chosen not in names and chosen.lstrip("-").isdigit() and -len(names) <= int(chosen) < len(names):
        chosen = names[int(chosen)]
    if chosen not in names:
        raise DataError(
            f"{place}: data.target={chosen}: no such column.{nearest(chosen, names)} There are: {', '.join(names)}; or "
            f"a number from 0 to {len(names) - 1}."
        )
    if chosen not in kept:
        raise DataError(f"data.target={data.target} is in data.drop={list(data.drop)}. Keep it.")
    return chosen


class Split:
    """Which rows are trained on and which are held out: two parts of one fixed shuffle."""

    def __init__(self, size: int, share: float) -> None:
        self.order = Shuffle(size, SPLIT_SEED, 0)
        self.held_out = min(size - 1, round(size * share))
        self.train = size - self.held_out

    def rows(self, part: str, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """The rows at ``positions`` of ``train`` or ``eval``."""
        return self.order(positions + (self.train if part == "eval" else 0))


def chunks(size: int, of: int = 65536) -> Iterator[NDArray[np.int64]]:
    """``arange(size)`` in pieces."""
    return (np.arange(start, min(start + of, size)) for start in range(0, size, of))
