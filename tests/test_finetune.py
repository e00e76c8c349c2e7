"""Fine-tuning for real: every kind of task learns, in every layout alike; the best weights are kept and used."""

import csv
import gzip
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from labelled_data import KINDS, rows, table, write
from launching import TINY, Result, data_cache, launch, launch_many, read, read_by
from rich.console import Console
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    pipeline,
)

from toolkit.checkpoint.export import export
from toolkit.config import kinds
from toolkit.config.compose import compose
from toolkit.data import labelled
from toolkit.data.examples import Text
from toolkit.data.labelled import Encoded
from toolkit.data.order import Grouped
from toolkit.engine.start import factor
from toolkit.models.build import decay_groups, initialise
from toolkit.tasks import task_class
from toolkit.tasks.classify import Regress
from toolkit.train.several import row

BEST = dict.fromkeys(KINDS, "f1") | {"classify": "accuracy", "choose": "accuracy", "regress": "spearman"}
BEST["multi_label"] = "f1_micro"
FILE = dict.fromkeys(KINDS, "predictions.tsv") | {"tag": "predictions.conll", "span_qa": "predictions.json"}
# layout -> (ranks, overrides)
LAYOUTS: dict[str, tuple[int, Sequence[str]]] = {
    "1 rank": (1, ("zero=stage0",)),
    "ZeRO 0": (2, ("zero=stage0",)),
    "ZeRO 2": (2, ("zero=stage2",)),
    "ZeRO 3": (2, ("zero=stage3",)),
    "ZeRO 3 with small micro-batches": (2, ("zero=stage3", "batch.micro_size=2")),
    "ZeRO 2 with offload": (2, ("zero=stage2", "offload=cpu")),
    "tensor parallel": (2, ("zero=stage1", "parallel=tensor")),
    "padded to the full length": (2, ("zero=stage1", "data.padding=max_length")),
    "recomputed": (2, ("zero=stage3", "activation=recompute")),
    "two pipe stages": (2, ("zero=stage1", "pipeline=two")),
    "two pipe stages of GPipe": (2, ("zero=stage0", "pipeline=two", "pipeline.schedule=gpipe")),
}
SCORES = {f"eval_{metric}" for kind in KINDS for metric in kinds.KINDS[kind].metrics}
FEW = ("train.steps=20", "train.log_every=1", "train.eval_every=null")


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One run of each kind, called by its name."""
    folder = tmp_path_factory.mktemp("learned")
    assert not launch_many(folder, {kind: table(folder, kind) for kind in KINDS}).errors
    return folder


@pytest.fixture(scope="module")
def layouts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("layouts")
    given = [
        *table(folder, "classify"),
        *FEW,
        f"data.test={write(folder / 'test.jsonl', rows('classify', 29, seed=7))}",
    ]
    for ranks in {number for number, _ in LAYOUTS.values()}:
        runs = {n: [*given, *more] for n, (r, more) in LAYOUTS.items() if r == ranks}
        several = [*table(folder, "multi_label"), *FEW, "batch.micro_size=2", "zero=stage2"]
        runs |= {f"several labels on {ranks}": several}
        assert not launch_many(folder, runs, ranks=ranks).errors
    return folder


def last_evaluation(run: Path) -> dict[str, Any]:
    return [r for r in read(run / "metrics.jsonl") if "eval_loss" in r][-1]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_task_learns(kind: str, learned: Path) -> None:
    result = last_evaluation(learned / kind)
    assert result[f"eval_{BEST[kind]}"] > 0.85, result
    assert (learned / kind / FILE[kind]).stat().st_size
    steps = [r for r in read(learned / kind / "metrics.jsonl") if "loss" in r]
    assert all(0 <= r["padding"] < 0.6 for r in steps if "padding" in r)


def test_predictions_say_what_the_metric_counts(learned: Path) -> None:
    rows = list(csv.DictReader((learned / "classify" / "predictions.tsv").open(), delimiter="\t"))
    right = np.mean([row["prediction"] == row["label"] for row in rows])
    assert len(rows) == 37 and right == pytest.approx(last_evaluation(learned / "classify")["eval_accuracy"])
    assert all(row["label"] in row["text"].split() for row in rows)
    answers = json.loads((learned / "span_qa" / "predictions.json").read_text())
    exact = np.mean([answer == "gold" for answer in answers.values()])
    assert len(answers) == 37 and exact == pytest.approx(last_evaluation(learned / "span_qa")["eval_exact_match"])
    sentences = (learned / "tag" / "predictions.conll").read_text().strip().split("\n\n")
    cells = [line.split(" ") for sentence in sentences for line in sentence.splitlines()]
    assert len(sentences) == 37 and {len(c) for c in cells} == {3}
    assert {c[1] for c in cells if c[0] == "paris"} == {"B-place"}


SAME = {name: "1 rank" for name in LAYOUTS if name != "1 rank"}
SAME |= {"several labels on 2": "several labels on 1"}


def test_scores_and_probabilities_are_written_exactly(learned: Path) -> None:
    scored, several = (
        list(csv.DictReader((learned / kind / "predictions.tsv").open(), delimiter="\t"))
        for kind in ("regress", "multi_label")
    )
    errors = [np.float32(row["prediction"]) - float(row["label"]) for row in scored]
    assert np.mean(np.square(errors)) == pytest.approx(last_evaluation(learned / "regress")["eval_mse"], rel=1e-6)
    right = np.mean([row["prediction"] == row["label"] for row in several])
    assert right == pytest.approx(last_evaluation(learned / "multi_label")["eval_exact_match"])
    for line in several:
        chances = {name: float(line[f"probability_{name}"]) for name in ("bad", "good", "sad")}
        assert line["prediction"] == ",".join(name for name, chance in chances.items() if chance >= 0.5)


def test_the_export_tags_plain_text_as_the_predictions_say(learned: Path) -> None:
    """That of BERT; tests/test_architectures.py has the others."""
    exported = pipeline("token-classification", str(export(learned / "tag")), ignore_labels=[], device="cpu")
    for sentence in (learned / "tag" / "predictions.conll").read_text().strip().split("\n\n"):
        words, _, said = zip(*(line.split(" ") for line in sentence.splitlines()), strict=True)
        starts = np.cumsum([0, *(len(word) + 1 for word in words[:-1])])
        tags = {token["start"]: token["entity"] for token in exported(" ".join(words))}
        assert [tags[start] for start in starts.tolist()] == list(said)


@pytest.mark.parametrize("name", SAME)
def test_the_losses_and_scores_are_those_of_one_rank(name: str, layouts: Path) -> None:
    one, here = (read(layouts / n / "metrics.jsonl") for n in (SAME[name], name))
    losses = [[r["loss"] for r in records if "loss" in r] for records in (one, here)]
    assert len(losses[0]) == 20
    np.testing.assert_allclose(losses[1], losses[0], rtol=2e-5)
    ours, theirs = last_evaluation(layouts / name), last_evaluation(layouts / SAME[name])
    assert ours["eval_loss"] == pytest.approx(theirs["eval_loss"], rel=2e-5)
    assert {k: v for k, v in ours.items() if k in SCORES} == {k: v for k, v in theirs.items() if k in SCORES}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_labelled_test_file_is_scored_and_predicted_in_its_order(name: str, layouts: Path) -> None:
    """On any number of ranks; each sample counts once."""
    predicted = list(csv.DictReader((layouts / name / "predictions.test.tsv").open(), delimiter="\t"))
    assert [row["index"] for row in predicted] == [str(i) for i in range(29)]
    gold = [row["label"] for row in rows("classify", 29, seed=7)]
    found = [r for r in read(layouts / name / "metrics.jsonl") if "test_accuracy" in r][-1]
    assert found["test_accuracy"] == np.mean([p["prediction"] == g for p, g in zip(predicted, gold, strict=True)])
    one = [r for r in read(layouts / "1 rank" / "metrics.jsonl") if "test_loss" in r][-1]
    assert found["test_loss"] == pytest.approx(one["test_loss"], rel=2e-5) and "test_f1" in found


@pytest.mark.parametrize(("kind", "run"), [("classify", "ZeRO 2"), ("multi_label", "several labels on 2")])
def test_the_losses_are_those_of_plain_pytorch(kind: str, run: str, layouts: Path) -> None:
    """Hugging Face's own model, loss and mean over the global batch, without DeepSpeed."""
    given = [*table(layouts, kind), *FEW]
    names = {o.split("=")[0] for o in given}
    tiny = [o for o in TINY if o.split("=")[0] not in names]
    config = compose([*tiny, *given, f"data.cache_dir={data_cache()}"])
    model = BertForSequenceClassification(AutoConfig.from_pretrained(layouts / run / "model")).train()
    assert model.config.num_labels == {"classify": 2, "multi_label": 3}[kind]
    initialise(model, config.seed)
    data = Encoded(task_class(kind).prepare(config, Console(quiet=True)).path / "train", pad_id=0)
    params = config.deepspeed["optimizer"]["params"]
    optimizer = torch.optim.AdamW(
        decay_groups(model, params["weight_decay"]), lr=params["lr"], betas=tuple(params["betas"]), eps=params["eps"]
    )
    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: factor(config.schedule, step, 20))
    stream = Grouped(data.lengths, config.seed, size=config.batch.global_size).from_sample(0)
    losses = []
    for _ in range(20):
        batch = data[next(stream)]
        batch.pop("index")
        loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        rate.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    ours = [r["loss"] for r in read(layouts / run / "metrics.jsonl") if "loss" in r]
    np.testing.assert_allclose(ours, losses, rtol=2e-5)


