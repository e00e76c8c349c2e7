"""Every metric against a published example, and its edges without NaN and without warnings."""

import math
import warnings

import numpy as np
import pytest
from sklearn import metrics

from toolkit.config.kinds import KINDS
from toolkit.config.schema import Task
from toolkit.errors import ConfigError
from toolkit.tasks.metrics import bleu, check, exact_match, scores, several, squad, tagging, token_f1, undefined


def test_matthews_is_that_of_scikit_learns_documentation():
    assert scores(["matthews"], [1, 0, 1, 1], [1, 1, 1, 0], labels=2)["matthews"] == pytest.approx(-1 / 3)


def test_f1_is_of_label_one_for_two_labels_and_macro_for_more():
    # scikit-learn's user guide on binary metrics, and the docstring of f1_score
    assert scores(["accuracy", "f1"], [0, 1, 0, 0], [0, 1, 0, 1], labels=2) == pytest.approx(
        {"accuracy": 3 / 4, "f1": 2 / 3}
    )
    assert scores(["f1_macro"], [0, 1, 0, 0], [0, 1, 0, 1], labels=2)["f1_macro"] == pytest.approx((0.8 + 2 / 3) / 2)
    macro = scores(["f1", "f1_macro"], [0, 2, 1, 0, 0, 1], [0, 1, 2, 0, 1, 2], labels=3)
    assert macro == pytest.approx({"f1": 0.8 / 3, "f1_macro": 0.8 / 3})  # 0.267


def test_correlations_are_those_of_scipys_documentation():
    assert scores(["spearman"], [1, 2, 3, 4, 5], [5, 6, 7, 8, 7])["spearman"] == pytest.approx(0.8207826816681233)
    pearson = scores(["pearson"], [1, 2, 3, 4, 5, 6, 7], [10, 9, 2.5, 6, 4, 3, 2])["pearson"]
    assert pearson == pytest.approx(-0.828503883588428)


def test_the_mean_squared_error():
    assert scores(["mse"], [2.5, 0.0, 2.0, 8.0], [3.0, -0.5, 2.0, 7.0]) == {"mse": 0.375}  # scikit-learn's docs


@pytest.mark.parametrize("gold", [[0, 1], [0, 0], [1, 1]])
def test_constant_predictions_give_zero_without_a_warning(gold):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        classes = scores(["f1", "f1_macro", "matthews"], [0, 0], gold, labels=2)
        numbers = scores(["pearson", "spearman"], [0.5, 0.5], gold)
    assert (classes["f1"], classes["matthews"]) == (0, 0)
    assert classes["f1_macro"] == pytest.approx({(0, 1): 1 / 3, (0, 0): 1, (1, 1): 0}[tuple(gold)])
    assert numbers == {"pearson": 0, "spearman": 0}


def test_f1_is_of_the_label_that_is_named_whatever_its_number():
    one, other = (scores(["f1"], [0, 1, 0, 0], [0, 1, 0, 1], 2, positive)["f1"] for positive in (1, 0))
    swapped = scores(["f1"], [1, 0, 1, 1], [1, 0, 1, 0], 2, 0)["f1"]
    assert one == swapped == pytest.approx(2 / 3) and other == pytest.approx(0.8)


def test_correlations_are_told_to_be_undefined_where_one_side_is_constant():
    names = ("pearson", "mse", "spearman")
    assert undefined(names, [0.5, 0.5], [0, 1]) == undefined(names, [0, 1], [2, 2]) == ["pearson", "spearman"]
    assert undefined(names, [0.1, 0.5], [0, 1]) == []


def test_metrics_of_several_labels_are_scikit_learns():
    rng = np.random.default_rng(0)
    gold, chances = rng.random((50, 4)) < 0.4, rng.random((50, 4))
    found, predicted = several(chances >= 0.5, chances, gold), chances >= 0.5
    assert found == pytest.approx(
        {
            "f1_micro": metrics.f1_score(gold, predicted, average="micro"),
            "f1_macro": metrics.f1_score(gold, predicted, average="macro"),
            "map": metrics.average_precision_score(gold, chances, average="macro"),
            "exact_match": metrics.accuracy_score(gold, predicted),
        }
    )
    absent = [np.hstack([a, np.zeros((50, 1), a.dtype)]) for a in (predicted, chances, gold)]
    assert several(*absent) == pytest.approx(found), "a label that nothing has is in no mean"
    one = several(predicted[:, :1], chances[:, :1], gold[:, :1])
    assert one["f1_micro"] == one["f1_macro"] == pytest.approx(metrics.f1_score(gold[:, 0], predicted[:, 0]))
    assert math.isnan(several(predicted, np.full((50, 4), np.nan), gold)["map"])


def test_nothing_that_has_a_label_gives_zero_without_a_warning():
    none = np.zeros((3, 2), bool)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = several(none, np.full((3, 2), 0.1), none)
    assert found == {"f1_micro": 0, "f1_macro": 0, "map": 0, "exact_match": 1}


def test_constant_labels_give_zero_without_a_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert scores(["matthews", "pearson", "spearman"], [0, 1, 2], [1, 1, 1]) == dict.fromkeys(
            ["matthews", "pearson", "spearman"], 0
        )


def test_predictions_that_are_not_finite_are_no_zero():
    for value in scores(KINDS["regress"].metrics, [float("nan"), 1.0, 2.0], [1.0, 2.0, 3.0]).values():
        assert math.isnan(value)


