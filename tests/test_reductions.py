"""A sum by threads in four ways: the right ones are right to the bit, the wrong one loses additions."""

import csv
import math
import re
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from launching import launch
from rich.console import Console
from studies import reductions
from studies.reductions import ReductionsBuilder, Terms, draw

from toolkit.errors import ConfigError
from toolkit.job import ops

ROWS = 100_001  # neither groups of 64 nor blocks of 4096 divide it
RIGHT = ("serial", "mutex", "partial")


@pytest.fixture(scope="module")
def op() -> Any:
    return reductions.load(Console())


@pytest.fixture(scope="module")
def data() -> Terms:
    """Errors of very different size, so that another order of summation gives other bits."""
    drawn = draw(rows=ROWS, features=5, seed=1)
    drawn.y.view(-1)[:ROWS] *= torch.logspace(-6, 2, ROWS)
    return drawn


def summed(op: Any, method: str, data: Terms, threads: int) -> float:
    result: float = getattr(op, method)(data.x, data.w, data.y, threads)
    return result


def rows_of(data: Terms) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """x as [rows, features] and y as [rows], without what the last group was filled up with."""
    x = data.x.permute(0, 2, 1).reshape(-1, data.w.numel())[: data.rows]
    return x.numpy(), data.y.flatten()[: data.rows].numpy()


def test_the_exact_sum_is_numpys_in_double_precision(data: Terms) -> None:
    x, y = rows_of(data)
    errors = np.abs(x.astype(np.float64) @ data.w.numpy().astype(np.float64) - y)
    assert data.exact() == pytest.approx(math.fsum(errors), rel=1e-14)
    assert not data.x[-1, :, ROWS % 64 :].any() and not data.y[-1, ROWS % 64 :].any()


@pytest.mark.parametrize("method", RIGHT)
def test_a_right_sum_is_exact_but_for_the_rounding_of_rows(method: str, op: Any, data: Terms) -> None:
    assert summed(op, method, data, 3) == pytest.approx(data.exact(), rel=1e-7)


@pytest.mark.parametrize("method", RIGHT)
def test_sums_of_whole_numbers_are_exact(method: str, op: Any) -> None:
    x = torch.arange(2 * 3 * 64).view(2, 3, 64).float()
    w, y = torch.tensor([1.0, -2.0, 3.0]), torch.arange(128.0).view(2, 64)
    rows = zip(x.permute(0, 2, 1).reshape(-1, 3).tolist(), y.view(-1).tolist(), strict=True)
    expected = sum(abs(a - 2 * b + 3 * c - d) for (a, b, c), d in rows)
    assert summed(op, method, Terms(x, w, y, 128), 2) == expected


def test_the_right_sums_have_the_same_bits_for_every_number_of_threads(op: Any, data: Terms) -> None:
    for method in ("mutex", "partial"):
        assert len({summed(op, method, data, n) for n in (1, 2, 3, 5, 8, 64)}) == 1, method
    assert summed(op, "partial", data, 3) == summed(op, "serial", data, 1)


def test_the_order_of_summation_is_the_one_that_is_told(op: Any, data: Terms) -> None:
    """Errors that fp32 holds exactly, of sizes so different that their sum rounds, added one by one by torch."""
    y = data.y.abs() * 10 ** torch.empty_like(data.y).uniform_(-12, 4, generator=torch.Generator().manual_seed(1))
    zero = Terms(torch.zeros_like(data.x), data.w, y, ROWS)
    sums = []
    for x_block, y_block in zip(zero.x.split(64), y.split(64), strict=True):
        lanes = y_block.double().cumsum(0)[-1]
        sums.append(float(lanes.cumsum(0)[-1]))
        assert summed(op, "serial", Terms(x_block, data.w, y_block, y_block.numel()), 1) == sums[-1]
    assert summed(op, "partial", zero, 2) == sum(sums)
    units = sum(round(float(error) * 2**32) for error in y.flatten())
    assert summed(op, "mutex", zero, 2) == units / 2**32


def test_threads_on_one_unprotected_sum_lose_additions(op: Any) -> None:
    large = draw(rows=2_000_000, features=2, seed=1)
    exact = large.exact()
    assert summed(op, "unprotected", large, 1) == pytest.approx(exact, rel=1e-9), "alone it has no race"
    for _ in range(50):  # threads that a busy machine runs one after the other lose little
        if summed(op, "unprotected", large, 4) < 0.999 * exact:
            return
    raise AssertionError("nothing was lost in fifty sums")