@pytest.fixture(scope="module")
def stopped_early(tmp_path_factory: pytest.TempPathFactory) -> Result:
    """A run that learns, and then forgets as its rate is far too high: the best step is an early one."""
    folder = tmp_path_factory.mktemp("early")
    return launch(folder, *table(folder, "classify"), *EARLY, recipe="finetune")


EARLY = (
    "train.steps=400", "train.eval_every=10", "train.patience=3", "train.keep_checkpoints=1", "schedule=constant",
    "deepspeed.optimizer.params.lr=3e-3", "deepspeed.optimizer.params.weight_decay=0", "zero=stage2",
)  # fmt: skip


def test_training_ends_when_the_metric_has_not_improved(stopped_early: Result) -> None:
    evaluations = {r["step"]: r["eval_accuracy"] for r in stopped_early.records if "eval_accuracy" in r}
    best = json.loads((stopped_early.dir / "best.json").read_text())
    assert best["value"] == max(evaluations.values()) == evaluations[best["step"]]
    assert max(r["step"] for r in stopped_early.steps) == best["step"] + 30 < 400
    kept = sorted(p.name for p in (stopped_early.dir / "checkpoints").iterdir())
    assert f"step-{best['step']}" in kept and len(kept) <= 2
    assert f"The best weights are those of step {best['step']}" in stopped_early.stdout


