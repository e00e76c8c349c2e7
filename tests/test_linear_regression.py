"""A linear regression on DeepSpeed reaches the optimum that other means find, in every layout."""

import csv
import gzip
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from launching import ROOT, launch, launch_many, read, runnable

from toolkit.config.compose import compose
from toolkit.config.schema import Data
from toolkit.data import regression
from toolkit.errors import DataError
from toolkit.models.linear import mean_loss, optimum

REAL = ROOT.parent / "shared" / "data" / "regression"
needs_real = pytest.mark.skipif(not REAL.exists(), reason="no ../shared/data/regression beside this checkout")
TABLE = Data(format=None, header=None)


def table(tmp_path: Path, text: str, name: str = "t.csv", **options: Any) -> Any:
    packed = gzip.compress(text.encode()) if name.endswith(".gz") else text.encode()
    (tmp_path / name).write_bytes(packed)
    return regression.read(TABLE.model_copy(update={"path": str(tmp_path / name), **options}), seed=1)


# Tables --------------------------------------------------------------------------------------------------------------

HEADED = "size,rooms,price\n1,2,3\n4,5,6\n7,8,10\n"


@pytest.mark.parametrize(
    ("text", "name", "options", "names", "target"),
    [
        (HEADED, "t.csv", {}, ("size", "rooms"), [3, 6, 10]),
        (HEADED, "t.csv", {"target": "rooms"}, ("size", "price"), [2, 5, 8]),
        (HEADED, "t.csv", {"target": "0"}, ("rooms", "price"), [1, 4, 7]),
        (HEADED, "t.csv", {"target": "-2"}, ("size", "price"), [2, 5, 8]),
        (HEADED, "t.csv", {"drop": ("price",)}, ("size",), [2, 5, 8]),
        ("1,2,3\n4,5,6\n", "t.csv", {}, ("0", "1"), [3, 6]),
        ("1 2\t3 \n\n4  5 6\n", "t.txt", {}, ("0", "1"), [3, 6]),
        ("1 2\t3 \n\n4  5 6\n", "t.txt.gz", {}, ("0", "1"), [3, 6]),
        ("size;rooms;price\n1;2;3\n4;5;6\n", "t.csv", {}, ("size", "rooms"), [3, 6]),
        ("a;b\tb\n1\t2\n3\t4\n", "t.tsv", {}, ("a;b",), [2, 4]),
        (HEADED + ",1,1\n2,x,3\n", "t.csv", {"on_error": "skip"}, ("size", "rooms"), [3, 6, 10]),
    ],
)  # fmt: skip
def test_a_table_has_these_features_and_this_target(
    tmp_path: Path, text: str, name: str, options: dict[str, Any], names: tuple[str, ...], target: list[float]
) -> None:
    found = table(tmp_path, text, name, **options)
    assert found.names == names and found.targets.tolist() == target
    assert found.features.shape == (len(target), len(names))
    assert found.skipped == (2 if "on_error" in options else 0)


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("a,b\n1,2\n3,\n", {}, "t.csv:3: column 'b' is empty"),
        ("a,b\n1,2\nred,4\n", {}, "t.csv:3: column 'a' 'red' is no number. Correct it, leave it out with data.drop=[a"),
        ("a,b\n1,2\n3,nan\n", {}, "t.csv:3: column 'b' 'nan' is no number"),
        ("a,b,c\n1,2,3\n1,4,5\n", {}, "t.csv: column 'a' is 1 in every row"),
        ("a,b\n1,2\n3\n", {}, "t.csv:3: has 1 cells where the header has 2"),
        (HEADED, {"target": "prices"}, "data.target=prices: no such column. Did you mean 'price'?"),
        (HEADED, {"target": "3"}, "data.target=3: no such column"),
        (HEADED, {"drop": ("prise",)}, "data.drop=[prise]: no such column. Did you mean 'price'?"),
        (HEADED, {"drop": ("size",), "target": "size"}, "data.target=size is in data.drop=['size']. Keep it."),
        ("a\n1\n2\n", {}, "1 columns are no regression"),
        ("a,b\n1,2\nx,3\n", {"on_error": "skip"}, "1 rows of numbers: a regression takes two"),
        ("a,b\n1,2\n3,2\n", {}, "column 'b' is 2 in every row: it says nothing. Choose another with data.target"),
        ("price,area,price\n1,2,3\n2,3,5\n", {}, "t.csv:1: the header has 'price' twice"),
        ("1,,3\n2,3,5\n4,4,9\n", {}, "t.csv:1: holds numbers, but also ''"),
        ("1,,3\n2,3,5\n4,4,9\n", {"header": False}, "t.csv:1: column '1' is empty"),
        (HEADED, {"target": "--1"}, "data.target=--1: no such column"),
    ],
)  # fmt: skip
def test_what_is_no_table_of_numbers_is_refused_with_row_and_column(
    tmp_path: Path, text: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError) as error:
        table(tmp_path, text, **options)
    assert message in str(error.value)


