"""Encoders of every architecture, tiny and drawn, each with the tokenizer of its kind, trained on a few texts.

tokenizer = tokenizer_of("modernbert", texts)
model = model_of("modernbert", AutoModelForTokenClassification, tokenizer, id2label={0: "O", 1: "B-x"})
"""

from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import (
    AlbertTokenizer,
    AutoConfig,
    BertTokenizer,
    DebertaV2Tokenizer,
    DistilBertTokenizer,
    PreTrainedTokenizerFast,
    RobertaTokenizer,
    XLMRobertaTokenizer,
)

SHAPE = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "dim": 32,
    "n_layers": 2, "n_heads": 2, "hidden_dim": 64, "embedding_size": 32, "max_position_embeddings": 130,
}  # fmt: skip
BERT = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
ARCHITECTURES = (
    "bert", "distilbert", "electra", "albert", "roberta", "camembert", "xlm-roberta", "deberta-v2", "modernbert",
)  # fmt: skip


def tokenizer_of(name: str, texts: list[str]) -> Any:
    if name in ("bert", "distilbert", "electra"):
        cls = DistilBertTokenizer if name == "distilbert" else BertTokenizer
        return cls(_wordpiece(texts), do_lower_case=name != "bert")
    if name in ("roberta", "modernbert"):
        vocab, merges = _bytes(texts)
        return RobertaTokenizer(vocab, merges) if name == "roberta" else _modernbert(vocab, merges)
    pieces = _unigram(texts)
    if name == "albert":
        return AlbertTokenizer([("<pad>", 0.0), ("<unk>", 0.0), *_zero("[CLS]", "[SEP]", "[MASK]"), *pieces])
    if name == "deberta-v2":
        return DebertaV2Tokenizer([*_zero("[PAD]", "[CLS]", "[SEP]", "[UNK]"), *pieces, *_zero("[MASK]")])
    return XLMRobertaTokenizer([*_zero("<s>", "<pad>", "</s>", "<unk>"), *pieces, *_zero("<mask>")])


def model_of(name: str, auto: Any, tokenizer: Any, **keys: Any) -> Any:
    torch.manual_seed(1)
    special = {f"{key}_token_id": getattr(tokenizer, f"{key}_token_id") for key in ("pad", "bos", "eos", "cls", "sep")}
    shape = SHAPE | {"vocab_size": max(tokenizer.get_vocab().values()) + 1, "initializer_range": 0.5}
    return auto.from_config(AutoConfig.for_model(name, **shape, **special, **keys)).eval()


def _zero(*tokens: str) -> list[tuple[str, float]]:
    return [(token, 0.0) for token in tokens]


def _wordpiece(texts: list[str]) -> dict[str, int]:
    backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=200, special_tokens=list(BERT.values()), show_progress=False)
    backend.train_from_iterator([*texts, *map(str.lower, texts)], trainer)
    return dict(backend.get_vocab())


def _bytes(texts: list[str]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    import json

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=["<s>", "<pad>", "</s>", "<unk>", "<mask>", *BERT.values()],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
    )  # fmt: skip
    backend.train_from_iterator(texts, trainer)
    model = json.loads(backend.to_str())["model"]
    return model["vocab"], [tuple(pair) for pair in model["merges"]]


def _modernbert(vocab: dict[str, int], merges: list[tuple[str, str]]) -> Any:
    """As answerdotai/ModernBERT-base: byte-level, with BERT's markers, offsets that hold the blank before a word."""
    backend = Tokenizer(models.BPE(vocab, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True)
    cls, sep = (("[CLS]", vocab["[CLS]"]), ("[SEP]", vocab["[SEP]"]))
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[cls, sep]
    )
    names = ["input_ids", "attention_mask"]
    return PreTrainedTokenizerFast(tokenizer_object=backend, model_input_names=names, **BERT)


def _unigram(texts: list[str]) -> list[tuple[str, float]]:
    import json

    backend = Tokenizer(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.train_from_iterator(texts, trainers.UnigramTrainer(vocab_size=150, show_progress=False))
    return [(piece, score) for piece, score in json.loads(backend.to_str())["model"]["vocab"]]