def test_starting_again_after_an_early_end_evaluates_the_best_weights_again(stopped_early: Result) -> None:
    folder = stopped_early.dir.parent
    again = launch(folder, *table(folder, "classify"), *EARLY, recipe="finetune")
    assert "ended early after step" in again.stdout
    assert len(again.steps) == len(stopped_early.steps)
    assert last_evaluation(again.dir)["eval_accuracy"] == json.loads((folder / "x" / "best.json").read_text())["value"]


def test_the_export_holds_the_best_weights_and_predicts_what_was_written(stopped_early: Result) -> None:
    folder = export(stopped_early.dir)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert model.config.id2label == {0: "bad", 1: "good"}
    rows = list(csv.DictReader((stopped_early.dir / "predictions.tsv").open(), delimiter="\t"))
    with torch.no_grad():
        logits = model(**tokenizer([r["text"] for r in rows], padding=True, return_tensors="pt")).logits
    assert [model.config.id2label[i] for i in logits.argmax(-1).tolist()] == [r["prediction"] for r in rows]
    assert logits.softmax(-1).max(-1).values.tolist() == pytest.approx(
        [float(r["probability"]) for r in rows], rel=1e-5
    )


def test_weights_keep_the_order_of_their_labels(stopped_early: Result) -> None:
    """Whatever that of the data; lr=0: nothing moves."""
    folder, weights = stopped_early.dir.parent, export(stopped_early.dir)
    given = fit(*table(folder, "classify"), "train.steps=2", f"model.weights={weights}", "data.labels=[good,bad]")
    assert not launch_many(folder, {"again": [*given, "deepspeed.optimizer.params.lr=0"]}).errors
    assert AutoConfig.from_pretrained(folder / "again" / "model").id2label == {0: "bad", 1: "good"}
    best = json.loads((stopped_early.dir / "best.json").read_text())["value"]
    assert last_evaluation(folder / "again")["eval_accuracy"] == best > 0.6


