"""Preparing is exact, cached, atomic, flat in memory and nearly as fast as the tokenizer alone."""

import gzip
import io
import json
import signal
import subprocess
import sys
import threading
import time
from itertools import chain
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pytest
from data_helpers import (
    PAD,
    SHARED,
    corpus,
    corpus_of,
    dataset,
    needs_shared,
    parts,
    random_lengths,
    toy,
    unmasked,
    write_vocab,
)
from filelock import FileLock
from rich.console import Console

from toolkit.config.schema import Data, RunConfig
from toolkit.data import corpus as corpora
from toolkit.data import tokenizer as tokenizers
from toolkit.data.masked import MaskedText
from toolkit.data.prepared import Prepared, Spool, build, open_columns, seal
from toolkit.data.sources import documents
from toolkit.data.text import format_audit, prepare
from toolkit.errors import DataError

PRETRAIN, VOCABULARY = SHARED / "pretrain", SHARED / "vocab"


def built(config: RunConfig) -> list[str]:
    """The finished and unfinished folders in the cache, without locks."""
    return sorted(p.name for p in Path(str(config.data.cache_dir)).iterdir() if p.is_dir())


def with_data(config: RunConfig, **changes: Any) -> RunConfig:
    return config.model_copy(update={"data": config.data.model_copy(update=changes)})


def text_config(folder: Path, **settings: Any) -> RunConfig:
    base = {"format": "text", "cache_dir": str(folder / "cache"), "max_length": 64}
    tokenizer = {"vocab_size": 500} | settings.pop("tokenizer", {})
    return RunConfig.model_validate({"tokenizer": tokenizer, "data": base | settings})


def members(prepared: Prepared, split: str) -> Any:
    """The documents of a split."""
    return open_columns(prepared.path / f"{split}_documents.arrow")["document"]


def sum_of_files(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.glob("*.arrow"))}


def test_the_arrays_hold_the_corpus_exactly(tmp_path: Path) -> None:
    lengths = random_lengths(7, 9)
    prepared = prepare(toy(tmp_path, lengths))
    flat = [sentence for document in corpus(lengths) for sentence in document]
    assert corpus_of(prepared).tokens.dtype == np.uint16 and corpus_of(prepared).tokens.tolist() == list(chain(*flat))
    assert np.diff(corpus_of(prepared).sentences).tolist() == [len(s) for s in flat]
    assert corpus_of(prepared).documents.tolist() == [9 * i for i in range(8)]
    assert (
        not corpus_of(prepared).tokens.flags.owndata and not corpus_of(prepared).tokens.flags.writeable
    )  # a view of the file
    assert (prepared.vocab_size, prepared.pad_id) == (5 + len(list(chain(*flat))), PAD)


def test_documents_that_span_blocks_or_are_empty_keep_their_bounds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpora, "BLOCK_CHARACTERS", 40)
    (tmp_path / "x.jsonl").write_text(
        "".join(
            json.dumps({"text": t}) + "\n"
            for t in (["w1 w2", "w3"] * 9, "", ["\x00", "w0"], " ", ["w2"] * 5, "\x01 " * 60)
        )
    )
    vocab = write_vocab(tmp_path, [f"w{i}" for i in range(9)])
    config = text_config(
        tmp_path, format="jsonl", path=str(tmp_path / "x.jsonl"), tokenizer={"path": str(vocab)}, holdout=0
    )
    prepared = prepare(config)
    assert corpus_of(prepared).tokens.tolist() == [6, 7, 8] * 9 + [5] + [7] * 5
    assert corpus_of(prepared).documents.tolist() == [0, 18, 19, 24]
    assert (prepared.audit["documents"], prepared.audit["empty_documents"]) == (3, 3)


def test_large_vocabularies_get_wider_tokens(tmp_path: Path) -> None:
    vocab = write_vocab(tmp_path, [f"w{i}" for i in range(70_000)])
    (tmp_path / "x.txt").write_text("w69999 w0\nw1\n\nw1\nw2\n\nw2\nw3\n\nw3\nw4\n")
    prepared = prepare(text_config(tmp_path, path=str(tmp_path / "x.txt"), tokenizer={"path": str(vocab)}))
    assert corpus_of(prepared).tokens.dtype == np.uint32 and corpus_of(prepared).tokens.tolist()[0] == 70_004


