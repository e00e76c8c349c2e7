"""Prepared data, of whatever kind: a folder of the cache that training maps into memory.

    prepared = Prepared(made(config.data, f"labelled-{key}", write))    # found there the second time
    prepared.vocab_size, prepared.audit, prepared.names("eval")

``write(folder)`` leaves the arrays of each split, ``tokenizer/``, and what :func:`finish` writes.
"""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from toolkit.config.schema import Data, RunConfig, Tokenizer, cache_dir
from toolkit.data.arrays import Mapped
from toolkit.data.cache import build
from toolkit.errors import DataError
from toolkit.run.directory import weights_folder

SPLIT_SEED = 0  # seeds of a run share what is held out, or their scores could not be compared


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
    def tokenizer(self) -> Path:
        """A folder for ``AutoTokenizer.from_pretrained``."""
        return self.path / "tokenizer"

    def names(self, of: str) -> list[str]:
        """The splits of a role, ``eval`` or ``test``: ``eval``, or ``eval.matched`` and so on; the first counts."""
        return [name for name in self.facts["splits"] if role(name) == of]


def finish(folder: Path, audit: dict[str, Any], *, splits: Iterable[str], notes: Iterable[str], **facts: Any) -> None:
    """Write the audit and the facts of a prepared folder."""
    facts |= {"splits": list(splits), "notes": list(notes)}
    (folder / "audit.json").write_text(json.dumps(audit, indent=1))
    (folder / "facts.json").write_text(json.dumps(facts))


def made(data: Data, name: str, write: Callable[[Path], None]) -> Path:
    """The folder ``name`` of the cache, written if it is not there yet."""
    return build(Path(data.cache_dir).expanduser() if data.cache_dir else cache_dir("data"), name, write)


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
