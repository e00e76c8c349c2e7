"""Exports: Hugging Face folders equal to what was trained, from every layout, and whole or not there."""

import json
from pathlib import Path
from typing import Any

import checkpoint_runs
import pytest
import torch
from checkpoint_runs import ALL, LAYOUTS, copy_run, plant
from launching import launch_many, layouts, read, toolkit_command
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy
from transformers import AutoModelForPreTraining, AutoTokenizer, BertForPreTraining

from toolkit.checkpoint import export as exporting
from toolkit.checkpoint.export import export
from toolkit.config.schema import RunConfig, load
from toolkit.data import loader, text
from toolkit.data.masked import MaskedText
from toolkit.data.order import Split
from toolkit.errors import CheckpointError

V = ("pipeline.schedule=dualpipev", "pipeline.partition=uniform")


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exports")
    for name in LAYOUTS:
        export(checkpoint_runs.whole() / name, folder / name)
    return folder


def config_of(run: Path) -> RunConfig:
    from omegaconf import OmegaConf

    return load(OmegaConf.load(run / "config.yaml"))


def held_out_loss(model: Any, config: RunConfig) -> float:
    """MLM + NSP over the run's held-out samples in plain PyTorch, with Hugging Face's own full-length heads."""
    prepared = text.prepare(config)
    dataset = MaskedText(prepared, config.data, config.task.objective, config.seed, "eval")
    sums = {"mlm": [0.0, 0], "nsp": [0.0, 0]}
    for batch in loader.eval_batches(dataset, Split(8, 8, rank=0, world=1), limit=config.train.eval_samples):
        inputs = {k: batch[k] for k in ("input_ids", "attention_mask", "token_type_ids")}
        with torch.no_grad():
            output = model.eval()(**inputs)
        rows = torch.arange(len(batch["input_ids"]))[:, None]
        logits = {"mlm": output.prediction_logits[rows, batch["mlm_positions"]], "nsp": output.seq_relationship_logits}
        for name, labels in (("mlm", batch["mlm_labels"]), ("nsp", batch["nsp_labels"])):
            loss = cross_entropy(logits[name].flatten(0, -2).double(), labels.flatten(), reduction="sum")
            sums[name][0] += float(loss)
            sums[name][1] += int((labels != -100).sum())
    return sum(total / count for total, count in sums.values())