def test_target_and_columns_of_the_default_table_can_be_chosen() -> None:
    found = regression.read(TABLE.model_copy(update={"target": "bmi", "drop": ("sex",)}), seed=1)
    assert found.target == "bmi" and found.names == ("age", "bp", "s1", "s2", "s3", "s4", "s5", "s6", "progression")


@needs_real
def test_real_tables_are_read_as_they_are_given_away() -> None:
    shapes = {"winequality-white.csv": (4898, 11), "concrete.txt": (1030, 8), "power-plant.txt": (9568, 4)}
    for name, shape in shapes.items():
        found = regression.read(TABLE.model_copy(update={"path": str(REAL / name)}), seed=1)
        assert isinstance(found, regression.Table) and found.features.shape == shape
    path = REAL / "california_housing.csv.gz"
    options = {"path": str(path), "drop": ("ocean_proximity",), "on_error": "skip"}
    houses = regression.read(TABLE.model_copy(update=options), seed=1)
    assert isinstance(houses, regression.Table) and (houses.skipped, houses.size) == (207, 20640 - 207)
    with gzip.open(path, "rt") as file:
        last = list(csv.DictReader(file))[-1]
    assert houses.target == "median_house_value" and houses.targets[-1] == float(last["median_house_value"])


def test_synthetic_rows_are_functions_of_seed_and_row() -> None:
    rows = regression.Synthetic(10**12, 3, 0.5, seed=7)
    some = np.array([5, 10**11, 123456])
    x, y = rows.take(some)
    one, target = rows.take(some[1:2])
    assert (one[0] == x[1]).all() and target[0] == pytest.approx(y[1], rel=1e-14)
    x, y = rows.take(np.arange(200_000))
    noise = (y - 1 - x @ rows.weights) / 0.5
    assert np.abs(x.mean(0)).max() < 0.01 and np.abs(x.var(0) - 1).max() < 0.01
    assert abs(noise.mean()) < 0.01 and abs(noise.var() - 1) < 0.03
    assert np.abs(np.corrcoef(np.column_stack([x, noise]), rowvar=False) - np.eye(4)).max() < 0.01


def test_what_is_held_out_is_every_row_once_and_not_trained_on() -> None:
    parts = regression.Parts(101, 0.1)
    held, trained = (parts.rows(n, np.arange(k)) for n, k in (("eval", parts.held_out), ("train", parts.train)))
    assert len(held) == 10 and sorted([*held, *trained]) == list(range(101))


# The optimum ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["mse", "mae", "huber"])
def test_no_step_from_the_optimum_is_better(kind: str) -> None:
    draws = np.random.default_rng(3)
    x = draws.normal(size=(300, 4))
    y = x @ [1, -2, 0, 3] + 0.5 + draws.standard_t(2, 300)
    best = optimum(kind, x, y, 0.7)
    assert best.loss == mean_loss(kind, y - x @ best.weights - best.intercept, 0.7)
    for step in [*np.eye(5), *draws.normal(size=(50, 5))]:
        for size in (1e-2, -1e-2, 1e-4, -1e-4):
            w = best.weights + size * step[:4]
            assert mean_loss(kind, y - x @ w - best.intercept - size * step[4], 0.7) > best.loss


