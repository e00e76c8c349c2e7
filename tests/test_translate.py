"""Translation on two ranks: equal in every layout, it learns, pretrained models go in, the loss is the paper's."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from launching import launch, launch_many, read, read_by
from studies.bert_init import markdown, rows
from torch.nn.functional import cross_entropy
from torch.utils.flop_counter import FlopCounterMode

from toolkit.config.schema import Model, Tokenizer
from toolkit.data import tokenizer as tokenizers
from toolkit.models import seq2seq
from toolkit.tasks.translate import summed_loss

WORDS = ["rot", "blau", "grün", "alt", "neu", "groß", "klein", "Hund", "Katze", "Haus", "Baum", "Tisch"]
NAMES = ("train", "val", "test")


@pytest.fixture(scope="module")
def reversals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs whose target is the source with its words in the opposite order."""
    folder, rng = tmp_path_factory.mktemp("reversals"), np.random.default_rng(0)
    for name, number in zip(NAMES, (3000, 9, 17), strict=True):
        lines = [list(rng.choice(WORDS, rng.integers(2, 7), replace=False)) for _ in range(number)]
        (folder / f"{name}.a").write_text("".join(" ".join(words) + "\n" for words in lines))
        (folder / f"{name}.b").write_text("".join(" ".join(words[::-1]) + "\n" for words in lines))
    return folder


def common(folder: Path, *more: str) -> list[str]:
    by_sentence = [] if any(o.startswith("batch.tokens=") for o in more) else ["batch.tokens=null"]
    given = [
        "experiment=multi30k", "tokenizer.vocab_size=60", "task.source=a", "task.target=b", "task.max_target=12",
        f"data.train={folder / 'train'}", f"data.eval={folder / 'val'}", f"data.test={folder / 'test'}",
        "train.eval_every=4", "model.dropout=0", *by_sentence, *more,
    ]  # fmt: skip
    return read_by(given, given)


LAYOUTS = {
    "zero0": ("zero=stage0",),
    "zero2": ("zero=stage2",),
    "zero3": ("zero=stage3", "deepspeed.zero_optimization.stage3_param_persistence_threshold=0"),
    "recompute": ("zero=stage2", "activation=recompute"),
    "micro2": ("zero=stage2", "batch.micro_size=2"),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, reversals: Path) -> Path:
    """Eight steps in each layout, on two ranks and on one, of sixteen pairs and of 150 tokens."""
    folder = tmp_path_factory.mktemp("runs")
    grid = {
        f"{name}-{kind}": common(reversals, *layout, *batch)
        for name, layout in LAYOUTS.items()
        for kind, batch in (("pairs", ()), ("tokens", ("batch.tokens=150",)))
    }
    assert not launch_many(folder, grid).errors
    assert not launch_many(
        folder, {"one-pairs": grid["zero0-pairs"], "one-tokens": grid["zero0-tokens"]}, ranks=1
    ).errors
    return folder


def losses(run: Path, key: str = "loss") -> list[float]:
    return [r[key] for r in read(run / "metrics.jsonl") if key in r]


@pytest.mark.parametrize("kind", ["pairs", "tokens"])
@pytest.mark.parametrize("layout", [*LAYOUTS, "one"])
def test_losses_are_equal_in_every_layout(runs: Path, layout: str, kind: str) -> None:
    reference, run = runs / f"zero0-{kind}", runs / f"{layout}-{kind}"
    assert len(losses(run)) == 8
    assert losses(run) == pytest.approx(losses(reference), rel=1e-5)
    assert losses(run, "eval_loss") == pytest.approx(losses(reference, "eval_loss"), rel=1e-5)
    assert losses(run, "grad_norm") == pytest.approx(losses(reference, "grad_norm"), rel=1e-3)


@pytest.mark.parametrize("kind", ["pairs", "tokens"])
@pytest.mark.parametrize("layout", [*LAYOUTS, "one"])
def test_beam_search_finds_the_same_translations_in_every_layout(runs: Path, layout: str, kind: str) -> None:
    for name, number in (("eval", 9), ("test", 17)):  # an odd number of batches: a rank is left over
        texts = [(runs / f"{run}-{kind}" / f"predictions.{name}.b").read_text() for run in ("zero0", layout)]
        assert texts[0] == texts[1]
        assert texts[0].count("\n") == number


