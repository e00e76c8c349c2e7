"""Texts and vocabularies as other people have them: nothing is lost or changed in silence."""

from pathlib import Path
from typing import Any

import pytest
from composing import compose
from data_helpers import SEP, corpus_of, write_vocab
from world_cases import Case, cases, parts, told

from toolkit.config.schema import Tokenizer
from toolkit.data import labelled, parallel, unknown
from toolkit.data import tokenizer as tokenizers
from toolkit.data.prepared import Prepared, Ragged
from toolkit.data.text import prepare as prepare_text
from toolkit.errors import DataError
from toolkit.tasks.classify import Classify


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
    continuing = tokenizer.convert_ids_to_tokens(tokenizers.pieces(tokenizer))
    assert {token: token in continuing for token in case.pieces or {}} == (case.pieces or {})
    assert all(tokenizer.tokenize(one) != tokenizer.tokenize(other) for one, other in case.apart or [])
    assert all(tokenizer.tokenize(one) == tokenizer.tokenize(other) for one, other in case.alike or [])
    for name in case.special or []:
        assert tokenizer.convert_tokens_to_ids(name) not in tokenizer(name, add_special_tokens=False).input_ids
    assert "Backend" not in (tmp_path / "saved" / "tokenizer_config.json").read_text()  # unknown to transformers 4
    plain = AutoTokenizer.from_pretrained(tmp_path / "saved")  # what an export is read with
    names = tokenizers.special_names(plain)
    for text in {*texts, *(case.tokens or {})}:
        if not any(name in text for name in names):
            assert plain(text).input_ids == tokenizer(text).input_ids


ENGLISH, OTHER = "a dog runs", "пес бежит да"


def prepare(kind: str, folder: Path, *overrides: str, lines: list[str]) -> Prepared:
    """``lines`` as the data of a kind of task, with an English vocabulary; in translation they are the target."""
    write_vocab(folder, [*"[]", "sep", *ENGLISH.split()])
    common = [
        "tokenizer.lowercase=true",
        f"tokenizer.path={folder / 'vocab.txt'}",
        f"data.cache_dir={folder / 'cache'}",
        "data.holdout=0",
    ]
    if kind == "pretrain":
        (folder / "x.txt").write_text("\n\n".join(lines))
        corpus = ["task.objective=mlm", "data=text", f"data.path={folder / 'x.txt'}"]
        return prepare_text(compose(*corpus, *common, *overrides))
    if kind == "classify":
        rows = "".join(f"{line}\t{'no' if number % 3 else 'yes'}\n" for number, line in enumerate(lines))
        (folder / "x.tsv").write_text(f"text\tlabel\n{rows}")
        config = compose("task=classify", f"data.train={folder / 'x.tsv'}", *common, *overrides)
        return labelled.prepare(config, labelled.Reader(Classify.encode))
    (folder / "x.de").write_text(f"{ENGLISH}\n" * len(lines))
    (folder / "x.en").write_text("".join(f"{line}\n" for line in lines))
    given = [
        "task=translate",
        "task.source=de",
        "task.target=en",
        "model=transformer_tiny",
        f"data.train={folder / 'x'}",
    ]
    return parallel.prepare(compose(*given, *common, *overrides))


NAMES = {"pretrain": "the corpus", "classify": "train", "translate": "train target"}


@pytest.mark.parametrize("kind", NAMES)
def test_every_kind_of_task_measures_its_texts(kind: str, tmp_path: Path) -> None:
    half = [ENGLISH, OTHER] * 8
    assert prepare(kind, tmp_path, lines=[ENGLISH] * 16).warnings == []
    (said,) = prepare(kind, tmp_path, "tokenizer.max_unknown=1", lines=half).warnings
    assert said.startswith(f"{NAMES[kind]}: 55.6% of the characters are unknown to tokenizer.path=")
    with pytest.raises(DataError, match=f"{NAMES[kind]}: 55.6%.*tokenizer.max_unknown=0.2 is refused"):
        prepare(kind, tmp_path, lines=half)  # though it is in the cache


@pytest.mark.parametrize("kind", NAMES)
def test_special_tokens_in_texts_are_text_to_every_kind_of_task(kind: str, tmp_path: Path) -> None:
    def separators(*overrides: str) -> int:
        """[SEP] in the ids of what 16 lines became."""
        path = prepare(kind, tmp_path, *overrides, lines=["a dog [SEP] runs"] * 16).path
        if kind == "pretrain":
            return int((corpus_of(Prepared(path)).tokens == SEP).sum())
        of, column = ("sequences", "ids") if kind == "classify" else ("target", "id")
        return int((Ragged(path / "train" / of).columns[column] == SEP).sum())

    ends = 0 if kind == "pretrain" else 16
    assert separators() == ends and separators("tokenizer.special_in_text=true") == ends + 16
    (said,) = prepare(kind, tmp_path, lines=["a dog [SEP] runs"] * 16).warnings
    assert said.startswith(f"{NAMES[kind]}: ") and "hold the name of a special token, such as '[SEP]'" in said


def test_a_prefix_that_names_a_special_token_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"task.prefix=\[SEP\] : names a special token.*special_in_text=true"):
        prepare("translate", tmp_path, "task.prefix='[SEP] '", lines=[ENGLISH])