def test_the_cache_is_reused_and_sampling_settings_do_not_tokenise_again(tmp_path: Path) -> None:
    config = toy(tmp_path, random_lengths(6, 9))
    first = prepare(config)
    assert prepare(config) == first and len(built(config)) == 2
    for changes in ({"max_length": 64}, {"holdout": 0.4}, {"mask_rate": 0.3}):
        other = prepare(with_data(config, **changes))
        assert corpus_of(other).path == corpus_of(first).path and other.path != first.path
    assert prepare(with_data(config, workers=5)).path == first.path  # has no effect on the data
    source = tmp_path / "corpus.jsonl"
    source.write_text(source.read_text() + '{"text": ["w1 w2", "w3"]}\n')
    assert corpus_of(prepare(config)).path != corpus_of(first).path
    (tmp_path / "vocab.txt").write_text((tmp_path / "vocab.txt").read_text() + "more\n")
    assert prepare(config).vocab_size == first.vocab_size + 1


def test_held_out_documents_are_never_in_training_samples(tmp_path: Path) -> None:
    lengths = random_lengths(20, 12)
    config = toy(tmp_path, lengths, holdout=0.3)
    prepared = prepare(config)
    home = {t: d for d, document in enumerate(corpus(lengths)) for s in document for t in s}
    seen = {}
    for part in ("train", "eval"):
        samples = dataset(config, part, prepared)
        drawn = [samples.sample(e, i) for e in range(6) for i in range(len(samples))]
        seen[part] = {token for sample in drawn for segment in parts(sample) for token in segment}
        for sample in drawn:
            here, there = ({home[t] for t in segment} for segment in parts(sample))
            assert len(here) == len(there) == 1 and (here != there) == (sample.pair_label == 1)
    assert not seen["train"] & seen["eval"]
    held = {d for d, document in enumerate(corpus(lengths)) if set(chain(*document)) & seen["eval"]}
    assert len(held) == 6 and held == set(members(prepared, "eval").tolist())
    assert held != set(members(prepare(config.model_copy(update={"seed": 2})), "eval").tolist())


@pytest.mark.parametrize(
    ("number", "objective", "held"),
    [(4, "mlm_nsp", 2), (100, "mlm_nsp", 5), (2, "mlm", 1), (1, "mlm", 0), (3, "sop", 1)],
)
def test_each_side_gets_enough_documents(tmp_path: Path, number: int, objective: str, held: int) -> None:
    config = toy(tmp_path, [[5, 5, 5]] * number, objective=objective, holdout=0.05)
    prepared = prepare(config)
    assert len(members(prepared, "eval")) == held and len(members(prepared, "train")) == number - held


def test_too_few_documents_to_hold_pairs_out_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"has 3 document\(s\); .* need 4, two for training and two held out"):
        prepare(toy(tmp_path, [[5, 5]] * 3, holdout=0.05))


@pytest.mark.parametrize("content", ["", "\n \n\n"])
def test_a_corpus_without_a_document_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "x.txt").write_text(content)
    vocab = write_vocab(tmp_path, ["a"])
    config = text_config(tmp_path, path=str(tmp_path / "x.txt"), tokenizer={"path": str(vocab)})
    with pytest.raises(DataError, match=r"no document with text \(1 empty, 0 skipped\). Check data.path"):
        prepare(config)
    assert built(config) == []  # nothing half-made stays
    with pytest.raises(DataError, match=r"the texts hold no word to train on"):
        prepare(config.model_copy(update={"tokenizer": RunConfig().tokenizer}))


def test_what_was_skipped_is_in_the_audit(tmp_path: Path) -> None:
    config = toy(tmp_path, random_lengths(5, 5), on_error="skip")
    source = tmp_path / "corpus.jsonl"
    source.write_text(source.read_text() + '{"text": \n{"txt": "x"}\n{"text": ""}\n')
    audit = prepare(config).audit
    assert (audit["documents"], audit["skipped"], audit["empty_documents"]) == (5, 2, 1)
    with pytest.raises(DataError, match=r"corpus.jsonl:6: no valid JSON"):
        prepare(with_data(config, on_error="raise"))
    assert "corpus.jsonl:6: no valid JSON" in audit["skipped_first"][0]


