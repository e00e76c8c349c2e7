"""Sentence pairs for translation: read, counted, tokenised once, then mapped into memory.

    prepared = prepare(config)                    # the second time it finds everything in the cache
    data = Translations(prepared.path / "train", pad=0, start=0)
    data.source(7)                                # token ids, special tokens included

With ``task.source=de task.target=en`` and ``data.train=corpus/train`` this reads ``corpus/train.de[.gz]`` and
``corpus/train.en[.gz]``, aligned line by line; what is not the beginning of such names is a table, and
data.columns.source and .target are its columns.
"""

import json
import logging
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import islice, takewhile, zip_longest
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from toolkit.config.schema import Data, RunConfig, Task
from toolkit.data import prepared, tables, unknown
from toolkit.data import tokenizer as tokenizers
from toolkit.data.batch import IGNORED, Batch, padded, tensors
from toolkit.data.lines import Problems, every_line
from toolkit.data.order import Keys, mix, uniform
from toolkit.data.prepared import SPLIT_SEED, Mapped, Prepared, Ragged, RaggedWriter
from toolkit.data.sources import stamps
from toolkit.data.unknown import Lost
from toolkit.errors import DataError

SIDES = ("source", "target")
HELD_OUT = 0x7061  # salt of the choice of held-out pairs


def prepare(config: RunConfig) -> Prepared:
    """Read and tokenise all pairs, or find them in the cache. Raises DataError."""
    config = config.model_copy(update={"tokenizer": prepared.with_weights(config)})
    data, task = config.data, config.task
    places = prepared.splits(
        data, "data.train=corpus/train for corpus/train.de.gz and corpus/train.en.gz, or name a table of sentence pairs"
    )
    holdout = 0.0 if "eval" in map(prepared.role, places) else data.holdout
    key = prepared.fingerprint(
        [[name, place, _identity(place, prepared.role(name), data, task)] for name, place in places.items()],
        data.columns.model_dump(include=set(SIDES)),
        [data.header, data.format, data.on_error, data.max_length, holdout or None],
        [task.source, task.target, task.source_code, task.target_code, task.prefix],
        [config.tokenizer.model, tokenizers.identity(config.tokenizer)],
    )
    path = prepared.build(data, f"parallel-{key}", lambda folder: _write(folder, config, places, holdout))
    unknown.refuse(config.tokenizer, Prepared(path).audit["lost"])
    return Prepared(path)


@dataclass(frozen=True)
class Pair:
    """A sentence, its translation, and where they were read."""

    source: str
    target: str
    where: str


def pairs(place: str, split: str, data: Data, task: Task, problems: Problems | None = None) -> Iterator[Pair]:
    """Every pair of ``place``, in order, stripped of white space at the ends; of two files, lines of the same number.
    Raises DataError."""
    problems = problems or Problems(data.on_error)
    sides = _sides(place, split, task)
    if sides is None:
        for where, row in tables.rows(place, data, split, problems):
            yield Pair(_cell(row, data.columns.source, where), _cell(row, data.columns.target, where), where)
        return
    source, target = sides
    counts = [0, 0]
    for a, b in zip_longest(every_line(source, problems), every_line(target, problems)):
        counts = [counts[0] + (a is not None), counts[1] + (b is not None)]
        if a and b and a[1] is not None and b[1] is not None:
            yield Pair(a[1].strip(), b[1].strip(), f"{source}:{counts[0]}")
    if counts[0] != counts[1]:
        raise DataError(
            f"data.{split}: {source} has {counts[0]:,} lines, {target} {counts[1]:,}. Line by line they are to be "
            "translations of each other: align them."
        )


def _identity(place: str, split: str, data: Data, task: Task) -> list[Any]:
    """What stands for the content of ``place`` in the cache."""
    sides = _sides(place, split, task)
    return stamps(sides) if sides else tables.identity(place, data, split)


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


def _sides(place: str, split: str, task: Task) -> tuple[Path, Path] | None:
    """The files of the two languages that begin with ``place``; None if it names a table."""
    if place.startswith("None/"):  # what ${data.path}/… of an experiment is without data.path
        raise DataError(f"data.path is not set, and data.{split}={place} begins with it. Name the folder of the files.")
    try:
        path, *sides = (Path(f"{place}{end}").expanduser() for end in ("", f".{task.source}", f".{task.target}"))
        found = {side: file for side in sides for file in (Path(f"{side}.gz"), side) if file.is_file()}
        there = path.exists()
    except (OSError, RuntimeError) as error:  # no permission, a home of nobody
        raise DataError(f"data.{split}={place}: cannot be looked up ({error}). Correct it.") from error
    missing = [f"{side}[.gz]" for side in sides if side not in found]
    if not missing:
        return found[sides[0]], found[sides[1]]
    if not found and (there or path.suffix or place[0] not in "~./"):
        return None  # a table, a glob of them, or a name of the hub
    raise DataError(
        f"data.{split}={place}: there is no {' and no '.join(missing)}. The two files are data.{split}, a dot and "
        f"task.source={task.source} or task.target={task.target}."
    )


