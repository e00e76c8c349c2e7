"""Activations on the host or recomputed: the same numbers, and on the device only what the layer at work needs."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from launching import launch_many, read
from studies.step_memory import Tracker
from torch import Tensor, nn
from transformers.models.bert.modeling_bert import BertLayer

from toolkit.config.schema import Model
from toolkit.models import activation
from toolkit.models.build import bert_config, initialise
from toolkit.models.pretraining import PairBert

WAYS = [(True, False), (False, True), (True, True)]
ROWS, LENGTH, HIDDEN = 4, 32, 64
INPUT_BYTES = ROWS * LENGTH * HIDDEN * 4  # of one layer, in fp32


def build(layers: int = 2, dropout: float = 0.0, **ways: bool) -> PairBert:
    shape = Model(
        hidden_size=HIDDEN, num_hidden_layers=layers, num_attention_heads=4, intermediate_size=256, dropout=dropout
    )
    model = PairBert(bert_config(shape, vocab_size=101, pad_id=0)).train()
    initialise(model, 1)
    activation.apply(model.bert.encoder.layer, **{"recompute": False, "offload": False, **ways})
    return model


def loss(model: PairBert) -> Tensor:
    ids = torch.randint(5, 101, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 20:] = 0
    torch.manual_seed(7)  # the dropout
    output = model(input_ids=ids, attention_mask=mask, token_type_ids=ids % 2, mlm_positions=ids[:, :5] % 20)
    return output["mlm"].logsumexp(-1).sum() + output["pair"].sum()


@pytest.mark.parametrize(("recompute", "offload"), WAYS)
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_losses_and_gradients_are_those_without_to_the_bit(recompute: bool, offload: bool, dropout: float) -> None:
    expected, found = build(dropout=dropout), build(dropout=dropout, recompute=recompute, offload=offload)
    for model in (expected, found):
        total = loss(model)
        total.backward()
    assert torch.equal(total, loss(expected))
    for (name, p), q in zip(found.named_parameters(), expected.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None) and (p.grad is None or torch.equal(p.grad, q.grad)), name


def peaks(layers: int, **ways: bool) -> dict[str, int]:
    """Bytes at the peak of one step, without those of a model of no layers' own embeddings and heads."""
    model = build(layers, dropout=0.1, **ways)
    optimizer = torch.optim.AdamW(model.parameters())
    ds = SimpleNamespace(module=model, optimizer=optimizer, config={}, _take_model_step=optimizer.step)
    with Tracker(ds) as tracker:
        loss(model).backward()
        ds._take_model_step()
    return tracker.peak


def test_recomputing_keeps_the_inputs_of_all_layers_and_the_inside_of_one() -> None:
    """L layers of inside A and input a: L·A becomes L·a + A (Chen et al., https://arxiv.org/abs/1604.06174)."""
    none = {n: peaks(n)["activations"] for n in (2, 4, 8)}
    inside = (none[8] - none[2]) // 6
    assert none[4] - none[2] == 2 * inside, "each layer adds the same"
    recomputed = {n: peaks(n, recompute=True)["activations"] for n in (2, 4, 8)}
    assert [recomputed[n] - recomputed[2] for n in (4, 8)] == [2 * INPUT_BYTES, 6 * INPUT_BYTES]
    assert recomputed[8] < 8 * INPUT_BYTES + 1.2 * inside < none[8] / 4


def test_offloading_moves_all_that_layers_keep_and_leaves_one_layer_on_the_device() -> None:
    none = {n: peaks(n)["activations"] for n in (2, 8)}
    inside = (none[8] - none[2]) // 6
    moved = {n: peaks(n, offload=True) for n in (2, 8)}
    assert moved[2]["activations"] == moved[8]["activations"] < inside, "the device does not see how many layers"
    assert moved[8]["moved"] == 8 * inside, "each storage once, and no weights"


def test_recomputing_with_offload_keeps_no_layers_input_on_the_device() -> None:
    found = {n: peaks(n, recompute=True, offload=True) for n in (2, 8)}
    assert found[2]["activations"] == found[8]["activations"]
    assert [found[n]["moved"] for n in (2, 8)] == [2 * INPUT_BYTES, 8 * INPUT_BYTES]