def test_tags_are_scored_as_in_seqevals_readme():
    gold = [["O", "O", "O", "B-MISC", "I-MISC", "I-MISC", "O"], ["B-PER", "I-PER", "O"]]
    predicted = [["O", "O", "B-MISC", "I-MISC", "I-MISC", "I-MISC", "O"], ["B-PER", "I-PER", "O"]]
    assert tagging(predicted, gold) == {"f1": 0.5, "precision": 0.5, "recall": 0.5, "accuracy": 0.8}


def test_tags_are_scored_strictly():
    gold = [["B-NP", "I-NP", "O", "B-NP"]]
    assert tagging([["I-NP", "I-NP", "O", "B-NP"]], gold) == pytest.approx(
        {"f1": 2 / 3, "precision": 1, "recall": 1 / 2, "accuracy": 3 / 4}
    )
    assert tagging([["B-NP", "I-PP", "O", "B-NP"]], gold)["f1"] == 1 / 2, "B-NP alone is another entity"


def test_precision_is_of_the_predicted_and_recall_of_the_gold_entities():
    found = tagging([["B-A", "O", "B-A", "B-B"]], [["B-A", "O", "O", "O"]])
    assert found == pytest.approx({"f1": 0.5, "precision": 1 / 3, "recall": 1, "accuracy": 0.5})


def test_no_entity_anywhere_gives_zero_without_a_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tagging([["O"]], [["O"]]) == {"f1": 0, "precision": 0, "recall": 0, "accuracy": 1}


@pytest.mark.parametrize(
    ("prediction", "golds", "exact", "f1"),
    [
        ("The Normans", ["normans"], 1, 1),
        ("the  Nor-mans!", ["a Normans"], 1, 1),
        ("a b c", ["b d"], 0, 1 / 2),  # 'a' is an article: b c with b d
        ("b c x", ["b d", "q", "b c"], 0, 4 / 5),  # the best of the answers
        ("x x y", ["x z"], 0, 2 / 5),  # words count as often as they are in both
        ("x x y", ["x x z"], 0, 4 / 6),
        ("x", ["y"], 0, 0),
        ("", ["y"], 0, 0),
        ("", ["the", "y"], 0, 0),  # nothing is left of 'the', so it is no answer
        ("", [], 1, 1),
        ("x", [], 0, 0),
    ],
)
def test_an_answer_is_scored_by_the_official_rules(prediction, golds, exact, f1):
    assert exact_match(prediction, golds) == exact
    assert token_f1(prediction, golds) == pytest.approx(f1)


def test_questions_without_an_answer_are_scored_apart():
    golds = {"1": ["the cat"], "2": ["b d"], "3": [], "4": [], "5": []}
    predictions = {"1": "Cat", "2": "b c", "3": "", "4": "", "5": "dog"}
    assert squad(predictions, golds) == pytest.approx(
        {
            "exact_match": 3 / 5,
            "f1": 3.5 / 5,
            "has_answer_exact_match": 1 / 2,
            "has_answer_f1": 3 / 4,
            "no_answer_accuracy": 2 / 3,
        }
    )
    assert squad({"1": "Cat"}, {"1": ["the cat"]}) == {"exact_match": 1, "f1": 1}
    assert "has_answer_f1" not in squad({"3": ""}, {"3": []})


def test_bleu_by_hand():
    result = bleu(["The dog bit the man."], ["The dog had bit the man."])
    # n-grams of 6 tokens found in the 7 of the reference: 6/6, 4/5, 2/4, 1/3 (Papineni et al. 2002)
    assert result.score == pytest.approx(100 * math.exp(1 - 7 / 6) * (6 / 6 * 4 / 5 * 2 / 4 * 1 / 3) ** (1 / 4))
    assert result.signature.startswith("nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:")


def test_bleu_is_of_the_corpus():
    # n-grams are added over both sentences: 10/10, 7/8, 4/6, 2/4; the lengths too: 10 and 11
    result = bleu(["The dog bit the man.", "It was me."], ["The dog had bit the man.", "It was me."])
    assert result.score == pytest.approx(100 * math.exp(1 - 11 / 10) * (10 / 10 * 7 / 8 * 4 / 6 * 2 / 4) ** (1 / 4))


def test_every_known_metric_is_computed():
    for kind in ("classify", "regress", "choose"):
        assert tuple(scores(KINDS[kind].metrics, [0, 1, 1], [0, 1, 0], labels=2)) == KINDS[kind].metrics
    assert tuple(several(*3 * [np.eye(2)])) == KINDS["multi_label"].metrics
    assert set(tagging([["O"]], [["O"]])) == set(KINDS["tag"].metrics)
    assert set(squad({"1": "x", "2": ""}, {"1": ["x"], "2": []})) == set(KINDS["span_qa"].metrics)


def test_check_names_the_metric_that_was_meant():
    check(Task(kind="classify", metrics=("accuracy", "f1"), best="f1"))
    check(Task(kind="pretrain"))
    with pytest.raises(
        ConfigError, match=r"task\.metrics=\[acuracy\]: .*classify\. Did you mean 'accuracy'\? Known: acc"
    ):
        check(Task(kind="classify", metrics=("acuracy",)))
    with pytest.raises(ConfigError, match=r"task\.metrics=\[bleu\]: unknown for task\.kind=pretrain\. Known: none\."):
        check(Task(metrics=("bleu",)))
    with pytest.raises(ConfigError, match=r"task\.best=f1: is not in task\.metrics=\[accuracy\]"):
        check(Task(kind="classify", metrics=("accuracy",), best="f1"))
