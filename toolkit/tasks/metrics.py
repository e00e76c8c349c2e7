"""Metrics of the finetuning tasks, computed by the libraries that the field compares with.

    scores(["accuracy", "f1"], predicted, gold, labels=2)  # {"accuracy": 0.84, "f1": 0.89}

Shares are 0 to 1, SQuAD's too; only BLEU is 0 to 100, as papers print it.
"""

import re
import string
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from toolkit.config.kinds import KINDS
from toolkit.config.schema import Task
from toolkit.errors import ConfigError, nearest

LOWER_IS_BETTER = frozenset({"mse"})


@dataclass(frozen=True)
class Bleu:
    """A corpus' BLEU, 0 to 100, and how sacreBLEU computed it."""

    score: float
    signature: str


def check(task: Task) -> None:
    """Raises ConfigError for a metric that ``task.kind`` does not have, or a ``task.best`` that is not computed."""
    known = KINDS[task.kind].metrics
    for name in task.metrics:
        if name not in known:
            raise ConfigError(
                f"task.metrics=[{name}]: unknown for task.kind={task.kind}.{nearest(name, known)} "
                f"Known: {', '.join(known) or 'none'}."
            )
    if task.best is not None and task.best not in task.metrics:
        raise ConfigError(
            f"task.best={task.best}: is not in task.metrics=[{','.join(task.metrics)}]."
            f"{nearest(task.best, task.metrics)} Use one of these, or add it there."
        )


def scores(
    names: Iterable[str], predicted: ArrayLike, gold: ArrayLike, labels: int = 0, positive: int = 1
) -> dict[str, float]:
    """The named metrics of classification (label numbers, of ``labels`` labels) or regression (scores); both [samples].

    ``f1`` is that of label number ``positive`` where there are two labels, else ``f1_macro``: the mean over the
    labels that occur. Correlations with a constant, Matthews' too, are undefined and count as 0.
    """
    from scipy import stats
    from sklearn import metrics

    predicted, gold = np.asarray(predicted), np.asarray(gold)

    def f1(average: str) -> Any:
        return metrics.f1_score(gold, predicted, average=average, pos_label=positive, zero_division=0)

    found: dict[str, Callable[[], Any]] = {
        "accuracy": lambda: np.mean(predicted == gold),
        "mse": lambda: np.mean((predicted - gold) ** 2),
        "f1": lambda: f1("binary" if labels == 2 else "macro"),
        "f1_macro": lambda: f1("macro"),
        "matthews": lambda: metrics.matthews_corrcoef(gold, predicted),
        "pearson": lambda: stats.pearsonr(predicted, gold).statistic,
        "spearman": lambda: stats.spearmanr(predicted, gold).statistic,
    }
    names = list(names)
    found |= dict.fromkeys(undefined(names, predicted, gold), lambda: 0.0)
    return {name: float(found[name]()) for name in names}


def undefined(names: Iterable[str], predicted: ArrayLike, gold: ArrayLike) -> list[str]:
    """Those of the metrics that are correlations, where one of the two is constant."""
    constant = np.ptp(predicted) == 0 or np.ptp(gold) == 0
    return [name for name in names if constant and name in ("matthews", "pearson", "spearman")]


def several(predicted: NDArray[Any], logits: NDArray[Any], gold: NDArray[Any]) -> dict[str, float]:
    """Of any number of labels a sample, all [samples, labels]: whether each is predicted, its logit, whether it
    applies. Macro means are over the labels that occur: for ``f1_macro`` in either, for ``map``, the mean average
    precision, in ``gold``. ``exact_match`` is the share of samples of which every label is right."""
    from sklearn import metrics

    # not by its f1_score, to which a single label is one of two classes
    both, either, there = (gold * predicted).sum(0), gold.sum(0) + predicted.sum(0), gold.any(0)
    ranked = 0.0 if np.isfinite(logits).all() else np.nan
    if there.any() and not np.isnan(ranked):
        ranked = metrics.average_precision_score(gold[:, there], logits[:, there], average="macro")
    return {
        "f1_micro": float(2 * both.sum() / max(1, either.sum())),
        "f1_macro": float(np.mean(2 * both[either > 0] / either[either > 0])) if either.any() else 0.0,
        "map": float(ranked),
        "exact_match": float(np.mean((predicted == gold).all(1))),
    }


def tagging(predicted: list[list[str]], gold: list[list[str]]) -> dict[str, float]:
    """Entity ``f1``, ``precision`` and ``recall``, and ``accuracy`` of the tags, of IOB2 read strictly: a predicted I-
    that continues nothing is no entity, where conlleval counts one. A list a sentence."""
    from seqeval.metrics import accuracy_score
    from seqeval.metrics.v1 import precision_recall_fscore_support
    from seqeval.scheme import IOB2

    precision, recall, f1, _ = precision_recall_fscore_support(
        gold, predicted, average="micro", zero_division=0, scheme=IOB2
    )
    accuracy = accuracy_score(gold, predicted)
    return {"f1": float(f1), "precision": float(precision), "recall": float(recall), "accuracy": float(accuracy)}


def bleu(predicted: list[str], references: list[str]) -> Bleu:
    """Corpus BLEU of untokenised translations against one reference each."""
    from sacrebleu.metrics.bleu import BLEU

    metric = BLEU()
    score = metric.corpus_score(predicted, [references]).score
    return Bleu(score, str(metric.get_signature()))


def squad(predictions: Mapping[str, str], golds: Mapping[str, Sequence[str]]) -> dict[str, float]:
    """``exact_match`` and ``f1`` of answers by question id, as SQuAD's evaluate-v2.0.py, but 0 to 1.

    No gold answer means that the question has none, which the prediction "" says. Where there are such
    questions, ``no_answer_accuracy`` is theirs, ``has_answer_exact_match`` and ``has_answer_f1`` the others'.
    """
    exact = np.array([exact_match(predictions[key], answers) for key, answers in golds.items()])
    f1 = np.array([token_f1(predictions[key], answers) for key, answers in golds.items()])
    has = np.array([bool(answers) for answers in golds.values()])
    result = {"exact_match": exact.mean(), "f1": f1.mean()}
    if not has.all():
        result["no_answer_accuracy"] = exact[~has].mean()
        result |= {"has_answer_exact_match": exact[has].mean(), "has_answer_f1": f1[has].mean()} if has.any() else {}
    return {name: float(value) for name, value in result.items()}


def exact_match(prediction: str, golds: Sequence[str]) -> float:
    """1 where the normalised prediction is one of the gold answers, else 0."""
    return float(_normal(prediction) in _accepted(golds))


def token_f1(prediction: str, golds: Sequence[str]) -> float:
    """The best F1 of the prediction's bag of words with that of a gold answer."""
    words, best = _normal(prediction).split(), 0.0
    for gold in map(str.split, _accepted(golds)):
        common = (Counter(words) & Counter(gold)).total()
        best = max(best, 2 * common / (len(words) + len(gold)) if words and gold else float(words == gold))
    return best


def _normal(text: str) -> str:
    """An answer as SQuAD compares it: lower case without punctuation, articles and extra blanks."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def _accepted(golds: Sequence[str]) -> list[str]:
    return [gold for gold in map(_normal, golds) if gold] or [""]