def test_least_squares_and_hubers_limits() -> None:
    draws = np.random.default_rng(4)
    x, y = draws.normal(size=(200, 3)), draws.normal(size=200)
    closed = np.linalg.lstsq(np.column_stack([x, np.ones(200)]), y, rcond=None)[0]
    least = optimum("mse", x, y, 1.0)
    assert np.append(least.weights, least.intercept) == pytest.approx(closed, rel=1e-9)
    assert optimum("huber", x, y, 1e3).loss == pytest.approx(least.loss / 2, rel=1e-9)
    assert optimum("huber", x, y, 1e-5).loss / 1e-5 == pytest.approx(optimum("mae", x, y, 1.0).loss, rel=1e-3)


# Training ------------------------------------------------------------------------------------------------------------

COMMON = ("task=linear", "train.steps=30", "train.log_every=1", "deepspeed.optimizer.params.lr=0.1")
LAYOUTS = {
    "ZeRO 0": ("zero=stage0",),
    "ZeRO 1": ("zero=stage1",),
    "ZeRO 2": ("zero=stage2",),
    "ZeRO 3": ("zero=stage3",),
    "optimizer on the CPU": ("zero=stage2", "offload=cpu"),
    "all on the CPU": ("zero=stage3", "offload=cpu_params"),
    "all on NVMe": ("zero=stage3", "offload=nvme"),
    "features over ranks": ("zero=stage0", "parallel=features"),
    "features over ranks at ZeRO 3": ("zero=stage3", "parallel=features"),
    "micro-batches of 64": ("zero=stage2", "batch.micro_size=64"),
}
LOSSES = ("mae", "mse", "huber")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("linear")
    runs = {name: (*COMMON, *given) for name, given in runnable(LAYOUTS).items()}
    runs |= {loss: (*COMMON, f"loss={loss}", "train.steps=400", "train.log_every=100") for loss in LOSSES}  # to the end
    # 11 features over two ranks: one has a column of zeros more.
    odd = (*COMMON, "data=synthetic", "data.rows=2000", "data.features=11", "loss=mae")
    runs |= {"odd": odd, "odd split": (*odd, "parallel=features")}
    assert not launch_many(folder, runs, bare=True).errors
    return folder


@pytest.mark.parametrize("layout", [n for n in LAYOUTS if n in runnable(LAYOUTS)])
def test_every_layout_takes_the_same_steps(layout: str, trained: Path) -> None:
    losses, whole = (
        [r["loss"] for r in read(trained / n / "metrics.jsonl") if "loss" in r] for n in (layout, "ZeRO 0")
    )
    assert len(losses) == 30 and losses == pytest.approx(whole, rel=2e-5)


@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_reaches_its_optimum(loss: str, trained: Path) -> None:
    (last,) = (r for r in read(trained / loss / "metrics.jsonl") if "train_loss" in r)
    assert last["optimum_loss"] <= last["train_loss"] * (1 + 1e-6)
    assert last["train_loss"] == pytest.approx(last["optimum_loss"], rel=5e-4 if loss == "mae" else 1e-4)
    data = compose(["task=linear"]).data
    rows = regression.read(data, 42)
    parts = regression.Parts(rows.size, data.holdout)
    x, y = rows.take(parts.rows("train", np.arange(parts.train)))
    best = optimum(loss, x, y, 1.35 * float(y.std()))  # on the table as it is, not standardised
    assert last["optimum_loss"] == pytest.approx(best.loss, rel=1e-6)


def test_features_that_do_not_divide_are_split_all_the_same(trained: Path) -> None:
    split, whole = (
        [r["loss"] for r in read(trained / n / "metrics.jsonl") if "loss" in r] for n in ("odd split", "odd")
    )
    assert split == pytest.approx(whole, rel=2e-5)