def test_weights_and_the_mask_stay_where_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Copied, a weight at ZeRO 3 would outlive its gathering, and the mask would be on the host once a layer."""
    moved, empty_like = [], torch.empty_like

    def recording(tensor: Tensor, **options: Any) -> Tensor:
        moved.append(tensor)
        return empty_like(tensor, **options)

    monkeypatch.setattr(torch, "empty_like", recording)
    layer = _Layer()
    activation.apply([layer], recompute=False, offload=True)
    mask = torch.ones(ROWS, 1, 1, HIDDEN)
    hidden = torch.randn(ROWS, LENGTH, HIDDEN, requires_grad=True)
    layer(hidden, mask).sum().backward()
    assert moved and all(t.shape[-1] == HIDDEN and t.shape[0] != HIDDEN for t in moved)
    assert not any(t.untyped_storage().data_ptr() == mask.untyped_storage().data_ptr() for t in moved)


class _Layer(BertLayer):
    """Called with hidden states and something that all layers share."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.dense = nn.Linear(HIDDEN, HIDDEN)

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        return self.dense(hidden).tanh().unsqueeze(1) * mask.expand(-1, 2, -1, -1)


class _PipeLayer(BertLayer):
    """As a pipeline calls its layers: one tuple of floats and ints in, such a tuple out."""

    def forward(self, inputs: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        hidden, mask, positions = inputs
        return super().forward(hidden, mask[:, None, None, :].bool()), mask, positions


@pytest.mark.parametrize(("recompute", "offload"), WAYS)
def test_layers_of_a_pipeline_take_one_tuple(recompute: bool, offload: bool) -> None:
    shape = Model(hidden_size=HIDDEN, num_attention_heads=4, intermediate_size=256)
    config = bert_config(shape, vocab_size=9, pad_id=0)
    config._attn_implementation = "sdpa"
    layers = nn.ModuleList(_PipeLayer(config) for _ in range(4)).train()
    mask, positions = torch.ones(ROWS, LENGTH, dtype=torch.long), torch.zeros(ROWS, 3, dtype=torch.long)

    def step() -> tuple[Any, Tensor]:
        layers.zero_grad()
        hidden = torch.randn(ROWS, LENGTH, HIDDEN, generator=torch.Generator().manual_seed(0)).requires_grad_()
        torch.manual_seed(7)
        ds = SimpleNamespace(
            module=layers, optimizer=torch.optim.SGD(layers.parameters()), config={}, _take_model_step=None
        )
        with Tracker(ds) as tracker:
            out = (hidden, mask, positions)
            for layer in layers:
                out = layer(out)
            out[0].square().sum().backward()
        return tracker.peak, hidden.grad

    whole, expected = step()
    activation.apply(layers, recompute=recompute, offload=offload)
    peak, found = step()
    assert torch.equal(found, expected)
    assert peak["activations"] < 0.6 * whole["activations"]
    assert not offload or peak["moved"] >= 4 * INPUT_BYTES


# Dropout on, and two micro-batches a rank: gradients are accumulated.
LAYOUTS = {
    "stage0": ("zero=stage0",),
    "stage2-bf16": ("zero=stage2", "precision=bf16"),
    "stage3-params": ("zero=stage3", "offload=cpu_params"),
}
RUNS = {
    f"{name}-{way}": [
        *layout, f"activation={way}", "train.steps=3", "data.workers=0", "model.dropout=0.1", "train.eval_samples=16",
        "train.save_every=null",
    ]
    for name, layout in LAYOUTS.items()
    for way in ("none", "offload_cpu", "recompute_offload")
}  # fmt: skip


def test_training_gives_the_same_losses_in_every_layout(tmp_path: Path) -> None:
    assert not launch_many(tmp_path, RUNS).errors
    losses = {n: [r["loss"] for r in read(tmp_path / n / "metrics.jsonl") if "loss" in r] for n in RUNS}
    for name, found in losses.items():
        reference = losses[f"{name.rsplit('-', 1)[0]}-none"]
        assert len(found) == 3 and found == reference, name