def _write(folder: Path, config: RunConfig, places: dict[str, str], holdout: float) -> None:
    data, task = config.data, config.task
    training = partial(pairs, places["train"], "train", data, task)
    tokenizer = tokenizers.create(
        config.tokenizer, lambda: (t for p in training() for t in (p.source, p.target)), slow=True
    )
    tokenizers.set_languages(tokenizer, task)
    tokenizer = tokenizers.save(tokenizer, folder / "tokenizer", config.tokenizer)
    if tokenizer.split_special_tokens and any(name in task.prefix for name in tokenizers.special_names(tokenizer)):
        raise DataError(
            f"task.prefix={task.prefix}: names a special token, and in texts these are text. Use "
            "tokenizer.special_in_text=true."
        )
    logging.getLogger("transformers.tokenization_utils_base").setLevel(logging.ERROR)  # its word on long texts
    audit, held = {}, list[Pair]()
    for name in ["train", *(["eval"] if holdout else []), *list(places)[1:]]:
        problems = Problems(data.on_error)
        found = pairs(places[name], prepared.role(name), data, task, problems) if name in places else iter(held)
        if holdout and name == "train":
            found = _trained(found, holdout, held)
        audit[name] = _write_split(folder / name, name, found, tokenizer, config)
        audit[name] |= {"skipped": problems.skipped, "skipped_first": problems.first}
    for name, counts in audit.items():
        if not counts["kept"]:
            way_out = "" if name in places else " Raise data.holdout, or name data.eval."
            place = places.get(name, places["train"])
            raise DataError(f"{name}: no pair is left of {place}: {_told(counts)}.{way_out}")
    size = tokenizers.vocab_size(tokenizer)
    lost = {f"{name} {side}": counts["lost"][side] for name, counts in audit.items() for side in SIDES}
    told = {"splits": audit, "vocabulary": {"model": config.tokenizer.model, "size": size}, "lost": lost}
    notes = [f"{name}: {_told(counts)}" for name, counts in audit.items()]
    warnings = unknown.warnings(config.tokenizer, tokenizer, lost)
    prepared.finish(folder, told, vocab_size=size, splits=audit, notes=notes, warnings=warnings)


def _trained(found: Iterator[Pair], holdout: float, held: list[Pair]) -> Iterator[Pair]:
    """The pairs to train on; those that are held out go into ``held``, whose texts are kept anyway."""
    for number, pair in enumerate(found):
        whole = bool(pair.source and pair.target)  # else it is dropped, and training counts what is
        if whole and uniform(mix(SPLIT_SEED, HELD_OUT, number))[0] < holdout:
            held.append(pair)
        else:
            yield pair


def _filled(found: Iterator[Pair], name: str, counts: Counter[str]) -> Iterator[Pair]:
    """The pairs that have two sides, or need none: an empty source is translated, too."""
    for pair in found:
        counts["read"] += 1
        empty = [side for side in SIDES if not getattr(pair, side)]
        if empty:
            counts["empty_" + ("both" if len(empty) == 2 else empty[0])] += 1
            if name == "train":
                continue
            if "target" in empty:
                raise DataError(f"{pair.where}: an empty reference in data.{name}. Correct it, or take the pair out.")
        yield pair


