"""Random numbers that do not know of ranks, and chains that find the posterior of a linear regression."""

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from launching import launch
from scipy import stats
from sklearn.linear_model import LinearRegression, Ridge
from studies import mcmc, mcmc_report
from studies.random_numbers import Counter, Generator, numbers, share, uniform

from toolkit.config.schema import Data
from toolkit.data import regression
from toolkit.errors import DataError

TABLE = regression.read(Data(format=None), seed=1)
TARGET = mcmc.posterior(TABLE, prior=1.0)
TINY = ("mcmc.steps=300", "mcmc.warmup=100", "mcmc.rounds=1", "mcmc.chains=5")


def chains(kind: Generator, world: int, steps: int = 250, count: int = 8) -> mcmc.Floats:
    """[steps, size, count], each rank's share sampled on its own."""
    own = [numbers(kind, 7, count, TARGET.size, rank, world) for rank in range(world)]
    return np.concatenate([mcmc.sample(TARGET, source, steps) for source in own], axis=2)


def test_the_counter_gives_the_published_words() -> None:
    """Known answers of Random123 1.14 for philox4x64-10: key 0 and counter 0, all bits set, digits of pi."""
    zero = Counter(0, [0], 3).words(0, 0, 1)[0]
    assert [f"{int(w):016x}" for w in zero] == [
        "16554d9eca36314c", "db20fe9d672d0fdc", "d7e772cee186176b", "7e68b68aec7ba23b",
    ]  # fmt: skip
    key = 2**64 - 1
    ones = Counter(key, [key], 3).words(key, 2**256 - 1, 1)[0]
    assert [f"{int(w):016x}" for w in ones] == [
        "87b092c3013fe90b", "438c3c67be8d0224", "9cc7d7c69cd777b6", "a09caebf594f0ba0",
    ]  # fmt: skip


@pytest.mark.parametrize("size", [3, 4, 11])
def test_a_number_is_a_function_of_seed_chain_and_step(size: int) -> None:
    normals, uniforms = Counter(1, [0, 1, 2], size).block(0, 40)
    assert normals.shape == (size, 40, 3) and uniforms.shape == (40, 3)
    for first, steps, chain in ((0, 1, 0), (39, 1, 2), (13, 20, 1)):
        some, levels = Counter(1, [chain], size).block(first, steps)
        assert np.array_equal(some[..., 0], normals[:, first : first + steps, chain])
        assert np.array_equal(levels[:, 0], uniforms[first : first + steps, chain])
    assert len(np.unique(normals)) == normals.size, "no number comes twice"
    assert not np.isin(Counter(2, [0, 1, 2], size).block(0, 40)[0], normals).any(), "another seed"


def test_the_numbers_are_uniform_normal_and_independent() -> None:
    normals, uniforms = Counter(3, range(4), 3).block(0, 5000)
    assert stats.kstest(uniforms.ravel(), "uniform").pvalue > 0.01
    assert stats.kstest(normals.ravel(), "norm").pvalue > 0.01
    across = np.concatenate([normals.transpose(0, 2, 1).reshape(12, -1), stats.norm.ppf(uniforms.T)])
    one_later = np.corrcoef(across[:, 1:], across[:, :-1])[:16, 16:]
    off = np.corrcoef(across)[~np.eye(16, dtype=bool)]
    assert max(np.abs(off).max(), np.abs(one_later).max()) < 4.5 / 5000**0.5, "of 376 pairs"


def test_uniform_numbers_are_neither_0_nor_1() -> None:
    low, high = uniform(np.array([0, 2**64 - 1], dtype=np.uint64))
    assert 0 < low == 1 - high < 1e-15


def test_the_closed_form_is_that_of_ridge_and_of_least_squares() -> None:
    columns = np.column_stack(TABLE.take(np.arange(TABLE.size)))
    columns = (columns - columns.mean(0)) / columns.std(0)
    x, y = columns[:, :-1], columns[:, -1]
    left = y - LinearRegression().fit(x, y).predict(x)
    assert TARGET.noise == pytest.approx((left @ left / (442 - 11)) ** 0.5)
    for prior in (0.05, 1.0):
        found = mcmc.posterior(TABLE, prior)
        ridge = Ridge(alpha=found.noise**2 / prior**2).fit(x, y)
        assert found.mean[1:] == pytest.approx(ridge.coef_) and found.mean[0] == pytest.approx(0, abs=1e-12)
    sure = mcmc.posterior(TABLE, prior=1e6)  # then the covariance is that of least squares
    assert sure.covariance[1:, 1:] == pytest.approx(TARGET.noise**2 * np.linalg.inv(x.T @ x), rel=1e-6)


def test_the_density_is_the_posteriors() -> None:
    points = np.random.default_rng(0).normal(size=(11, 6))
    exact = stats.multivariate_normal(TARGET.mean, TARGET.covariance).logpdf(points.T)
    assert np.diff(mcmc.log_density(TARGET, points)) == pytest.approx(np.diff(exact))


