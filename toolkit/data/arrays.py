"""Arrays larger than memory: spooled while they grow, then sealed as one Arrow file that memory-maps.

    spool = Spool(folder / "tokens", np.uint16)
    spool.append(values)
    seal(folder / "tokens.arrow", {"id": spool})
    open_columns(folder / "tokens.arrow")["id"]  # a numpy view of the file, nothing is copied

Rows of any length, of tokens say, are ragged arrays, and all that is prepared is kept in such:

    writer = RaggedWriter(folder / "sequences", ids=np.int32, types=np.int8)
    writer.append(ids=[2, 17, 3], types=[0, 0, 0])
    writer.seal()
    Ragged(folder / "sequences").row("ids", 0)

A slice of a column reads that part of the file and nothing else.
"""

from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import ArrayLike, DTypeLike, NDArray


class Spool:
    """A growing one-dimensional array in a raw file next to where it will be sealed."""

    def __init__(self, path: Path, dtype: DTypeLike) -> None:
        self.path, self.dtype, self.length = path.with_suffix(".spool"), np.dtype(dtype), 0
        self._file = self.path.open("wb")

    def append(self, values: ArrayLike) -> None:
        array = np.ascontiguousarray(values, self.dtype)
        self._file.write(array.data)
        self.length += len(array)

    def view(self) -> NDArray[Any]:
        """Everything appended so far, memory-mapped."""
        self._file.flush()
        if not self.length:  # an empty file cannot be mapped
            return np.empty(0, self.dtype)
        return np.memmap(self.path, self.dtype, mode="r")

    def remove(self) -> None:
        self._file.close()
        self.path.unlink()


def seal(path: Path, columns: dict[str, Spool]) -> None:
    """Write the spools as the columns of one record batch and remove them.

    One batch keeps every column contiguous: a slice of the corpus is then a slice of one array. The
    spool is mapped, not read, so sealing costs a copy on disk and no memory.
    """
    batch = pa.record_batch({name: pa.array(spool.view()) for name, spool in columns.items()})
    with pa.ipc.new_file(str(path), batch.schema) as writer:
        writer.write_batch(batch)
    for spool in columns.values():
        spool.remove()


def open_columns(path: Path) -> dict[str, NDArray[Any]]:
    """The columns of a sealed file as read-only numpy views of the mapped file."""
    batch = pa.ipc.open_file(pa.memory_map(str(path))).get_batch(0)
    return {name: batch.column(name).to_numpy() for name in batch.schema.names}


class RaggedWriter:
    """Rows of any length as they come; the columns, one for each of ``dtypes``, have rows of the same lengths."""

    def __init__(self, path: Path, **dtypes: DTypeLike) -> None:
        self.path = path
        self.columns = {name: Spool(path.with_name(f"{path.name}_{name}"), dtype) for name, dtype in dtypes.items()}
        self.ends, self.length = Spool(path.with_name(f"{path.name}_end"), np.int64), 0
        self.ends.append([0])  # bounds: n + 1 numbers for n rows

    def append(self, **row: ArrayLike) -> None:
        """One row."""
        self.extend([len(next(iter(row.values())))], **row)  # type: ignore[arg-type]

    def extend(self, lengths: ArrayLike, **flat: ArrayLike) -> None:
        """Rows of these lengths, one after the other."""
        for name, values in flat.items():
            self.columns[name].append(values)
        ends = self.length + np.cumsum(lengths, dtype=np.int64)
        self.length = int(ends[-1]) if len(ends) else self.length
        self.ends.append(ends)

    def seal(self) -> None:
        """Write the columns to ``<path>.arrow``, the bounds to ``<path>_end.arrow``."""
        seal(self.path.with_suffix(".arrow"), self.columns)
        seal(self.path.with_name(f"{self.path.name}_end.arrow"), {"end": self.ends})


class Mapped:
    """What opens files on first use: a worker opens them itself, so nothing that is cached is pickled."""

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if not isinstance(getattr(type(self), k, None), cached_property)}


class Ragged(Mapped):
    """What a :class:`RaggedWriter` wrote: row i is ``[ends[i] : ends[i + 1]]`` of each column."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __len__(self) -> int:
        return len(self.ends) - 1

    @cached_property
    def columns(self) -> dict[str, NDArray[Any]]:
        return open_columns(self.path.with_suffix(".arrow"))

    @cached_property
    def ends(self) -> NDArray[np.int64]:
        """Bounds of the rows, int64 [rows + 1]."""
        return open_columns(self.path.with_name(f"{self.path.name}_end.arrow"))["end"]

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Of each row, int64 [rows]."""
        return np.diff(self.ends)

    def row(self, name: str, number: int) -> NDArray[Any]:
        return self.columns[name][self.ends[number] : self.ends[number + 1]]
