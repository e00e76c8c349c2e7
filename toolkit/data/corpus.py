"""The tokenised corpus, one flat array of token ids with the bounds of its sentences and documents, and its samples.

    write(folder, data, tokenizer_config, report)    # sentences.arrow, documents.arrow, tokenizer/ …
    corpus = Corpus(folder)                          # mapped into memory
    index(folder, corpus, held, data, "mlm", seed)   # train_chunks.arrow, eval_chunks.arrow, train_documents.arrow, …

A chunk, which becomes a sample, is (document's rank in its split, first sentence, number of sentences, target length).
"""

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, pairwise
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from sentencex import segment

from toolkit.config.schema import Data, Tokenizer
from toolkit.data import tokenizer as tokenizers
from toolkit.data.lines import Problems
from toolkit.data.order import mix, uniform
from toolkit.data.prepared import Mapped, Ragged, RaggedWriter, Spool, open_columns, seal
from toolkit.data.sources import documents
from toolkit.data.unknown import Lost, warnings
from toolkit.errors import ConfigError, DataError

T = TypeVar("T")
COUNTS = (
    "documents", "empty_documents", "skipped", "skipped_first", "sentences", "words", "tokens", "unknown_tokens"
)  # fmt: skip
BLOCK_CHARACTERS = 2**18  # the encoder needs some thousand sentences at a time to keep all cores busy
# sentencex takes quadratic time in the length of a paragraph: 100 MB/s at 1 KB, 50 at 4 KB, 0.3 at 1 MB.
LONGEST = 4096
BLOCK_SENTENCES = 2**16
SPLITS = ("train", "eval")
COLUMNS = {"document": np.int64, "first": np.int64, "count": np.int32, "target": np.int32}  # of chunks
HOLDOUT, IS_SHORT, SHORT_LENGTH = 1, 2, 3  # salts: one stream of random numbers for each decision


@dataclass(frozen=True)
class Corpus(Mapped):
    """What :func:`write` left in a folder; arrays open on first use, in each process."""

    path: Path

    @cached_property
    def facts(self) -> dict[str, Any]:
        """The ``special`` ids (pad, unk, cls, sep, mask), ``vocab_size``, the ``counts`` of what went into it, what the
        tokenizer ``lost`` of it, and ``warnings``."""
        return dict(json.loads((self.path / "corpus.json").read_text()))

    @cached_property
    def tokens(self) -> NDArray[Any]:
        """Token ids of the whole corpus, uint16 or uint32 [tokens]."""
        return Ragged(self.path / "sentences").columns["id"]

    @cached_property
    def sentences(self) -> NDArray[np.int64]:
        """Bounds: sentence i is ``tokens[sentences[i] : sentences[i + 1]]``; int64 [sentences + 1]."""
        return Ragged(self.path / "sentences").ends

    @cached_property
    def documents(self) -> NDArray[np.int64]:
        """Bounds: document i is the sentences ``documents[i]`` up to ``documents[i + 1]``."""
        return open_columns(self.path / "documents.arrow")["end"]

    def run(self, first: int, end: int) -> NDArray[Any]:
        """The tokens of sentences ``first`` up to ``end``."""
        return self.tokens[self.sentences[first] : self.sentences[end]]

    @cached_property
    def vocabulary(self) -> dict[str, NDArray[np.bool_]]:
        """Per id: ``piece`` (it continues a word) and ``regular`` (it exists and is not special)."""
        columns = open_columns(self.path / "vocabulary.arrow")
        return {name: column.astype(np.bool_) for name, column in columns.items()}


Block = tuple[list[str], list[int]]  # consecutive sentences, and the numbers of them before each document's end
Encoded = Iterator[tuple[Block, list[Any]]]
Columns = dict[str, NDArray[Any]]
Report = Callable[[int, int], None]  # of documents and tokens so far


