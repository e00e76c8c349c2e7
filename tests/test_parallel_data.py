"""Sentence pairs: what is read, dropped, cut and refused, and how they become batches."""

import gzip
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from composing import compose

from toolkit.config.schema import RunConfig
from toolkit.data import parallel
from toolkit.data import tokenizer as tokenizers
from toolkit.data.batch import IGNORED
from toolkit.data.loader import eval_batches, train_batches
from toolkit.data.order import Grouped, Split
from toolkit.data.parallel import Translations
from toolkit.data.prepared import Prepared
from toolkit.errors import DataError

MULTI30K = Path(__file__).parents[2] / "shared" / "data" / "translation" / "multi30k"
PAD = START = 0
DE = ["ein Hund läuft", "eine Katze schläft im Haus", "zwei Hunde", "", "die Katze und der Hund", ""]
EN = ["a dog runs", "a cat sleeps in the house", "two dogs", "an answer to nothing", "", ""]


def write(path: Path, lines: list[str]) -> None:
    text = "".join(f"{line}\n" for line in lines)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())


def corpus(folder: Path, source: list[str] = DE, target: list[str] = EN, name: str = "train", suffix: str = "") -> str:
    write(folder / f"{name}.de{suffix}", source)
    write(folder / f"{name}.en{suffix}", target)
    return str(folder / name)


def config(tmp_path: Path, *overrides: str) -> RunConfig:
    common = [
        "task=translate",
        "model=transformer_tiny",
        "task.source=de",
        "task.target=en",
        "tokenizer.vocab_size=120",
    ]
    common += [f"data.cache_dir={tmp_path / 'cache'}", f"data.train={tmp_path / 'train'}", "data.holdout=0"]
    given = {o.split("=")[0] for o in overrides}
    return compose(*(o for o in common if o.split("=")[0] not in given), *overrides)


def pairs(prepared: Prepared, split: str) -> Translations:
    return Translations(prepared.path / split, PAD, START)


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_pairs_without_a_side_are_counted_and_left_out(tmp_path: Path, suffix: str) -> None:
    corpus(tmp_path, suffix=suffix)
    prepared = parallel.prepare(config(tmp_path))
    counts = prepared.audit["splits"]["train"]
    assert (counts["read"], counts["kept"], len(pairs(prepared, "train"))) == (6, 3, 3)
    assert (counts["empty_source"], counts["empty_target"], counts["empty_both"]) == (1, 1, 1)
    assert prepared.notes == [
        "train: 3 of 6 pairs, 1 with an empty source, 1 with an empty target, 1 empty on both sides"
    ]


