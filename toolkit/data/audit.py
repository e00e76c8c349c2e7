"""What is in the prepared data, in numbers a person can judge before training.

    prepare(config).audit              # the dict, also audit.json in the cache
    rich.print(format_audit(audit))    # the same as a table

Entropies are in nats per token; what is under "sample" was counted over some samples of epoch 0.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from toolkit.config.schema import RunConfig
from toolkit.data.chunks import SPLITS
from toolkit.data.corpus import Corpus
from toolkit.data.draws import Shuffle
from toolkit.data.masked import Masked, MaskedText
from toolkit.data.prepared import Prepared
from toolkit.run.table import table

SAMPLES = 2000  # of epoch 0, in training order: what the numbers under "sample" are taken from
BLOCK_TOKENS = 2**18


def audit(
    prepared: Prepared, config: RunConfig, held: NDArray[np.bool_], chunk_counts: dict[str, dict[str, int]]
) -> dict[str, Any]:
    """Counts of the corpus, its splits and chunks, entropies in nats per token, and sample statistics."""
    dataset = {s: MaskedText(prepared, config.data, config.task.objective, config.seed, s) for s in SPLITS}
    corpus = dataset["train"].corpus
    counts, unigrams = corpus.counts, _unigrams(corpus, held)
    return {
        **counts,
        "vocab_size": corpus.vocab_size,
        "unknown_share": counts["unknown_tokens"] / counts["tokens"],
        "entropy": {
            "corpus_unigram": cross_entropy(unigrams.sum(0), unigrams.sum(0)),
            "eval_under_train_unigram": cross_entropy(unigrams[1], unigrams[0] + 1),
        },
        **{
            split: {
                "documents": len(dataset[split].members),
                "tokens": int(row.sum()),
                **chunk_counts[split],
            }
            for split, row in zip(SPLITS, unigrams, strict=True)
        },
        "sample": _sampled(dataset["train"]),
    }


def cross_entropy(counts: NDArray[np.int64], model: NDArray[np.int64]) -> float | None:
    """Nats per token of ``counts`` under the distribution ``model / model.sum()``; None of no tokens."""
    seen = counts > 0
    if not seen.any():
        return None
    log_p = np.log(model[seen] / model.sum())
    return float(-(counts[seen] * log_p).sum() / counts.sum())


def _unigrams(corpus: Corpus, held: NDArray[np.bool_]) -> NDArray[np.int64]:
    """How often each token occurs, int64 [train and eval, vocabulary]."""
    counts = np.zeros((2, corpus.vocab_size), np.int64)
    starts = corpus.sentences[corpus.documents]  # token at which each document starts
    for low in range(0, len(corpus.tokens), BLOCK_TOKENS):
        tokens = corpus.tokens[low : low + BLOCK_TOKENS]
        first, last = np.searchsorted(starts, [low, low + len(tokens) - 1], side="right") - 1
        edges = np.clip(starts[first : last + 2], low, low + len(tokens))
        in_eval = np.repeat(held[first : last + 1], np.diff(edges))
        for row, chosen in enumerate((~in_eval, in_eval)):
            counts[row] += np.bincount(tokens[chosen], minlength=corpus.vocab_size)
    return counts


def _sampled(dataset: MaskedText) -> dict[str, Any]:
    data = dataset.data
    order = Shuffle(len(dataset), dataset.seed, 0)(np.arange(min(SAMPLES, len(dataset))))
    samples = [dataset.sample(0, index) for index in order.tolist()]
    lengths = np.array([len(sample.input_ids) for sample in samples])
    tokens = int(sum(len(s.input_ids) - 2 - (s.pair_label >= 0) for s in samples))
    histogram, edges = np.histogram(lengths, bins=8, range=(0, data.max_length))
    return {
        "samples": len(samples),
        "pair_label_1_share": _pair_share(samples),
        "mask_rate": sum(len(s.positions) for s in samples) / tokens,
        "truncated_share": float(np.mean([s.cut > 0 for s in samples])),
        "tokens_cut_share": sum(s.cut for s in samples) / (tokens + sum(s.cut for s in samples)),
        "short_share": float(np.mean(lengths < data.max_length / 2)),
        "padding_share": float(1 - lengths.sum() / (len(samples) * data.max_length)),
        "length_histogram": {f"{int(edge)}": int(n) for edge, n in zip(edges[1:], histogram, strict=True)},
    }


def _pair_share(samples: list[Masked]) -> float | None:
    labels = [sample.pair_label for sample in samples if sample.pair_label >= 0]
    return float(np.mean(labels)) if labels else None


def format_audit(audit: dict[str, Any]) -> Any:
    """A rich Table with one row per number."""
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
