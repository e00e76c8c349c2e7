"""Text for pretraining: sources -> documents -> sentences -> token ids -> chunks, prepared once and audited.

prepared = prepare(config, progress=True)    # again with the same config and sources it is found in the cache
MaskedText(prepared, config.data, config.task.objective, config.seed)    # masked.py
rich.print(format_audit(prepared.audit))     # numbers a person can judge before training
"""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.table import Table

from toolkit.config.schema import RunConfig
from toolkit.data import corpus, sources, unknown
from toolkit.data import tokenizer as tokenizers
from toolkit.data.corpus import Corpus
from toolkit.data.prepared import Prepared, build, fingerprint, finish
from toolkit.errors import ConfigError, DataError
from toolkit.run.table import table

SAMPLING = {"holdout", "max_length", "max_predictions", "mask_rate", "whole_word", "short_rate", "dynamic"}
BLOCK_TOKENS = 2**18
FEW_PIECES, MANY_PIECES = 0.01, 0.8  # shares of the tokens, beyond which masking whole words is doubtful
ALONE = 0.3  # the largest share of samples of one sentence that needs no word: 35 % of the pairs are real then
WHOLE = {  # what makes a document, and how it becomes one of several sentences; else a regex does
    "blank_line": "A blank line ends a document (data.documents=blank_line): leave none between its sentences, or set "
    "data.documents=file or a regex of its first line",
    "file": "A file is a document (data.documents=file): put all its sentences into one",
    "row": "A row is a document: put all its sentences into one",
}


def prepare(config: RunConfig, *, progress: bool = False, console: Any = None) -> Prepared:
    """Read, split, tokenise and index the corpus, or find all that in the cache. Raises DataError. Two folders: the
    tokenised corpus depends on the sources and the tokenizer, the sample index on the corpus and on how samples are
    drawn; another max_length does not tokenise again."""
    data = config.data
    reading = data.format, data.column, data.language, data.on_error
    key = fingerprint(*reading, sources.identity(data), tokenizers.identity(config.tokenizer))
    path = build(data, f"corpus-{key}", lambda f: _write_corpus(f, config, progress, console))
    unknown.refuse(config.tokenizer, Corpus(path).facts["lost"])
    sampling = data.model_dump(include=SAMPLING) | {"seed": config.seed, "objective": config.task.objective}
    name = "samples-" + fingerprint(path.name, sampling)
    return Prepared(build(data, name, lambda f: _write_samples(f, path, config)))


def require(samples: int, global_size: int) -> None:
    """Raises DataError unless an epoch of ``samples`` is enough for one optimizer step."""
    if samples < global_size:
        raise DataError(
            f"batch.global_size={global_size}: the corpus gives only {samples} training "
            "samples. Use a smaller batch.global_size, a larger corpus or a smaller data.max_length."
        )


def _write_corpus(folder: Path, config: RunConfig, progress: bool, console: Any) -> None:
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
    with Progress(*columns, console=console, disable=not progress, transient=True) as bar:
        task = bar.add_task("preparing: reading")

        def report(documents: int, tokens: int) -> None:
            bar.update(task, description=f"preparing: {documents:,} documents, {tokens:,} tokens")

        corpus.write(folder, config.data, config.tokenizer, report)


def _write_samples(folder: Path, path: Path, config: RunConfig) -> None:
    from toolkit.data.masked import MaskedText, sampled  # with torch, which finding all in the cache takes none of

    data, objective, whole = config.data, config.task.objective, Corpus(path)
    try:
        held = corpus.held_out(len(whole.documents) - 1, data.holdout, config.seed, objective)
    except DataError as error:
        raise DataError(f"{error}{sources.separators(data)}") from error
    counts = corpus.index(folder, whole, held, data, objective, config.seed)
    alone = counts["train"]["chunks_of_one_sentence"] / max(counts["train"]["chunks"], 1)
    notes = [f"{(1 - alone) / 2:.0%} of the pairs are real, the others random"] if objective == "mlm_nsp" else []
    shutil.copytree(whole.path / "tokenizer", folder / "tokenizer")
    facts = {"vocab_size": whole.facts["vocab_size"], "pad_id": whole.facts["special"]["pad"], "corpus": path.name}
    unigrams = _unigrams(whole, held)
    warnings = [*whole.facts["warnings"], *_warnings(whole, held, alone, config)]
    if data.whole_word:
        warnings += _whole_words(whole, unigrams.sum(0))
    finish(folder, {}, splits=corpus.SPLITS, notes=notes, warnings=warnings, **facts)
    samples = MaskedText(Prepared(folder), data, objective, config.seed)
    found = _audit(whole, held, counts, unigrams) | {"sample": sampled(samples)}
    (folder / "audit.json").write_text(json.dumps(found, indent=1))


