"""Metrics of the finetuning tasks, computed by the libraries that the field compares with.

    check(config.task)  # known to the task? else a ConfigError
    scores(["accuracy", "f1"], predicted, gold, labels=2)  # {"accuracy": 0.84, "f1": 0.89}

Shares are 0 to 1, SQuAD's too; only BLEU is 0 to 100, as papers print it.
"""

import re
import string
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
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


def scores(names: Iterable[str], predicted: ArrayLike, gold: ArrayLike, labels: int = 0) -> dict[str, float]:
    """The named metrics of classification (label numbers, of ``labels`` labels) or regression (scores); both [samples].

    ``f1`` is that of label number 1 where there are two labels, else ``f1_macro``: the mean over the
    labels that occur. Correlations with a constant, Matthews' too, are undefined and count as 0.
    """
    predicted, gold = np.asarray(predicted), np.asarray(gold)
    return {name: float(_score(name, predicted, gold, labels)) for name in names}


def _score(name: str, predicted: NDArray[Any], gold: NDArray[Any], labels: int) -> Any:
    from scipy import stats
    from sklearn import metrics

    if name == "accuracy":
        return np.mean(predicted == gold)
    if name == "mse":
        return np.mean((predicted - gold) ** 2)
    if name in ("f1", "f1_macro"):
        average = "binary" if name == "f1" and labels == 2 else "macro"
        return metrics.f1_score(gold, predicted, average=average, zero_division=0)
    if np.ptp(predicted) == 0 or np.ptp(gold) == 0:
        return 0.0
    if name == "matthews":
        return metrics.matthews_corrcoef(gold, predicted)
    return {"pearson": stats.pearsonr, "spearman": stats.spearmanr}[name](predicted, gold).statistic


def tagging(predicted: list[list[str]], gold: list[list[str]]) -> dict[str, float]:
    """Entity ``f1``, ``precision`` and ``recall`` as conlleval, and ``accuracy`` of the tags; one list a sentence."""
    from seqeval.metrics import accuracy_score
    from seqeval.metrics.sequence_labeling import precision_recall_fscore_support

    precision, recall, f1, _ = precision_recall_fscore_support(gold, predicted, average="micro", zero_division=0)
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
    f1 = {key: token_f1(predictions[key], answers) for key, answers in golds.items()}
    exact = {key: exact_match(predictions[key], answers) for key, answers in golds.items()}
    has = [key for key, answers in golds.items() if answers]
    has_no = [key for key, answers in golds.items() if not answers]
    result = {"exact_match": _mean(exact, exact), "f1": _mean(f1, f1)}
    if has_no:
        result["no_answer_accuracy"] = _mean(exact, has_no)
    if has_no and has:
        result |= {"has_answer_exact_match": _mean(exact, has), "has_answer_f1": _mean(f1, has)}
    return result


def _mean(values: Mapping[str, float], keys: Iterable[str]) -> float:
    return float(np.mean([values[key] for key in keys]))


def exact_match(prediction: str, golds: Sequence[str]) -> float:
    """1 where the normalised prediction is one of the gold answers, else 0."""
    return float(normal(prediction) in _accepted(golds))


def token_f1(prediction: str, golds: Sequence[str]) -> float:
    """The best F1 of the prediction's bag of words with that of a gold answer."""
    return max(_overlap(normal(prediction).split(), gold.split()) for gold in _accepted(golds))


def normal(text: str) -> str:
    """An answer as SQuAD compares it: lower case without punctuation, articles and extra blanks."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def _accepted(golds: Sequence[str]) -> list[str]:
    return [gold for gold in map(normal, golds) if gold] or [""]


def _overlap(predicted: list[str], gold: list[str]) -> float:
    if not predicted or not gold:
        return float(predicted == gold)
    return 2 * (Counter(predicted) & Counter(gold)).total() / (len(predicted) + len(gold))