def test_a_trained_vocabulary_is_the_same_each_time_and_loads_with_auto_tokenizer(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    text = "".join(
        f"The {a} {b}s are {b}ing.\nThe {b} is {a}.\n\n"
        for a in ("red", "new", "old", "odd")
        for b in ("play", "walk", "end")
    )
    (tmp_path / "x.txt").write_text(text * 5)
    vocabularies = []
    for name in ("one", "two"):
        prepared = prepare(text_config(tmp_path / name, path=str(tmp_path / "x.txt"), tokenizer={"vocab_size": 70}))
        loaded = AutoTokenizer.from_pretrained(prepared.tokenizer)
        vocabularies.append(loaded.get_vocab())
    assert vocabularies[0] == vocabularies[1] and len(vocabularies[0]) == prepared.vocab_size <= 70
    assert loaded.convert_ids_to_tokens(range(5)) == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    ids = [loaded(line, add_special_tokens=False).input_ids for line in (text * 5).split("\n") if line]
    assert corpus_of(prepared).tokens.tolist() == list(chain(*ids))
    assert loaded("The red", "Walk").input_ids[0] == 2  # [CLS]
    cased = {"lowercase": False, "vocab_size": 70}
    kept = prepare(text_config(tmp_path, path=str(tmp_path / "x.txt"), tokenizer=cased))
    assert any(token[:1] == "T" for token in AutoTokenizer.from_pretrained(kept.tokenizer).get_vocab())


def test_special_tokens_in_a_text_are_only_text(tmp_path: Path) -> None:
    vocab = write_vocab(tmp_path, ["a", "[", "]", "mask", "sep"])
    (tmp_path / "x.txt").write_text("a [MASK] a [SEP] a\na\n\na\na\n\na\na\n\na\na\n")
    prepared = prepare(text_config(tmp_path, path=str(tmp_path / "x.txt"), tokenizer={"path": str(vocab)}))
    assert set(corpus_of(prepared).tokens.tolist()) == {5, 6, 7, 8, 9}


def test_a_tokenizer_without_special_tokens_is_refused(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    (tmp_path / "v.txt").write_text("[PAD]\n[UNK]\n[CLS]\na\n")
    (tmp_path / "x.txt").write_text("a\n")
    with pytest.raises(DataError, match=r"tokenizer.path=.*v.txt: has no \[SEP\], \[MASK\]. Use a BERT vocab.txt"):
        prepare(text_config(tmp_path, path=str(tmp_path / "x.txt"), tokenizer={"path": str(tmp_path / "v.txt")}))
    plain = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0})), pad_token="[PAD]")
    plain.save_pretrained(tmp_path / "plain")
    with pytest.raises(DataError, match=r"tokenizer: has no \[UNK\], \[CLS\], \[SEP\], \[MASK\]. Use a BERT tok"):
        prepare(text_config(tmp_path, path=str(tmp_path / "x.txt"), tokenizer={"path": str(tmp_path / "plain")}))


def test_a_missing_tokenizer_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "x.txt").write_text("a\n")
    for path, message in (("./nowhere", "does not exist"), ("no/model", "no tokenizer could be loaded")):
        config = text_config(tmp_path, path=str(tmp_path / "x.txt"), tokenizer={"path": path})
        with pytest.raises(DataError, match=rf"tokenizer.path={path}: {message}.*train one \(path=null\)"):
            prepare(config)


PREPARE = "import sys; from toolkit.data import text; from toolkit.config.schema import RunConfig; " \
    "print(text.prepare(RunConfig.model_validate_json(sys.argv[1])).vocab_size)"  # fmt: skip


def start(config: RunConfig) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", PREPARE, config.model_dump_json()]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1])


def large_text(path: Path, megabytes: float) -> Path:
    """Paragraphs of words that no two documents share in this order."""
    rng = np.random.default_rng(0)
    words = np.array([f"{a}{b}{c}" for a in "bdfgklm" for b in "aeiou" for c in ("rt", "nd", "st", "ll", "ck")])
    with path.open("w") as file:
        while file.tell() < megabytes * 2**20:
            lines = (" ".join(rng.choice(words, 60)) + ".\n" for _ in range(12))
            file.write("".join(lines) + "\n")
    return path


def test_two_processes_preparing_the_same_data_build_it_once(tmp_path: Path) -> None:
    config = text_config(tmp_path, path=str(large_text(tmp_path / "x.txt", 0.5)))
    outputs = [process.communicate(timeout=120)[0] for process in [start(config), start(config)]]
    assert outputs[0] == outputs[1] and int(outputs[0]) > 0
    assert len(built(config)) == 2


