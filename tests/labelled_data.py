"""Small labelled tables that a tiny model learns in seconds, one for each kind of task.

overrides = table(tmp_path, "classify")     # task=classify data.train=… data.eval=…
"""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

FILLERS = "the a of old new red sea day way man time road tree house water night stone river".split()  # noqa: SIM905
KINDS = ("classify", "multi_label", "regress", "tag", "span_qa", "choose")
TRAINING = (
    "data.max_length=32",
    "train.steps=120",
    "train.epochs=null",
    "model.initializer_range=0.1",
    "train.log_every=10",
    "train.save_every=null",
    "train.eval_every=30",
    "train.eval_samples=null",
    "deepspeed.optimizer.params.lr=3e-3",
    "model.dropout=0",
)


def words(rng: random.Random, low: int = 3, high: int = 18) -> list[str]:
    return [rng.choice(FILLERS) for _ in range(rng.randint(low, high))]


def _with(rng: random.Random, word: str) -> list[str]:
    found = words(rng)
    found.insert(rng.randint(0, len(found)), word)
    return found


def _classify(rng: random.Random, number: int) -> dict[str, Any]:
    label = rng.choice(["good", "bad"])
    return {"text": " ".join(_with(rng, label)), "label": label}


def _multi_label(rng: random.Random, number: int) -> dict[str, Any]:
    labels = [name for name in ("good", "bad", "sad") if rng.random() < 0.5]
    found = words(rng)
    for label in labels:
        found.insert(rng.randint(0, len(found)), label)
    return {"text": " ".join(found), "label": labels}


def _regress(rng: random.Random, number: int) -> dict[str, Any]:
    score = rng.randint(0, 2)
    return {"text": " ".join(_with(rng, ["good", "fair", "bad"][score])), "label": score}


def _tag(rng: random.Random, number: int) -> dict[str, Any]:
    names = {"ann": "B-person", "paris": "B-place"}
    tokens = _with(rng, rng.choice(list(names)))
    return {"tokens": tokens, "tags": [names.get(t, "O") for t in tokens]}


def _span_qa(rng: random.Random, number: int) -> dict[str, Any]:
    context = " ".join(_with(rng, "gold"))
    answers = {"text": ["gold"], "answer_start": [context.index("gold")]}
    return {"id": f"q{number}", "question": "what shines", "context": context, "answers": answers}


def _choose(rng: random.Random, number: int) -> dict[str, Any]:
    label = rng.randint(0, 3)
    endings = {f"ending{i}": " ".join(_with(rng, "good" if i == label else "bad")) for i in range(4)}
    return {"prompt": " ".join(words(rng, 2, 4)), **endings, "label": label}


ROW: dict[str, Callable[[random.Random, int], dict[str, Any]]] = {
    "classify": _classify, "multi_label": _multi_label, "regress": _regress, "tag": _tag, "span_qa": _span_qa,
    "choose": _choose,
}  # fmt: skip


def rows(kind: str, number: int, seed: int = 0) -> list[dict[str, Any]]:
    rng = random.Random(f"{kind}/{seed}")
    return [ROW[kind](rng, i) for i in range(number)]


def write(path: Path, content: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in content))
    return path


def table(folder: Path, kind: str, train: int = 203, held: int = 37) -> tuple[str, ...]:
    """The overrides of a task on data of its own; the sizes divide by nothing."""
    paths = [write(folder / f"{kind}.{n}.jsonl", rows(kind, size, seed)) for seed, (n, size) in enumerate(
        {"train": train, "eval": held}.items()
    )]  # fmt: skip
    metrics = {"regress": "spearman,pearson,mse"}.get(kind)
    more = [f"task.metrics=[{metrics}]"] if metrics else []
    return (f"task={kind}", "model.weights=none", f"data.train={paths[0]}", f"data.eval={paths[1]}", *TRAINING, *more)