def test_ids_decode_to_the_text_and_end_with_eos(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    corpus(tmp_path)
    for model in ("bpe", "unigram"):
        prepared = parallel.prepare(config(tmp_path, f"tokenizer.model={model}", "tokenizer.vocab_size=60"))
        tokenizer = AutoTokenizer.from_pretrained(prepared.tokenizer)
        split = pairs(prepared, "train")
        assert tokenizer.decode(split.source(1), skip_special_tokens=True) == DE[1]
        assert tokenizer.decode(split.target(1), skip_special_tokens=True) == EN[1]
        assert split.source(1)[-1] == split.target(1)[-1] == tokenizer.eos_token_id == 1
        assert (tokenizer.pad_token_id, tokenizer.unk_token_id) == (0, 2)


def test_too_long_is_dropped_in_training_and_cut_in_evaluation(tmp_path: Path) -> None:
    long = " ".join(["Hund"] * 40)
    corpus(tmp_path, [*DE, long], [*EN, "dog"])
    corpus(tmp_path, [DE[0], long, ""], [EN[0], "dog", "dog"], name="val")
    prepared = parallel.prepare(config(tmp_path, f"data.eval={tmp_path / 'val'}", "data.max_length=24"))
    train, held = (prepared.audit["splits"][name] for name in ("train", "eval"))
    assert (train["too_long"], train["kept"]) == (1, 3)
    assert (held["cut_source"], held["empty_source"], held["kept"], held["read"]) == (1, 1, 3, 3)
    assert len(pairs(prepared, "eval").source(1)) == 24 and pairs(prepared, "eval").source(1)[-1] == 1
    assert pairs(prepared, "eval").texts[1] == (long, "dog")  # BLEU is of the whole


def test_a_share_of_the_pairs_is_held_out_without_data_eval(tmp_path: Path) -> None:
    corpus(tmp_path, DE[:3] * 100, EN[:3] * 100)
    prepared = parallel.prepare(config(tmp_path, "data.holdout=0.2"))
    assert 30 < len(pairs(prepared, "eval")) < 90
    assert len(pairs(prepared, "eval")) + len(pairs(prepared, "train")) == 300


def refused(tmp_path: Path, *overrides: str) -> str:
    with pytest.raises(DataError) as error:
        parallel.prepare(config(tmp_path, *overrides))
    assert "\n" not in str(error.value)
    return str(error.value)


def test_bad_input_is_refused_in_one_line(tmp_path: Path) -> None:
    assert "there is no" in refused(tmp_path) and "train.de[.gz] and no" in refused(tmp_path)
    corpus(tmp_path)
    (tmp_path / "train.en").unlink()
    assert "train.en[.gz]. The two files are data.train, a dot and task.source=de" in refused(tmp_path)
    corpus(tmp_path, DE, [*EN, "one more", "and another"])
    assert "train.de has 6 lines" in refused(tmp_path) and "train.en 8" in refused(tmp_path)
    corpus(tmp_path, ["", ""], ["", ""])
    assert "hold no word to train on" in refused(tmp_path)
    corpus(tmp_path, ["Hund"] * 3, ["dog"] * 3)
    assert "train: 0 of 3 pairs, 3 above data.max_length" in refused(
        tmp_path, "data.max_length=1", "data.max_predictions=1"
    )
    corpus(tmp_path, ["Hund", "Haus"], ["dog", ""], name="val")
    assert "val.de:2: an empty reference in data.eval" in refused(tmp_path, f"data.eval={tmp_path / 'val'}")
    (tmp_path / "train.de").write_bytes(b"gut\n\xff\n")
    assert (
        "train.de:2: byte 0xff at offset 4 is not valid UTF-8 text. It looks like CP1252 or CP1251: iconv"
        in refused(tmp_path)
    )
    (tmp_path / "train.de").unlink()
    (tmp_path / "train.de.gz").write_bytes(b"no gzip")
    assert "train.de.gz: cannot be read" in refused(tmp_path)
    assert "data.path is not set" in refused(tmp_path, "experiment=multi30k", "data.train=${data.path}/train")
    assert "data.train is not set" in refused(tmp_path, "data.train=null")


def test_a_line_ends_with_a_newline_only(tmp_path: Path) -> None:
    corpus(tmp_path, ["ein\u2028Hund\x0c da", "zwei"], ["a dog", "two"])
    read = list(parallel.pairs(str(tmp_path / "train"), "train", config(tmp_path).data, config(tmp_path).task))
    assert [p.target for p in read] == ["a dog", "two"] and read[0].source == "ein\u2028Hund\x0c da"


def test_a_bad_line_takes_its_pair_along_and_no_other(tmp_path: Path) -> None:
    corpus(tmp_path, ["eins", "zwei", "drei", "vier"], ["one", "two", "three", "four"])
    (tmp_path / "train.de").write_bytes(b"eins\nzw\xff\ndrei\nvier\n")
    prepared = parallel.prepare(config(tmp_path, "data.on_error=skip"))
    read = parallel.pairs(
        str(tmp_path / "train"), "train", config(tmp_path, "data.on_error=skip").data, config(tmp_path).task
    )
    assert [(p.source, p.target) for p in read] == [("eins", "one"), ("drei", "three"), ("vier", "four")]
    assert prepared.notes == ["train: 3 of 3 pairs, 1 bad lines skipped"]
    assert "train.de:2: byte 0xff" in prepared.audit["splits"]["train"]["skipped_first"][0]


def test_pairs_come_from_tables_too(tmp_path: Path) -> None:
    (tmp_path / "train.tsv").write_text(
        "source\ttarget\n" + "".join(f"{a}\t{b}\n" for a, b in zip(DE[:3], EN[:3], strict=True))
    )
    nested = [json.dumps({"translation": {"de": a, "en": b}}) for a, b in zip(DE[:3], EN[:3], strict=True)]
    (tmp_path / "val.jsonl").write_text("\n".join(nested))
    tsv = config(tmp_path, f"data.train={tmp_path / 'train.tsv'}")
    assert parallel.prepare(tsv).audit["splits"]["train"]["kept"] == 3
    columns = ["data.columns.source=translation.de", "data.columns.target=translation.en"]
    rows = config(tmp_path, f"data.train={tmp_path / 'val.jsonl'}", *columns)
    assert [p.target for p in parallel.pairs(rows.data.train, "train", rows.data, rows.task)] == EN[:3]
    assert "train.tsv:2: has no column 'translation.de', only 'source', 'target'" in refused(
        tmp_path, f"data.train={tmp_path / 'train.tsv'}", *columns
    )


def test_another_seed_finds_the_same_data(tmp_path: Path) -> None:
    corpus(tmp_path)
    one, two = (parallel.prepare(config(tmp_path, f"seed={seed}")) for seed in (1, 2))
    assert one.path == two.path
    held = ["data.eval=null", "data.holdout=0.4"]
    three, four = (parallel.prepare(config(tmp_path, f"seed={seed}", *held)) for seed in (1, 2))
    assert three.path == four.path  # seeds are compared on the same held-out pairs


# ---- batches


def many(tmp_path: Path, *overrides: str) -> tuple[RunConfig, Translations]:
    rng = np.random.default_rng(0)
    source = [" ".join(rng.choice(DE[1].split(), rng.integers(1, 12))) for _ in range(300)]
    target = [" ".join(rng.choice(EN[1].split(), rng.integers(1, 12))) for _ in range(300)]
    corpus(tmp_path, source, target)
    built = config(tmp_path, "batch.global_size=32", "batch.micro_size=8", *overrides)
    return built, pairs(parallel.prepare(built), "train")


def steps(built: RunConfig, split: Translations, world: int, number: int, step: int = 0) -> list[list[Any]]:
    """The micro-batches of each step, over all ranks."""
    accumulation = built.batch.global_size // built.batch.micro_size // world
    batch = built.batch
    order = Grouped(split.lengths, built.seed, size=batch.global_size, tokens=batch.tokens)
    splits = [Split(batch.global_size, batch.micro_size, rank, world) for rank in range(world)]
    streams = [train_batches(split, order, of, start_sample=step * batch.global_size) for of in splits]
    return [[next(s) for _ in range(accumulation) for s in streams] for _ in range(number)]


def rows(batches: list[Any]) -> list[tuple[Any, ...]]:
    found = []
    for batch in batches:
        for ids, mask, labels in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True):
            found.append((tuple(ids[mask > 0].tolist()), tuple(labels[labels != IGNORED].tolist())))
    return sorted(row for row in found if row[1])


