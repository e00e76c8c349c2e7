"""Hand-made corpora in which every word occurs once, so that a token tells its document and sentence."""

import json
from collections.abc import Sequence
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from toolkit.config.schema import RunConfig
from toolkit.data.corpus import Corpus
from toolkit.data.masked import Masked, MaskedText
from toolkit.data.prepared import Prepared
from toolkit.data.text import prepare

SHARED = Path(__file__).parents[2] / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason=f"the real data sets are not at {SHARED}")
SPECIALS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
PAD, UNK, CLS, SEP, MASK = range(5)

Lengths = Sequence[Sequence[int]]  # per document, words per sentence


def write_vocab(folder: Path, words: Sequence[str]) -> Path:
    path = folder / "vocab.txt"
    path.write_text("\n".join([*SPECIALS, *words]) + "\n")
    return path


def corpus(lengths: Lengths) -> list[list[list[int]]]:
    """Token ids [document][sentence][word], every id once, from 5 up."""
    ids = count(len(SPECIALS))
    return [[[next(ids) for _ in range(n)] for n in document] for document in lengths]


def toy(folder: Path, lengths: Lengths, *, objective: str = "mlm_nsp", seed: int = 1, **data: Any) -> RunConfig:
    """A config over a JSON-lines corpus of such documents; id 5 + k is the word 'w<k>'."""
    documents = corpus(lengths)
    lines = [{"text": [" ".join(f"w{i - 5}" for i in s) for s in document]} for document in documents]
    (folder / "corpus.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    vocab = write_vocab(folder, [f"w{k}" for k in range(sum(map(sum, lengths)))])
    settings = {"holdout": 0.0, "max_length": 32, "cache_dir": str(folder / "cache"), "short_rate": 0.0}
    return RunConfig.model_validate(
        {
            "seed": seed,
            "task": {"objective": objective},
            "tokenizer": {"path": str(vocab)},
            "data": {"format": "jsonl", "path": str(folder / "corpus.jsonl"), **settings, **data},
        }
    )


def dataset(config: RunConfig, split: str = "train", prepared: Prepared | None = None) -> MaskedText:
    return MaskedText(prepared or prepare(config), config.data, config.task.objective, config.seed, split)


def corpus_of(prepared: Prepared) -> Corpus:
    """The tokenised text that the samples are drawn from."""
    return Corpus(prepared.path.parent / prepared.facts["corpus"])


def random_lengths(documents: int, sentences: int, words: tuple[int, int] = (3, 9)) -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [rng.integers(*words, size=sentences).tolist() for _ in range(documents)]


def unmasked(sample: Masked) -> list[int]:
    ids = sample.input_ids.copy()
    ids[sample.positions] = sample.labels
    return [int(i) for i in ids]


def parts(sample: Masked) -> tuple[list[int], list[int]]:
    """The original tokens of both segments without [CLS] and [SEP]."""
    ids = unmasked(sample)
    assert ids[0] == CLS and ids[sample.first_length - 1] == SEP and ids[-1] == SEP
    return ids[1 : sample.first_length - 1], ids[sample.first_length : -1]


def assert_share(hits: int, trials: int, share: float) -> None:
    """Within five standard deviations of the binomial distribution."""
    bound = 5 * (trials * share * (1 - share)) ** 0.5
    assert abs(hits - trials * share) < bound, (hits / trials, share, trials)
