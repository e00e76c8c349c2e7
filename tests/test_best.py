"""Which step's weights are the best: from what the run logged, and only if they are still there."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from toolkit.config.compose import compose
from toolkit.job import ranks
from toolkit.run.directory import Run
from toolkit.train.loop import Best, find_best


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "from_rank0", lambda value: value)


def run(tmp_path: Path, scores: dict[int, float], kept: list[int], *overrides: str, metric: str = "accuracy") -> Run:
    found = Run(tmp_path, compose([*overrides]), Console())
    for step in kept:
        (tmp_path / "checkpoints" / f"step-{step}").mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"step": step, f"eval_{metric}": score}) for step, score in scores.items()]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    return found


def task(best: str | None) -> Any:
    return SimpleNamespace(best=best)


def test_the_first_of_the_highest_scores_is_the_best(tmp_path: Path) -> None:
    here = run(tmp_path, {10: 0.5, 20: 0.9, 30: 0.9, 40: 0.1}, [10, 20, 30, 40])
    assert find_best(here, task("accuracy"), 40) == Best(20, False)
    assert json.loads((tmp_path / "best.json").read_text()) == {"step": 20, "metric": "accuracy", "value": 0.9}


def test_of_an_error_the_lowest_is_the_best(tmp_path: Path) -> None:
    here = run(tmp_path, {10: 0.5, 20: 0.2, 30: 0.4}, [10, 20, 30], metric="mse")
    assert find_best(here, task("mse"), 30).step == 20


def test_weights_that_are_gone_are_not_the_best_but_those_at_hand_are(tmp_path: Path) -> None:
    here = run(tmp_path, {100: 0.9, 200: 0.5}, [200])
    assert find_best(here, task("accuracy"), 200).step == 200
    assert find_best(run(tmp_path, {100: 0.9, 200: 0.5}, []), task("accuracy"), 100).step == 100


def test_patience_counts_the_evaluations_since(tmp_path: Path) -> None:
    scores = {10: 0.5, 20: 0.9, 30: 0.8, 40: 0.7}
    for patience, ended in ((2, True), (3, False)):
        here = run(tmp_path, scores, [20], f"train.patience={patience}")
        assert find_best(here, task("accuracy"), 40) == Best(20, ended)


def test_a_run_that_went_back_before_its_best_has_none(tmp_path: Path) -> None:
    find_best(run(tmp_path, {10: 0.5}, [10]), task("accuracy"), 10)
    assert find_best(run(tmp_path, {}, [5]), task("accuracy"), 5) == Best()
    assert not (tmp_path / "best.json").exists(), "an export would take it"


def test_a_task_without_a_metric_keeps_its_last_weights(tmp_path: Path) -> None:
    assert find_best(run(tmp_path, {10: 0.5}, [10]), task(None), 10) == Best()
