"""Data sets of the Hugging Face hub, streamed or downloaded by the datasets library.

    for where, row in rows(data, ["Salesforce/wikitext:wikitext-2-raw-v1"]): ...

A folder of data files stands for a data set of the hub, as in the library.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from toolkit.config.schema import Data
from toolkit.errors import DataError


def rows(data: Data, names: list[str]) -> Iterator[tuple[str, Any]]:
    """(name:row, row as a dict) of every row of every named data set, in the order given."""
    for name in names:
        for number, row in enumerate(load(name, data.split, data.streaming), 1):
            yield f"{name}:row {number}", row


def identity(name: str, data: Data) -> list[Any]:
    """The name and the revision that ``rows`` would read: files of a folder, else the hub's commit."""
    folder = Path(_owner_and_config(name)[0])
    if folder.is_dir():
        stats = [(path, path.stat()) for path in sorted(folder.rglob("*")) if path.is_file()]
        return [name, [[str(path.resolve()), stat.st_size, stat.st_mtime_ns] for path, stat in stats]]
    if not data.streaming:
        return [name, load(name, data.split, data.streaming)._fingerprint]
    return [name, _revision(name)]


def _revision(name: str) -> str:
    from huggingface_hub import HfApi

    try:
        return str(HfApi().dataset_info(_owner_and_config(name)[0]).sha)
    except Exception as error:  # the client raises from several libraries; each means: not reachable
        raise _unreachable("data.path", name, error) from error


def load(name: str, split: str, streaming: bool, key: str = "data.path") -> Any:
    """One split of a data set. Raises DataError with the ``key`` its name stands at."""
    from datasets import load_dataset

    owner, config = _owner_and_config(name)
    try:
        return load_dataset(owner, config, split=split, streaming=streaming)
    except Exception as error:  # ditto
        raise _unreachable(key, name, error) from error


def class_names(dataset: Any) -> dict[str, list[str]]:
    """The names of the numbers in each column of classes, or of lists of classes."""
    from datasets import ClassLabel

    features = {column: getattr(feature, "feature", feature) for column, feature in (dataset.features or {}).items()}
    return {column: feature.names for column, feature in features.items() if isinstance(feature, ClassLabel)}


def _owner_and_config(name: str) -> tuple[str, str | None]:
    owner, _, config = name.partition(":")
    return owner, config or None


def _unreachable(key: str, name: str, error: Exception) -> DataError:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return DataError(
        f"{key}={name}: the hub data set cannot be loaded ({reason}) "
        "Check the name (owner/name[:config]), the split and the network; without one, data.streaming=false "
        "reads what was downloaded before."
    )
