"""Weights of any architecture: what the model computes is what transformers computes, whatever its keys are called."""

import io
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from composing import compose
from rich.console import Console
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)
from world_cases import Case, cases, parts, told

from toolkit.checkpoint.export import _save
from toolkit.data.order import keyed
from toolkit.data.tokenizer import vocab_size
from toolkit.models import build
from toolkit.run.directory import Run
from toolkit.tasks.classify import Classify
from toolkit.tasks.translate import Translate


@pytest.fixture(scope="module", autouse=True)
def one_rank() -> Iterator[None]:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


WORDS = "the a of old new red sea day way man time road tree house".split()  # noqa: SIM905
# The special tokens from id 0, and what stands around a text and around two
SPECIAL: dict[str, tuple[dict[str, str], str, str]] = {
    "bert": (
        {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"},
        "[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1",
    ),
    "roberta": (
        {"bos": "<s>", "pad": "<pad>", "eos": "</s>", "unk": "<unk>", "mask": "<mask>"},
        "<s> $A </s>", "<s> $A </s> </s> $B </s>",
    ),
    "t5": ({"pad": "<pad>", "eos": "</s>", "unk": "<unk>"}, "$A </s>", "$A </s> $B </s>"),
    "gpt2": ({"eos": "<|endoftext|>", "unk": "<unk>"}, "$A", "$A $B"),
    "none": ({"unk": "<unk>"}, "$A", "$A $B"),
}  # fmt: skip


def tokenizer(like: str) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    special, one, two = SPECIAL[like]
    vocab = {token: i for i, token in enumerate([*special.values(), *WORDS])}
    backend = Tokenizer(models.WordLevel(vocab, unk_token=special["unk"]))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    around = [(token, vocab[token]) for token in special.values()]
    backend.post_processor = processors.TemplateProcessing(single=one, pair=two, special_tokens=around)
    names = ["input_ids", "attention_mask", *(["token_type_ids"] if like == "bert" else [])]
    roles = {f"{role}_token": token for role, token in special.items()}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, model_input_names=names, **roles)


def configured(case: Case, vocab_size: int = 40) -> Any:
    return getattr(transformers, case.config)(vocab_size=vocab_size, **case.keys)


def opened(folder: Path, *options: str) -> tuple[Run, io.StringIO]:
    """A run on the weights and the rows of the folder, and what it says."""
    said = io.StringIO()
    config = compose(
        f"data.train={folder}/rows.jsonl", f"data.eval={folder}/rows.jsonl", f"model.weights={folder}/weights",
        f"data.cache_dir={folder}/cache", "train.steps=2", "batch.global_size=2", "batch.micro_size=2", *options,
    )  # fmt: skip
    return Run(folder, config, Console(file=said, width=1000)), said


