"""What is prepared: folders of a cache, each complete or absent, and the ragged arrays in them, mapped into memory.

    prepared = Prepared(build(config.data, f"labelled-{fingerprint(sources)}", write))  # found there the second time
    prepared.vocab_size, prepared.audit, prepared.names("eval")

``write(folder)`` leaves ``tokenizer/``, what :func:`finish` writes, and arrays larger than memory, spooled while they
grow, then sealed as one Arrow file, or as rows of any length, of tokens say:

    writer = RaggedWriter(folder / "sequences", ids=np.int32, types=np.int8)
    writer.append(ids=[2, 17, 3], types=[0, 0, 0])
    writer.seal()
    Ragged(folder / "sequences").row("ids", 0)    # a numpy view of the file, nothing is copied
"""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from filelock import FileLock, Timeout
from numpy.typing import ArrayLike, DTypeLike, NDArray

from toolkit.config.schema import Data, RunConfig, Tokenizer, cache_dir
from toolkit.errors import DataError
from toolkit.run.directory import weights_folder

log = logging.getLogger(__name__)
FORMAT = 4  # raise it when the meaning of any cached file changes
SPLIT_SEED = 0  # seeds of a run share what is held out, or their scores could not be compared


class Mapped:
    """What opens files on first use: a worker opens them itself, so nothing that is cached is pickled."""

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if not isinstance(getattr(type(self), k, None), cached_property)}


@dataclass(frozen=True)
class Prepared(Mapped):
    """A folder of the cache; what is in it opens on first use, in each process."""

    path: Path

    @cached_property
    def audit(self) -> dict[str, Any]:
        """What was read, dropped, cut and kept, and what a person may judge the data by."""
        return dict(json.loads((self.path / "audit.json").read_text()))

    @cached_property
    def facts(self) -> dict[str, Any]:
        """What a task must know of it."""
        return dict(json.loads((self.path / "facts.json").read_text()))

    @property
    def vocab_size(self) -> int:
        return int(self.facts["vocab_size"])

    @property
    def pad_id(self) -> int:
        return int(self.facts["pad_id"])

    @property
    def notes(self) -> list[str]:
        """A line for the console about each split."""
        return list(self.facts["notes"])

    @property
    def warnings(self) -> list[str]:
        """A line for each thing that makes results doubtful: what, how much, the way out."""
        return list(self.facts["warnings"])

    @property
    def tokenizer(self) -> Path:
        """A folder for ``AutoTokenizer.from_pretrained``."""
        return self.path / "tokenizer"

    def names(self, of: str) -> list[str]:
        """The splits of a role, ``eval`` or ``test``: ``eval``, or ``eval.matched`` and so on; the first counts."""
        return [name for name in self.facts["splits"] if role(name) == of]


def finish(
    folder: Path,
    audit: dict[str, Any],
    *,
    splits: Iterable[str],
    notes: Iterable[str] = (),
    warnings: Iterable[str] = (),
    **facts: Any,
) -> None:
    """Write the audit and the facts of a prepared folder."""
    facts |= {"splits": list(splits), "notes": list(notes), "warnings": list(warnings)}
    (folder / "audit.json").write_text(json.dumps(audit, indent=1))
    (folder / "facts.json").write_text(json.dumps(facts))


def fingerprint(*parts: Any) -> str:
    """Sixteen hex digits of everything a folder depends on; the parts must be JSON."""
    text = json.dumps([FORMAT, *parts], sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def build(data: Data, name: str, write: Callable[[Path], None]) -> Path:
    """The folder ``name`` of the cache, made by ``write(staging)`` if it is not there yet. The folder appears by one
    rename, so a killed build leaves only a staging folder, which the next build removes; other processes wait for the
    lock and then find the folder."""
    cache = Path(data.cache_dir).expanduser() if data.cache_dir else cache_dir("data")
    folder = cache / name
    if folder.is_dir():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    lock = FileLock(cache / f"{name}.lock")  # the operating system's, so that of a killed process is free
    try:
        held = lock.acquire(timeout=0)
    except Timeout:
        log.warning("waiting for another process that is preparing %s", folder)
        held = lock.acquire()
    with held:
        for leftover in cache.glob(f"{name}.building-*"):  # under the lock, so its process is dead
            shutil.rmtree(leftover)
        if folder.is_dir():
            return folder
        staging = cache / f"{name}.building-{os.getpid()}"
        staging.mkdir()
        try:
            write(staging)
            for path in (path for path in staging.rglob("*") if path.is_file()):
                with path.open("rb") as file:
                    os.fsync(file.fileno())  # the name must not outlive a power cut that the content does not
            return staging.replace(folder)
        finally:
            shutil.rmtree(staging, ignore_errors=True)


def splits(data: Data, way_out: str) -> dict[str, str]:
    """Where each split comes from: train, eval and test, or eval.<name> and test.<name> of several."""
    if not data.train:
        raise DataError(f"data.train is not set: there is nothing to learn from. Set {way_out}.")
    found = {"train": data.train}
    for name, given in (("eval", data.eval), ("test", data.test)):
        if isinstance(given, str):
            found[name] = given
        elif given:
            found |= {f"{name}.{part}": source for part, source in given.items()}
    return found


def role(split: str) -> str:
    """``eval`` of ``eval.matched``."""
    return split.partition(".")[0]


def with_weights(config: RunConfig) -> Tokenizer:
    """The one that is named, else that of the weights, else one to be trained on the texts."""
    if config.tokenizer.path or not config.model.weights:
        return config.tokenizer
    return config.tokenizer.model_copy(update={"path": weights_folder(config.model.weights)})


class Spool:
    """A growing one-dimensional array in a raw file next to where it will be sealed."""

    def __init__(self, path: Path, dtype: DTypeLike) -> None:
        self.path, self.dtype = path.with_suffix(".spool"), np.dtype(dtype)
        self.file = self.path.open("wb")

    def append(self, values: ArrayLike) -> None:
        self.file.write(np.ascontiguousarray(values, self.dtype).data)

    def view(self) -> NDArray[Any]:
        """Everything appended, memory-mapped; nothing more can be."""
        self.file.close()
        # An empty file cannot be mapped.
        return np.memmap(self.path, self.dtype, mode="r") if self.path.stat().st_size else np.empty(0, self.dtype)


def seal(path: Path, columns: Mapping[str, Spool | NDArray[Any]]) -> None:
    """Write arrays, and spools, which it removes, as the columns of one record batch. One batch keeps every column
    contiguous: a slice of the corpus is then a slice of one array. A spool is mapped, not read, so sealing costs a copy
    on disk and no memory."""
    views = {name: column.view() for name, column in columns.items()}
    batch = pa.record_batch({name: pa.array(view) for name, view in views.items()})
    with pa.ipc.new_file(str(path), batch.schema) as writer:
        writer.write_batch(batch)
    for column in columns.values():
        if isinstance(column, Spool):
            column.path.unlink()


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


@dataclass(frozen=True)
class Ragged(Mapped):
    """What a :class:`RaggedWriter` wrote: row i is ``[ends[i] : ends[i + 1]]`` of each column."""

    path: Path

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