def test_waiting_for_another_process_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    held, built_at = threading.Event(), []

    def hold() -> None:
        with FileLock(tmp_path / "x.lock"):
            held.set()
            time.sleep(0.3)
            built_at.append("released")

    holder = threading.Thread(target=hold)
    holder.start()
    held.wait()
    build(Data(cache_dir=str(tmp_path)), "x", lambda folder: built_at.append("built"))
    holder.join()
    assert built_at == ["released", "built"]
    assert "waiting for another process that is preparing" in caplog.text


def test_a_killed_build_is_not_taken_for_done_and_is_cleared_away(tmp_path: Path) -> None:
    config = text_config(tmp_path, path=str(large_text(tmp_path / "x.txt", 3)), max_length=128)
    process = start(config)
    cache = tmp_path / "cache"
    deadline = time.monotonic() + 60
    while not any(p.stat().st_size for p in cache.glob("corpus-*.building-*/sentences_id.spool")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    (leftover,) = built(config)
    assert ".building-" in leftover
    prepared = prepare(config)
    assert not any(".building-" in name for name in built(config))
    clean = prepare(with_data(config, cache_dir=str(tmp_path / "clean")))
    assert sum_of_files(corpus_of(prepared).path) == sum_of_files(corpus_of(clean).path)
    assert sum_of_files(prepared.path) == sum_of_files(clean.path)


PEAK = """
import sys, threading, time
from toolkit.config.schema import RunConfig
from toolkit.data import text
def anonymous():
    return next(int(l.split()[1]) / 1024 for l in open('/proc/self/status') if l.startswith('RssAnon'))
import transformers.models.bert.tokenization_bert, toolkit.data.masked, toolkit.data.corpus
toolkit.data.corpus.BLOCK_CHARACTERS = 2**14  # so that the heap's own size settles early
peak, base = 0.0, anonymous()
def watch():
    global peak
    while True:
        peak = max(peak, anonymous() - base)
        time.sleep(0.01)
threading.Thread(target=watch, daemon=True).start()
text.prepare(RunConfig.model_validate_json(sys.argv[1]))
print(peak)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_does_not_grow_with_the_corpus(tmp_path: Path) -> None:
    vocab = write_vocab(
        tmp_path, [f"{a}{b}{c}" for a in "bdfgklm" for b in "aeiou" for c in ("rt", "nd", "st", "ll", "ck")]
    )
    peaks = []
    for megabytes in (2, 12):
        source = large_text(tmp_path / f"{megabytes}.txt", megabytes)
        config = text_config(tmp_path, path=str(source), tokenizer={"path": str(vocab)})
        command = [sys.executable, "-c", PEAK, config.model_dump_json()]
        root = Path(__file__).parents[1]
        peaks.append(float(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, cwd=root).stdout))
    assert peaks[1] - peaks[0] < 5, peaks  # MiB, for 10 MiB more of text


def test_importing_and_finding_the_cache_needs_no_torch(tmp_path: Path) -> None:
    config = toy(tmp_path, random_lengths(4, 4))
    prepare(config)
    code = PREPARE + "; assert not {'torch', 'transformers', 'datasets'} & set(sys.modules)"
    command = [sys.executable, "-c", code, config.model_dump_json()]
    subprocess.run(command, check=True, cwd=Path(__file__).parents[1], stdout=subprocess.PIPE)


def test_sealed_columns_are_views_of_one_file(tmp_path: Path) -> None:
    spool, empty = Spool(tmp_path / "a", np.uint32), Spool(tmp_path / "b", np.int64)
    spool.append([1, 2])
    spool.append(np.arange(3))
    seal(tmp_path / "x.arrow", {"a": spool})
    seal(tmp_path / "y.arrow", {"b": empty})
    assert open_columns(tmp_path / "x.arrow")["a"].tolist() == [1, 2, 0, 1, 2]
    assert open_columns(tmp_path / "y.arrow")["b"].size == 0
    assert not list(tmp_path.glob("*.spool"))


def test_the_audit_reads_as_a_table_and_progress_goes_to_the_given_console(tmp_path: Path) -> None:
    console = Console(record=True, width=120, force_terminal=True, file=io.StringIO())
    prepared = prepare(toy(tmp_path, random_lengths(9, 20), holdout=0.3), progress=True, console=console)
    assert "preparing" in console.export_text()
    console.print(format_audit(prepared.audit))
    shown = console.export_text()
    for line in (
        "train chunks",
        "unknown share",
        "eval under train unigram",
        "sample mask rate",
        "sample padding share",
    ):
        assert line in shown
    audit = json.loads((prepared.path / "audit.json").read_text())
    assert audit == prepared.audit and sum(audit["sample"]["length_histogram"].values()) == audit["sample"]["samples"]


def test_the_audit_counts_what_truncation_cuts(tmp_path: Path) -> None:
    audit = prepare(toy(tmp_path, [[40, 30], [5, 5]], max_length=32)).audit
    assert (audit["train"]["chunks_truncated"], audit["train"]["tokens_cut"]) == (1, 70 - 29)


@needs_shared
def test_real_text_with_the_real_vocabulary_reads_back(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    vocab = str(VOCABULARY / "bert-base-uncased-vocab.txt")
    source = str(PRETRAIN / "wikitext2_raw_test.txt.gz")
    config = text_config(tmp_path, path=source, documents="^ = [^=].* = $", max_length=128, tokenizer={"path": vocab})
    prepared = prepare(config)
    tokenizer = AutoTokenizer.from_pretrained(prepared.tokenizer)
    assert (prepared.vocab_size, corpus_of(prepared).facts["special"]["mask"]) == (30522, 103)
    text = [s for paragraphs in documents(config.data) for p in paragraphs for s in corpora.split(p)]
    assert corpus_of(prepared).tokens.tolist() == list(chain(*tokenizer(text, add_special_tokens=False).input_ids))
    audit = prepared.audit
    assert 58 <= audit["documents"] <= 64 and audit["unknown_share"] < 0.01
    assert 0.45 < audit["sample"]["pair_label_1_share"] < 0.55 and 0.14 < audit["sample"]["mask_rate"] < 0.16
    assert 6 < audit["entropy"]["corpus_unigram"] < audit["entropy"]["eval_under_train_unigram"] < 9
    shown = tokenizer.decode(unmasked(MaskedText(prepared, config.data, "mlm_nsp", 42).sample(0, 0)))
    assert shown.startswith("[CLS]") and shown.count("[SEP]") == 2


@needs_shared
def test_a_cased_vocabulary_is_not_lowercased_by_accident(tmp_path: Path) -> None:
    vocab = str(VOCABULARY / "bert-base-cased-vocab.txt")
    source = str(PRETRAIN / "bert_sample_text.txt")
    with pytest.raises(DataError, match=r"tokenizer.lowercase=true with .*cased \(it has '\w'\).*lowercase=false"):
        prepare(text_config(tmp_path, path=source, tokenizer={"path": vocab}, holdout=0))
    config = text_config(tmp_path, path=source, tokenizer={"path": vocab, "lowercase": False}, holdout=0)
    assert prepare(config).audit["unknown_share"] < 0.01


@needs_shared
@pytest.mark.alone
def test_preparing_is_nearly_as_fast_as_the_tokenizer_alone(tmp_path: Path) -> None:
    source = tmp_path / "wiki.txt"
    source.write_bytes(gzip.decompress((PRETRAIN / "wikitext2_raw_test.txt.gz").read_bytes()) * 2)
    vocab = str(VOCABULARY / "bert-base-uncased-vocab.txt")
    config = text_config(tmp_path, path=str(source), documents="^ = [^=].* = $", tokenizer={"path": vocab})
    text = [s for paragraphs in documents(config.data) for p in paragraphs for s in corpora.split(p)]
    encode = tokenizers.create(config.tokenizer, lambda: iter(())).backend_tokenizer.encode_batch
    ratios = []
    for number in range(5):  # alternating, so that a busy machine slows both down
        started = time.perf_counter()
        for i in range(0, len(text), 2048):
            encode(text[i : i + 2048], add_special_tokens=False)
        between = time.perf_counter()
        folder = tmp_path / str(number)
        folder.mkdir()
        corpora.write(folder, config.data, config.tokenizer, lambda documents, tokens: None)
        ratios.append((between - started) / (time.perf_counter() - between))
    print(f"preparation runs at {median(ratios):.0%} of the tokenizer's speed ({sorted(ratios)})")
    assert median(ratios) > 0.55  # 0.93 measured on two cores; the rest is for machines that others share