@pytest.mark.parametrize("tokens", ["null", "200"])
def test_every_layout_takes_the_same_global_batches(tmp_path: Path, tokens: str) -> None:
    built, split = many(tmp_path, f"batch.tokens={tokens}")
    expected = [rows(step) for step in steps(built, split, 1, 20)]
    assert [rows(step) for step in steps(built, split, 2, 20)] == expected
    assert [rows(step) for step in steps(built, split, 4, 20)] == expected
    assert [rows(step) for step in steps(built, split, 2, 8, step=12)] == expected[12:]


def test_batches_by_tokens_hold_as_many_as_fit(tmp_path: Path) -> None:
    built, split = many(tmp_path, "batch.tokens=200")
    order = Grouped(split.lengths, built.seed, size=32, tokens=built.batch.tokens)
    sizes = [split.lengths[i].max() * len(i) for i in order.epoch(0)]
    assert max(sizes) <= 200 and np.mean(sizes) > 150
    assert sorted(np.concatenate(order.epoch(0))) == list(range(300))


def test_decoder_reads_the_labels_shifted_right(tmp_path: Path) -> None:
    built, split = many(tmp_path)
    for step in steps(built, split, 2, 12):
        for batch in step:
            labels = batch["labels"].masked_fill(batch["labels"] == IGNORED, 0)
            assert torch.equal(batch["decoder_input_ids"][:, 1:], labels[:, :-1])
            assert (batch["decoder_input_ids"][:, 0] == START).all()


