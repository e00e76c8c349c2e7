"""Text for pretraining: sources -> documents -> sentences -> token ids -> chunks, prepared once.

    prepared = prepare(config, progress=True)
    MaskedText(prepared, config.data, config.task.objective, config.seed)    # masked.py

Calling it again with the same config and the same sources finds everything in the cache.
"""

import json
import shutil
from pathlib import Path
from typing import Any

from toolkit.config.schema import Data, RunConfig, Tokenizer
from toolkit.data import chunks, corpus, sources
from toolkit.data import tokenizer as tokenizers
from toolkit.data.cache import fingerprint
from toolkit.data.corpus import Corpus
from toolkit.data.prepared import Prepared, finish, made
from toolkit.errors import ConfigError, DataError

SAMPLING = {"holdout", "max_length", "max_predictions", "mask_rate", "whole_word", "short_rate", "dynamic"}


def prepare(config: RunConfig, *, progress: bool = False, console: Any = None) -> Prepared:
    """Read, split, tokenise and index the corpus, or find all that in the cache. Raises DataError.

    Two folders: the tokenised corpus depends on the sources and the tokenizer, the sample index on
    the corpus and on how samples are drawn; another max_length does not tokenise again.
    """
    data = config.data
    key = fingerprint(
        *(getattr(data, name) for name in ("format", "column", "language", "on_error")),
        sources.identity(data),
        tokenizers.identity(config.tokenizer),
    )
    path = made(data, f"corpus-{key}", lambda f: _write_corpus(f, data, config.tokenizer, progress, console))
    sampling = data.model_dump(include=SAMPLING) | {"seed": config.seed, "objective": config.task.objective}
    name = "samples-" + fingerprint(path.name, sampling)
    return Prepared(made(data, name, lambda f: _write_samples(f, path, config)))


def require(samples: int, global_size: int) -> None:
    """Raises DataError unless an epoch of ``samples`` is enough for one optimizer step."""
    if samples < global_size:
        raise DataError(
            f"batch.global_size={global_size}: the corpus gives only {samples} training "
            "samples. Use a smaller batch.global_size, a larger corpus or a smaller data.max_length."
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


def _write_samples(folder: Path, path: Path, config: RunConfig) -> None:
    from toolkit.data.audit import audit  # with torch, which finding all in the cache takes none of

    data, objective, whole = config.data, config.task.objective, Corpus(path)
    if data.whole_word and not whole.vocabulary["piece"].any():
        raise ConfigError(
            "data.whole_word=true: the tokenizer's vocabulary has no '##' pieces, so where words end "
            "is unknown. Use a WordPiece tokenizer or data.whole_word=false."
        )
    held = chunks.held_out(len(whole.documents) - 1, data.holdout, config.seed, objective)
    counts = chunks.write(folder, whole.sentences, whole.documents, held, chunks.rule(data, objective, config.seed))
    shutil.copytree(whole.path / "tokenizer", folder / "tokenizer")
    facts = {"vocab_size": whole.vocab_size, "pad_id": whole.special.pad, "corpus": path.name}
    finish(folder, {}, splits=chunks.SPLITS, notes=(), **facts)
    found = audit(Prepared(folder), config, held, counts)
    (folder / "audit.json").write_text(json.dumps(found, indent=1))
