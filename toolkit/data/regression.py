"""The rows of a linear regression: a table of numbers from files, scikit-learn's diabetes, or synthetic ones.

table = read(config.data, seed=42)
table.size, table.names, table.target      # 442, ('age', 'sex', …), 'disease progression'
x, y = table.take(np.array([0, 5]))        # float64 [2, features], [2]
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from toolkit.config.schema import Data
from toolkit.data import tables
from toolkit.data.batch import Batch, tensors
from toolkit.data.lines import Problems
from toolkit.data.order import Keys, mix, shuffled, uniform
from toolkit.data.prepared import SPLIT_SEED
from toolkit.errors import DataError, nearest

Floats = NDArray[np.float64]
PLAIN = (".txt", ".dat", ".data")  # of whitespace between columns


@dataclass(frozen=True)
class Table:
    """Numbers in memory."""

    features: Floats  # [rows, features]
    targets: Floats  # [rows]
    names: tuple[str, ...]
    target: str
    skipped: int = 0

    @property
    def size(self) -> int:
        return len(self.targets)

    def take(self, rows: NDArray[np.int64]) -> tuple[Floats, Floats]:
        """Features [n, features] and targets [n] of these rows."""
        return self.features[rows], self.targets[rows]


@dataclass(frozen=True)
class Synthetic:
    """Rows that are functions of (seed, row), so that any number of them takes no memory. y = x·w + 1 + noise·e with w
    of -1, -1/2, -1/3, … of alternating sign; x uniform with variance 1, e Laplace with variance 1: its tails are those
    that the mean absolute error is good for."""

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
    if data.path is not None:
        return _read(data, [data.path] if isinstance(data.path, str) else list(data.path))
    from sklearn.datasets import load_diabetes

    found: Any = load_diabetes()
    names = (*found.feature_names, "progression")
    return _chosen(np.column_stack([found.data, found.target]), names, data, "diabetes", 0)


def _read(data: Data, places: list[str]) -> Table:
    problems = Problems(data.on_error)
    names: tuple[str, ...] = ()
    numbers: list[list[float]] = []
    for place in places:
        columns = data.format is None and place.removesuffix(".gz").endswith(PLAIN)
        of = data.model_copy(update={"format": "columns"}) if columns else data
        for where, row in tables.rows(place, of, data.split, problems, key="data.path"):
            names = names or tuple(row)
            if tuple(row) != names:
                raise DataError(f"{where}: has the columns {', '.join(row)}, the rows before {', '.join(names)}.")
            if (values := _numbers(where, row, data.drop, problems)) is not None:
                numbers.append(values)
    if len(numbers) < 2:
        raise DataError(
            f"{places[0]}: {len(numbers)} rows of numbers: a regression takes two. Skipped: {problems.skipped}. "
            f"{' '.join(problems.first[:1])}"
        )
    return _chosen(np.array(numbers), names, data, places[0], problems.skipped)


def _numbers(where: str, row: dict[str, Any], drop: tuple[str, ...], problems: Problems) -> list[float] | None:
    """The cells of a row, 0 for those that are dropped; None of a row that has a bad one."""
    found = {name: 0.0 if name in drop else tables.number(cell) for name, cell in row.items()}
    values = [value for value in found.values() if value is not None]
    if len(values) == len(found):
        return values
    name = next(name for name, value in found.items() if value is None)
    missing = row[name] is None or not str(row[name]).strip()
    said = "is empty" if missing else f"{str(row[name])[:40]!r} is no number"
    problems.found(f"{where}: column '{name}' {said}", f"Correct it, leave it out with data.drop=[{name}]")
    return None


def _chosen(array: Floats, names: tuple[str, ...], data: Data, place: str, skipped: int) -> Table:
    """Features and target of ``array`` [rows, columns], without what ``data.drop`` names."""
    if unknown := [name for name in data.drop if name not in names]:
        raise DataError(
            f"data.drop=[{unknown[0]}]: no such column.{nearest(unknown[0], names)} There are: {', '.join(names)}."
        )
    kept = [name for name in names if name not in data.drop]
    if len(kept) < 2:
        raise DataError(f"{place}: {len(kept)} columns are no regression: it takes a feature and a target.")
    target = _target(data, names, kept, place)
    columns = dict(zip(names, array.T, strict=True))
    for name in kept:
        if np.ptp(columns[name]) == 0:
            way = "Choose another with data.target" if name == target else f"Leave it out with data.drop=[{name}]"
            raise DataError(f"{place}: column '{name}' is {columns[name][0]:g} in every row: it says nothing. {way}.")
    features = tuple(name for name in kept if name != target)
    return Table(array[:, [names.index(name) for name in features]], columns[target], features, target, skipped)


def _target(data: Data, names: tuple[str, ...], kept: list[str], place: str) -> str:
    """The column that ``data.target`` means: a name, or a number from 0 (from the end with -1); the last one kept."""
    chosen = data.target
    if chosen is None:
        return kept[-1]
    if chosen not in names and re.fullmatch("-?[0-9]+", chosen) and -len(names) <= int(chosen) < len(names):
        chosen = names[int(chosen)]
    if chosen not in names:
        raise DataError(
            f"{place}: data.target={chosen}: no such column.{nearest(chosen, names)} There are: {', '.join(names)}; or "
            f"a number from 0 to {len(names) - 1}."
        )
    if chosen not in kept:
        raise DataError(f"data.target={data.target} is in data.drop={list(data.drop)}. Keep it.")
    return chosen


class Parts:
    """Which rows are trained on and which are held out: two parts of one fixed shuffle."""

    def __init__(self, size: int, share: float) -> None:
        self.size, self.held_out = size, min(size - 1, round(size * share))
        self.train = size - self.held_out

    def rows(self, part: str, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """The rows at ``positions`` of ``train`` or ``eval``."""
        return shuffled(self.size, SPLIT_SEED, 0, positions + (self.train if part == "eval" else 0))


@dataclass(frozen=True)
class Standardised:
    """The rows of ``train`` or ``eval`` as batches of standardised numbers, ``columns`` wide: the last are zeros."""

    table: Table | Synthetic
    parts: Parts
    part: str
    mean: Floats  # [features]
    std: Floats
    target_mean: float
    target_std: float
    columns: int

    full = False

    @property
    def lengths(self) -> NDArray[np.int64]:
        return np.ones(self.parts.held_out if self.part == "eval" else self.parts.train, np.int64)

    def take(self, positions: NDArray[np.int64]) -> tuple[Floats, Floats]:
        """Features [n, features] and targets [n] at these positions of the part."""
        x, y = self.table.take(self.parts.rows(self.part, positions))
        return (x - self.mean) / self.std, (y - self.target_mean) / self.target_std

    def __getitem__(self, keys: Keys) -> Batch:
        """``features`` [rows, columns], ``target`` [rows], ``real`` [rows]: 0 for one that fills a gap."""
        positions = keys[:, 1]
        x, y = self.take(np.maximum(positions, 0))
        x = np.pad(x, ((0, 0), (0, self.columns - x.shape[1])))
        arrays = {"features": x, "target": y, "real": positions >= 0}
        return tensors(**{name: array.astype(np.float32) for name, array in arrays.items()})


def chunks(size: int, of: int) -> Iterator[NDArray[np.int64]]:
    """``arange(size)`` in pieces."""
    return (np.arange(start, min(start + of, size)) for start in range(0, size, of))
