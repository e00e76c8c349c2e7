"""Sentence pairs for translation: read, counted, tokenised once, then mapped into memory.

prepared = prepare(config)                    # the second time it finds everything in the cache
Translations(prepared.path / "train", …)      # translations.py
"""

import json
import logging
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from toolkit.config.schema import Data, RunConfig
from toolkit.data import aligned, subwords
from toolkit.data import tokenizer as tokenizers
from toolkit.data.aligned import SIDES, Pair
from toolkit.data.arrays import RaggedWriter
from toolkit.data.cache import fingerprint
from toolkit.data.draws import mix, uniform
from toolkit.data.prepared import SPLIT_SEED, Prepared, finish, made, role, splits, with_weights
from toolkit.errors import DataError

HELD_OUT = 0x7061  # salt of the choice of held-out pairs


def prepare(config: RunConfig) -> Prepared:
    """Read and tokenise all pairs, or find them in the cache. Raises DataError."""
    config = config.model_copy(update={"tokenizer": with_weights(config)})
    data = config.data
    places = _places(data)
    key = fingerprint(
        [[name, place, aligned.identity(place, role(name), data, config.task)] for name, place in places.items()],
        data.columns.model_dump(include=set(SIDES)),
        [data.header, data.format, data.on_error, data.max_length, data.holdout if _holds_out(places, data) else None],
        [config.task.source, config.task.target, config.task.prefix],
        [config.tokenizer.model, tokenizers.identity(config.tokenizer)],
    )
    return Prepared(made(data, f"parallel-{key}", lambda folder: _write(folder, config, places)))


def _places(data: Data) -> dict[str, str]:
    """Where each split is."""
    return splits(
        data, "data.train=corpus/train for corpus/train.de.gz and corpus/train.en.gz, or name a table of sentence pairs"
    )


def _holds_out(places: dict[str, str], data: Data) -> bool:
    """Without data.eval a share of the training pairs is kept apart."""
    return data.holdout > 0 and "eval" not in map(role, places)


def _write(folder: Path, config: RunConfig, places: dict[str, str]) -> None:
    data, task = config.data, config.task

    def texts() -> Iterator[str]:
        for pair in aligned.pairs(places["train"], "train", data, task):
            yield pair.source
            yield pair.target

    tokenizer = subwords.create(config.tokenizer, texts)
    tokenizer.save_pretrained(folder / "tokenizer")
    logging.getLogger("transformers.tokenization_utils_base").setLevel(logging.ERROR)  # its word on long texts
    splits = [name for name in places if name != "train"]
    hold = _holds_out(places, data)
    writers = {name: _Writer(folder / name, tokenizer, config, name) for name in ["train", *(["eval"] * hold), *splits]}
    for name, place in places.items():
        for number, pair in enumerate(aligned.pairs(place, role(name), data, task)):
            whole = pair.source and pair.target  # else it is dropped, and training counts what is
            held = hold and name == "train" and whole and uniform(mix(SPLIT_SEED, HELD_OUT, number))[0] < data.holdout
            writers["eval" if held else name].add(pair)
    audit = {name: writer.close() for name, writer in writers.items()}
    for name, counts in audit.items():
        if not counts["kept"]:
            way_out = "" if name in places else " Raise data.holdout, or name data.eval."
            raise DataError(
                f"{name}: no pair is left of {places.get(name, places['train'])}: {_told(counts)}.{way_out}"
            )
    size = tokenizers.vocab_size(tokenizer)
    found = {"splits": audit, "vocabulary": {"model": config.tokenizer.model, "size": size}}
    notes = [f"{name}: {_told(counts)}" for name, counts in audit.items()]
    finish(folder, found, vocab_size=size, splits=list(audit), notes=notes)


class _Writer:
    """One split: pairs in, token ids and counts out."""

    def __init__(self, folder: Path, tokenizer: Any, config: RunConfig, name: str) -> None:
        folder.mkdir()
        self.folder, self.tokenizer, self.name = folder, tokenizer, name
        self.training, self.task, self.longest = name == "train", config.task, config.data.max_length
        dtype = np.uint16 if tokenizers.vocab_size(tokenizer) <= 2**16 else np.uint32
        self.sides = {side: RaggedWriter(folder / side, id=dtype) for side in SIDES}
        self.counts: Counter[str] = Counter()
        self.ratios: list[float] = []
        self.texts: list[tuple[str, str]] = []
        self.waiting: list[Pair] = []

    def add(self, pair: Pair) -> None:
        self.counts["read"] += 1
        empty = [side for side in SIDES if not getattr(pair, side)]
        if empty:
            self.counts["empty_" + ("both" if len(empty) == 2 else empty[0])] += 1
            if self.training:
                return
            if "target" in empty:
                raise DataError(
                    f"{pair.where}: an empty reference in data.{self.name}. Correct it, or take the pair out."
                )
        self.waiting.append(pair)
        if len(self.waiting) == 1000:
            self._flush()

    def _flush(self) -> None:
        if not self.waiting:
            return
        sources = self.tokenizer([self.task.prefix + pair.source for pair in self.waiting])["input_ids"]
        targets = self.tokenizer(text_target=[pair.target for pair in self.waiting])["input_ids"]
        for pair, *both in zip(self.waiting, sources, targets, strict=True):
            long = [side for side, ids in zip(SIDES, both, strict=True) if len(ids) > self.longest]
            if self.training and long:
                self.counts["too_long"] += 1
                continue
            for side in long:
                self.counts[f"cut_{side}"] += 1
            self._keep(pair, dict(zip(SIDES, both, strict=True)))
        self.waiting = []

    def _keep(self, pair: Pair, ids: dict[str, list[int]]) -> None:
        self.counts["kept"] += 1
        unknown = self.tokenizer.unk_token_id
        for side, whole in ids.items():
            some = whole if len(whole) <= self.longest else [*whole[: self.longest - 1], whole[-1]]  # the last is </s>
            self.sides[side].append(id=some)
            self.counts[f"{side}_tokens"] += len(some)
            self.counts[f"{side}_unknown"] += some.count(unknown)
        self.ratios.append(len(ids["source"]) / len(ids["target"]))
        if not self.training:
            self.texts.append((pair.source, pair.target))

    def close(self) -> dict[str, Any]:
        """Seal the arrays. Returns the split's part of the audit."""
        self._flush()
        for writer in self.sides.values():
            writer.seal()
        (self.folder / "texts.json").write_text(json.dumps(self.texts, ensure_ascii=False))
        names = ("read", "kept", "empty_source", "empty_target", "empty_both", "too_long", "cut_source", "cut_target")
        tokens = (f"{side}_{what}" for side in SIDES for what in ("tokens", "unknown"))
        ratios = np.quantile(self.ratios, [0.01, 0.5, 0.99]).tolist() if self.ratios else []
        ratio = dict(zip(("percentile_1", "median", "percentile_99"), ratios, strict=False))
        return {name: self.counts[name] for name in (*names, *tokens)} | {"source_to_target_length": ratio}


def _told(counts: dict[str, Any]) -> str:
    words = {
        "empty_source": "with an empty source", "empty_target": "with an empty target",
        "empty_both": "empty on both sides",
        "too_long": "above data.max_length", "cut_source": "sources cut to data.max_length",
        "cut_target": "references cut for the loss",
    }  # fmt: skip
    rest = [f"{counts[name]:,} {text}" for name, text in words.items() if counts[name]]
    return ", ".join([f"{counts['kept']:,} of {counts['read']:,} pairs", *rest])