def test_other_python_threads_run_meanwhile(op: Any) -> None:
    data = draw(rows=4_000_000, features=1, seed=1)
    begin, ticks = threading.Event(), 0

    def work() -> None:
        begin.set()
        for _ in range(3):
            summed(op, "mutex", data, 1)

    worker = threading.Thread(target=work)
    worker.start()
    begin.wait()
    while worker.is_alive():
        time.sleep(0.001)
        ticks += 1
    assert ticks > 10, "with the interpreter's lock held there is about one between two calls"


def test_the_copy_copies_all_of_it(op: Any) -> None:
    source = torch.rand(100_003)
    target = torch.zeros_like(source)
    op.copy(target, source, 3)
    assert torch.equal(source, target)


def test_sizes_that_do_not_fit_are_refused(op: Any, data: Terms) -> None:
    with pytest.raises(RuntimeError, match="do not fit"):
        op.partial(data.x, data.w[:2].clone(), data.y, 1)
    with pytest.raises(RuntimeError, match="contiguous"):
        op.partial(data.x.transpose(1, 2), data.w, data.y, 1)


def test_a_change_of_the_source_is_built_under_another_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = ReductionsBuilder()
    changed = tmp_path / "changed.cpp"
    changed.write_text(reductions.SOURCE.read_text().replace("-y[group", "1-y[group"))
    monkeypatch.setattr(reductions, "SOURCE", changed)
    after = reductions.load(Console())
    zero = torch.zeros(1, 1, 64)
    assert after.serial(zero, torch.zeros(1), torch.zeros(1, 64), 1) == 64
    assert after.__name__ != before.name and ReductionsBuilder().name == after.__name__
    (ops.directory() / after.__name__ / f"{after.__name__}.so").unlink()


def test_rows_that_do_not_fit_memory_are_refused_before_any_is_taken() -> None:
    with pytest.raises(ConfigError, match=r"reductions.rows=1000000000000: .* GiB with 8 .*Take at most") as error:
        draw(rows=10**12, features=8, seed=0)
    most = int(str(error.value).rsplit("=", 1)[1].rstrip("."))
    assert 10**5 < most < 10**12 and "\n" not in str(error.value)


SMALL = ("reductions.rows=300_000", "reductions.repeats=3")


def test_the_recipe_compares_the_four_ways(tmp_path: Path) -> None:
    result = launch(tmp_path, "reductions.threads=[4,1,2,2]", *SMALL, ranks=0, recipe="reductions", bare=True)
    expected = [("serial", 1), *((m, n) for m in reductions.METHODS[1:] for n in (1, 2, 4))]
    rows = list(csv.DictReader((result.dir / "reductions.csv").open()))
    assert [(r["method"], int(r["threads"])) for r in rows] == expected
    assert [(r["step"], r["method"], r["threads"]) for r in result.records] == [(i, *e) for i, e in enumerate(expected)]
    for r in result.records:
        assert r["samples_per_second"] == pytest.approx(300_000 / r["seconds"])
        assert r["gb_per_second"] == pytest.approx(4 * 9 * 300_032 / r["seconds"] / 1e9), "filled up to 4688 x 64 rows"
        assert r["speedup"] == pytest.approx(result.records[0]["seconds"] / r["seconds"])
        assert r["copy_gb_per_second"] > 0
        assert r["relative_error"] < 1e-8 or r["method"] == "unprotected"
    right = {r["mean_absolute_error"] for r in result.records if r["method"] in ("serial", "partial")}
    assert len(right) == 1 and right.pop() == pytest.approx(math.sqrt(2 / math.pi), rel=0.01), "of normal noise"
    assert all((result.dir / f"reductions.{kind}").stat().st_size > 5000 for kind in ("png", "svg"))
    assert "partial" in result.stdout and f"Run directory: {result.dir}" in result.stdout


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("reductions.threads=0", r"reductions.threads.0=0: .*greater than 0"),
        ("reductions.threads=[]", r"reductions.threads=\[\]: "),
        ("reductions.threads=[2,100000]", r"reductions.threads.1=100000: .*1024"),
        ("reductions.row=5", r"reductions.row: unknown key. Did you mean 'rows'"),
    ],
)
def test_bad_values_are_refused_in_one_line(override: str, message: str, tmp_path: Path) -> None:
    result = launch(tmp_path, override, ranks=0, recipe="reductions", bare=True, check=False)
    assert result.code == 2 and re.search(message, result.error) and len(result.error.splitlines()) == 1
    assert not result.dir.exists()


def test_more_than_one_rank_is_refused(tmp_path: Path) -> None:
    result = launch(tmp_path, ranks=2, recipe="reductions", bare=True, check=False)
    assert result.code and "error: 2 ranks: reductions compares threads" in result.stderr
    assert len(result.error.splitlines()) == 1 and not result.dir.exists()