def test_stopping_and_resuming_gives_the_same_losses(tmp_path: Path) -> None:
    """Over the end of an epoch of 13 steps, the rate constant, dropout on."""
    common = (*table(tmp_path, "classify"), *FEW, "model.dropout=0.1", "schedule=constant", "train.save_every=7")
    assert not launch_many(tmp_path, {"whole": common, "cut": (*common, "train.steps=7")}).errors
    assert not launch_many(tmp_path, {"cut": common}).errors
    whole, cut = ([r["loss"] for r in read(tmp_path / n / "metrics.jsonl") if "loss" in r] for n in ("whole", "cut"))
    assert len(whole) == 20 and cut == whole


def test_from_pretraining_over_the_export_to_a_task(tmp_path: Path) -> None:
    """Pretrain, fine-tune from the run, which is exported on the way; and the weights are those."""
    launch(tmp_path, "name=bert", "train.steps=4", "data.max_length=64")
    given = [*table(tmp_path, "classify"), "train.steps=2", "deepspeed.optimizer.params.lr=0", "zero=stage3"]
    given = fit(*given, "name=tuned", f"model.weights={tmp_path / 'bert'}")
    result = launch(tmp_path, *given, recipe="finetune")
    tuned, started = (load_file(export(tmp_path / n) / "model.safetensors") for n in ("tuned", "bert"))
    body = [name for name in tuned if name.startswith("bert.")]
    assert body and all(torch.equal(tuned[n], started[n]) for n in body), "lr=0: nothing moves"
    assert "classifier.weight" in tuned and last_evaluation(result.dir)["eval_accuracy"] >= 0
    assert json.loads((tmp_path / "tuned" / "model" / "config.json").read_text())["id2label"] == {
        "0": "bad",
        "1": "good",
    }


def test_seeds_differ_and_are_summed_up(tmp_path: Path) -> None:
    given = [*table(tmp_path, "classify"), "train.steps=12", "seeds=[1,2]"]
    given.append(f"data.test={tmp_path}/classify.eval.jsonl")
    result = launch(tmp_path, *given, recipe="finetune")
    scores = json.loads((tmp_path / "x" / "scores.json").read_text())
    assert [s["seed"] for s in scores] == [1, 2]
    assert scores[0]["scores"]["eval_loss"] != scores[1]["scores"]["eval_loss"]
    assert "±" in result.stdout and (tmp_path / "x-seed2" / "predictions.tsv").exists()
    assert [row(tmp_path / f"x-seed{seed}") for seed in (1, 2)] == scores, "the directories alone have all of it"
    last = last_evaluation(tmp_path / "x-seed2")
    expected = {k: v for k, v in last.items() if k.startswith("eval_") and k != "eval_seconds"}
    tested = {k.replace("eval_", "test_"): v for k, v in expected.items()}  # they are the same rows
    assert scores[1]["scores"] == pytest.approx(expected | tested) and "test accuracy" in result.stdout
    assert "eval_accuracy" in expected and scores[1]["seconds"] > 0
    rates = [r["samples_per_second"] for r in read(tmp_path / "x-seed1" / "metrics.jsonl") if "samples_per_second" in r]
    assert scores[0]["samples_per_second"] == pytest.approx(float(np.median(rates)))


