"""Texts and vocabularies as other people have them: nothing is lost or changed in silence."""

from pathlib import Path
from typing import Any

import pytest
from world_cases import Case, cases, parts, told

from toolkit.config.schema import Tokenizer
from toolkit.data import tokenizer as tokenizers
from toolkit.data import unknown


def pieces(*special: str) -> list[tuple[str, float]]:
    """A unigram vocabulary, in which special tokens are the most likely, as SentencePiece writes them."""
    letters = dict.fromkeys("▁</>[]_0abcdefghijklmnopqrstuvwxyz")
    return [(name, 0.0) for name in special] + [(c, -9.0) for c in letters] + [("▁hello", -3.0)]


def saved(kind: str, folder: Path) -> Path:
    """A small tokenizer of a kind of model, as it comes from the hub."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import AlbertTokenizer, RobertaTokenizer, T5Tokenizer, XLMRobertaTokenizer

    bytes_ = ["<s>", "<pad>", "</s>", "<unk>", *sorted(ByteLevel.alphabet()), "he", "ll", "Ġhe", "<mask>"]
    made: dict[str, Any] = {
        "t5": lambda: T5Tokenizer(vocab=pieces("<pad>", "</s>", "<unk>")),
        "albert": lambda: AlbertTokenizer(vocab=pieces("<pad>", "<unk>", "[CLS]", "[SEP]", "[MASK]")),
        "xlm-roberta": lambda: XLMRobertaTokenizer(vocab=[*pieces("<s>", "<pad>", "</s>", "<unk>"), ("<mask>", 0.0)]),
        "roberta": lambda: RobertaTokenizer(
            vocab={token: number for number, token in enumerate(bytes_)}, merges=[("h", "e"), ("l", "l"), ("Ġ", "he")]
        ),
    }
    made[kind]().save_pretrained(folder / kind)
    return folder / kind


def read(case: Case) -> list[str]:
    """The texts; of ``characters`` the one at rank r stands 1000 / r times, at least twice."""
    if case.characters is None:
        return list(case.texts) * (case.times or 1)
    first, number = case.characters
    return [chr(first + rank) * max(2, 1000 // (rank + 1)) for rank in range(number)]


@pytest.mark.parametrize("case", cases("vocabularies"))
def test_what_a_tokenizer_makes_of_texts(case: Case, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    given = dict(case.tokenizer or {})
    if case.saved or "path" in given:
        given["path"] = str(saved(case.saved, tmp_path) if case.saved else case.write(tmp_path) / given["path"])
    config, texts = Tokenizer(**given), read(case)
    with told(case):
        tokenizer = tokenizers.save(tokenizers.create(config, lambda: iter(texts)), tmp_path / "saved", config)
        lost = {"train": unknown.lost(tokenizer, iter(texts))}
        unknown.refuse(config, lost)
    if case.error:
        return
    said = unknown.warnings(config, tokenizer, lost)
    assert bool(said) == bool(case.warning), said
    assert all(part in " ".join(said) for part in parts(case.warning)), said
    assert all("\n" not in line for line in said)
    assert tokenizers.vocab_size(tokenizer) == case.size or case.size is None, tokenizers.vocab_size(tokenizer)
    low, high = case.unknown or (0, 1)
    assert low <= lost["train"]["unknown"] / lost["train"]["characters"] <= high
    for text, tokens in (case.tokens or {}).items():
        assert tokenizer.tokenize(text) == tokens
    assert {text: tokenizer.convert_tokens_to_ids(text) for text in case.ids or {}} == (case.ids or {})
    assert all(tokenizer.tokenize(one) != tokenizer.tokenize(other) for one, other in case.apart or [])
    assert all(tokenizer.tokenize(one) == tokenizer.tokenize(other) for one, other in case.alike or [])
    for name in case.special or []:
        assert tokenizer.convert_tokens_to_ids(name) not in tokenizer(name, add_special_tokens=False).input_ids
    plain = AutoTokenizer.from_pretrained(tmp_path / "saved")  # what an export is read with
    names = tokenizers.special_names(plain)
    for text in {*texts, *(case.tokens or {})}:
        if not any(name in text for name in names):
            assert plain(text).input_ids == tokenizer(text).input_ids
