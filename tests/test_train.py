"""Training for real: what a record holds, every objective and optimizer, monitors, real books."""

import csv
import gzip
import json
from pathlib import Path

import pytest
from launching import launch, launch_many, read

DATA = Path(__file__).parents[2] / "shared" / "data"
KEYS = {
    "step", "loss", "mlm_loss", "nsp_loss", "lr", "grad_norm", "samples_per_second", "tokens_per_second",
    "tokens_per_second_unpadded", "padding", "step_seconds", "data_wait", "tflops_per_device", "mfu", "peak_gib",
    "process_peak_gib", "eta_seconds",
}  # fmt: skip
EVAL_KEYS = {
    "step",
    "eval_loss",
    "eval_mlm_loss",
    "eval_mlm_accuracy",
    "eval_nsp_loss",
    "eval_nsp_accuracy",
    "eval_seconds",
}


def test_records_and_files_of_a_run(tmp_path: Path) -> None:
    result = launch(
        tmp_path,
        "train.steps=12",
        "train.log_every=4",
        "train.eval_every=6",
        "data.max_length=64",
        "deepspeed.csv_monitor.enabled=true",
    )
    first, *records = result.steps
    assert [r["step"] for r in result.steps] == [1, 4, 8, 12]
    assert "tokens_per_second" not in first, "the first steps allocate and fill caches: no rate"
    for record in records:
        assert set(record) == KEYS
        assert record["loss"] == pytest.approx(record["mlm_loss"] + record["nsp_loss"])
        assert 0 <= record["data_wait"] < 1 and 0 < record["mfu"] < 1
        assert record["tokens_per_second_unpadded"] < record["tokens_per_second"]
        assert record["tokens_per_second"] == pytest.approx(64 * record["samples_per_second"])
        assert record["samples_per_second"] == pytest.approx(16 / record["step_seconds"])
    evaluations = [r for r in result.records if "eval_loss" in r]
    assert [r["step"] for r in evaluations] == [6, 12] and all(set(r) == EVAL_KEYS for r in evaluations)
    names = {p.name for p in result.dir.iterdir()}
    assert names >= {
        "config.yaml",
        "ds_config.json",
        "env.json",
        "metrics.jsonl",
        "model",
        "checkpoints",
        "log.rank1.txt",
    }
    env = json.loads((result.dir / "env.json").read_text())
    assert env["world_size"] == 2 and env["versions"]["deepspeed"] and env["git"]["commit"]
    (written,) = (p for p in result.dir.rglob("*mlm_loss.csv") if "eval" not in p.name)
    rows = list(csv.reader(written.open()))
    assert float(rows[-1][1]) == pytest.approx(records[-1]["mlm_loss"])
    assert "held out" in result.stdout and f"Run directory: {result.dir}" in result.stdout


@pytest.mark.alone
def test_the_clock_leaves_out_evaluation_and_saving(tmp_path: Path) -> None:
    steps = ("train.steps=24", "train.log_every=24")
    quiet = launch(tmp_path, *steps, "name=quiet").steps[-1]
    busy = launch(tmp_path, *steps, "train.eval_every=1", "train.save_every=4", "train.eval_samples=1500", "name=busy")
    evaluating = sum(r["eval_seconds"] for r in busy.records if "eval_loss" in r and r["step"] < 24) / 24
    assert evaluating > quiet["step_seconds"], "too little evaluation to tell"
    assert busy.steps[-1]["step_seconds"] < quiet["step_seconds"] + evaluating / 2


RATE = "deepspeed.optimizer.params.lr="
VARIANTS = {
    "mlm": ["task.objective=mlm", "zero=stage3"],
    "sop": ["task.objective=sop", "zero=stage3"],
    "sgd": ["optimizer=sgd", f"{RATE}0.1"],
    "lion": ["optimizer=lion", "offload=cpu", f"{RATE}1e-3"],
    "muon": ["optimizer=muon", "zero=stage1"],
    "no-schedule": ["schedule=none", f"{RATE}1e-3"],
}


@pytest.fixture(scope="module")
def variants(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("variants")
    runs = {name: [*overrides, "train.steps=20", "model.dropout=0"] for name, overrides in VARIANTS.items()}
    assert not launch_many(folder, runs).errors
    return folder


@pytest.mark.parametrize("name", VARIANTS)
def test_every_objective_and_every_optimizer_that_this_device_has_learns(name: str, variants: Path) -> None:
    steps = [r for r in read(variants / name / "metrics.jsonl") if "loss" in r]
    assert steps[-1]["mlm_loss"] < steps[0]["mlm_loss"] - 0.02
    pair = {"mlm": set(), "sop": {"sop_loss"}}.get(name, {"nsp_loss"})
    assert {k for k in steps[-1] if k.endswith("_loss")} == {"mlm_loss"} | pair


def test_real_books_with_the_real_vocabulary(tmp_path: Path) -> None:
    books = DATA / "pretrain" / "gutenberg"
    vocab = DATA / "vocab" / "bert-base-uncased-vocab.txt"
    if not books.is_dir() or not vocab.is_file():
        pytest.skip(f"{DATA} is not on this machine")
    for name in (
        "84_frankenstein",
        "11_alice_in_wonderland",
        "1661_sherlock_holmes",
        "98_tale_of_two_cities",
        "1342_pride_and_prejudice",
    ):
        text = gzip.decompress((books / f"{name}.txt.gz").read_bytes())
        (tmp_path / f"{name}.txt").write_bytes(text)
    result = launch(
        tmp_path,
        "data=text",
        f"data.path={tmp_path}/*.txt",
        "data.documents=file",
        "zero=stage3",
        f"tokenizer.path={vocab}",
        "train.steps=30",
        "deepspeed.optimizer.params.lr=2e-3",
        "data.workers=2",
    )
    first, last = result.steps[0], result.steps[-1]
    assert first["mlm_loss"] == pytest.approx(10.3, abs=0.2), "ln 30522: nothing is known yet"
    assert last["mlm_loss"] < first["mlm_loss"] - 0.5


def test_a_vocabulary_of_another_size_than_the_models_is_refused(tmp_path: Path) -> None:
    result = launch(tmp_path, "model.vocab_size=600", check=False, ranks=0)
    assert result.code == 2
    assert "model.vocab_size=600: the tokenizer has 512 entries" in result.error


def test_a_loss_that_is_not_finite_ends_the_run_in_one_line(tmp_path: Path) -> None:
    result = launch(tmp_path, "deepspeed.optimizer.params.lr=1e30", "zero=stage0", "train.log_every=50", check=False)
    assert result.code == 2 and "the loss is nan" in result.error and "Traceback" not in result.stderr
    assert not list(result.dir.glob("checkpoints/step-*")), "its weights are spoilt"


def test_an_error_of_rank_0_alone_is_the_only_one_shown(tmp_path: Path) -> None:
    result = launch(tmp_path, "data=text", "data.path=nowhere/*.txt", check=False)
    assert result.code == 2
    assert len(result.error.splitlines()) == 1 and "nowhere/*.txt" in result.error
    assert "Traceback" not in result.stdout + result.stderr


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.weights=no/such/run", "model.weights=no/such/run: neither a folder with a config.json, nor a run"),
        ("batch.global_size=40000", "the corpus gives only"),
    ],
)
def test_what_only_the_data_or_the_weights_can_tell_is_refused_before_training(
    override: str, message: str, tmp_path: Path
) -> None:
    result = launch(tmp_path, override, check=False, ranks=0)
    assert result.code == 2 and message in result.error and not result.records