REFUSED: dict[str, tuple[list[str], str]] = {
    "another number of labels": (["model.weights={other}"], "classifier.bias is (3,) there and (2,) here"),
    "another vocabulary": (["model.weights={small}"], "its vocabulary has 20 entries, the tokenizer"),
    "longer than the model": (["model.weights={other}", "data.max_length=64"], "data.max_length=64: model.weights="),
    "an unknown metric": (["task.metrics=[acuracy]"], "Did you mean 'accuracy'?"),
    "no training data": (["data.train=null"], "data.train is not set"),
    "no such file": (["data.train=nowhere.csv"], "nowhere.csv"),
    "a label that is new": (["data.eval={odd}"], "unknown label 'ugly'"),
}


def fit(*overrides: str) -> list[str]:
    """Without those on the shape of a model that brings its own."""
    return read_by(overrides, overrides)


@pytest.fixture(scope="module")
def refused(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[str]]]:
    folder = tmp_path_factory.mktemp("refused")
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    places = {"odd": write(folder / "odd.jsonl", [{"text": "a b", "label": "ugly"}])}
    launch_many(folder, {"base": [*table(folder, "classify"), "train.steps=2"]})
    tokenizer = AutoTokenizer.from_pretrained(folder / "base" / "model")
    for name, size, labels in (("other", len(tokenizer), 3), ("small", 20, 2), ("unnamed", len(tokenizer), 2)):
        config = BertConfig(vocab_size=size, num_labels=labels, max_position_embeddings=32, **shape)
        BertForSequenceClassification(config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
        places[name] = folder / name
    runs = {n: fit(*table(folder, "classify"), *(o.format(**places) for o in more)) for n, (more, _) in REFUSED.items()}
    new = fit(*table(folder, "classify"), f"model.weights={places['other']}", "model.new_head=true")
    own = [*new, "train.steps=2"]
    runs["weights"] = [*own, "zero=stage1"]
    runs["weights in stages"] = [*own, "zero=stage1", "pipeline=two"]
    runs["unnamed"] = fit(*table(folder, "classify"), f"model.weights={places['unnamed']}", "train.steps=2")
    runs["new head"] = new
    many = launch_many(folder, runs)
    (folder / "told.txt").write_text(many.stdout)
    return folder, many.errors


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_learnt_is_refused_before_training(
    name: str, refused: tuple[Path, dict[str, list[str]]]
) -> None:
    folder, errors = refused
    assert set(errors[name]) != {None} and all(REFUSED[name][1] in str(e) for e in errors[name]), errors[name]
    assert not (folder / name / "metrics.jsonl").exists()


def test_weights_and_a_new_head_go_into_the_stages_of_a_pipeline(refused: tuple[Path, dict[str, list[str]]]) -> None:
    folder, errors = refused
    assert "weights" not in errors and "weights in stages" not in errors
    losses = [last_evaluation(folder / n)["eval_loss"] for n in ("weights", "weights in stages")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_which_label_is_which_of_unnamed_ones_is_said_to_be_a_guess(refused: tuple[Path, dict[str, list[str]]]) -> None:
    folder, errors = refused
    told = " ".join((folder / "told.txt").read_text().split())
    guess = "their head names no labels (LABEL_0, …), so that these are theirs is a guess: 0 is bad, 1 is good"
    assert "unnamed" not in errors and told.count("is a guess") == 1 and guess in told


def test_a_new_head_replaces_that_of_the_weights(refused: tuple[Path, dict[str, list[str]]]) -> None:
    folder, errors = refused
    assert "new head" not in errors and last_evaluation(folder / "new head")["eval_loss"] > 0


def test_glue_is_all_nine_tasks_and_the_papers_table(tmp_path: Path) -> None:
    for file, lines in glue_files().items():
        path = tmp_path / "glue" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        text = "\n".join(lines) + "\n"
        if file.endswith(".gz"):
            path.write_bytes(gzip.compress(text.encode()))
        else:
            path.write_text(text)
    small = [
        "train.steps=2",
        "train.eval_every=null",
        "train.save_every=null",
        "data.max_length=32",
        "model.weights=none",
    ]
    given = ["task=glue", "data=files/glue", f"data.path={tmp_path / 'glue'}", "model.weights=none", *small]
    result = launch(tmp_path, *given, recipe="finetune", timeout=400)
    scores = json.loads((tmp_path / "x" / "scores.json").read_text())
    assert {s["task"] for s in scores} == {"sst2", "cola", "mrpc", "qqp", "stsb", "mnli", "qnli", "rte", "wnli"}
    assert "MNLI-m" in result.stdout and "Average" in result.stdout
    best = {s["task"]: s["best"] for s in scores}
    assert (best["cola"], best["stsb"], best["qqp"], best["rte"]) == (
        "eval_matthews", "eval_spearman", "eval_f1", "eval_accuracy",
    )  # fmt: skip
    shutil.rmtree(tmp_path / "x-rte")
    saved = ["--config-path", str(tmp_path / "x"), "--config-name", "config"]
    again = launch(tmp_path, *saved, recipe="finetune", ranks=0, bare=True)
    assert again.stdout.count("done before, in ") == 8 and "Average" in again.stdout
    redone = {s["task"]: s for s in json.loads((tmp_path / "x" / "scores.json").read_text())}
    assert {s["task"]: s for s in scores if s["task"] != "rte"} == {t: s for t, s in redone.items() if t != "rte"}
    assert redone["rte"]["scores"]["eval_accuracy"] >= 0 and (tmp_path / "x-rte" / "checkpoints").exists()


def glue_files() -> dict[str, list[str]]:
    """Twenty rows of each task in the layout of its files."""
    text = ["the old man and the sea", "a new day of red water", "time and tide", "the road of stone"]
    pick = lambda i: text[i % 4]  # noqa: E731
    n = range(20)
    pair = lambda labels: [  # noqa: E731
        json.dumps({"text_a": pick(i), "text_b": pick(i + 1), "label": labels[i % len(labels)]}) for i in n
    ]
    indexed = lambda labels: [  # noqa: E731
        "index\tsentence1\tsentence2\tlabel",
        *(f"{i}\t{pick(i)}\t{pick(i + 1)}\t{labels[i % 2]}" for i in n),
    ]
    entails = ["entailment", "not_entailment"]
    sts = "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore"
    files = {
        "SST-2/{}.tsv": ["sentence\tlabel", *(f"{pick(i)}\t{i % 2}" for i in n)],
        "CoLA/{}.tsv": [f"x\t{i % 2}\t\t{pick(i)}" for i in n],
        "RTE/{}.tsv": indexed(entails),
        "WNLI/{}.tsv": indexed(["0", "1"]),
        "STS-B/{}.tsv": [sts, *(f"{i}\tg\tf\ty\to\ts\ts\t{pick(i)}\t{pick(i + 1)}\t{i % 6}" for i in n)],
        "MNLI/{}.jsonl": pair(["entailment", "neutral", "contradiction"]),
        "QQP/{}.jsonl": pair(["0", "1"]),
        "QNLI/{}.jsonl": pair(entails),
    }
    names = {"SST-2/train.tsv": "SST-2/train.tsv.gz", "QNLI/dev.jsonl": "QNLI/dev_small.jsonl"}
    names |= {f"{t}/train.jsonl": f"{t}/train.jsonl.gz" for t in ("MNLI", "QQP", "QNLI")}
    found = {f.format(split): lines for f, lines in files.items() for split in ("train", "dev")}
    mrpc = ["Quality\t#1 ID\t#2 ID\t#1 String\t#2 String", *(f"{i % 2}\t1\t2\t{pick(i)}\t{pick(i + 1)}" for i in n)]
    return {names.get(f, f): lines for f, lines in found.items()} | {"MRPC/msr_paraphrase_train.txt.gz": mrpc}


@pytest.fixture(scope="module")
def splits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a test split, one with two held-out ones, one with none."""
    folder = tmp_path_factory.mktemp("splits")
    given = list(table(folder, "classify"))
    held = next(o for o in given if o.startswith("data.eval=")).split("=")[1]
    alone = [o for o in given if not o.startswith("data.eval=")]
    unlabelled = write(folder / "test.jsonl", [{"text": f"the good sea {i}"} for i in range(7)])
    other = write(folder / "other.jsonl", [{"text": "a good day", "label": "good"}] * 5)
    runs = {
        "test": [*given, f"data.test={unlabelled}", "train.steps=2"],
        "two": [*alone, f"data.eval.matched={held}", f"data.eval.mismatched={other}", "train.steps=2"],
        "none": [*alone, "data.holdout=0", "train.steps=2", "train.eval_every=null"],
    }
    assert not launch_many(folder, runs).errors
    return folder


def test_a_test_split_is_predicted_as_a_leaderboard_takes_it(splits: Path) -> None:
    lines = (splits / "test" / "predictions.test.tsv").read_text().splitlines()
    assert lines[0] == "index\tprediction" and [x.split("\t")[0] for x in lines[1:]] == [str(i) for i in range(7)]
    assert {x.split("\t")[1] for x in lines[1:]} <= {"good", "bad"}


def test_a_second_held_out_split_is_recorded_under_its_name(splits: Path) -> None:
    result = last_evaluation(splits / "two")
    assert {"eval_accuracy", "eval_loss", "eval_mismatched_accuracy", "eval_mismatched_loss"} <= set(result)
    assert result["eval_mismatched_accuracy"] in (0.0, 1.0)
    assert (splits / "two" / "predictions.eval.mismatched.tsv").exists()


def test_without_anything_held_out_the_last_weights_are_kept(splits: Path) -> None:
    records = read(splits / "none" / "metrics.jsonl")
    assert not any("eval_loss" in r for r in records) and records[-1]["checkpoint"] == "step-2"


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ("[mse]", "eval: all predictions are the same. Train longer"),
        ("[pearson,mse]", "eval: all predictions are the same; undefined, pearson count as 0. Train longer"),
    ],
)
def test_constant_predictions_are_said_once(names: str, said: str) -> None:
    task = Regress.__new__(Regress)
    task.config = compose(["task=regress", f"task.metrics={names}"])
    told: list[str] = []
    vars(task).update(
        run=SimpleNamespace(warn=told.append), prepared=SimpleNamespace(facts={"positive": 1}), names=("score",),
        examples=lambda _: [Text("0", "a", None, 1.0), Text("1", "b", None, 3.0)],
    )  # fmt: skip
    task.scores("eval", {0: np.array([1.5]), 1: np.array([2.0])})
    assert not told
    assert [task.scores("eval", {0: np.array([2.0]), 1: np.array([2.0])})["mse"] for _ in range(2)] == [1, 1]
    assert len(told) == 1 and told[0].startswith(said)


def test_prepared_data_is_found_again(tmp_path: Path) -> None:
    config = compose([*table(tmp_path, "classify"), f"data.cache_dir={tmp_path / 'cache'}", "tokenizer.vocab_size=200"])
    calls: list[int] = []

    def encode(config: Any, tokenizer: Any, examples: list[Any]) -> Any:
        calls.append(len(examples))
        return (labelled.Sample([([1], [0])], [0]) for _ in range(len(examples)))

    first = labelled.prepare(config, labelled.Reader(encode))
    assert labelled.prepare(config, labelled.Reader(encode)).path == first.path and calls == [203, 37]
    assert [*first.audit["splits"]] == ["train", "eval"]


def test_without_held_out_data_a_share_of_the_rows_is_held_out_whatever_the_seed(tmp_path: Path) -> None:
    given = [o for o in table(tmp_path, "classify") if not o.startswith("data.eval=")]
    common = [*given, f"data.cache_dir={tmp_path / 'cache'}", "data.holdout=0.1", "tokenizer.vocab_size=200"]
    rows = []
    for seed in (1, 2):
        config = compose([*common, f"seed={seed}"])
        prepared = labelled.prepare(
            config, labelled.Reader(lambda c, t, e: (labelled.Sample([([1], [0])], [0]) for _ in e))
        )
        labels = tuple(prepared.facts["labels"])
        train, held = ({e.id for e in labelled.read(config, s, labels)} for s in ("train", "eval"))
        assert len(held) == 20 and len(train) == 183 and not train & held
        rows.append(held)
    assert rows[0] == rows[1]