def write(folder: Path, data: Data, config: Tokenizer, report: Report) -> None:
    """Tokenise every document of the sources into ``folder``; memory holds a few blocks at a time. Reading and
    splitting run in one thread, encoding (which holds no interpreter lock) in a second, and conversion and writing in
    the caller's, so that the encoder is what the time goes into."""
    # Setting it, even to its default, keeps the encoder from warning when a loader forks later.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    tokenizer = tokenizers.create(config, lambda: chain.from_iterable(documents(data)))
    tokenizer = tokenizers.save(tokenizer, folder / "tokenizer", config)
    special, size = tokenizers.special_ids(tokenizer), tokenizers.vocab_size(tokenizer)
    problems = Problems(data.on_error)
    encode = tokenizers.encoder(tokenizer).encode_batch_fast
    blocks = _ahead(_blocks(documents(data, problems), data.language))
    encoded = _ahead((block, encode(block[0], add_special_tokens=False)) for block in blocks)
    lost = Lost(tokenizer)
    counts = _write_tokens(folder, encoded, tokenizer, lost, report)
    counts |= {"skipped": problems.skipped, "skipped_first": problems.first}
    if not counts["documents"]:
        raise DataError(
            f"data.path={data.path}: no document with text ({counts['empty_documents']} empty, "
            f"{problems.skipped} skipped). Check data.path, data.column and data.documents."
        )
    piece, regular = np.zeros(size, np.uint8), np.zeros(size, np.uint8)
    regular[list(tokenizer.get_vocab().values())] = 1
    regular[tokenizer.all_special_ids] = 0
    piece[tokenizers.pieces(tokenizer)] = 1
    seal(folder / "vocabulary.arrow", {"piece": piece, "regular": regular})
    found = {"the corpus": lost.counts}
    facts = {"special": special, "vocab_size": size, "counts": counts, "lost": found}
    facts["warnings"] = warnings(config, tokenizer, found)
    (folder / "corpus.json").write_text(json.dumps(facts, indent=1))


def split(paragraph: str, language: str = "en") -> list[str]:
    """The sentences of a paragraph, stripped, in order; none is empty. By Wikimedia's rules for some 300 languages;
    other splitters took 3 to 200 times as long on books and Wikipedia."""
    sentences: list[str] = []
    start = 0
    while len(paragraph) - start > LONGEST:  # the last sentence of a piece waits for the next, or is cut at a space
        piece = paragraph[start : start + LONGEST]
        whole = segment(language, piece)[:-1] or [piece[: piece.rfind(" ") + 1 or LONGEST]]
        sentences += whole
        start += sum(map(len, whole))
    sentences += segment(language, paragraph[start:])
    return [s for s in map(str.strip, sentences) if s]


def _blocks(source: Iterator[list[str]], language: str) -> Iterator[Block]:
    sentences: list[str] = []
    ends: list[int] = []
    characters = 0
    for paragraphs in source:
        for paragraph in paragraphs:
            sentences += split(paragraph, language)
            characters += len(paragraph)
            if characters > BLOCK_CHARACTERS:
                yield sentences, ends
                sentences, ends, characters = [], [], 0
        ends.append(len(sentences))
    yield sentences, ends


def _ahead(items: Iterator[T]) -> Iterator[T]:
    """The same items, the next one being made in a thread while this one is used."""
    end: Any = object()
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(next, items, end)
        while (item := future.result()) is not end:
            future = pool.submit(next, items, end)
            yield item


def _write_tokens(folder: Path, encoded: Encoded, tokenizer: Any, lost: Lost, report: Report) -> dict[str, Any]:
    """Write the tokens and count what went into the corpus; words are separated by spaces."""
    size = tokenizers.vocab_size(tokenizer)
    writer = RaggedWriter(folder / "sentences", id=np.uint16 if size <= 2**16 else np.uint32)
    bounds = Spool(folder / "documents", np.int64)
    bounds.append([0])  # n + 1 numbers for n documents
    counts = dict.fromkeys(COUNTS, 0)
    last = 0
    with closing(encoded):  # type: ignore[type-var]
        for (sentences, ends), encodings in encoded:
            ids = [encoding.ids for encoding in encodings]
            lengths = np.fromiter(map(len, ids), np.int64, len(ids))
            flat = np.fromiter(chain.from_iterable(ids), np.uint32, lengths.sum())
            # Sentences with any token up to each document's end, counted over the whole corpus
            before = counts["sentences"] + np.concatenate([[0], np.cumsum(lengths > 0)])
            there = before[np.asarray(ends, np.int64)]
            kept = there[np.diff(there, prepend=last) > 0]
            writer.extend(lengths[lengths > 0], id=flat)
            bounds.append(kept)
            last = int(kept[-1]) if len(kept) else last
            counts["documents"] += len(kept)
            counts["empty_documents"] += len(ends) - len(kept)
            counts["sentences"] = int(before[-1])
            counts["words"] += sum(sentence.count(" ") + 1 for sentence in sentences)
            counts["tokens"] += len(flat)
            counts["unknown_tokens"] += int(np.count_nonzero(flat == tokenizer.unk_token_id))
            lost.add(sentences, ids)
            report(counts["documents"], counts["tokens"])
    writer.seal()
    seal(folder / "documents.arrow", {"end": bounds})
    return counts