def test_records_say_how_good_it_is_and_how_much_is_padding(runs: Path) -> None:
    records = read(runs / "zero2-tokens" / "metrics.jsonl")
    held = [r for r in records if "eval_loss" in r]
    assert [r["step"] for r in held[:2]] == [4, 8]
    assert held[0]["eval_perplexity"] == pytest.approx(math.exp(held[0]["eval_loss"])) and "eval_bleu" in held[0]
    assert 0 < sum(r["padding"] for r in records if "padding" in r) < 2
    facts = json.loads((runs / "zero2-tokens" / "predictions.json").read_text())
    assert losses(runs / "zero2-tokens", "test_bleu") == [facts["test"]["bleu"]]
    assert "tok:13a" in facts["test"]["signature"]
    assert (runs / "zero2-tokens" / "samples.md").read_text().count("translation:") == 9 + 10


def test_stopping_and_resuming_gives_the_same_losses(tmp_path: Path, reversals: Path, runs: Path) -> None:
    both = common(reversals, *LAYOUTS["zero2"], "batch.tokens=150")
    assert not launch_many(tmp_path, {"x": [*both, "train.steps=4"]}).errors
    assert not launch_many(tmp_path, {"x": both}).errors
    assert losses(tmp_path / "x") == losses(runs / "zero2-tokens")


def test_it_learns_to_reverse(tmp_path: Path, reversals: Path) -> None:
    options = common(
        reversals, "zero=stage2", "model.hidden_size=64", "model.num_attention_heads=4", "model.intermediate_size=128",
        "model.initializer_range=0.12", "batch.tokens=500", "batch.micro_size=8", "train.steps=null", "train.epochs=14",
        "train.log_every=50", "train.eval_every=null", "train.save_every=null", "schedule=linear",
        "schedule.warmup=100", "deepspeed.optimizer.params.lr=3e-3",
    )  # fmt: skip
    result = launch(tmp_path, *options, recipe="translate")
    assert losses(result.dir, "test_bleu")[-1] > 80  # of 17 short sentences; one word amiss is two points


# ---- pretrained models


def tokenizer() -> object:
    return tokenizers.create(Tokenizer(model="bpe", vocab_size=60, lowercase=False), lambda: iter(WORDS * 3))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiny models with random weights, as from_pretrained would find them."""
    from transformers import (
        BartConfig,
        BartForConditionalGeneration,
        BertConfig,
        BertForMaskedLM,
        BertTokenizer,
        MarianMTModel,
        T5Config,
        T5ForConditionalGeneration,
    )

    torch.manual_seed(0)
    base = tmp_path_factory.mktemp("pretrained")
    ours = tokenizer()
    size = len(ours)
    names = ("d_model", "encoder_ffn_dim", "decoder_ffn_dim", "encoder_attention_heads", "decoder_attention_heads")
    bart = dict(zip(names, (32, 64, 64, 2, 2), strict=True)) | {"encoder_layers": 2, "decoder_layers": 1}
    bart |= {"max_position_embeddings": 64, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
    bart |= {"decoder_start_token_id": 1, "forced_eos_token_id": 1}
    t5 = T5Config(vocab_size=size + 3, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0)
    marian = seq2seq.marian_config(
        Model(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, max_position_embeddings=64
        ),
        seq2seq.Special(0, 1, 0),
        size,
    )
    models = {
        "t5": T5ForConditionalGeneration(t5),
        "bart": BartForConditionalGeneration(BartConfig(vocab_size=size, **bart)),
        "marian": MarianMTModel(marian),
    }
    models["bart"].final_logits_bias.normal_(std=0.1)  # a buffer that the loss depends on
    for name, model in models.items():
        model.save_pretrained(base / name)
        ours.save_pretrained(base / name)
    vocab = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    BertForMaskedLM(BertConfig(vocab_size=len(vocab), **shape)).save_pretrained(base / "bert")
    BertTokenizer({w: i for i, w in enumerate(vocab)}, do_lower_case=False).save_pretrained(base / "bert")
    return {path.name: path for path in base.iterdir()}


@pytest.fixture(scope="module")
def finetuned(tmp_path_factory: pytest.TempPathFactory, reversals: Path, folders: dict[str, Path]) -> Path:
    folder = tmp_path_factory.mktemp("finetuned")
    grid = {
        f"{name}-{zero}": common(reversals, *LAYOUTS[zero], f"model.weights={path}", "train.eval_every=null")
        for name, path in folders.items()
        for zero in ("zero0", "zero3")
    }
    for init in ("none", "encoder"):
        grid[f"bert_{init}-zero0"] = [*grid["bert-zero0"], f"model.init={init}"]
    assert not launch_many(folder, grid).errors
    return folder


@pytest.mark.parametrize("name", ["t5", "bart", "marian", "bert"])
def test_pretrained_models_fine_tune_alike_in_zero_0_and_3(finetuned: Path, name: str) -> None:
    found = losses(finetuned / f"{name}-zero0")
    assert min(found[1:]) < found[0]  # steps of short and of long sentences take turns
    assert losses(finetuned / f"{name}-zero3") == pytest.approx(found, rel=1e-5)


@pytest.mark.parametrize("name", ["t5", "bart", "marian"])
def test_training_starts_from_the_weights_that_are_given(
    finetuned: Path, folders: dict[str, Path], reversals: Path, name: str
) -> None:
    """The first loss is Hugging Face's own on the first global batch."""
    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

    from toolkit.data.order import Grouped

    model, tok = (
        AutoModelForSeq2SeqLM.from_pretrained(folders[name]).eval(),
        AutoTokenizer.from_pretrained(folders[name]),
    )
    sides = [(reversals / f"train.{side}").read_text().splitlines() for side in "ab"]
    ids = [[tok(x)["input_ids"] for x in side] for side in sides]
    lengths = np.array([max(len(a), len(b)) for a, b in zip(*ids, strict=True)])
    total, count = 0.0, 0
    for i in Grouped(lengths, 42, size=16).epoch(0)[0]:
        labels = torch.tensor([ids[1][i]])
        logits = model(input_ids=torch.tensor([ids[0][i]]), labels=labels).logits[0]
        total += cross_entropy(logits, labels[0], label_smoothing=0.1, reduction="sum").item()
        count += labels.numel()
    assert losses(finetuned / f"{name}-zero0")[0] == pytest.approx(total / count, rel=1e-4)


