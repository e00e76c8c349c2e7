"""The sample index: which documents are held out, and runs of sentences that each become one sample.

    write(folder, corpus, rule)   # train_chunks.arrow, eval_chunks.arrow, train_documents.arrow, …

A chunk is (document's rank in its split, first sentence, number of sentences, target length).
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from toolkit.config.schema import Data
from toolkit.data.arrays import Spool, seal
from toolkit.data.draws import mix, uniform
from toolkit.errors import ConfigError, DataError

SPLITS = ("train", "eval")
COLUMNS = {"document": np.int64, "first": np.int64, "count": np.int32, "target": np.int32}
HOLDOUT, IS_SHORT, SHORT_LENGTH = 1, 2, 3  # salts: one stream of random numbers for each decision
BLOCK_SENTENCES = 2**16


@dataclass(frozen=True)
class Rule:
    """How sentences become chunks."""

    room: int  # tokens of a sample besides [CLS] and [SEP]
    least: int  # sentences per chunk where the document has them: a pair needs two
    fewest_tokens: int  # sentence order needs two even from a single sentence
    short_rate: float
    seed: int


def rule(data: Data, objective: str, seed: int) -> Rule:
    """The rule for an objective. Raises ConfigError when max_length leaves no room."""
    pair = objective != "mlm"
    room = data.max_length - (3 if pair else 2)
    if room < 2:
        raise ConfigError(f"data.max_length={data.max_length}: [CLS] and [SEP] leave no room. Use 8 or more.")
    return Rule(room, 2 if pair else 1, 2 if objective == "sop" else 1, data.short_rate, seed)


def held_out(documents: int, share: float, seed: int, objective: str) -> NDArray[np.bool_]:
    """Which documents evaluation keeps: the given share, whose hashes of (seed, number) are smallest.

    Either side gets at least one document, or two where a pair's second part comes from another
    document of the same side. Raises DataError when there are too few documents for that.
    """
    least = 2 if objective == "mlm_nsp" else 1
    needed = 1 if least == 1 else 2 * least if share else least
    if documents < needed:
        raise DataError(
            f"task.objective={objective} with data.holdout={share}: the corpus has {documents} document(s); "
            f"pairs from different documents need {needed}, two for training and two held out. "
            "Add documents (see data.documents), set data.holdout=0, or use task.objective=sop or mlm."
        )
    held = np.zeros(documents, np.bool_)
    if share and documents > 1:
        number = int(np.clip(round(share * documents), least, documents - least))
        order = np.argsort(mix(seed, HOLDOUT, np.arange(documents, dtype=np.uint64)), kind="stable")
        held[order[:number]] = True
    return held


def write(
    folder: Path,
    sentences: NDArray[np.int64],
    documents: NDArray[np.int64],
    held: NDArray[np.bool_],
    rule: Rule,
) -> dict[str, dict[str, int]]:
    """Write the chunks and the documents of both splits and count them, for the audit.

    ``sentences`` and ``documents`` are bounds. Memory holds some 30 bytes a document and one block.
    """
    ranks = np.where(held, np.cumsum(held), np.cumsum(~held)) - 1
    spools = {s: {c: Spool(folder / f"{s}_{c}", dtype) for c, dtype in COLUMNS.items()} for s in SPLITS}
    counts: dict[str, Counter[str]] = {split: Counter() for split in SPLITS}
    for block in _blocks(sentences, documents, rule):
        in_eval = held[block["document"]]
        block["document"] = ranks[block["document"]]
        for split, chosen in zip(SPLITS, (~in_eval, in_eval), strict=True):
            mine = {name: column[chosen] for name, column in block.items()}
            for column, spool in spools[split].items():
                spool.append(mine[column])
            counts[split].update(_counts(mine, rule))
    for split, chosen in zip(SPLITS, (~held, held), strict=True):
        seal(folder / f"{split}_chunks.arrow", spools[split])
        members = Spool(folder / f"{split}_documents", np.int64)
        members.append(np.flatnonzero(chosen))
        seal(folder / f"{split}_documents.arrow", {"document": members})
    return {split: dict(counted) for split, counted in counts.items()}


def _counts(block: dict[str, NDArray[Any]], rule: Rule) -> dict[str, int]:
    excess = np.maximum(block["tokens"] - rule.room, 0)
    return {
        "chunks": len(excess),
        "chunks_of_one_sentence": int((block["count"] == 1).sum()),
        "chunks_short_target": int((block["target"] < rule.room).sum()),
        "chunks_truncated": int((excess > 0).sum()),
        "tokens_cut": int(excess.sum()),
    }


def _blocks(
    sentences: NDArray[np.int64], documents: NDArray[np.int64], rule: Rule
) -> Iterator[dict[str, NDArray[Any]]]:
    """The chunks of as many whole documents at a time as BLOCK_SENTENCES hold, as columns."""
    start = 0
    while start < len(documents) - 1:
        fits = np.searchsorted(documents, documents[start] + BLOCK_SENTENCES, side="right") - 1
        bounds = documents[start : max(int(fits), start + 1) + 1]
        low, high = int(bounds[0]), int(bounds[-1])
        lengths, targets = np.diff(sentences[low : high + 1]), _targets(low, high, rule)
        runs = _runs(lengths.tolist(), targets.tolist(), (bounds - low).tolist(), rule.least)
        first = np.array(runs[0], np.int64)
        tokens = np.add.reduceat(lengths, first)
        block = {
            "document": start + np.searchsorted(bounds - low, first, side="right") - 1,
            "first": low + first,
            "count": np.array(runs[1], np.int64),
            "target": targets[first],
            "tokens": tokens,
        }
        yield {name: column[tokens >= rule.fewest_tokens] for name, column in block.items()}
        start += len(bounds) - 1


def _targets(low: int, high: int, rule: Rule) -> NDArray[np.int64]:
    """The target length of a chunk that starts at each sentence: all the room, or now and then less."""
    numbers = np.arange(low, high, dtype=np.uint64)
    short = uniform(mix(rule.seed, IS_SHORT, numbers)) < rule.short_rate
    lengths = 2 + mix(rule.seed, SHORT_LENGTH, numbers) % np.uint64(rule.room - 1)
    return np.where(short, lengths.astype(np.int64), rule.room)


def _runs(lengths: list[int], targets: list[int], bounds: list[int], least: int) -> tuple[list[int], list[int]]:
    """(first sentences, numbers of sentences) of the chunks of consecutive documents.

    As in BERT's create_pretraining_data.py a chunk closes when it reaches its target. It also takes
    ``least`` sentences, and leaves the document none or at least as many. Plain lists and one loop:
    0.1 to 0.2 µs a sentence.
    """
    firsts, counts = [], []
    for first, end in pairwise(bounds):
        while first < end:
            total, here, target = 0, first, targets[first]
            while here < end:
                total += lengths[here]
                here += 1
                if total >= target and here - first >= least and end - here >= least:
                    break
            firsts.append(first)
            counts.append(here - first)
            first = here
    return firsts, counts
