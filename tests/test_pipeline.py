"""BERT as a pipeline: its layers and cuts; what it computes is held by test_parity, test_checkpoint and test_export."""

import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from checkpoint_runs import assert_same_state, copy_run, trained
from deepspeed.pipe import LayerSpec
from forks import on_ranks
from launching import launch, launch_many, python, read, toolkit_command
from transformers import BertConfig
from transformers.initialization import no_init_weights

from toolkit.checkpoint.export import export
from toolkit.engine.pipe import PipeEngine
from toolkit.engine.pipe_events import bubble_share, load
from toolkit.errors import ConfigError
from toolkit.job import ranks
from toolkit.models.pipeline import Pipe, parameters, partition, pipe_layers
from toolkit.models.pretraining import MaskedBert, PairBert

CONFIG = BertConfig(
    vocab_size=512, hidden_size=32, num_hidden_layers=6, num_attention_heads=2, intermediate_size=64, pad_token_id=3
)


def layers_of(model_class: Any) -> list[LayerSpec]:
    with torch.device("meta"), no_init_weights():
        return pipe_layers(model_class(CONFIG))


def names(pair: bool) -> list[str]:
    """What every parameter of every layer is called at Hugging Face; a tied one once."""
    layers = layers_of(PairBert if pair else MaskedBert)
    pipe = SimpleNamespace(layers=layers)
    found: dict[str, None] = {}
    with torch.device("meta"), no_init_weights():
        for i, layer in enumerate(layers):
            prefix = f"tied_modules.{layer.key}" if hasattr(layer, "key") else str(i)
            found |= {Pipe.hf_name(pipe, f"{prefix}.{n}"): None for n, _ in layer.build().named_parameters()}
    return list(found)


class TwoMicroBatches:
    """As much of DeepSpeed's engine as one step of one stage needs."""

    device, stage_id = "cpu", 0

    def __init__(self) -> None:
        self.module = SimpleNamespace(training=True)
        self._INSTRUCTION_MAP: dict[Any, Any] = {}

    def gradient_accumulation_steps(self) -> int:
        return 2

    def get_lr(self) -> list[float]:
        return [0.1]

    def train_batch(self, batches: Iterator[Any]) -> None:
        self.minimised = sum(float(self.module.loss_fn(inputs, labels)) for inputs, labels in batches)


def test_losses_are_told_in_the_units_of_the_task_and_minimised_in_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "total", list)
    task = SimpleNamespace(
        inputs=("x",), labels=("y",), outputs=("x",), predicted=("loss",), unit=100.0,
        counts=lambda batch: {"loss": len(batch["y"])}, losses=lambda outputs, batch: {"loss": batch["y"].sum()},
    )  # fmt: skip
    engine = PipeEngine(ds := TwoMicroBatches(), task, ranks.Replica(0, 1, 1), "1f1b")  # type: ignore[arg-type]
    step = engine.train_batch(iter([{"x": torch.zeros(2), "y": torch.tensor([a, 2.0])} for a in (1.0, 5.0)]))
    assert float(step.losses["loss"]) == pytest.approx(100 * 10 / 4)
    assert ds.minimised == pytest.approx(2 * 10 / 4), "times the accumulation, by which DeepSpeed divides"


@pytest.mark.parametrize("model_class", [PairBert, MaskedBert])
def test_the_layers_hold_every_weight_of_the_hugging_face_model(model_class: Any) -> None:
    with torch.device("meta"):
        model = model_class(CONFIG)
    model.tie_weights()
    assert sorted(names(pair=model_class is PairBert)) == sorted(n for n, _ in model.named_parameters())


def test_a_tied_weight_has_a_layer_without_forward_fn_for_deepspeed_saves_no_other() -> None:
    specs = [layer for layer in layers_of(PairBert) if hasattr(layer, "key")]
    assert len(specs) == 2 and sum(spec.forward_fn is None for spec in specs) == 1


@pytest.mark.parametrize(
    ("how", "stages", "parts"),
    [
        ("uniform", 3, [0, 3, 6, 11]),
        ((2, 6), 3, [0, 2, 6, 11]),
        ("parameters", 2, [0, 4, 11]),  # the vocabulary counts twice: it is on the first stage and the last
    ],
)
def test_stages_begin_where_the_partition_says(how: Any, stages: int, parts: list[int]) -> None:
    assert partition(layers_of(PairBert), how, stages, None) == parts


def test_parts_hold_about_equally_many_parameters() -> None:
    layers = layers_of(PairBert)
    counts = parameters(layers)
    cut = partition(layers, "parameters", 2, None)[1]
    larger = max(sum(counts[:cut]), sum(counts[cut:]))
    assert all(larger <= max(sum(counts[:c]), sum(counts[c:])) for c in range(1, len(layers) - 2))


@pytest.mark.parametrize(("how", "stages"), [("uniform", 10), ((3, 9), 3)])
def test_a_stage_without_layers_is_refused(how: Any, stages: int) -> None:
    with pytest.raises(ConfigError, match=r"pipeline.partition=.* of 9 \(0 and 1 embed, 8 is the heads\)"):
        partition(layers_of(PairBert), how, stages, None)


