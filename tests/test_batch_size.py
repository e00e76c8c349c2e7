"""Regimes of batch sizes on curves of closed form, the search for the best rate, and the recipe on two ranks."""

import csv
import json
import math
from itertools import pairwise
from pathlib import Path

import pytest
from launching import launch, start
from studies import batch_size as study
from studies.batch_size import Trial

LINEAR = (
    "task=linear", "data=synthetic", "data.rows=600", "data.holdout=0.3", "data.features=4", "optimizer=sgd",
    "zero=stage0",
    "deepspeed.optimizer.params.momentum=0", "deepspeed.optimizer.params.lr=0.02", "batch.micro_size=2",
    "batch_size.sizes=[4,8]", "batch_size.rates=[0.5,1,2]", "batch_size.extend=2", "batch_size.max_steps=60",
    "batch_size.target_loss=1.4", "train.hang_minutes=3",
)  # fmt: skip


def test_the_regimes_of_a_curve_of_closed_form() -> None:
    """steps = a / B + b: a doubling saves a / (2 a + 2 b B) of them at the smaller B."""
    a, b = 4096, 16
    sizes = [2**i for i in range(13)]
    rows = study.judged([{"batch_size": s, "rate": 1.0, "steps": a // s + b, "inside": True} for s in sizes])
    for before, row in pairwise(rows):
        assert row["saved"] == pytest.approx(a / (2 * (a + b * before["batch_size"])))
    # at least 40 % up to B = a / (4 b) = 64, below 25 % beyond B = a / b = 256
    regimes = {r["batch_size"]: r["regime"] for r in rows}
    assert [s for s in sizes if regimes[s] == "perfect"] == [2, 4, 8, 16, 32, 64, 128]
    assert [s for s in sizes if regimes[s] == "diminishing"] == [256, 512]
    assert [s for s in sizes if regimes[s] == "plateau"] == [1024, 2048, 4096] and regimes[1] == ""
    assert rows[9]["speedup"] == (a + b) / (8 + b) and rows[9]["ideal"] == 512 and rows[9]["samples"] == 512 * (8 + b)
    assert study.useful(rows) == rows[9]
    assert study.verdict(rows, 16).startswith("Largest useful data-parallel degree: 32 ranks of 16 samples each, a ")
    assert "at least 8 ranks" in study.verdict(rows[:8], 16), "all sizes but the plateau were tried"


def test_sizes_that_never_reach_the_target_have_no_regime_and_unequal_distances_count(tmp_path: Path) -> None:
    steps = {4: None, 16: 100, 64: 25, 128: 26, 256: 24}
    rows = study.judged([{"batch_size": s, "rate": 1.0, "steps": n, "inside": True} for s, n in steps.items()])
    assert [r["regime"] for r in rows] == ["not reached", "", "perfect", "plateau", "plateau"]
    assert rows[2]["saved"] == 0.5 and rows[3]["saved"] < 0
    assert rows[4]["saved"] == pytest.approx(1 - (24 / 25) ** 0.5), "by the fewest steps so far"
    assert "No batch size reached the target" in study.verdict(rows[:1], 16)
    study.plot(rows[:1], [], tmp_path / "plot", "")


def attempts(steps_of: dict[float, int | None], log: list[tuple[float, int]]) -> study.Attempt:
    """Trials of a made-up training, found by the nearest rate."""

    def attempt(rate: float, limit: int) -> Trial:
        log.append((round(rate, 6), limit))
        steps = next(n for r, n in steps_of.items() if math.isclose(r, rate))
        if steps is None:
            return Trial(8, rate, 1.0, limit, None, "diverged", math.inf)
        reached = steps <= limit
        return Trial(8, rate, 1.0, limit, steps if reached else None, "reached" if reached else "not reached", steps)

    return attempt


def test_the_search_goes_on_until_the_best_rate_lies_inside() -> None:
    log: list[tuple[float, int]] = []
    found = study.search(attempts({0.5: 90, 1: 50, 2: 30, 4: 20, 8: None}, log), 1, (0.5, 1, 2), 4, 1000)
    assert log == [(1, 1000), (0.5, 50), (2, 50), (4, 30), (8, 20)], "none goes on for longer than the best so far"
    assert study.best(8, found) == {"batch_size": 8, "rate": 4, "steps": 20, "inside": True}
    found = study.search(attempts({0.5: 90, 1: 50, 2: 30, 4: 20}, []), 1, (0.5, 1, 2), 1, 1000)
    assert not study.best(8, found)["inside"]
    shown = study.listing(study.judged([study.best(8, found)]))
    assert [str(cell) for cell in shown.columns[-1].cells] == ["extend rates"]


def test_where_no_rate_reaches_the_target_the_search_follows_the_loss() -> None:
    found = study.search(attempts({0.125: 110, 0.25: 120, 0.5: 150, 1: 200, 2: None}, []), 1, (0.5, 1, 2), 2, steps=100)
    assert [t.rate for t in found] == [0.125, 0.25, 0.5, 1, 2] and study.best(8, found)["steps"] is None
    assert [t.end for t in found] == ["not reached"] * 4 + ["diverged"]


def test_evaluations_are_five_percent_apart() -> None:
    steps = list(study.evaluations(500))
    assert steps[:40] == [*range(1, 41)] and steps[-1] == 500
    assert all(b - a <= max(1, a / 20) for a, b in pairwise(steps))


def test_the_recipe_on_two_ranks_survives_a_diverging_rate_and_goes_on_where_it_ended(tmp_path: Path) -> None:
    recipe = {"recipe": "batch_size", "bare": True}
    overrides = (*LINEAR, "batch_size.rates=[0.5,1,2,400]")
    with start(tmp_path, *overrides, **recipe) as job:  # type: ignore[arg-type]
        file = job.dir / "trials.jsonl"
        job.until(lambda: file.exists() and len(file.read_text().splitlines()) >= 4, "three trials")
        job.kill()
    before = file.read_text().splitlines()
    with file.open("a") as cut:
        cut.write('{"size": 4, "ra')
    result = launch(tmp_path, *overrides, **recipe)  # type: ignore[arg-type]
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert file.read_text().splitlines()[: len(before)] == before, "finished trials are kept"
    trials = [Trial(**line) for line in lines[1:]]
    assert len({(t.size, t.rate) for t in trials}) == len(trials), "and none is made again"
    assert {t.end for t in trials if t.rate >= 4} == {"diverged"}
    rows = list(csv.DictReader((result.dir / "batch_size.csv").open()))
    for row in rows:
        mine = [t.steps for t in trials if t.size == int(row["batch_size"]) and t.steps]
        assert mine and int(row["steps"]) == min(mine) and row["inside"] == "True"
    assert float(rows[1]["speedup"]) == int(rows[0]["steps"]) / int(rows[1]["steps"])
    assert [r["step"] for r in result.records] == [0, 1]
    assert "Largest useful data-parallel degree: " in result.stdout
    assert all((result.dir / f"batch_size.{kind}").stat().st_size > 5000 for kind in ("png", "svg"))
    other = launch(tmp_path, *overrides, "seed=1", check=False, **recipe)  # type: ignore[arg-type]
    assert other.code == 2 and "its trials are of another configuration" in other.error


@pytest.mark.parametrize("overrides, message", [
    (["batch_size.target_loss=null"], "batch_size.target_loss is not set"),
    (["batch_size.sizes=[4,7]"], "batch_size.sizes=[4, 7]: batch.global_size=7 is no multiple of batch.micro_size=2"),
    (["batch_size.sizes=[4]"], "there is nothing to compare"),
    (["batch_size.rates=[1,0,2]"], "batch_size.rates.1=0: Input should be greater than 0"),
    (["batch_size.target_loss=1e9"], "batch_size.target_loss=1e+09: the loss before training is "),
])  # fmt: skip
def test_what_cannot_be_compared_is_refused(overrides: list[str], message: str, tmp_path: Path) -> None:
    result = launch(tmp_path, *LINEAR, *overrides, ranks=0, recipe="batch_size", bare=True, check=False)
    assert result.code == 2 and message in result.error and len(result.error.splitlines()) == 1