def test_a_bert_begins_the_encoder_the_decoder_or_neither(folders: dict[str, Path]) -> None:
    from transformers import BertConfig, BertForMaskedLM

    bert = BertForMaskedLM.from_pretrained(folders["bert"]).state_dict()
    config = seq2seq.bert2bert_config(BertConfig.from_pretrained(folders["bert"]), seq2seq.Special(0, 3, 2))
    for init, halves in (("both", {"encoder", "decoder"}), ("encoder", {"encoder"}), ("none", set())):
        model, info = seq2seq.model_class(config, init).from_pretrained(str(folders["bert"]), config=config)
        state = model.state_dict()
        taken = set(state) - info["missing_keys"]
        assert {name.split(".")[0] for name in taken} == halves
        assert all("crossattention" in n for n in info["missing_keys"] if n.split(".")[0] in halves)
        for name in taken:
            original = (
                name.removeprefix("decoder.") if name.startswith("decoder.") else name.replace("encoder.", "bert.", 1)
            )
            assert torch.equal(state[name], bert[original])


def test_the_bert_baseline_has_the_same_shape_and_another_beginning(finetuned: Path) -> None:
    firsts = {losses(finetuned / f"{name}-zero0")[0] for name in ("bert", "bert_encoder", "bert_none")}
    assert len(firsts) == 3
    shapes = {(finetuned / f"{name}-zero0" / "model" / "config.json").read_text() for name in ("bert", "bert_none")}
    assert len(shapes) == 1


def test_an_exported_translator_is_weights_again(finetuned: Path) -> None:
    """Even one made of two BERTs, whose poolers nothing has trained."""
    from transformers import AutoConfig

    from toolkit.checkpoint.export import export

    for name in ("bert-zero3", "marian-zero0"):
        folder = str(export(finetuned / name))
        config = AutoConfig.from_pretrained(folder)
        assert not seq2seq.made_of_bert(config, folder)
        _, info = seq2seq.model_class(config).from_pretrained(folder, config=config, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"]


# ---- loss and FLOPs


def test_the_loss_is_torch_s_with_label_smoothing_and_one_by_hand() -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(3, 5, 7), torch.randint(7, (3, 5))
    labels[0, 3:] = -100
    found = summed_loss(logits, labels, 0.1)
    real = labels != -100
    expected = cross_entropy(logits[real], labels[real], label_smoothing=0.1, reduction="sum")
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)
    log_p = logits.log_softmax(-1)[real]
    wanted = torch.full_like(log_p, 0.1 / 7)
    wanted[torch.arange(len(log_p)), labels[real]] += 0.9
    assert found.item() == pytest.approx(-(wanted * log_p).sum().item(), rel=1e-6)