@pytest.mark.parametrize("name", layouts(ALL))
def test_the_export_has_the_held_out_loss_of_the_run(name: str, exports: Path) -> None:
    run = checkpoint_runs.whole() / name
    model, info = BertForPreTraining.from_pretrained(exports / name, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert model.cls.predictions.decoder.weight is model.bert.embeddings.word_embeddings.weight
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    logged = [r["eval_loss"] for r in read(run / "metrics.jsonl") if "eval_loss" in r]
    # bf16 runs evaluate with bf16 weights; the export holds the fp32 ones
    tolerance = 3e-3 if name.startswith("bf16") else 2e-6
    assert held_out_loss(model, config_of(run)) == pytest.approx(logged[-1], abs=tolerance)


def test_auto_classes_load_the_export(exports: Path) -> None:
    assert type(AutoModelForPreTraining.from_pretrained(exports / "stage2")) is BertForPreTraining
    tokenizer = AutoTokenizer.from_pretrained(exports / "stage2")
    config = json.loads((exports / "stage2" / "config.json").read_text())
    assert len(tokenizer) == config["vocab_size"] == 512
    assert tokenizer.decode(tokenizer("the module").input_ids, skip_special_tokens=True) == "the module"


def test_exports_of_equal_trainings_are_equal_whatever_the_stage(exports: Path) -> None:
    # NVMe has another model here, pipelines other dropout
    names = [n for n in LAYOUTS if n != "stage3-nvme" and "pipe" not in n]
    states = {n: BertForPreTraining.from_pretrained(exports / n).state_dict() for n in names}
    for name, state in states.items():
        for key, value in state.items():
            tolerance = 2e-2 if name.startswith("bf16") else 2e-5
            assert torch.allclose(value, states["stage0"][key], atol=tolerance, rtol=0), (name, key)


def test_an_interrupted_export_leaves_the_old_one_and_no_half_of_the_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = copy_run(checkpoint_runs.whole() / "stage2", tmp_path / "x", without=None)

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as broken:
        broken.setattr(exporting, "_save", interrupted)
        with pytest.raises(KeyboardInterrupt):
            export(run)
    assert not (run / "export").exists()
    assert export(run) == run / "export"
    before = (run / "export" / "model.safetensors").read_bytes()
    with monkeypatch.context() as broken:
        broken.setattr(exporting, "_save", interrupted)
        with pytest.raises(KeyboardInterrupt):
            export(run)
    assert (run / "export" / "model.safetensors").read_bytes() == before
    export(run)
    assert not list(run.glob(".export*"))


@pytest.mark.parametrize(
    "file", ["state/zero_pp_rank_1_mp_rank_00_optim_states.pt", "state/mp_rank_00_model_states.pt"]
)
def test_code_in_a_checkpoint_is_refused_by_name_and_never_run(file: str, tmp_path: Path) -> None:
    run = copy_run(checkpoint_runs.whole() / "stage2", tmp_path / "x", without=None)
    plant(run / "checkpoints/step-8", file, tmp_path / "ran")
    with pytest.raises(CheckpointError, match=f"step-8/{file} would run posix.system"):
        export(run)
    assert not (tmp_path / "ran").exists() and not (run / "export").exists()


def test_what_is_no_run_and_what_is_no_export_is_refused(tmp_path: Path) -> None:
    done = toolkit_command("export", str(tmp_path / "no"))
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    with pytest.raises(CheckpointError, match="not the directory of a run"):
        export(tmp_path)
    run = copy_run(checkpoint_runs.whole() / "stage2", tmp_path / "x", without=None)
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.txt").write_text("years of work")
    for out in (tmp_path / "thesis", tmp_path / "thesis" / "chapter1.txt", run):
        with pytest.raises(CheckpointError, match="holds something else than an export"):
            export(run, out)
    assert (tmp_path / "thesis" / "chapter1.txt").exists()
    for path in (run / "checkpoints").iterdir():
        (path / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="no whole checkpoint"):
        export(run)


def test_another_run_starts_from_the_weights_of_a_run(tmp_path: Path) -> None:
    source = copy_run(checkpoint_runs.whole() / "stage2", tmp_path / "source", without=None)
    weights = f"model.weights={source}"
    still = ["deepspeed.optimizer.params.lr=0", "train.steps=1", "schedule.warmup=0", "model.dropout=0"]
    runs = {
        "stage0": ["zero=stage0", weights, *still],
        "stage3": ["zero=stage3", weights, *still],
        # 32 held-out micro-batches, not a multiple of the 5 of a step
        "pipe": ["zero=stage1", "pipeline=two", "batch.micro_size=2", "batch.global_size=10", weights, *still, *V],
        "other-vocabulary": [weights, "tokenizer.vocab_size=300"],
        "no-export": [f"model.weights={checkpoint_runs.whole()}/stage2"],
    }
    export(source)
    errors = launch_many(tmp_path, runs).errors
    assert "its vocabulary has 512 entries, the tokenizer 300." in errors["other-vocabulary"][0]
    assert "this run has no export yet. Run: toolkit export" in errors["no-export"][0]
    given = load_file(source / "export" / "model.safetensors")
    before = next(r["eval_loss"] for r in read(source / "metrics.jsonl") if "eval_loss" in r)
    for name in ("stage0", "stage3", "pipe"):
        training, _, evaluation = read(tmp_path / name / "metrics.jsonl")
        assert evaluation["eval_loss"] == pytest.approx(before, abs=2e-6)
        own = load_file(export(tmp_path / name) / "model.safetensors")
        assert own.keys() == given.keys() and all(torch.equal(own[key], given[key]) for key in given), name
        assert training["loss"] == pytest.approx(before, abs=0.5)  # of 50 predictions or more, other ones
