"""The tokenised corpus: one flat array of token ids with the bounds of its sentences and documents.

    write(folder, data, tokenizer_config)   # sentences.arrow, documents.arrow, tokenizer/ …
    Corpus(folder).tokens                   # mapped into memory

Reading and splitting run in one thread, encoding (which holds no interpreter lock) in a second, and
conversion and writing in the caller's, so that the encoder is what the time goes into.
"""

import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass, field
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from toolkit.config.schema import Data, Tokenizer
from toolkit.data import tokenizer as tokenizers
from toolkit.data.arrays import Mapped, Ragged, RaggedWriter, Spool, open_columns, seal
from toolkit.data.sentences import split
from toolkit.data.sources import Document, Problems, documents
from toolkit.data.tokenizer import Special
from toolkit.errors import DataError

T = TypeVar("T")
BLOCK_CHARACTERS = 2**18  # the encoder needs some thousand sentences at a time to keep all cores busy


@dataclass(frozen=True)
class Corpus(Mapped):
    """What :func:`write` left in a folder; arrays open on first use, in each process."""

    path: Path

    @cached_property
    def _facts(self) -> dict[str, Any]:
        return dict(json.loads((self.path / "corpus.json").read_text()))

    @property
    def vocab_size(self) -> int:
        return int(self._facts["vocab_size"])

    @property
    def counts(self) -> dict[str, Any]:
        """:class:`Counts` of what went into it."""
        return dict(self._facts["counts"])

    @cached_property
    def special(self) -> Special:
        return Special(**self._facts["special"])

    @cached_property
    def _sentences(self) -> Ragged:
        return Ragged(self.path / "sentences")

    @property
    def tokens(self) -> NDArray[Any]:
        """Token ids of the whole corpus, uint16 or uint32 [tokens]."""
        return self._sentences.columns["id"]

    @property
    def sentences(self) -> NDArray[np.int64]:
        """Bounds: sentence i is ``tokens[sentences[i] : sentences[i + 1]]``; int64 [sentences + 1]."""
        return self._sentences.ends

    @cached_property
    def documents(self) -> NDArray[np.int64]:
        """Bounds: document i is the sentences ``documents[i]`` up to ``documents[i + 1]``."""
        return open_columns(self.path / "documents.arrow")["end"]

    @cached_property
    def vocabulary(self) -> dict[str, NDArray[np.bool_]]:
        """Per token id: ``piece`` (it continues a word) and ``regular`` (it exists and is not special)."""
        columns = open_columns(self.path / "vocabulary.arrow")
        return {name: column.astype(np.bool_) for name, column in columns.items()}


@dataclass
class Block:
    """Consecutive sentences; ``ends`` are the numbers of sentences before each document's end."""

    sentences: list[str] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)


@dataclass
class Counts:
    """What went into the corpus."""

    documents: int = 0
    empty_documents: int = 0
    skipped: int = 0
    skipped_first: list[str] = field(default_factory=list)
    sentences: int = 0
    words: int = 0  # separated by spaces
    tokens: int = 0
    unknown_tokens: int = 0


Report = Callable[[Counts], None]


def write(folder: Path, data: Data, config: Tokenizer, report: Report = lambda counts: None) -> None:
    """Tokenise every document of the sources into ``folder``; memory holds a few blocks at a time."""
    # Setting it, even to its default, keeps the encoder from warning when a loader forks later.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    tokenizer = tokenizers.create(config, lambda: (p for document in documents(data) for p in document.paragraphs))
    special = tokenizers.special_ids(tokenizer)
    problems = Problems(data.on_error)
    counts = _write_tokens(folder, _encoded(documents(data, problems), tokenizer, data), tokenizer, report)
    counts.skipped, counts.skipped_first = problems.skipped, problems.first
    if not counts.documents:
        raise DataError(
            f"data.path={data.path}: no document with text ({counts.empty_documents} empty, "
            f"{counts.skipped} skipped). Check data.path, data.column and data.documents."
        )
    tokenizer.save_pretrained(folder / "tokenizer")
    _write_vocabulary(folder, tokenizer)
    facts = {
        "special": asdict(special),
        "vocab_size": tokenizers.vocab_size(tokenizer),
        "counts": asdict(counts),
    }
    (folder / "corpus.json").write_text(json.dumps(facts, indent=1))