def test_held_out_pairs_come_once_and_equally_often_on_each_rank(tmp_path: Path) -> None:
    _, split = many(tmp_path)
    for world in (1, 2, 3):
        streams = [list(eval_batches(split, Split(32, 8, r, world), limit=45)) for r in range(world)]
        assert len({len(s) for s in streams}) == 1
        expected = sorted((tuple(split.source(i)), tuple(split.target(i))) for i in range(45))
        assert rows([b for s in streams for b in s]) == expected


# ---- real text


needs_multi30k = pytest.mark.skipif(not MULTI30K.is_dir(), reason=f"{MULTI30K} is not there")


@needs_multi30k
def test_multi30k_is_read_whole(tmp_path: Path) -> None:
    place = [f"data.{split}={MULTI30K / name}" for split, name in (("train", "train"), ("eval", "val"))]
    prepared = parallel.prepare(config(tmp_path, *place, "data.max_length=64", "tokenizer.vocab_size=4000"))
    train, held = (prepared.audit["splits"][name] for name in ("train", "eval"))
    assert (train["read"], train["kept"], held["kept"]) == (29_000, 29_000, 1_014)
    assert sum(train["lost"][side]["unknown"] for side in ("source", "target")) <= 1
    assert prepared.audit["vocabulary"] == {"model": "bpe", "size": 4000}


@needs_multi30k
def test_training_bpe_twice_gives_the_same_ids() -> None:
    code = (
        "import gzip, sys; from toolkit.config.schema import Tokenizer; from toolkit.data import tokenizer;"
        "texts = lambda: (line.strip() for line in gzip.open(sys.argv[1], 'rt'));"
        "print(tokenizer.digest(tokenizer.create(Tokenizer(model='bpe', vocab_size=2000), texts)))"
    )
    file = str(MULTI30K / "val.de.gz")
    runs = [subprocess.run([sys.executable, "-c", code, file], capture_output=True, text=True) for _ in range(2)]
    assert runs[0].stdout == runs[1].stdout != ""


def test_a_unigram_vocabulary_holds_the_same_entries_each_time() -> None:
    from toolkit.config.schema import Tokenizer

    texts = [f"{a} {b}" for a in DE[1].split() for b in EN[1].split()]
    one, two = (tokenizers.create(Tokenizer(model="unigram", vocab_size=60), lambda: iter(texts)) for _ in range(2))
    assert one.get_vocab().keys() == two.get_vocab().keys()


def test_what_is_cut_keeps_the_tokens_that_end_a_sentence() -> None:
    assert parallel._cut([5, 6, 7, 8, 2], 3, {2}) == [5, 6, 2]
    assert parallel._cut([5, 6, 7, 8, 2, 22], 4, {2, 22}) == [5, 6, 2, 22], "mBART's end with the language"
    assert parallel._cut([22, 5, 6, 7, 2], 3, {2, 22}) == [22, 5, 2]