def room(data: Data, objective: str) -> int:
    """Tokens of a sample besides [CLS] and [SEP]. Raises ConfigError when max_length leaves none."""
    tokens = data.max_length - (2 if objective == "mlm" else 3)
    if tokens < 2:
        raise ConfigError(f"data.max_length={data.max_length}: [CLS] and [SEP] leave no room. Use 8 or more.")
    return tokens


def held_out(documents: int, share: float, seed: int, objective: str) -> NDArray[np.bool_]:
    """Which documents evaluation keeps: the given share, whose hashes of (seed, number) are smallest. Either side gets
    at least one document, or two where a pair's second part comes from another document of the same side. Raises
    DataError when there are too few documents for that."""
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


def index(
    folder: Path, corpus: Corpus, held: NDArray[np.bool_], data: Data, objective: str, seed: int
) -> dict[str, dict[str, int]]:
    """Write the chunks and the documents of both splits and count them, for the audit. Memory holds some 30 bytes a
    document and one block."""
    space = room(data, objective)
    ranks = np.where(held, np.cumsum(held), np.cumsum(~held)) - 1
    spools = {s: {c: Spool(folder / f"{s}_{c}", dtype) for c, dtype in COLUMNS.items()} for s in SPLITS}
    counts: dict[str, Counter[str]] = {split: Counter() for split in SPLITS}
    for block in _chunks(corpus, space, data.short_rate, objective, seed):
        in_eval = held[block["document"]]
        block["document"] = ranks[block["document"]]
        for split, chosen in zip(SPLITS, (~in_eval, in_eval), strict=True):
            mine = {name: column[chosen] for name, column in block.items()}
            for column, spool in spools[split].items():
                spool.append(mine[column])
            excess = np.maximum(mine["tokens"] - space, 0)
            counts[split]["chunks"] += len(excess)
            counts[split]["chunks_of_one_sentence"] += int((mine["count"] == 1).sum())
            counts[split]["chunks_short_target"] += int((mine["target"] < space).sum())
            counts[split]["chunks_truncated"] += int((excess > 0).sum())
            counts[split]["tokens_cut"] += int(excess.sum())
    for split, chosen in zip(SPLITS, (~held, held), strict=True):
        seal(folder / f"{split}_chunks.arrow", spools[split])
        seal(folder / f"{split}_documents.arrow", {"document": np.flatnonzero(chosen)})
    return {split: dict(counted) for split, counted in counts.items()}


def _chunks(corpus: Corpus, space: int, short_rate: float, objective: str, seed: int) -> Iterator[Columns]:
    """The chunks of as many whole documents at a time as BLOCK_SENTENCES hold, as columns."""
    sentences, documents, start = corpus.sentences, corpus.documents, 0
    least = 1 if objective == "mlm" else 2  # sentences, where the document has them: a pair needs two
    fewest_tokens = 2 if objective == "sop" else 1  # even of a single sentence its order takes two
    while start < len(documents) - 1:
        fits = np.searchsorted(documents, documents[start] + BLOCK_SENTENCES, side="right") - 1
        bounds = documents[start : max(int(fits), start + 1) + 1]
        low, high = int(bounds[0]), int(bounds[-1])
        lengths = np.diff(sentences[low : high + 1])
        # The target length of a chunk that starts at each sentence: all the room, or now and then less
        numbers = np.arange(low, high, dtype=np.uint64)
        short = uniform(mix(seed, IS_SHORT, numbers)) < short_rate
        less = 2 + mix(seed, SHORT_LENGTH, numbers) % np.uint64(space - 1)
        targets = np.where(short, less.astype(np.int64), space)
        runs = _runs(lengths.tolist(), targets.tolist(), (bounds - low).tolist(), least)
        first = np.array(runs[0], np.int64)
        tokens = np.add.reduceat(lengths, first)
        block = {
            "document": start + np.searchsorted(bounds - low, first, side="right") - 1,
            "first": low + first,
            "count": np.array(runs[1], np.int64),
            "target": targets[first],
            "tokens": tokens,
        }
        yield {name: column[tokens >= fewest_tokens] for name, column in block.items()}
        start += len(bounds) - 1


def _runs(lengths: list[int], targets: list[int], bounds: list[int], least: int) -> tuple[list[int], list[int]]:
    """(first sentences, numbers of sentences) of the chunks of consecutive documents. As in BERT's
    create_pretraining_data.py a chunk closes when it reaches its target. It also takes ``least`` sentences, and leaves
    the document none or at least as many. Plain lists and one loop: 0.1 to 0.2 µs a sentence."""
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
