"""Data sets of the Hugging Face hub, streamed or downloaded by the datasets library.

    for where, row in rows(data, ["Salesforce/wikitext:wikitext-2-raw-v1"]): ...

A folder of data files stands for a data set of the hub, as in the library.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from toolkit.config import Data
from toolkit.errors import DataError


def rows(data: Data, names: list[str]) -> Iterator[tuple[str, Any]]:
    """(name:row, row as a dict) of every row of every named data set, in the order given."""
    for name in names:
        for number, row in enumerate(_load(name, data), 1):
            yield f"{name}:row {number}", row


def identity(name: str, data: Data) -> list[Any]:
    """The name and the revision that ``rows`` would read: files of a folder, else the hub's commit."""
    folder = Path(_owner_and_config(name)[0])
    if folder.is_dir():
        stats = [(path, path.stat()) for path in sorted(folder.rglob("*")) if path.is_file()]
        return [name, [[str(path.resolve()), stat.st_size, stat.st_mtime_ns] for path, stat in stats]]
    if not data.streaming:
        return [name, _load(name, data)._fingerprint]
    return [name, _revision(name)]


def _revision(name: str) -> str:
    from huggingface_hub import HfApi

    try:
        return str(HfApi().dataset_info(_owner_and_config(name)[0]).sha)
    except Exception as error:  # the client raises from several libraries; each means: not reachable
        raise _unreachable(name, error) from error


def _load(name: str, data: Data) -> Any:
    from datasets import load_dataset

    owner, config = _owner_and_config(name)
    try:
        return load_dataset(owner, config, split=data.split, streaming=data.streaming)
    except Exception as error:  # ditto
        raise _unreachable(name, error) from error


def _owner_and_config(name: str) -> tuple[str, str | None]:
    owner, _, config = name.partition(":")
    return owner, config or None


def _unreachable(name: str, error: Exception) -> DataError:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return DataError(
        f"data.path={name}: the hub data set cannot be loaded ({reason}) "
        "Check the name (owner/name[:config]), data.split and the network; without one, data.streaming=false "
        "reads what was downloaded before."
    )
