"""Labelled data as ``recipes/finetune.py`` reads it: rows checked, tokenised and cached, once for all ranks.

    prepared = prepare(config, Reader(encode))    # encode(config, tokenizer, examples) yields Samples
    read(config, "eval", prepared.facts["labels"])    # its examples
    data = Encoded(prepared.path / "train", pad_id=0)
    data[keyed(0, np.array([3, 5, -1]))]    # tensors; -1 is an empty sample that nothing counts

Every split is read and checked before training starts, so a bad row ends a run at once.
A sample is one sequence, or as many as it has choices. Arrays are memory-mapped: ranks of a host share them.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from toolkit.config.schema import RunConfig, Tokenizer
from toolkit.data import doubts, examples, prepared, tables, unknown
from toolkit.data import tokenizer as tokenizers
from toolkit.data.batch import IGNORED, Batch, padded, tensors
from toolkit.data.corpus import held_out
from toolkit.data.lines import Problems
from toolkit.data.order import Indices, Keys
from toolkit.data.prepared import SPLIT_SEED, Mapped, Prepared, Ragged, RaggedWriter
from toolkit.errors import ConfigError, DataError, first_of

READING = {
    "columns", "header", "format", "labels", "label_separator", "range", "holdout", "on_error", "max_length", "joiner"
}  # fmt: skip
TASK = {"kind", "scheme", "stride", "max_question", "max_answer", "null_answers"}
WAY_OUT = "data.train=<file or hub name>, or use a preset: task=sst2, or data=files/sst2 data.path=<folder>"
UNNAMED = "LABEL_0"  # of a head whose labels transformers has numbered
MULTIPLE = 8  # of which widths are: what tensor cores like


@dataclass(frozen=True)
class Sample:
    """``sequences`` (ids, types) of one sample; ``labels`` one number, or one per token of its only sequence."""

    sequences: Sequence[tuple[Sequence[int], Sequence[int]]]
    labels: Sequence[float]


Encode = Callable[[RunConfig, Any, list[Any]], Iterator[Sample]]  # with a tokenizer, of examples
Warnings = Callable[[RunConfig, Any, list[Any], examples.Labels], Iterator[str]]  # of these, with the labels' names


@dataclass(frozen=True)
class Reader:
    """How a kind of task reads labelled rows; labels are numbered as in the ``head`` that begins as that of the
    weights."""

    encode: Encode
    warnings: Warnings = lambda *_: iter(())
    float_labels: bool = False
    head: examples.Labels = ()


def prepare(config: RunConfig, reader: Reader) -> Prepared:
    """Read, check and tokenise all splits, or find them in the cache. Raises DataError naming file and row."""
    data = config.data
    sources = [[name, tables.identity(place, data, name)] for name, place in prepared.splits(data, WAY_OUT).items()]
    chosen = data.model_dump(mode="json", include=READING), config.task.model_dump(mode="json", include=TASK)
    tokenizer = prepared.with_weights(config)
    key = prepared.fingerprint("labelled", sources, *chosen, reader.head, tokenizers.identity(tokenizer))
    path = prepared.build(data, f"labelled-{key}", lambda f: _write(f, config, tokenizer, reader))
    unknown.refuse(tokenizer, Prepared(path).audit["lost"])
    return Prepared(path)


def read(config: RunConfig, split: str, labels: examples.Labels, problems: Problems | None = None) -> list[Any]:
    """The examples of a split as they are now; without data.eval a share of the training rows is held out."""
    data = config.data
    source = prepared.splits(data, WAY_OUT).get(split)
    place = (source, split) if source else (str(data.train), "train")
    found: list[Any] = examples.read(*place, data, config.task, labels, problems)
    if data.eval or prepared.role(split) == "test" or not data.holdout:
        return found
    held = held_out(len(found), data.holdout, SPLIT_SEED, "mlm")
    return [example for example, out in zip(found, held, strict=True) if out == (split == "eval")]


def _write(folder: Path, config: RunConfig, chosen: Tokenizer, reader: Reader) -> None:
    data, sources = config.data, prepared.splits(config.data, WAY_OUT)
    named = examples.find_labels(tables.rows(sources["train"], data, "train"), data, config.task.kind)
    labels = _in_order(named, reader.head, config)
    tokenizer = tokenizers.create(chosen, lambda: _texts(read(config, "train", labels), data.joiner))
    tokenizer = tokenizers.save(tokenizer, folder / "tokenizer", chosen)
    counts: dict[str, dict[str, int]] = {}
    lost: dict[str, unknown.Counts] = {}
    first: dict[str, list[str]] = {}
    seen: dict[str, Counter[str]] = {}  # rows of each label
    warnings = [*_guessed(labels, reader.head)]
    for name in [*sources] + ([] if data.eval or not data.holdout else ["eval"]):
        problems = Problems(data.on_error)
        rows = read(config, name, labels, problems)
        if not rows:
            place = sources.get(name, data.train)
            raise DataError(f"{name}: no row is left of {place}. Add rows, or name other data for it.")
        seen[name] = doubts.counted(rows, labels)
        if name == "train":
            doubts.refuse(seen[name], len(rows), config)
        write(folder / name, reader.encode(config, tokenizer, rows), float_labels=reader.float_labels)
        if prepared.role(name) != "test":
            warnings += [f"{name}: {line}" for line in reader.warnings(config, tokenizer, rows, labels)]
        lengths = Ragged(folder / name / "sequences").lengths
        lost[name] = unknown.lost(tokenizer, iter(dict.fromkeys(_texts(rows, data.joiner))))
        counts[name] = {
            "rows": len(rows),
            "sequences": len(lengths),
            "tokens": int(lengths.sum()),
            "at_max_length": int((lengths == data.max_length).sum()),  # which most likely were cut
            "skipped": problems.skipped,
            "unlabelled": doubts.unlabelled(rows, config.task) if prepared.role(name) == "test" else 0,
        }
        first |= {name: problems.first} if problems.first else {}
    positive = labels.index(named[-1]) if len(labels) == 2 else 1  # F1 is of the data's second label
    known = {"labels": labels, "positive": positive, "pad_id": tokenizer.pad_token_id}
    known["vocab_size"] = tokenizers.vocab_size(tokenizer)
    found = known | {"splits": counts, "first_skipped": first, "lost": lost}
    warnings += [*unknown.warnings(chosen, tokenizer, lost), *doubts.warnings(seen, counts, labels, config.task.kind)]
    prepared.finish(folder, found, splits=counts, notes=_told(counts, first), warnings=warnings, **known)


def _in_order(labels: examples.Labels, head: examples.Labels, config: RunConfig) -> examples.Labels:
    """The labels as the weights' head numbers them, in capitals or not, with those that the data lacks. Raises
    ConfigError where the head lacks some."""
    here = {name.casefold(): name for name in labels}
    theirs = tuple(name if name in labels else here.get(name.casefold(), name) for name in head)
    # a head of another scheme says other tags than those that are learned
    tags = config.task.kind == "tag" and "Tags are learned as IOB2, whatever their scheme: "
    foreign = tags and any(name != "O" and name[:2] not in ("B-", "I-") for name in theirs)
    if set(labels) <= set(theirs) and len(set(theirs)) == len(theirs) and not foreign:
        return theirs
    if not head or UNNAMED in head:
        return labels
    told, ours = (" ".join(first_of(some, 20).split()) for some in (head, labels))
    way_out = tags or "Write the head's names in the data, or "
    if all(tables.number(name) is not None for name in labels):
        way_out = f"Name them in the order of the file's numbers, as data.labels=[{','.join(head[:20])}], or "
    raise ConfigError(
        f"model.weights={config.model.weights}: its head tells {told} (id2label), data.train={config.data.train} has "
        f"{ours}. {way_out}model.new_head=true draws a head for other labels."
    )


def _guessed(labels: examples.Labels, head: examples.Labels) -> Iterator[str]:
    """Of a head whose labels have no names, each may be any."""
    numbers = tuple(map(str, range(len(labels))))
    if UNNAMED in head and len(head) == len(labels) and labels not in (head, numbers):
        told = first_of([f"{i} is {name}" for i, name in enumerate(labels)], 5)
        yield (
            f"model.weights: their head names no labels ({UNNAMED}, …), so that these are theirs is a guess: {told}. "
            "Order them by data.labels, or let model.new_head=true draw a head."
        )


def _texts(rows: list[Any], joiner: str) -> Iterator[str]:
    """Every text of the examples, for a tokenizer to be trained on."""
    for row in rows:
        for name, value in vars(row).items():
            if isinstance(value, str) and name != "id":
                yield value
            elif name in ("words", "endings"):
                yield (joiner if name == "words" else " ").join(value)


def _told(counts: dict[str, dict[str, int]], first_skipped: dict[str, list[str]]) -> Iterator[str]:
    """One line for each split, and for the first rows that are skipped."""
    for name, found in counts.items():
        text = "  ".join(f"{key.replace('_', ' ')} {value:,}" for key, value in found.items() if value)
        yield f"{name}: {text}"
    for name, messages in first_skipped.items():
        yield from (f"{name}: skipped {message}" for message in messages)


def write(folder: Path, samples: Iterator[Sample], *, float_labels: bool = False) -> None:
    """Write the samples: their sequences a row each, their labels a row for each sample."""
    folder.mkdir(parents=True)
    sequences = RaggedWriter(folder / "sequences", ids=np.int32, types=np.int8)
    labels = RaggedWriter(folder / "labels", value=np.float32 if float_labels else np.int32)
    for sample in samples:
        for ids, types in sample.sequences:
            sequences.append(ids=ids, types=types)
        labels.append(value=sample.labels)
    sequences.seal()
    labels.seal()


@dataclass(frozen=True)
class Encoded(Mapped):
    """One split, padded no further than needed. ``choices`` sequences a sample (1 for all tasks but multiple choice);
    labels ``per_token`` or not. With ``width`` all batches have one shape, for a pipeline."""

    folder: Path
    pad_id: int
    choices: int = 1
    per_token: bool = False
    width: int | None = None

    @property
    def full(self) -> bool:
        return self.width is not None

    @cached_property
    def sequences(self) -> Ragged:
        return Ragged(self.folder / "sequences")

    @cached_property
    def labels(self) -> Ragged:
        return Ragged(self.folder / "labels")

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each sample's longest sequence, int64 [samples]."""
        lengths: NDArray[np.int64] = self.sequences.lengths.reshape(-1, self.choices).max(1)
        return lengths

    @cached_property
    def numbers(self) -> int:
        """Of a label; in a split of which not every row has one, those of the rows that do."""
        return int(self.labels.lengths.max())

    def __getitem__(self, keys: Keys) -> Batch:
        """``input_ids``, ``attention_mask``, ``token_type_ids`` int64 [samples, length] (of choices: [samples, choices,
        length]), ``labels`` [samples], [samples, labels] or [samples, length], ``index`` [samples]. What has no label
        is -100, or NaN where labels are floats."""
        indices = keys[:, 1]
        # No sample repeats another of the batch: heads that look for </s> (BART, T5) want equally many in every row
        filled = np.where(indices < 0, max(0, indices.max()), indices)
        longest = max(1, int(self.lengths[filled].max()))
        width = self.width or -(-longest // MULTIPLE) * MULTIPLE
        sequences = (filled[:, None] * self.choices + np.arange(self.choices)).ravel()
        ids, types = (self._rows(self.sequences, name, sequences) for name in ("ids", "types"))
        arrays = {
            "input_ids": padded(ids, self.pad_id, width),
            "attention_mask": padded([np.ones(len(some) or 1) for some in ids], 0, width),  # over nothing is no number
            "token_type_ids": padded(types, 0, width),
        }
        if self.choices > 1:
            arrays = {name: array.reshape(len(indices), self.choices, width) for name, array in arrays.items()}
        floats = self.labels.columns["value"].dtype.kind == "f"
        number = width if self.per_token else self.numbers
        labels = padded(self._rows(self.labels, "value", indices), np.nan if floats else IGNORED, number)
        if floats:
            labels = labels.astype(np.float32)
        return tensors(**arrays, labels=labels[:, 0] if number == 1 else labels, index=indices)

    def _rows(self, of: Ragged, name: str, numbers: Indices) -> list[NDArray[Any]]:
        return [of.row(name, number) if number >= 0 else of.columns[name][:0] for number in numbers.tolist()]
