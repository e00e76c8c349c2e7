"""Sentence pairs as they are read: two files that are aligned line by line, or the rows of a table.

    for pair in pairs("corpus/train", "train", config.data, config.task):
        pair.source, pair.target, pair.where

With ``task.source=de task.target=en`` this reads ``corpus/train.de[.gz]`` and ``corpus/train.en[.gz]``; what is not
the beginning of such names is a table, and data.columns.source and .target are its columns.
"""

import gzip
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolkit.config.schema import Data, Task
from toolkit.data import tables
from toolkit.errors import DataError

SIDES = ("source", "target")


@dataclass(frozen=True)
class Pair:
    """A sentence, its translation, and where they were read."""

    source: str
    target: str
    where: str


def pairs(place: str, split: str, data: Data, task: Task) -> Iterator[Pair]:
    """Every pair of ``place``, in order, stripped of white space at the ends. Raises DataError."""
    sides = _sides(place, split, task)
    if sides:
        yield from _aligned(sides[0], sides[1], split)
        return
    for where, row in tables.rows(place, data, tables.HUB_SPLIT[split]):
        source, target = (_cell(row, column, where) for column in (data.columns.source, data.columns.target))
        yield Pair(source, target, where)


def _cell(row: dict[str, Any], column: str, where: str) -> str:
    """``translation.de`` is the entry ``de`` of the column ``translation``, as in the WMT sets of the hub."""
    value: Any = row
    for name in [column] if column in row else column.split("."):
        if not isinstance(value, dict) or name not in value:
            raise DataError(
                f"{where}: has no column {column!r}, only {', '.join(map(repr, row))}. Set data.columns.source and "
                "data.columns.target."
            )
        value = value[name]
    return str("" if value is None else value).strip()


def _sides(place: str, split: str, task: Task) -> list[Path] | None:
    """The files of the two languages that begin with ``place``; None if it names a table."""
    if place.startswith("None/"):  # what ${data.path}/… of an experiment is without data.path
        raise DataError(f"data.path is not set, and data.{split}={place} begins with it. Name the folder of the files.")
    found: list[Path] = []
    missing: list[str] = []
    for language in (task.source, task.target):
        names = [Path(f"{place}.{language}{suffix}").expanduser() for suffix in ("", ".gz")]
        file = next((name for name in names if name.is_file()), None)
        found += [file] if file else []
        missing += [] if file else [f"{names[0]}[.gz]"]
    if not missing:
        return found
    path = Path(place).expanduser()
    if not found and (path.exists() or path.suffix or place[0] not in "~./"):
        return None  # a table, a glob of them, or a name of the hub
    raise DataError(
        f"data.{split}={place}: there is no {' and no '.join(missing)}. The two files are data.{split}, a dot and "
        f"task.source={task.source} or task.target={task.target}."
    )


def _aligned(source: Path, target: Path, split: str) -> Iterator[Pair]:
    """Lines of the same number; the counts are compared once both files have ended."""
    left, right = _lines(source), _lines(target)
    counts = [0, 0]
    while True:
        a, b = next(left, None), next(right, None)
        counts = [counts[0] + (a is not None), counts[1] + (b is not None)]
        if a is None or b is None:
            break
        yield Pair(a.strip(), b.strip(), f"{source}:{counts[0]}")
    counts = [counts[0] + sum(1 for _ in left), counts[1] + sum(1 for _ in right)]
    if counts[0] != counts[1]:
        raise DataError(
            f"data.{split}: {source} has {counts[0]:,} lines, {target} {counts[1]:,}. Line by line they are to be "
            "translations of each other: align them."
        )


def _lines(path: Path) -> Iterator[str]:
    """Lines end with a newline and nothing else: a form feed or U+2028 within one would shift all that follow."""
    number = 0
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            for number, line in enumerate(file, 1):
                yield line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}:{number}: is not UTF-8 ({error.reason}). Convert the file.") from error
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read: {error}.") from error


def identity(place: str, split: str, data: Data, task: Task) -> list[Any]:
    """What stands for the content of ``place`` in the cache: names, sizes and times of its files."""
    files = _sides(place, split, task)
    if files is None:
        return tables.identity(place, data, tables.HUB_SPLIT[split])
    return [[str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns] for file in files]