def test_the_chains_have_the_posteriors_mean_and_covariance() -> None:
    draws = chains("counter", 1, steps=20_000)[2000:]
    rows = mcmc_report.summary(TARGET, draws)
    worst = mcmc_report.overall(rows, draws)
    assert worst["r_hat_max"] < 1.01 and worst["ess_min"] > 2000 and 0.2 < worst["acceptance"] < 0.35
    assert worst["mean_error_in_mcse"] < 3.5, "of 11 normal numbers"
    covariance = np.cov(np.moveaxis(draws, 1, 0).reshape(11, -1))
    scale = np.outer(TARGET.deviations, TARGET.deviations)
    assert np.abs((covariance - TARGET.covariance) / scale).max() < 5 * (2 / worst["ess_min"]) ** 0.5


def test_chains_that_have_not_met_are_told() -> None:
    far = np.random.default_rng(0).normal(size=(500, 11, 4)) + np.arange(4)
    assert min(r["r_hat"] for r in mcmc_report.summary(TARGET, far)) > 1.2


@pytest.mark.parametrize("world", [2, 3, 8])
def test_a_counter_and_one_stream_give_the_same_chains_on_any_number_of_ranks(world: int) -> None:
    for kind in ("counter", "shared"):
        assert np.array_equal(chains(kind, world), chains(kind, 1)), kind
    assert not {*mcmc.digests(chains("per_rank", world))} & {*mcmc.digests(chains("per_rank", 1))}


def test_chains_go_on_where_they_were_left() -> None:
    whole = mcmc.sample(TARGET, Counter(7, [4, 5], 11), 250)
    head = mcmc.sample(TARGET, Counter(7, [4, 5], 11), 77, block=10)
    tail = mcmc.sample(TARGET, Counter(7, [4, 5], 11), 250, first=77, state=head[-1], block=64)
    assert np.array_equal(np.concatenate([head, tail]), whole)


def test_chains_are_shared_out_and_none_is_left() -> None:
    assert [share(8, rank, 3) for rank in range(3)] == [[0, 1, 2], [3, 4, 5], [6, 7]]


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (regression.Table(np.ones((9, 1)), np.arange(9.0), ("a",), "y"), "a: the same value"),
        (regression.Table(np.eye(2), np.arange(2.0), ("a", "b"), "y"), "2 rows for 3 coefficients"),
    ],
)
def test_a_table_that_tells_nothing_is_refused(table: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        mcmc.posterior(table, prior=1.0)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Any]:
    path = tmp_path_factory.mktemp("mcmc")
    names = {ranks: f"name=on{ranks}" for ranks in (1, 2)}
    return {n: launch(path, *TINY, name, ranks=n, recipe="mcmc", bare=True) for n, name in names.items()}


def test_real_ranks_give_the_same_chains_but_with_a_seed_per_rank(runs: dict[int, Any]) -> None:
    one, two = ({r["numbers"]: r for r in run.records if "numbers" in r} for run in runs.values())
    for kind, same in (("counter", True), ("shared", True), ("per_rank", False)):
        assert (one[kind]["sha256"] == two[kind]["sha256"]) == same, kind
        assert one[kind]["same_chains"] == two[kind]["same_chains"] == same, "as simulated within the run"
    assert [two[k]["drawn_at_4"] for k in two] == [2 * 300 * 12, 5 * 300 * 12, 2 * 300 * 12], (
        "by the rank of two chains"
    )
    assert all(r["steps_per_second"] > 0 and r["seconds"] > r["draw_seconds"] > 0 for r in two.values())
    assert (runs[1].dir / "mcmc.csv").read_text() == (runs[2].dir / "mcmc.csv").read_text()


def test_the_recipe_reports_the_posterior(runs: dict[int, Any]) -> None:
    rows = list(csv.DictReader((runs[2].dir / "mcmc.csv").open()))
    assert [r["coefficient"] for r in rows] == ["intercept", *TABLE.names]
    assert [float(r["closed_mean"]) for r in rows] == pytest.approx(TARGET.mean)
    assert {"acceptance", "r_hat_max", "ess_min", "mean_error_in_mcse"} <= runs[2].records[-1].keys()
    assert all((runs[2].dir / f"mcmc.{kind}").stat().st_size > 5000 for kind in ("png", "svg"))
    assert "yes" in runs[2].stdout and "bmi" in runs[2].stdout


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["mcmc.chains=1"], "mcmc.chains=1: Input should be greater than or equal to 2."),
        (["mcmc.warmup=9950"], "mcmc.steps=10000 leaves under 100 after mcmc.warmup=9950. Raise it."),
        (["mcmc.chains=3"], "4 of mcmc.worlds is above mcmc.chains=3: ranks need chains."),
        (["mcmc.chains=2", "mcmc.worlds=[1,2]"], "mcmc.chains=2 on 3 ranks: each needs one. Raise mcmc.chains."),
    ],
)
def test_what_cannot_work_is_refused(overrides: list[str], message: str, tmp_path: Path) -> None:
    ranks = 3 if "mcmc.worlds=[1,2]" in overrides else 1
    result = launch(tmp_path, *overrides, ranks=ranks, recipe="mcmc", bare=True, check=False)
    assert result.code == 2 and message in result.error
