"""Tensor parallelism on real engines: two ranks share each encoder layer, two such pairs share the data."""

import re
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_runs import DROPOUT, assert_same_state, copy_run, trained
from launching import ROOT, Many, launch_many, read
from test_export import config_of, held_out_loss
from transformers import BertConfig, BertForPreTraining

from toolkit.checkpoint import checkpoint, ds_state
from toolkit.checkpoint.export import export

RUNS = {
    "stage0": [*DROPOUT, "zero=stage0", "parallel=tensor"],
    "stage2-vocabulary": [*DROPOUT, "zero=stage2", "parallel=tensor_vocab"],
    "stage3": [*DROPOUT, "zero=stage3", "parallel=tensor"],
}
VOCABULARY = {"bert.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight"}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight steps, dropout on, saved after step 4 and at the end, and exported."""
    folder = tmp_path_factory.mktemp("tensor")
    done = launch_many(folder, RUNS, ranks=4)
    assert not done.errors, done.errors
    for name in RUNS:
        export(folder / name)
    return folder


@pytest.fixture(scope="module")
def later(whole: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Many]:
    """The same in other processes from step 4; another layout on a checkpoint; a start from exported weights."""
    folder = tmp_path_factory.mktemp("later")
    for name in RUNS:
        copy_run(whole / name, folder / name)
    for name in ("unsplit", "otherwise"):
        copy_run(whole / "stage2-vocabulary", folder / name)
    still = ["deepspeed.optimizer.params.lr=0", "train.steps=1", "schedule.warmup=0", "parallel=tensor"]
    runs = RUNS | {
        "unsplit": [*DROPOUT, "zero=stage2"],
        "otherwise": [*DROPOUT, "zero=stage2", "parallel=tensor"],
        "dense": [f"model.weights={whole}/stage2-vocabulary", "zero=stage2", *still],
        "partitioned": [f"model.weights={whole}/stage2-vocabulary", "zero=stage3", *still],
    }
    return folder, launch_many(folder, runs, ranks=4)


def shards(run: Path) -> list[dict[str, torch.Tensor]]:
    """The weights of both ranks that share layers."""
    files = sorted((checkpoint.newest(run) / ds_state.TAG).glob("mp_rank_*"))
    assert len(files) == 2
    with ds_state.safe_loading():
        return [torch.load(file)["module"] for file in files]


def split_dimension(shard: torch.Tensor, whole: torch.Tensor) -> str:
    """Which dimension was halved: ``0``, ``1``, or ``replicated``."""
    halved = [str(i) for i, (part, full) in enumerate(zip(shard.shape, whole.shape, strict=True)) if 2 * part == full]
    return halved[0] if halved else "replicated"


def test_the_pages_say_what_is_split_and_what_is_replicated(whole: Path) -> None:
    rows = re.findall(
        r"^\| `([\w.*]+)` \| (0|1|replicated)\b", (ROOT / "docs" / "pipelines.md").read_text(), re.MULTILINE
    )
    model = BertForPreTraining(BertConfig.from_pretrained(whole / "stage0" / "model")).state_dict()
    for name in VOCABULARY:
        assert split_dimension(shards(whole / "stage2-vocabulary")[0][name], model[name]) == "1"
    first, _ = shards(whole / "stage0")
    assert first.keys() == model.keys() and len(rows) == 4
    for name, shard in first.items():
        assert split_dimension(shard, model[name]) == next(dim for kind, dim in rows if fnmatch(name, kind)), name


@pytest.mark.parametrize("name", ["stage0", "stage2-vocabulary"])
def test_what_is_replicated_stays_equal_to_the_last_bit_with_dropout(name: str, whole: Path) -> None:
    first, second = shards(whole / name)
    differing = {n for n, tensor in first.items() if not torch.equal(tensor, second[n])}
    split = {n for n in first if re.search(r"attention\.self|intermediate|layer.*output\.dense\.weight", n)}
    assert len(split) == 20 and differing == (split | VOCABULARY if name == "stage2-vocabulary" else split)


@pytest.mark.parametrize("name", RUNS)
def test_a_resumed_run_is_the_same_to_the_last_bit(name: str, whole: Path, later: tuple[Path, Many]) -> None:
    assert len(trained(whole / name)) == 8 and trained(later[0] / name) == trained(whole / name)
    assert_same_state(later[0] / name, whole / name)


def evaluated(run: Path) -> Any:
    return next(r["eval_loss"] for r in read(run / "metrics.jsonl") if "eval_loss" in r)


@pytest.mark.parametrize("name", RUNS)
def test_an_export_is_whole_and_has_the_held_out_loss_of_the_run(name: str, whole: Path) -> None:
    model, info = BertForPreTraining.from_pretrained(whole / name / "export", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert held_out_loss(model, config_of(whole / name)) == pytest.approx(evaluated(whole / name), abs=2e-6)


def test_hugging_face_weights_are_split_as_they_are(whole: Path, later: tuple[Path, Many]) -> None:
    for name in ("dense", "partitioned"):
        assert evaluated(later[0] / name) == pytest.approx(evaluated(whole / "stage2-vocabulary"), abs=2e-6)


def test_another_layout_is_refused(later: tuple[Path, Many]) -> None:
    errors = later[1].errors
    assert errors.keys() == {"unsplit", "otherwise"}
    assert "saved with tensor_size=2, this run has tensor_size=1" in errors["unsplit"][0]
    assert "saved with tensor_split={" in errors["otherwise"][0]
