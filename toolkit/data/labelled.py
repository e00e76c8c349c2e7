"""Labelled data as ``recipes/finetune.py`` reads it: rows checked, tokenised and cached, once for all ranks.

    prepared = prepare(config, encode)        # encode(tokenizer, examples) yields Samples
    read(config, "eval", prepared.facts["labels"])    # its examples

Every split is read and checked before training starts, so a bad row ends a run at once.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from toolkit.config.schema import Data, RunConfig, Tokenizer
from toolkit.data import encoded, examples, tables
from toolkit.data import tokenizer as tokenizers
from toolkit.data.arrays import Ragged
from toolkit.data.cache import fingerprint
from toolkit.data.chunks import held_out
from toolkit.data.prepared import SPLIT_SEED, Prepared, finish, made, role, splits, with_weights
from toolkit.data.sources import Problems
from toolkit.errors import DataError

Encode = Callable[[Any, list[Any]], Iterator[encoded.Sample]]
READING = {"columns", "header", "format", "labels", "range", "holdout", "on_error", "max_length"}
TASK = {"kind", "scheme", "stride", "max_question", "null_answers"}


def prepare(config: RunConfig, encode: Encode, *, float_labels: bool = False) -> Prepared:
    """Read, check and tokenise all splits, or find them in the cache. Raises DataError naming file and row."""
    data = config.data
    sources = [[name, tables.identity(at, data, tables.HUB_SPLIT[role(name)])] for name, at in _sources(data).items()]
    chosen = data.model_dump(mode="json", include=READING), config.task.model_dump(mode="json", include=TASK)
    tokenizer = with_weights(config)
    key = fingerprint("labelled", sources, *chosen, tokenizers.identity(tokenizer))
    return Prepared(made(data, f"labelled-{key}", lambda f: _write(f, config, tokenizer, encode, float_labels)))


def _sources(data: Data) -> dict[str, str]:
    return splits(
        data, "data.train=<file or hub name>, or use a preset: task=sst2, or data=files/sst2 data.path=<folder>"
    )


def _write(folder: Path, config: RunConfig, chosen: Tokenizer, encode: Encode, float_labels: bool) -> None:
    data = config.data
    labels = examples.find_labels(tables.rows(str(data.train), data, "train"), data, config.task.kind)
    tokenizer = tokenizers.create(chosen, lambda: _texts(read(config, "train", labels)))
    tokenizer.save_pretrained(folder / "tokenizer")
    counts: dict[str, dict[str, int]] = {}
    first: dict[str, list[str]] = {}
    for name in [*_sources(data)] + ([] if data.eval or not data.holdout else ["eval"]):
        problems = Problems(data.on_error)
        rows = read(config, name, labels, problems)
        if not rows:
            place = _sources(data).get(name, data.train)
            raise DataError(f"{name}: no row is left of {place}. Add rows, or name other data for it.")
        encoded.write(folder / name, encode(tokenizer, rows), float_labels=float_labels)
        counts[name] = _counts(folder / name, len(rows), data.max_length) | {"skipped": problems.skipped}
        first |= {name: problems.first} if problems.first else {}
    known = {"labels": labels, "vocab_size": tokenizers.vocab_size(tokenizer), "pad_id": tokenizer.pad_token_id}
    found = known | {"splits": counts, "first_skipped": first}
    finish(folder, found, splits=counts, notes=_told(counts, first), **known)


def _told(counts: dict[str, dict[str, int]], first_skipped: dict[str, list[str]]) -> Iterator[str]:
    """One line for each split, and for the first rows that are skipped."""
    for name, found in counts.items():
        text = "  ".join(f"{key.replace('_', ' ')} {value:,}" for key, value in found.items() if value)
        yield f"{name}: {text}"
    for name, messages in first_skipped.items():
        yield from (f"{name}: skipped {message}" for message in messages)


def _counts(folder: Path, rows: int, max_length: int) -> dict[str, int]:
    """Rows, sequences, tokens, and the sequences that fill data.max_length, which most likely were cut."""
    lengths = Ragged(folder / "sequences").lengths
    return {
        "rows": rows,
        "sequences": len(lengths),
        "tokens": int(lengths.sum()),
        "at_max_length": int((lengths == max_length).sum()),
    }


def read(config: RunConfig, split: str, labels: examples.Labels, problems: Problems | None = None) -> list[Any]:
    """The examples of a split as they are now; without data.eval a share of the training rows is held out."""
    data = config.data
    source = _sources(data).get(split)
    reading = tables.HUB_SPLIT[role(split)] if source else "train"
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