def _write_split(folder: Path, name: str, found: Iterator[Pair], tokenizer: Any, config: RunConfig) -> dict[str, Any]:
    """Write the token ids of both sides. Returns the split's part of the audit, and what the tokenizer lost."""
    folder.mkdir()
    training, longest, special = name == "train", config.data.max_length, {*tokenizer.all_special_ids}
    dtype = np.uint16 if tokenizers.vocab_size(tokenizer) <= 2**16 else np.uint32
    writers = {side: RaggedWriter(folder / side, id=dtype) for side in SIDES}
    counts: Counter[str] = Counter()
    losses = {side: Lost(tokenizer) for side in SIDES}
    ratios: list[float] = []
    texts: list[tuple[str, str]] = []
    filled = _filled(found, name, counts)
    while some := list(islice(filled, 1000)):
        sources = tokenizer([config.task.prefix + pair.source for pair in some])["input_ids"]
        targets = tokenizer(text_target=[pair.target for pair in some])["input_ids"]
        for side, rows in zip(SIDES, (sources, targets), strict=True):
            losses[side].add([getattr(pair, side) for pair in some], rows)
        for pair, *both in zip(some, sources, targets, strict=True):
            long = [side for side, ids in zip(SIDES, both, strict=True) if len(ids) > longest]
            if training and long:
                counts["too_long"] += 1
                continue
            counts["kept"] += 1
            for side, ids in zip(SIDES, both, strict=True):
                counts[f"cut_{side}"] += side in long
                kept = _cut(ids, longest, special) if side in long else ids
                writers[side].append(id=kept)
                counts[f"{side}_tokens"] += len(kept)
            ratios.append(len(both[0]) / len(both[1]))
            texts += [] if training else [(pair.source, pair.target)]
    for writer in writers.values():
        writer.seal()
    (folder / "texts.json").write_text(json.dumps(texts, ensure_ascii=False))
    names = (
        "read", "kept", "empty_source", "empty_target", "empty_both", "too_long", "cut_source", "cut_target",
        "source_tokens", "target_tokens",
    )  # fmt: skip
    quantiles = np.quantile(ratios, [0.01, 0.5, 0.99]).tolist() if ratios else []
    ratio = dict(zip(("percentile_1", "median", "percentile_99"), quantiles, strict=False))
    lost = {side: of.counts for side, of in losses.items()}
    return {name: counts[name] for name in names} | {"source_to_target_length": ratio, "lost": lost}


def _cut(ids: list[int], length: int, special: set[int]) -> list[int]:
    """So many of ``ids`` with those at their end that are special: </s>, and mBART's language after it."""
    ends = min(length, sum(1 for _ in takewhile(special.__contains__, reversed(ids))))
    return [*ids[: length - ends], *ids[len(ids) - ends :]]


def _told(counts: dict[str, Any]) -> str:
    words = {
        "empty_source": "with an empty source", "empty_target": "with an empty target",
        "empty_both": "empty on both sides",
        "too_long": "above data.max_length", "cut_source": "sources cut to data.max_length",
        "cut_target": "references cut for the loss", "skipped": "bad lines skipped",
    }  # fmt: skip
    rest = [f"{counts[name]:,} {text}" for name, text in words.items() if counts[name]]
    return ", ".join([f"{counts['kept']:,} of {counts['read']:,} pairs", *rest])


@dataclass(frozen=True)
class Translations(Mapped):
    """The pairs of train, eval or test, padded to the longest of a batch, or to ``width``."""

    path: Path
    pad: int
    start: int  # what the decoder begins with
    width: int = 0

    full = False

    def __len__(self) -> int:
        return len(self._sides["source"])

    @cached_property
    def _sides(self) -> dict[str, Ragged]:
        return {side: Ragged(self.path / side) for side in SIDES}

    def source(self, index: int) -> NDArray[Any]:
        return self._sides["source"].row("id", index)

    def target(self, index: int) -> NDArray[Any]:
        return self._sides["target"].row("id", index)

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each pair's longer side."""
        return np.maximum(*(self._sides[side].lengths for side in SIDES))

    @cached_property
    def texts(self) -> list[tuple[str, str]]:
        """Sources and references as they were read; not kept for training pairs."""
        return [tuple(pair) for pair in json.loads((self.path / "texts.json").read_text())]

    def __getitem__(self, keys: Keys) -> Batch:
        """``input_ids`` and ``attention_mask`` [pairs, source], ``decoder_input_ids`` and ``labels`` [pairs, target].
        No pair at all becomes one whose labels count nothing: every rank has its forward."""
        chosen = [index for index in keys[:, 1].tolist() if index >= 0]
        sources, targets = ([side(i) for i in chosen or [0]] for side in (self.source, self.target))
        # BERT's tokenizer begins a text with the [CLS] that the decoder is started with: it is not to be predicted.
        targets = [ids[1:] if len(ids) and ids[0] == self.start else ids for ids in targets]
        long, wide = (max(self.width, *map(len, rows), 1) for rows in (sources, targets))
        labels = padded(targets, IGNORED, wide)
        shifted = np.roll(labels, 1, axis=1)
        shifted[:, 0] = self.start
        mask = padded([np.ones(len(s)) for s in sources], 0, long)
        if not chosen:
            labels[:] = IGNORED
            mask[:, 1:] = 0
        return tensors(
            input_ids=padded(sources, self.pad, long),
            attention_mask=mask,
            decoder_input_ids=np.where(shifted == IGNORED, self.pad, shifted),
            labels=labels,
        )