def built(case: Case, folder: Path) -> tuple[Classify, Any, str]:
    """A task on weights of the case, its model, and what the run says."""
    torch.manual_seed(0)
    AutoModel.from_config(configured(case)).save_pretrained(folder / "weights")
    tokenizer(case.tokenizer).save_pretrained(folder / "weights")
    rows = [{"text": " ".join(WORDS[:n]), "text_pair": "red sea", "label": "ab"[n % 2]} for n in (2, 7, 3, 5)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ("task=classify", "data.columns.text_pair=text_pair", "data.max_length=32", *(case.options or ()))
    run, told = opened(folder, *options)
    task = Classify(run)
    return task, build.build_model(run, task, {}), told.getvalue()


@pytest.mark.parametrize("case", cases("architectures"))
def test_logits_are_those_of_transformers_whatever_is_padded(case: Case, tmp_path: Path) -> None:
    with told(case):
        task, model, said = built(case, tmp_path)
    if case.error:
        return
    attention = task.hf_config._attn_implementation
    assert attention == case.attention and ("Warning: model.attention=sdpa" in said) == (attention == "eager")
    assert build.positions(build.skeleton(task.hf_config, task.model_class)) == case.positions
    model.eval().save_pretrained(tmp_path / "model")
    assert not getattr(model.config, "use_cache", False)  # which recomputed layers would fill twice
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model", attn_implementation=attention)
    given = AutoModel.from_pretrained(tmp_path / "weights").state_dict()
    body = getattr(theirs, theirs.base_model_prefix, theirs).state_dict()
    assert all(torch.equal(body[name], value) for name, value in given.items() if "pooler" not in name and name in body)
    assert len(given.keys() & body.keys()) > 5
    tok = AutoTokenizer.from_pretrained(tmp_path / "model")
    if tok.pad_token_id is not None:
        assert AutoConfig.from_pretrained(tmp_path / "model").pad_token_id == tok.pad_token_id
    examples = task.examples("train")
    padded = tok([e.text for e in examples], [e.text_pair for e in examples], padding=True, return_tensors="pt")
    with torch.no_grad():
        expected = theirs.eval()(**padded).logits
        for keys in ([0, 1, 2, 3], [1, -1, -1], [-1, 3], [-1, -1]):  # -1: a rank is left without samples
            batch = task._split("train")[keyed(0, keys)]
            logits = model(**{name: batch[name] for name in task.inputs}).logits
            real = [i for i, key in enumerate(keys) if key >= 0]
            torch.testing.assert_close(logits[real], expected[[keys[i] for i in real]], rtol=1e-4, atol=1e-6)
            assert logits.isfinite().all()


@pytest.mark.parametrize("case", [c for c in cases("architectures") if c.values[0].dropout])
def test_dropout_reaches_every_place_that_drops(case: Case) -> None:
    untouched, config = configured(case).to_dict(), configured(case)
    build.set_dropout(config, 0.37)
    changed = sorted(name for name, value in untouched.items() if value != config.to_dict()[name])
    assert changed == case.dropout
    mappings = ("SEQUENCE_CLASSIFICATION", "TOKEN_CLASSIFICATION", "QUESTION_ANSWERING", "MULTIPLE_CHOICE")
    for mapping in (getattr(transformers, f"MODEL_FOR_{name}_MAPPING") for name in mappings):
        if type(config) in mapping:
            model = build.skeleton(config, mapping[type(config)])
            assert {p for _, p in dropouts(model)} == {0.37}, list(dropouts(model))
    build.set_dropout(config, 0.0)
    model = transformers.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING[type(config)](config).train()
    ids = torch.tensor([[6, 7, 8, 2, 3, config.eos_token_id or 2]])
    assert torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits)


def dropouts(model: nn.Module) -> Any:
    """Every place that drops, with its rate: modules, and numbers that modules keep for torch's functions."""
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            rate = isinstance(value, (int, float)) and not isinstance(value, bool)
            if rate and ("drop" in key or (key == "p" and "Dropout" in type(module).__name__)) and "layer" not in key:
                yield f"{name}.{key}", value


def spoken(case: Case, folder: Path) -> Any:
    """The tokenizer of the case, in the classes and files of the library."""
    if case.tokenizer in SPECIAL:
        return tokenizer(case.tokenizer)
    letters = [(mark + letter, -3.0) for mark in ("", "▁") for letter in "abcdefghijklmnopqrstuvwxyz"]
    vocab = [(token, 0.0) for token in ("<s>", "<pad>", "</s>", "<unk>")] + [(f"▁{w}", -2.0) for w in WORDS] + letters
    kind = getattr(transformers, case.tokenizer)
    if case.tokenizer == "NllbTokenizer":
        return kind(vocab={token: i for i, (token, _) in enumerate([*vocab, ("▁", 0.0)])}, merges=[])
    if case.tokenizer.startswith("MBart"):
        return kind(vocab=vocab)
    spm = pytest.importorskip("sentencepiece")
    folder.mkdir()
    for side, texts in (("source", WORDS), ("target", [word[::-1] for word in WORDS])):
        options = {"vocab_size": 30, "hard_vocab_limit": False, "minloglevel": 9}
        spm.SentencePieceTrainer.train(
            sentence_iterator=iter(texts * 9), model_prefix=str(folder / side), **options, bos_id=-1
        )
        (folder / f"{side}.model").rename(folder / f"{side}.spm")
    models = [spm.SentencePieceProcessor(str(folder / f"{side}.spm")) for side in ("source", "target")]
    pieces = dict.fromkeys(m.id_to_piece(i) for m in models for i in range(len(m)))
    names = ["</s>", "<unk>", "<pad>", *(case.marks or ())] if "Marian" in case.tokenizer else ["<s>", "<pad>", "</s>"]
    (folder / "vocab.json").write_text(json.dumps({n: i for i, n in enumerate(dict.fromkeys([*names, *pieces]))}))
    if case.tokenizer == "MarianTokenizer":
        return kind(str(folder / "source.spm"), str(folder / "target.spm"), str(folder / "vocab.json"))
    languages = kind(str(folder / "vocab.json"), str(folder / "source.spm")).lang_token_to_id
    return kind(str(folder / "vocab.json"), str(folder / "source.spm"), additional_special_tokens=list(languages))


