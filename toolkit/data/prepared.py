"""Prepared data: what ``toolkit prepare`` leaves in the cache and training maps into memory.

    prepared = prepare(config, progress=True)
    prepared.train_samples, prepared.vocab_size, prepared.audit

Calling it again with the same config and the same sources finds everything in the cache.
"""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from toolkit.config.schema import Data, RunConfig, Tokenizer, cache_dir
from toolkit.data import chunks, corpus, sources
from toolkit.data import tokenizer as tokenizers
from toolkit.data.arrays import open_columns
from toolkit.data.cache import build, fingerprint
from toolkit.data.tokenizer import Special
from toolkit.errors import ConfigError, DataError


@dataclass(frozen=True)
class Prepared:
    """A tokenised corpus and its sample index on disk; arrays open on first use, in each process."""

    path: Path
    corpus: Path
    vocab_size: int
    special: Special
    train_samples: int
    eval_samples: int

    @classmethod
    def open(cls, path: Path) -> "Prepared":
        """The prepared data in a cache folder."""
        corpus_path = path.parent / json.loads((path / "samples.json").read_text())["corpus"]
        facts = json.loads((corpus_path / "corpus.json").read_text())
        train, held = (len(open_columns(path / f"{split}_chunks.arrow")["first"]) for split in chunks.SPLITS)
        return cls(path, corpus_path, facts["vocab_size"], Special(**facts["special"]), train, held)

    def __reduce__(self) -> Any:
        return Prepared.open, (self.path,)  # a worker maps the files itself, no array is pickled

    @property
    def tokenizer(self) -> Path:
        """A folder for ``AutoTokenizer.from_pretrained``."""
        return self.corpus / "tokenizer"

    @property
    def pad_id(self) -> int:
        return self.special.pad

    @cached_property
    def audit(self) -> dict[str, Any]:
        """What :func:`toolkit.data.audit.audit` found."""
        return dict(json.loads((self.path / "audit.json").read_text()))

    @cached_property
    def tokens(self) -> NDArray[Any]:
        """Token ids of the whole corpus, uint16 or uint32 [tokens]."""
        return open_columns(self.corpus / "tokens.arrow")["id"]

    @cached_property
    def sentences(self) -> NDArray[np.int64]:
        """Bounds: sentence i is ``tokens[sentences[i] : sentences[i + 1]]``; int64 [sentences + 1]."""
        return open_columns(self.corpus / "sentences.arrow")["end"]

    @cached_property
    def documents(self) -> NDArray[np.int64]:
        """Bounds: document i is the sentences ``documents[i]`` up to ``documents[i + 1]``."""
        return open_columns(self.corpus / "documents.arrow")["end"]

    @cached_property
    def vocabulary(self) -> dict[str, NDArray[np.bool_]]:
        """Per token id: ``piece`` (it continues a word) and ``regular`` (it exists and is not special)."""
        columns = open_columns(self.corpus / "vocabulary.arrow")
        return {name: column.astype(np.bool_) for name, column in columns.items()}

    def chunks(self, split: str) -> dict[str, NDArray[Any]]:
        """The sample index of a split: columns document (its rank in the split), first, count, target."""
        return open_columns(self.path / f"{split}_chunks.arrow")

    def members(self, split: str) -> NDArray[np.int64]:
        """The documents of a split, ascending."""
        return open_columns(self.path / f"{split}_documents.arrow")["document"]


def prepare(config: RunConfig, *, progress: bool = False, console: Any = None) -> Prepared:
    """Read, split, tokenise and index the corpus, or find all that in the cache. Raises DataError.

    Two folders: the tokenised corpus depends on the sources and the tokenizer, the sample index on
    the corpus and on how samples are drawn; another max_length does not tokenise again.
    """
    data, objective = config.data, config.task.objective
    cache = Path(data.cache_dir).expanduser() if data.cache_dir else cache_dir("data")
    corpus_name = "corpus-" + _corpus_key(data, config.tokenizer)
    corpus_path = build(cache, corpus_name, lambda f: _write_corpus(f, data, config.tokenizer, progress, console))
    sampling = data.model_dump(include=SAMPLING) | {"seed": config.seed, "objective": objective}
    name = "samples-" + fingerprint(corpus_name, sampling)
    return Prepared.open(build(cache, name, lambda f: _write_samples(f, corpus_path, config)))


SAMPLING = {"holdout", "max_length", "max_predictions", "mask_rate", "whole_word", "short_rate", "dynamic"}


def require(prepared: Prepared, global_size: int) -> None:
    """Raises DataError unless an epoch has enough samples for one optimizer step."""
    if prepared.train_samples < global_size:
        raise DataError(
            f"batch.global_size={global_size}: the corpus gives only {prepared.train_samples} training "
            "samples. Use a smaller batch.global_size, a larger corpus or a smaller data.max_length."
        )


def _corpus_key(data: Data, config: Tokenizer) -> str:
    return fingerprint(
        data.format,
        data.column,
        data.language,
        data.on_error,
        sources.identity(data),
        tokenizers.identity(config),
    )


def _write_corpus(folder: Path, data: Data, config: Tokenizer, progress: bool, console: Any) -> None:
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
    with Progress(*columns, console=console, disable=not progress, transient=True) as bar:
        task = bar.add_task("preparing: reading")

        def report(counts: corpus.Counts) -> None:
            text = f"preparing: {counts.documents:,} documents, {counts.tokens:,} tokens"
            bar.update(task, description=text)

        corpus.write(folder, data, config, report)


def _write_samples(folder: Path, corpus_path: Path, config: RunConfig) -> None:
    from toolkit.data.audit import audit

    objective = config.task.objective
    (folder / "samples.json").write_text(json.dumps({"corpus": corpus_path.name}))
    sentences = open_columns(corpus_path / "sentences.arrow")["end"]
    documents = open_columns(corpus_path / "documents.arrow")["end"]
    if config.data.whole_word and not open_columns(corpus_path / "vocabulary.arrow")["piece"].any():
        raise ConfigError(
            "data.whole_word=true: the tokenizer's vocabulary has no '##' pieces, so where words end "
            "is unknown. Use a WordPiece tokenizer or data.whole_word=false."
        )
    rule = chunks.rule(config.data, objective, config.seed)
    held = chunks.held_out(len(documents) - 1, config.data.holdout, config.seed, objective)
    counts = chunks.write(folder, sentences, documents, held, rule)
    found = audit(Prepared.open(folder), config, held, counts)
    (folder / "audit.json").write_text(json.dumps(found, indent=1))