def shapes() -> dict[str, object]:
    from transformers import BartConfig, BertConfig, T5Config

    special = seq2seq.Special(0, 1, 0)
    tiny = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    t5 = {"vocab_size": 100, "d_model": 32, "d_kv": 4, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    bart = {f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in (("layers", 2), ("ffn_dim", 64))}
    return {
        "marian": seq2seq.marian_config(Model(**tiny, decoder_layers=3), special, 100),
        "t5": T5Config(**t5),
        "t5 gated": T5Config(**t5, feed_forward_proj="gated-gelu"),
        "bart": BartConfig(vocab_size=100, d_model=32, **bart),
        "bert": seq2seq.bert2bert_config(BertConfig(vocab_size=100, **tiny), special),
    }


@pytest.mark.parametrize("name", ["marian", "t5", "t5 gated", "bart", "bert"])
def test_the_formula_counts_what_torch_counts(name: str) -> None:
    config = shapes()[name]
    config._attn_implementation = "eager"
    model = seq2seq.model_class(config)(config)
    n, s, t = 3, 11, 7
    with FlopCounterMode(display=False) as counter:
        ids = torch.ones(n, s, dtype=torch.long)
        model(input_ids=ids, attention_mask=ids, decoder_input_ids=torch.ones(n, t, dtype=torch.long))[
            "logits"
        ].sum().backward()
    counts = {
        "source": n * s,
        "target": n * t,
        "source_source": n * s * s,
        "target_target": n * t * t,
        "target_source": n * s * t,
    }
    assert seq2seq.shape(config).step(counts) == counter.get_total_flops()


def test_positions_are_sinusoids_and_stay_as_they_are(runs: Path) -> None:
    """Frozen in training, so the checkpoint's are those of the formula (Vaswani et al. 2017, section 3.5)."""
    from toolkit.checkpoint import export

    folder = export.export(runs / "zero3-pairs")
    from transformers import AutoModelForSeq2SeqLM

    model = AutoModelForSeq2SeqLM.from_pretrained(folder)
    table = model.model.encoder.embed_positions.weight
    angle = 3 / 10000 ** (2 * torch.arange(16) / 32)
    assert torch.allclose(table[3], torch.cat([angle.sin(), angle.cos()]), atol=1e-6)
    assert model.final_logits_bias.abs().max() == 0
    assert model.lm_head.weight is model.model.shared.weight is model.model.encoder.embed_tokens.weight


def test_a_recipe_compares_what_a_bert_is_worth(tmp_path: Path, reversals: Path, folders: dict[str, Path]) -> None:
    options = [
        o for o in common(reversals, "zero=stage2", "train.steps=4", "train.eval_every=2") if "tokenizer." not in o
    ]
    options[0] = "experiment=multi30k_bert"
    launch(tmp_path, *options, f"model.weights={folders['bert']}", "model=bert_tiny", recipe="bert_init")
    runs = {init: tmp_path / "x" / init for init in ("none", "encoder", "both")}
    assert len({losses(run)[0] for run in runs.values()}) == 3
    table = (tmp_path / "x" / "bert_init.md").read_text()
    assert "random: loss" in table and "| 2 |" in table and "| 4 |" in table
    assert (tmp_path / "x" / "bert_init.png").stat().st_size > 10_000
    assert (tmp_path / "x" / "bert_init.svg").exists()


def test_curves_keep_the_last_value_of_a_step_that_was_evaluated_twice(tmp_path: Path) -> None:
    records = [
        {"step": 1, "eval_bleu": 1.0},
        {"step": 2, "eval_bleu": 3.0},
        {"step": 2, "loss": 1},
        {"step": 1, "eval_bleu": 1.5},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    assert markdown(rows({"a": tmp_path}, ["eval_bleu"])).splitlines()[2:] == [
        "| 1 | 1.500 |",
        "| 2 | 3.000 |",
    ]
