"""Checkpoints of real runs on two ranks: resumed to the last bit, verified before loading, refused in one line."""

import json
import os
import pickle
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import checkpoint_runs
import pytest
import torch
from checkpoint_runs import (
    ALL,
    DROPOUT,
    LAYOUTS,
    Evil,
    assert_same_state,
    copy_run,
    edit_manifest,
    final_state,
    plant,
    trained,
)
from deepspeed.runtime.zero.config import ZeroStageEnum
from launching import Many, launch, launch_many, layouts, needs_nvme, read

from toolkit.checkpoint import checkpoint, ds_state


@pytest.fixture(scope="module")
def whole() -> Path:
    return checkpoint_runs.whole()


@pytest.fixture(scope="module")
def resumed(whole: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same in other processes, from the checkpoint after step 4."""
    folder = tmp_path_factory.mktemp("resumed")
    for name in LAYOUTS:
        copy_run(whole / name, folder / name)
    done = launch_many(folder, {name: [*DROPOUT, *o] for name, o in LAYOUTS.items()})
    assert not done.errors and done.stdout.count("Resuming from") == len(LAYOUTS)
    return folder


@pytest.mark.parametrize("name", layouts(ALL))
def test_a_resumed_run_gives_the_same_losses_norms_rates_and_final_state(name: str, whole: Path, resumed: Path) -> None:
    assert trained(resumed / name) == trained(whole / name)
    assert_same_state(resumed / name, whole / name)
    evals = [[r["eval_loss"] for r in read(d / name / "metrics.jsonl") if "eval_loss" in r] for d in (whole, resumed)]
    assert evals[0] == evals[1] and len(evals[0]) == 1


@needs_nvme
def test_the_shards_hold_what_was_swapped_to_nvme(whole: Path) -> None:
    run = whole / "stage3-nvme"
    with ds_state.safe_loading():
        tree = torch.load(next(checkpoint.newest(run).rglob("*optim_states.pt")))["optimizer_state_dict"]
    sizes = [4 * len(t) for t in tree["fp32_flat_groups"]]
    assert all(sizes) and max(sizes) >= 2**20, (
        "every tensor was too small to be swapped"  # test_nvme sees files
    )
    assert {int(s["step"]) for s in tree["optimizer_state_dict"]["state"].values()} == {6}


def test_the_newest_checkpoints_are_kept_each_with_a_manifest_of_all_its_files(whole: Path) -> None:
    run = whole / "stage2"
    newest, before = checkpoint.list_checkpoints(run / "checkpoints")
    assert (newest.name, before.name) == ("step-8", "step-4")
    assert checkpoint.verify(newest) is None
    manifest = json.loads((newest / "manifest.json").read_text())
    assert manifest["files"].keys() == {
        "rng.rank0.pt",
        "rng.rank1.pt",
        "state/mp_rank_00_model_states.pt",
        "state/zero_pp_rank_0_mp_rank_00_optim_states.pt",
        "state/zero_pp_rank_1_mp_rank_00_optim_states.pt",
    }
    assert (manifest["step"], manifest["samples"], manifest["world_size"]) == (8, 128, 2)


SHARD = "state/zero_pp_rank_1_mp_rank_00_optim_states.pt"


def flip_a_byte(path: Path) -> None:
    data = bytearray((path / SHARD).read_bytes())
    data[len(data) // 2] ^= 1
    (path / SHARD).write_bytes(data)


def truncate(path: Path) -> None:
    os.truncate(path / SHARD, 1000)


def remove(path: Path) -> None:
    (path / SHARD).unlink()


def shard_of_another_step(path: Path) -> None:
    shutil.copy(path.with_name("step-4") / SHARD, path / SHARD)


def half_a_manifest(path: Path) -> None:
    os.truncate(path / "manifest.json", 100)


def another_step_in_the_manifest(path: Path) -> None:
    edit_manifest(path, sealed=False, step=7)


def a_file_too_many(path: Path) -> None:
    shutil.copy(path / "state/mp_rank_00_model_states.pt", path / "state/mp_rank_01_model_states.pt")


DAMAGES = {
    flip_a_byte: f"{SHARD} has changed since it was written",
    truncate: f"{SHARD} has 1000 bytes, not ",
    remove: f"{SHARD} is missing",
    shard_of_another_step: f"{SHARD} has changed since it was written",
    half_a_manifest: "manifest.json: JSONDecodeError",
    another_step_in_the_manifest: "manifest.json has changed since it was written",
    a_file_too_many: "state/mp_rank_01_model_states.pt is not of this checkpoint",
}


HOSTILE = {
    "evil-shard": SHARD,
    "evil-model": "state/mp_rank_00_model_states.pt",
    "evil-rng": "rng.rank1.pt",
}


@pytest.fixture(scope="module")
def later(whole: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Many]:
    """Runs that go on from damaged, hostile, misfitting or finished ones, in one launch."""
    folder = tmp_path_factory.mktemp("later")
    runs: dict[str, list[str]] = {}

    def on(name: str, *overrides: str, source: str = "stage2", keep: bool = True) -> Path:
        run = copy_run(whole / source, folder / name, without=None if keep else "step-last")
        runs[name] = [*DROPOUT, *(overrides or LAYOUTS[source])]
        return run / "checkpoints" / ("step-8" if keep else "step-4")

    for damage in DAMAGES:
        damage(on(damage.__name__))
    for path in (on("none-whole"), folder / "none-whole/checkpoints/step-4"):
        truncate(path)
    shutil.rmtree(on("deleted").parent)
    for name, file in HOSTILE.items():
        plant(on(name), file, folder / f"{name}.ran")

    on("finished")
    on("other-stage", "zero=stage1")
    on("other-shape", "model.num_hidden_layers=1")
    on("other-dtype", "precision=bf16")
    on("other-optimizer", "optimizer=lion", "offload=cpu")
    on("other-schedule", "experiment=smoke", "data.holdout=0.1", "schedule=none")
    on("other-groups", "zero=stage3", "deepspeed.zero_optimization.sub_group_size=1000", source="stage3")
    on("never", "resume=never")
    on("other-lr", "deepspeed.optimizer.params.lr=1e-3", "deepspeed.gradient_clipping=0.5", keep=False)
    on("other-batch", "batch.global_size=32", keep=False)
    on("back", f"resume={folder}/back/checkpoints/step-4", "train.save_every=2", "train.keep_checkpoints=1")
    runs["from-path"] = [*DROPOUT, f"resume={whole}/stage2/checkpoints/step-4"]
    runs["no-such-path"] = [*DROPOUT, f"resume={whole}/stage2/checkpoints/step-5"]
    runs["path-of-a-run"] = [*DROPOUT, f"resume={whole}/stage2"]
    return folder, launch_many(folder, runs)


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda d: d.__name__)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(
    damage: Any, later: tuple[Path, Many], whole: Path
) -> None:
    folder, done = later
    run = folder / damage.__name__
    assert f"Checkpoint {run}/checkpoints/step-8 is broken ({DAMAGES[damage]}" in done.stdout
    assert f"Resuming from {run}/checkpoints/step-4." in done.stdout
    assert trained(run) == trained(whole / "stage2")
    assert checkpoint.verify(run / "checkpoints/step-8") is None


REFUSED = {
    "none-whole": "this run has saved checkpoints, and none is whole",
    "deleted": "this run has saved checkpoints, and none is whole",
    "other-stage": "saved with zero_stage=2, this run has zero_stage=1.",
    "other-shape": "saved with model.num_hidden_layers=2, this run has model.num_hidden_layers=1.",
    "other-dtype": "saved with dtype=fp32, this run has dtype=bf16.",
    "other-optimizer": "saved with optimizer=adamw, this run has optimizer=lion.",
    "other-schedule": "saved with scheduler=LambdaLR, this run has scheduler=NoneType.",
    "other-groups": "saved with sub_group_size=1000000000, this run has sub_group_size=1000.",
    "never": "resume=never with name=never",
    "no-such-path": "stage2/checkpoints/step-5: there is no such folder.",
    "path-of-a-run": "A run is named by its checkpoint: <run>/checkpoints/step-N.",
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_resumed_is_refused_in_one_line_on_every_rank(name: str, later: tuple[Path, Many]) -> None:
    messages = later[1].errors[name]
    assert len(set(messages)) == 1 and len(messages) == 2
    assert REFUSED[name] in messages[0] and "\n" not in messages[0]
    if name != "never":
        assert messages[0].startswith("CheckpointError: ")


@pytest.mark.parametrize("name", HOSTILE)
def test_code_in_a_checkpoint_is_refused_by_name_and_never_run(name: str, later: tuple[Path, Many]) -> None:
    folder, done = later
    file = folder / name / "checkpoints/step-8" / HOSTILE[name]
    assert all(m.startswith(f"CheckpointError: {file} would run posix.system.") for m in done.errors[name])
    assert not (folder / f"{name}.ran").exists()


def test_the_planted_pickle_would_have_run_otherwise(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Evil(tmp_path / "ran")))
    assert (tmp_path / "ran").exists()


def test_a_finished_run_started_again_only_evaluates(later: tuple[Path, Many], whole: Path) -> None:
    folder, done = later
    assert f"{folder}/finished has its 8 steps already (train.steps=8): evaluating only." in done.stdout
    before, after = (
        [{k: v for k, v in r.items() if "seconds" not in k} for r in read(d / "metrics.jsonl")]
        for d in (whole / "stage2", folder / "finished")
    )
    assert after == before


def test_a_resumed_run_obeys_a_new_learning_rate_and_clipping(later: tuple[Path, Many], whole: Path) -> None:
    rates = [r[3] for r in trained(whole / "stage2")]
    assert [r[3] for r in trained(later[0] / "other-lr")] == pytest.approx(rates[:4] + [r / 2 for r in rates[4:]])
    state = final_state(later[0] / "other-lr")
    assert {v for k, v in state.items() if k.endswith("clip_grad")} == {0.5}


def test_another_global_batch_goes_on_at_the_same_sample(later: tuple[Path, Many], whole: Path) -> None:
    manifest = json.loads((later[0] / "other-batch/checkpoints/step-8/manifest.json").read_text())
    assert manifest["samples"] == 4 * 16 + 4 * 32
    # samples 64 to 96: the mean of steps 5 and 6 of the other run, but for one update and dropout
    steps = {r[0]: r[1] for r in trained(whole / "stage2")}
    assert trained(later[0] / "other-batch")[4][1] == pytest.approx((steps[5] + steps[6]) / 2, abs=0.02)


def test_a_checkpoint_of_another_run_can_be_named(later: tuple[Path, Many], whole: Path) -> None:
    assert trained(later[0] / "from-path") == trained(whole / "stage2")[4:]


def test_going_back_drops_the_checkpoints_that_were_gone_back_on(later: tuple[Path, Many], whole: Path) -> None:
    assert trained(later[0] / "back") == trained(whole / "stage2")
    assert [p.name for p in checkpoint.list_checkpoints(later[0] / "back/checkpoints")] == ["step-8"]
    saved = [r["checkpoint"] for r in read(later[0] / "back/metrics.jsonl") if "checkpoint" in r]
    assert saved == ["step-4", "step-6", "step-8"]


def test_another_world_size_is_refused_in_one_line_with_exit_code_2(whole: Path, tmp_path: Path) -> None:
    copy_run(whole / "stage2", tmp_path / "x")
    result = launch(tmp_path, *DROPOUT, ranks=0, check=False)
    assert result.code == 2 and "Traceback" not in result.stderr
    assert "saved with world_size=2, this run has world_size=1. Use the saved value, or start a new" in result.error
    assert len(result.error.splitlines()) == 1


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB at <tmp_path>/x/checkpoints."""
    folder = tmp_path / "x" / "checkpoints"
    folder.mkdir(parents=True)
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small file system is not permitted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_one_line_and_the_checkpoints_before_stay_whole(small_disk: Path, tmp_path: Path) -> None:
    result = launch(tmp_path, "train.save_every=2", check=False)
    newest = checkpoint.list_checkpoints(small_disk)
    assert newest and all(checkpoint.verify(p) is None for p in newest)
    assert not list(small_disk.glob(".*")), "the half-written one takes the space"
    assert result.code == 2 and "Traceback" not in result.stderr + result.stdout
    failed = f"{small_disk}/step-{int(newest[0].name[5:]) + 2}: cannot be saved: rank "
    assert failed in result.error and "No space left on device" in result.error
    assert len(result.error.splitlines()) == 1


def test_reading_needs_the_classes_that_are_allowed_and_no_other(whole: Path) -> None:
    needed = {
        name
        for run in LAYOUTS
        for file in checkpoint.newest(whole / run).rglob("*.pt")
        for name in torch.serialization.get_unsafe_globals_in_checkpoint(str(file))
    }
    # DynamicLossScaler: fp16 alone, which does not train on a CPU. ZeroStageEnum: what DeepSpeed itself saves
    assert {name.rsplit(".", 1)[1] for name in needed} == {"LossScaler", "fragment_address"}


def test_the_zero_stage_is_saved_as_a_number(tmp_path: Path) -> None:
    """Python 3.11.0 to 3.11.3 pickle an enum as a call of getattr, which loading safely refuses."""
    for shard, stage in (({"zero_stage": ZeroStageEnum.weights}, 3), ({"single_partition_of_fp32_groups": []}, 1)):
        ds_state._Files(tmp_path).save({"optimizer_state_dict": shard}, str(tmp_path / "shard.pt"))
        found = torch.load(tmp_path / "shard.pt", weights_only=True)["optimizer_state_dict"]["zero_stage"]
        assert type(found) is int and found == stage
