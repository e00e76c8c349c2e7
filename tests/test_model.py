"""The model: predicted positions only, drawn the same everywhere, counted right."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertForMaskedLM, BertForPreTraining, DistilBertConfig, DistilBertForMaskedLM

from toolkit.config.schema import Model
from toolkit.errors import CheckpointError
from toolkit.models import build
from toolkit.models.build import bert_config, decay_groups, initialise
from toolkit.models.pretraining import MaskedBert, PairBert
from toolkit.plan import flops

SHAPE = Model(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, dropout=0.0)
VOCAB, LENGTH, ROWS, PREDICTIONS = 101, 24, 3, 5


def config(shape: Model = SHAPE):
    return bert_config(shape, vocab_size=VOCAB, pad_id=0)


def batch() -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    mask = torch.ones(ROWS, LENGTH, dtype=torch.long)
    mask[1, 20:] = 0
    labels = torch.randint(5, VOCAB, (ROWS, PREDICTIONS), generator=draw)
    labels[0, 3:] = -100
    return {
        "input_ids": torch.randint(5, VOCAB, (ROWS, LENGTH), generator=draw),
        "attention_mask": mask,
        "token_type_ids": (torch.arange(LENGTH) > 11).long().expand(ROWS, -1),
        "mlm_positions": torch.stack([torch.randperm(20, generator=draw)[:PREDICTIONS] for _ in range(ROWS)]),
        "mlm_labels": labels,
    }


@pytest.mark.parametrize(("ours", "stock"), [(PairBert, BertForPreTraining), (MaskedBert, BertForMaskedLM)])
def test_the_head_on_predicted_positions_has_the_loss_and_gradients_of_the_stock_head(ours, stock) -> None:
    b = batch()
    mine, theirs = ours(config()), stock(config())
    initialise(mine, 1)
    theirs.load_state_dict(mine.state_dict())
    inputs = {k: b[k] for k in ("input_ids", "attention_mask", "token_type_ids")}
    full = torch.full((ROWS, LENGTH), -100).scatter(1, b["mlm_positions"], b["mlm_labels"])
    output = theirs(**inputs)
    logits = output.prediction_logits if stock is BertForPreTraining else output.logits
    expected = cross_entropy(logits.flatten(0, 1), full.flatten())
    expected.backward()
    found = cross_entropy(
        mine(**inputs, mlm_positions=b["mlm_positions"])["mlm"].flatten(0, 1), b["mlm_labels"].flatten()
    )
    found.backward()
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    for (name, p), q in zip(mine.named_parameters(), theirs.parameters(), strict=True):
        if p.grad is None or q.grad is None:
            assert p.grad is None and (q.grad is None or not q.grad.any()), name
        else:
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-7, msg=name)


def test_weights_of_another_architecture_are_refused_in_a_short_line(tmp_path: Path) -> None:
    other = DistilBertConfig(vocab_size=VOCAB, dim=32, n_layers=2, n_heads=2, hidden_dim=64)
    DistilBertForMaskedLM(other).save_pretrained(tmp_path)
    task = SimpleNamespace(model_class=PairBert, hf_config=config(), new_head=False)
    with pytest.raises(CheckpointError) as refused:
        build._read(task, Model(weights=str(tmp_path)))  # type: ignore[arg-type]
    text = str(refused.value)
    assert f"model.weights={tmp_path}: a DistilBertForMaskedLM, which lacks " in text
    number = int(text.split("which lacks ")[1].split()[0])
    assert (
        number > 30 and f"{number} of the {len(PairBert(config()).state_dict())} weights of BertForPreTraining" in text
    )
    assert text.count("bert.") == 3 and len(text) < 400 + len(str(tmp_path))


def test_weights_are_drawn_as_hugging_face_draws_them() -> None:
    model = PairBert(config())
    initialise(model, 1)
    assert model.cls.predictions.decoder.weight is model.bert.embeddings.word_embeddings.weight
    assert not model.bert.embeddings.word_embeddings.weight[0].any(), "the padding row"
    query = model.bert.encoder.layer[0].attention.self.query
    assert abs(query.weight.std().item() - 0.02) < 0.002
    assert not query.bias.any()
    assert (model.bert.embeddings.LayerNorm.weight == 1).all()
    again = PairBert(config())
    initialise(again, 1)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    initialise(again, 2)
    assert not torch.equal(query.weight, again.bert.encoder.layer[0].attention.self.query.weight)


def test_biases_and_layer_norms_do_not_decay() -> None:
    model = PairBert(config())
    decayed, exempt = decay_groups(model, 0.1)
    names = {id(p): n for n, p in model.named_parameters()}
    assert all(p.ndim == 2 for p in decayed["params"]) and decayed["weight_decay"] == 0.1
    assert {names[id(p)].rsplit(".", 1)[-1] for p in exempt["params"]} == {"weight", "bias"}
    assert all("LayerNorm" in names[id(p)] or names[id(p)].endswith("bias") for p in exempt["params"])
    assert len(decayed["params"]) + len(exempt["params"]) == len(names)


def test_the_flops_formula_counts_what_torch_counts() -> None:
    b = batch() | {"attention_mask": torch.ones(ROWS, LENGTH, dtype=torch.long)}
    b.pop("mlm_labels")
    shape = config()
    shape._attn_implementation = "eager"  # the counter does not know the CPU's fused attention
    model = PairBert(shape)
    with FlopCounterMode(display=False) as counter:
        output = model(**b)
        (output["mlm"].sum() + output["pair"].sum()).backward()
    counts = {"sequences": ROWS, "predictions": ROWS * PREDICTIONS, "pairs": ROWS}
    expected = flops.bert(SHAPE, vocab_size=VOCAB, length=LENGTH, **counts)
    assert counter.get_total_flops() == pytest.approx(expected, rel=1e-9)


def test_the_flops_formula_gives_deepspeeds_published_rates() -> None:
    """BERT-large on one V100: 272 samples/s at length 128 are 64 TFLOP/s, 52 at 512 are 53 (deepspeed.ai)."""
    large = Model(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096)
    for length, predictions, samples, published in ((128, 20, 272, 64), (512, 80, 52, 53)):
        rate = flops.bert(
            large, vocab_size=30522, length=length, sequences=samples, predictions=samples * predictions, pairs=samples
        )
        assert rate / 1e12 == pytest.approx(published, rel=0.025)  # the page rounds, and hides its share of predictions