def test_the_steps_are_those_of_plain_pytorch(trained: Path) -> None:
    config = compose(list(COMMON))
    rows = regression.read(config.data, config.seed)
    parts = regression.Parts(rows.size, config.data.holdout)
    x, y = rows.take(parts.rows("train", np.arange(parts.train)))
    x, scale = (x - x.mean(0)) / x.std(0), y.std()
    features, target = (torch.tensor(a, dtype=torch.float32) for a in (x, (y - y.mean()) / scale))
    model = torch.nn.Linear(x.shape[1], 1)
    torch.nn.init.zeros_(model.weight), torch.nn.init.ones_(model.bias)
    adam = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0, eps=1e-6)
    losses = []
    for step in range(20):
        adam.param_groups[0]["lr"] = 0.1 * (1 - step / 30)
        loss = torch.nn.functional.mse_loss(model(features)[:, 0], target)
        losses.append(loss.item() * scale**2)
        adam.zero_grad(), loss.backward(), adam.step()
    found = [r["loss"] for r in read(trained / "ZeRO 0" / "metrics.jsonl") if "loss" in r]
    assert found[:20] == pytest.approx(losses, rel=2e-5)


def test_the_recipe_prints_and_draws_what_it_learned(tmp_path: Path) -> None:
    """Stopped and gone on with, over epochs of two unequal steps."""
    given = (
        "train.steps=120",
        "batch.global_size=256",
        "batch.micro_size=64",
        "train.log_every=1",
        "schedule=constant",
    )
    whole = launch(tmp_path, *given, "name=whole", recipe="linear_regression", bare=True)
    launch(tmp_path, *given, "train.steps=61", recipe="linear_regression", bare=True)
    result = launch(tmp_path, *given, recipe="linear_regression", bare=True)
    assert [r["loss"] for r in result.steps] == [r["loss"] for r in whole.steps]
    rates = result.steps[-1]
    assert rates["samples_per_second"] > 0 and rates["gb_per_second"] > 0 and "tokens_per_second" not in rates
    with (result.dir / "coefficients.csv").open() as file:
        rows = {r["name"]: r for r in csv.DictReader(file)}
    assert list(rows)[:4] == ["(intercept)", "age", "sex", "bmi"] and "bmi" in result.stdout
    assert float(rows["bmi"]["learned"]) == pytest.approx(float(rows["bmi"]["optimum"]), rel=0.1)
    assert (result.dir / "linear_regression.png").stat().st_size > 10_000


def test_another_loss_does_not_go_on_with_a_run(tmp_path: Path) -> None:
    given = ("task=linear", "train.steps=4", "name=a")
    assert not launch_many(tmp_path, {"a": given}, bare=True).errors
    errors = launch_many(tmp_path, {"a": (*given, "loss=mae", "train.steps=8")}, bare=True).errors["a"]
    assert all("saved with" in e and "loss" in e for e in errors)


def test_bad_data_ends_all_ranks_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("a,b\n1,2\n3,four\n")
    result = launch(tmp_path, f"data.path={tmp_path / 't.csv'}", recipe="linear_regression", bare=True, check=False)
    assert result.code == 2 and "t.csv:3: column 'b' 'four' is no number" in result.error
    assert len(result.error.splitlines()) == 1


def test_rows_over_ranks_send_the_gradient_and_columns_over_ranks_a_number_a_row(tmp_path: Path) -> None:
    given = (
        "task=linear", "data=synthetic", "data.rows=500", "data.features=40", "zero=stage0", "train.steps=6",
        "train.log_every=3", "batch.global_size=128", "train.communication=true", "data.holdout=0",
    )  # fmt: skip
    runs = {"rows": (*given, "batch.micro_size=64"), "columns": (*given, "batch.micro_size=128", "parallel=features")}
    assert not launch_many(tmp_path, runs, bare=True).errors
    sent = {n: read(tmp_path / n / "metrics.jsonl")[1]["comm_mib"] * 2**20 for n in runs}
    assert sent == {"rows": pytest.approx(4 * 41), "columns": pytest.approx(4 * 128)}
