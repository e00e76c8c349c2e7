"""Labelled data as ``recipes/finetune.py`` reads it: rows checked, tokenised and cached, once for all ranks.

    prepared = prepare(config, encode)        # encode(tokenizer, examples) yields Samples
    prepared.labels, prepared.names("eval"), prepared.audit

Every split is read and checked before training starts, so a bad row ends a run at once.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from toolkit.config.schema import Data, RunConfig, Tokenizer, cache_dir
from toolkit.data import encoded, examples, tables
from toolkit.data import tokenizer as tokenizers
from toolkit.data.cache import build, fingerprint
from toolkit.data.chunks import held_out
from toolkit.data.sources import Problems
from toolkit.errors import DataError
from toolkit.run.directory import weights_folder

Encode = Callable[[Any, list[Any]], Iterator[encoded.Sample]]
READING = {"columns", "header", "format", "labels", "range", "holdout", "on_error", "max_length"}
READING_AS = {"train": "train", "eval": "validation", "test": "test"}  # what the hub calls splits
SPLIT_SEED = 0  # seeds of a run share what is held out, or their scores could not be compared
TASK = {"kind", "scheme", "stride", "max_question", "null_answers"}


@dataclass(frozen=True)
class Prepared:
    """A cache folder: one folder of arrays for each split, the tokenizer, what was found."""

    path: Path
    config: RunConfig

    @cached_property
    def audit(self) -> dict[str, Any]:
        """Counts of every split, labels, and what was cut or skipped."""
        return dict(json.loads((self.path / "audit.json").read_text()))

    @property
    def labels(self) -> tuple[str, ...]:
        return tuple(self.audit["labels"])

    @property
    def vocab_size(self) -> int:
        return int(self.audit["vocab_size"])

    @property
    def tokenizer_folder(self) -> Path:
        return self.path / "tokenizer"

    @cached_property
    def tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.tokenizer_folder)

    @property
    def pad_id(self) -> int:
        return int(self.audit["pad_id"])

    def names(self, of: str) -> list[str]:
        """The splits of a role, ``eval`` or ``test``: ``eval``, or ``eval.matched`` and so on; the first counts."""
        return [name for name in self.audit["splits"] if role(name) == of]

    def examples(self, split: str) -> list[Any]:
        """The examples of a split, read again from where they come: once in a process that asks."""
        if split not in self._read:
            self._read[split] = _examples(self.config, split, self.labels)
        return self._read[split]

    @cached_property
    def _read(self) -> dict[str, list[Any]]:
        return {}

    @property
    def notes(self) -> Iterator[str]:
        """One line for each split."""
        for name, counts in self.audit["splits"].items():
            text = "  ".join(f"{key.replace('_', ' ')} {value:,}" for key, value in counts.items() if value)
            yield f"{name}: {text}"
        for name, messages in self.audit["first_skipped"].items():
            yield from (f"{name}: skipped {message}" for message in messages)


def prepare(config: RunConfig, encode: Encode, *, float_labels: bool = False) -> Prepared:
    """Read, check and tokenise all splits, or find them in the cache. Raises DataError naming file and row."""
    data = config.data
    cache = Path(data.cache_dir).expanduser() if data.cache_dir else cache_dir("data")
    sources = {name: tables.identity(source, data, READING_AS[role(name)]) for name, source in _sources(data).items()}
    chosen = data.model_dump(mode="json", include=READING), config.task.model_dump(mode="json", include=TASK)
    tokenizer = with_weights(config)
    key = fingerprint("labelled", list(sources.items()), *chosen, tokenizers.identity(tokenizer))
    return Prepared(
        build(cache, f"labelled-{key}", lambda f: _write(f, config, tokenizer, encode, float_labels)), config
    )


def _sources(data: Data) -> dict[str, str]:
    return splits(
        data, "data.train=<file or hub name>, or use a preset: task=sst2, or data=files/sst2 data.path=<folder>"
    )


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


def _write(folder: Path, config: RunConfig, chosen: Tokenizer, encode: Encode, float_labels: bool) -> None:
    data, kind = config.data, config.task.kind
    labels = examples.find_labels(tables.rows(str(data.train), data, "train"), data, kind)
    splits_ = [*_sources(data)] + ([] if data.eval or not data.holdout else ["eval"])
    tokenizer = tokenizers.create(chosen, lambda: _texts(_examples(config, "train", labels)))
    tokenizer.save_pretrained(folder / "tokenizer")
    counts: dict[str, dict[str, int]] = {}
    first: dict[str, list[str]] = {}
    for name in splits_:
        problems = Problems(data.on_error)
        rows = _examples(config, name, labels, problems)
        if not rows:
            place = _sources(data).get(name, data.train)
            raise DataError(f"{name}: no row is left of {place}. Add rows, or name other data for it.")
        encoded.write(folder / name, encode(tokenizer, rows), float_labels=float_labels)
        counts[name] = _counts(folder / name, len(rows), data.max_length) | {"skipped": problems.skipped}
        first |= {name: problems.first} if problems.first else {}
    audit = {
        "labels": labels,
        "splits": counts,
        "vocab_size": tokenizers.vocab_size(tokenizer),
        "pad_id": tokenizer.pad_token_id,
        "first_skipped": first,
    }
    (folder / "audit.json").write_text(json.dumps(audit, indent=2))


def _counts(folder: Path, rows: int, max_length: int) -> dict[str, int]:
    """Rows, sequences, tokens, and the sequences that fill data.max_length, which most likely were cut."""
    lengths = np.diff(encoded.Encoded(folder)["sequence_end"])
    return {
        "rows": rows,
        "sequences": len(lengths),
        "tokens": int(lengths.sum()),
        "at_max_length": int((lengths == max_length).sum()),
    }


def _examples(config: RunConfig, split: str, labels: tuple[str, ...], problems: Problems | None = None) -> list[Any]:
    """The examples of a split; without data.eval a share of the training rows is held out."""
    data = config.data
    source = _sources(data).get(split)
    reading = READING_AS[role(split)] if source else "train"
    problems = problems or Problems(data.on_error)
    found: list[Any] = examples.read(
        source or str(data.train), data, config.task, reading, labels, labelled=role(split) != "test", problems=problems
    )
    if data.eval or role(split) == "test" or not data.holdout:
        return found
    held = held_out(len(found), data.holdout, SPLIT_SEED, "mlm")
    return [example for example, out in zip(found, held, strict=True) if out == (split == "eval")]


def _texts(rows: list[Any]) -> Iterator[str]:
    """Every text of the examples, for a tokenizer to be trained on."""
    for row in rows:
        for name, value in vars(row).items():
            if isinstance(value, str) and name not in ("where", "id"):
                yield value
            elif name in ("words", "endings"):
                yield " ".join(value)
