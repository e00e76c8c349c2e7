"""Arrays larger than memory: spooled while they grow, then sealed as one Arrow file that memory-maps.

    spool = Spool(folder / "tokens", np.uint16)
    spool.append(values)
    seal(folder / "tokens.arrow", {"id": spool})
    open_columns(folder / "tokens.arrow")["id"]  # a numpy view of the file, nothing is copied

A slice of a column reads that part of the file and nothing else.
"""

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