def translator(case: Case, folder: Path) -> tuple[Translate, Any, str]:
    """A task on weights of the case, its model, and what the run says."""
    torch.manual_seed(case.seed or 0)
    tok = spoken(case, folder / "spm")
    config = configured(case, vocab_size=vocab_size(tok))
    kind = AutoModelForMaskedLM if case.config == "BertConfig" else AutoModelForSeq2SeqLM
    kind.from_config(config).save_pretrained(folder / "weights")
    tok.save_pretrained(folder / "weights")
    (folder / "weights" / "generation_config.json").unlink(missing_ok=True)
    if case.generation:
        (folder / "weights" / "generation_config.json").write_text(json.dumps(case.generation))
    file = folder / "weights" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | (case.older or {})))
    rows = [{"source": " ".join(WORDS[:n]), "target": " ".join(w[::-1] for w in WORDS[n : 2 * n])} for n in (2, 6, 3)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run, told = opened(
        folder,
        "task=translate",
        "tokenizer.max_unknown=1",
        "data.max_length=40",
        "task.max_target=9",
        "task.beams=2",
        *(case.options or ()),
    )
    task = Translate(run)
    return task, build.build_model(run, task, {}), told.getvalue()


@pytest.mark.parametrize("case", cases("translators"))
def test_an_export_translates_as_its_run_did(case: Case, tmp_path: Path) -> None:
    with told(case):
        task, model, said = translator(case, tmp_path)
    if case.error:
        return
    said = "".join(line for line in said.splitlines() if "characters are unknown" not in line)
    assert all(part in said for part in parts(case.warning)) and ("Warning" in said) == bool(case.warning)
    halves = model.get_encoder(), model.get_decoder()
    assert {half.config._attn_implementation for half in halves} == {task.config.model.attention}
    engine = SimpleNamespace(ds=SimpleNamespace(eval=model.eval, module=model, zero_optimization_stage=lambda: 0))
    split = task.splits["eval"]
    texts, _ = task._translated(engine, split, None, task.config.task.beams, iter)
    folder = tmp_path / "model"
    _save(model.state_dict(), folder / "model.safetensors")
    theirs, tok = AutoModelForSeq2SeqLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    sources, targets = zip(*split.texts, strict=True)
    inputs = tok([task.config.task.prefix + s for s in sources], padding=True, return_tensors="pt")
    found = theirs.generate(**inputs)
    assert [text.strip() for text in tok.batch_decode(found, skip_special_tokens=True)] == texts
    assert len(set(texts)) > 1
    assert {tok.convert_ids_to_tokens(row)[0] for row in found.tolist()} == {case.start}
    if case.first:
        assert {tok.convert_ids_to_tokens(row)[1] for row in found.tolist()} == {case.first}
    for i, target in enumerate(targets):  # training reads and predicts what the class itself makes of the labels
        batch, labels = split[keyed(0, [i])], tok(text_target=target, return_tensors="pt")["input_ids"]
        labels = labels[:, 1:] if labels[0, 0] == task.special.start else labels  # a BERT's
        assert torch.equal(batch["labels"], labels)
        expected = theirs(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels)
        given = {name: batch[name] for name in task.inputs}
        torch.testing.assert_close(model(**given).logits, expected.logits, rtol=1e-4, atol=1e-4)