def _whole_words(whole: Corpus, counts: NDArray[np.int64]) -> list[str]:
    """What makes masking whole words doubtful. Raises ConfigError where words cannot be told."""
    piece = whole.vocabulary["piece"]
    if not piece.any():
        raise ConfigError(
            "data.whole_word=true: nothing in the tokenizer's vocabulary ('##', 'Ġ' or '▁') tells what continues a "
            "word. Use another tokenizer or data.whole_word=false."
        )
    share = counts[piece].sum() / counts.sum()
    if FEW_PIECES <= share <= MANY_PIECES:
        return []
    harm = "nearly all words are masked whole anyway. A smaller tokenizer.vocab_size gives more."
    if share > MANY_PIECES:
        harm = "long words are never masked. Use data.whole_word=false for a script without spaces."
    return [f"data.whole_word=true: {share:.2%} of the tokens continue a word, so {harm}"]


def _warnings(whole: Corpus, held: NDArray[np.bool_], alone: float, config: RunConfig) -> list[str]:
    """What makes the corpus doubtful; ``alone`` is the share of samples that are a document of one sentence. Raises
    DataError where they all are: none has a next sentence."""
    data, objective, counts = config.data, config.task.objective, whole.facts["counts"]
    warnings = []
    if counts["skipped"]:
        left_out = f"{counts['skipped']:,} bad lines, rows or files are left out"
        warnings.append(f"data.on_error=skip: {left_out}, first {counts['skipped_first'][0]}.")
    if data.holdout and not held.any():
        warnings.append(
            f"data.holdout={data.holdout}: the corpus is one document, so none is held out: evaluation has nothing to "
            f"score. Add documents, or part them (data.documents).{sources.separators(data)}"
        )
    if objective != "mlm" and alone > ALONE:
        harm = "is cut within: no order of sentences is learnt of it"
        if objective == "mlm_nsp":
            harm = f"has no next: {(1 - alone) / 2:.0%} of the pairs are real, where half should be"
        made_by = data.documents if data.format == "text" else "row"
        whole_by = WHOLE.get(made_by, "Each line that matches data.documents begins one: correct the regex")
        warnings.append(
            f"task.objective={objective}: {alone:.0%} of the samples are a document of one sentence (by the rules of "
            f"data.language={data.language}), which {harm}. {whole_by}, or set task.objective=mlm."
            f"{sources.separators(data)}"
        )
        if objective == "mlm_nsp" and alone == 1:
            raise DataError(warnings[-1])
    return warnings


def _audit(
    whole: Corpus, held: NDArray[np.bool_], chunk_counts: dict[str, dict[str, int]], unigrams: NDArray[np.int64]
) -> dict[str, Any]:
    """Counts of the corpus, its splits and chunks; entropies in nats per token."""
    counts, lost = whole.facts["counts"], whole.facts["lost"]["the corpus"]
    documents = int((~held).sum()), int(held.sum())
    return {
        **counts,
        "vocab_size": whole.facts["vocab_size"],
        "unknown_share": counts["unknown_tokens"] / counts["tokens"],
        "unknown_characters_share": lost["unknown"] / max(lost["characters"], 1),
        "entropy": {
            "corpus_unigram": _cross_entropy(unigrams.sum(0), unigrams.sum(0)),
            "eval_under_train_unigram": _cross_entropy(unigrams[1], unigrams[0] + 1),
        },
        **{
            split: {"documents": number, "tokens": int(row.sum()), **chunk_counts[split]}
            for split, number, row in zip(corpus.SPLITS, documents, unigrams, strict=True)
        },
    }


def _cross_entropy(counts: NDArray[np.int64], model: NDArray[np.int64]) -> float | None:
    """Nats per token of ``counts`` under the distribution ``model / model.sum()``; None of no tokens."""
    seen = counts > 0
    if not seen.any():
        return None
    log_p = np.log(model[seen] / model.sum())
    return float(-(counts[seen] * log_p).sum() / counts.sum())


def _unigrams(whole: Corpus, held: NDArray[np.bool_]) -> NDArray[np.int64]:
    """How often each token occurs, int64 [train and eval, vocabulary]."""
    size = whole.facts["vocab_size"]
    counts = np.zeros((2, size), np.int64)
    starts = whole.sentences[whole.documents]  # token at which each document starts
    for low in range(0, len(whole.tokens), BLOCK_TOKENS):
        tokens = whole.tokens[low : low + BLOCK_TOKENS]
        first, last = np.searchsorted(starts, [low, low + len(tokens) - 1], side="right") - 1
        edges = np.clip(starts[first : last + 2], low, low + len(tokens))
        in_eval = np.repeat(held[first : last + 1], np.diff(edges))
        for row, chosen in enumerate((~in_eval, in_eval)):
            counts[row] += np.bincount(tokens[chosen], minlength=size)
    return counts


def format_audit(audit: dict[str, Any]) -> Table:
    """A row for each number."""
    rows = []
    for section, value in audit.items():
        for name, number in value.items() if isinstance(value, dict) else [("", value)]:
            rows.append((f"{section} {name}".strip().replace("_", " "), _shown(name or section, number)))
    return table({"what": "", "value": ""}, rows, "Prepared data")


def _shown(name: str, value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.2%}" if name.endswith(("share", "rate")) else f"{value:.4g}"
    if isinstance(value, dict):
        return "  ".join(f"≤{length}: {number}" for length, number in value.items())
    if isinstance(value, list):
        return "\n".join(map(str, value)) or "-"
    return "-" if value is None else f"{value:,}"