def test_clipping_takes_the_norm_of_all_stages_and_a_tied_weight_once(tmp_path: Path) -> None:
    layers, cut = layers_of(PairBert), [0, 4, 11]

    def work(rank: int) -> tuple[float, int]:
        import deepspeed
        from deepspeed.runtime.utils import clip_grad_norm_

        backend: Any = importlib.import_module("deepspeed.comm.torch")
        backend.build_shm_op = lambda: None  # gloo does, and the op might have to be built
        deepspeed.init_distributed(verbose=False)
        with no_init_weights():
            pipe = Pipe(layers, cut, PairBert(CONFIG), 2)
        for p in pipe.parameters():
            p.grad = torch.full_like(p, 0.5)
        return float(clip_grad_norm_(pipe.parameters(), 1e9, mpu=pipe.mpu())), sum(p.numel() for p in pipe.parameters())

    ended = on_ranks(2, tmp_path, work)
    assert {e.code for e in ended} == {0}, [e.printed for e in ended]
    with torch.device("meta"):
        model = PairBert(CONFIG)
    model.tie_weights()
    whole = sum(p.numel() for p in model.parameters())
    assert sum(e.result[1] for e in ended) == whole + CONFIG.vocab_size * CONFIG.hidden_size
    assert [e.result[0] for e in ended] == pytest.approx([0.5 * whole**0.5] * 2)


def test_a_run_logs_its_bubbles_and_keeps_its_timeline(tmp_path: Path) -> None:
    gpipe = ["pipeline=two", "zero=stage1", "pipeline.schedule=gpipe", "batch.micro_size=2"]
    result = launch(tmp_path, *gpipe, "deepspeed.csv_monitor.enabled=true")
    timeline = load(result.dir / "timeline.json")
    assert (timeline.schedule, timeline.stages, timeline.micro_batches, timeline.step) == ("gpipe", 2, 8, 8)
    last = result.steps[-1]
    assert last["bubble_formula"] == pytest.approx(1 / 9)
    assert last["bubble"] == pytest.approx(bubble_share(timeline.events, 2)) and 0 < last["bubble"] < 1
    ends = {(e.stage, e.kind, e.micro_batch): (e.start, e.end) for e in timeline.events}
    for m in range(8):  # what one stage sends, the next has not begun before
        assert ends[0, "forward", m][0] < ends[1, "forward", m][0] < ends[1, "backward", m][0]
        assert ends[1, "backward", m][1] < ends[0, "backward", m][1]
    assert all(ends[0, "forward", 7][1] < ends[0, "backward", m][0] for m in range(8)), "GPipe fills before it drains"
    assert not list(result.dir.rglob("Train_Samples_eval_loss.csv")), "DeepSpeed's own, of a few batches"
    done = toolkit_command("timeline", str(result.dir))
    assert (result.dir / "timeline.png").stat().st_size > 10_000 and "gpipe" in done.stdout.lower()


def test_masked_lm_alone_is_pipelined_too_with_every_layer_recomputed_by_deepspeed(tmp_path: Path) -> None:
    mlm = ["task.objective=mlm", "zero=stage1", "model.dropout=0"]
    every = "deepspeed.pipeline.activation_checkpoint_interval=1"
    assert not launch_many(tmp_path, {"plain": mlm, "piped": [*mlm, "pipeline=two", every]}).errors
    plain, piped = (
        [r["loss"] for r in read(tmp_path / n / "metrics.jsonl") if "loss" in r] for n in ("plain", "piped")
    )
    assert len(plain) == 8 and piped == pytest.approx(plain, rel=1e-5)


def test_another_cut_of_the_layers_does_not_resume(tmp_path: Path) -> None:
    pipeline = ["pipeline=two", "zero=stage1"]
    assert not launch_many(tmp_path, {"x": [*pipeline, "pipeline.partition=uniform", "train.steps=4"]}).errors
    error = launch_many(tmp_path, {"x": [*pipeline, "pipeline.partition=[1]"]}).errors["x"][0]
    assert "saved with pipe_parts=[0, 3, 7], this run has pipe_parts=[0, 1, 7]" in error, error


def test_two_pipelines_on_other_data_resume_to_the_last_bit_and_export_one_model(tmp_path: Path) -> None:
    runs = {"x": ["zero=stage1", "pipeline=two", "model.dropout=0.1", "batch.micro_size=2", "precision=bf16"]}
    assert not launch_many(tmp_path / "whole", runs, ranks=4).errors
    copy_run(tmp_path / "whole" / "x", tmp_path / "resumed" / "x")
    done = launch_many(tmp_path / "resumed", runs, ranks=4)
    assert not done.errors and "Resuming from" in done.stdout
    assert trained(tmp_path / "resumed" / "x") == trained(tmp_path / "whole" / "x")
    assert_same_state(tmp_path / "resumed" / "x", tmp_path / "whole" / "x")
    _, info = PairBert.from_pretrained(export(tmp_path / "whole" / "x"), output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]


def test_deepspeed_still_clips_by_the_norm_of_the_first_stage_alone() -> None:
    """When this fails, the mark ``model_parallel`` in toolkit/models/pipeline.py can go."""
    code = """
import json, deepspeed, torch
from types import SimpleNamespace
from deepspeed.runtime.utils import clip_grad_norm_
from deepspeed.utils import groups
from toolkit.job import ops, ranks
ops.directory()  # DeepSpeed's own may hold the lock of a killed build
ranks.complete_environment()
with ranks.joined():
    second = SimpleNamespace(get_model_parallel_rank=lambda: 1, get_model_parallel_group=lambda: None)
    p = torch.nn.Parameter(torch.zeros(4))
    norms = []
    for mark in (False, True):
        p.grad, p.model_parallel = torch.full((4,), 0.5), mark
        norms.append(float(clip_grad_norm_([p], 10.0, mpu=second)))
    print(json.dumps(norms))
"""
    done = python("-c", code)
    assert json.loads(done.stdout.splitlines()[-1]) == [0.0, 1.0]