def _write_vocabulary(folder: Path, tokenizer: Any) -> None:
    """Per id: is it a '##' piece of a word, and may masking draw it (it exists and is not special)?"""
    size = tokenizers.vocab_size(tokenizer)
    piece, regular = np.zeros(size, np.uint8), np.zeros(size, np.uint8)
    regular[list(tokenizer.get_vocab().values())] = 1
    regular[tokenizer.all_special_ids] = 0
    piece[[number for token, number in tokenizer.get_vocab().items() if token.startswith("##")]] = 1
    columns = {"piece": Spool(folder / "piece", np.uint8), "regular": Spool(folder / "regular", np.uint8)}
    columns["piece"].append(piece)
    columns["regular"].append(regular)
    seal(folder / "vocabulary.arrow", columns)


def _encoded(source: Iterator[Document], tokenizer: Any, data: Data) -> Iterator[tuple[Block, list[Any]]]:
    encode = tokenizers.encoder(tokenizer).encode_batch_fast
    blocks = _ahead(_blocks(source, data.language))
    return _ahead((block, encode(block.sentences, add_special_tokens=False)) for block in blocks)


def _blocks(source: Iterator[Document], language: str) -> Iterator[Block]:
    block, characters = Block(), 0
    for document in source:
        for paragraph in document.paragraphs:
            block.sentences += split(paragraph, language)
            characters += len(paragraph)
            if characters > BLOCK_CHARACTERS:
                yield block
                block, characters = Block(), 0
        block.ends.append(len(block.sentences))
    yield block


def _ahead(items: Iterator[T]) -> Iterator[T]:
    """The same items, the next one being made in a thread while this one is used."""
    end: Any = object()
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(next, items, end)
        while (item := future.result()) is not end:
            future = pool.submit(next, items, end)
            yield item


def _write_tokens(folder: Path, encoded: Iterator[tuple[Block, list[Any]]], tokenizer: Any, report: Report) -> Counts:
    size = tokenizers.vocab_size(tokenizer)
    sentences = RaggedWriter(folder / "sentences", id=np.uint16 if size <= 2**16 else np.uint32)
    ends = Spool(folder / "documents", np.int64)
    ends.append([0])  # bounds, too: n + 1 numbers for n documents
    counts, last = Counts(), 0
    with closing(encoded):  # type: ignore[type-var]
        for block, encodings in encoded:
            lengths = np.fromiter(map(len, encodings), np.int64, len(encodings))
            flat = np.fromiter(chain.from_iterable(e.ids for e in encodings), np.uint32, lengths.sum())
            bounds = _ends(block, lengths, counts.sentences)
            kept = bounds[np.diff(bounds, prepend=last) > 0]
            sentences.extend(lengths[lengths > 0], id=flat)
            ends.append(kept)
            last = int(kept[-1]) if len(kept) else last
            _count(counts, block, flat, lengths, len(kept), tokenizer.unk_token_id)
            report(counts)
    sentences.seal()
    seal(folder / "documents.arrow", {"end": ends})
    return counts


def _ends(block: Block, lengths: NDArray[np.int64], before: int) -> NDArray[np.int64]:
    """Sentences with any token up to each document's end, counted over the whole corpus."""
    kept = np.concatenate([[0], np.cumsum(lengths > 0)])
    return np.asarray(before + kept[np.asarray(block.ends, np.int64)], np.int64)


def _count(
    counts: Counts, block: Block, flat: NDArray[Any], lengths: NDArray[np.int64], full: int, unknown: int
) -> None:
    counts.documents += full
    counts.empty_documents += len(block.ends) - full
    counts.sentences += int((lengths > 0).sum())
    counts.words += sum(sentence.count(" ") + 1 for sentence in block.sentences)
    counts.tokens += len(flat)
    counts.unknown_tokens += int(np.count_nonzero(flat == unknown))
