"""Every format gives the documents that are in it; every bad input is named in one line or skipped alone."""

import gzip
import io
import json
import zipfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_helpers import SHARED, needs_shared

from toolkit.config.schema import Data
from toolkit.data.corpus import LONGEST, split
from toolkit.data.lines import Problems
from toolkit.data.python_docs import documents as python_documents
from toolkit.data.sources import documents
from toolkit.errors import DataError

PRETRAIN = SHARED / "pretrain"


def text(path: Path, content: str | bytes) -> str:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


def read(format: str = "text", problems: Problems | None = None, **data: Any) -> list[list[str]]:
    return list(documents(Data.model_validate({"format": format, **data}), problems))


def test_blank_lines_separate_documents_in_spite_of_bom_and_crlf(tmp_path: Path) -> None:
    path = text(tmp_path / "a.txt", b"\xef\xbb\xbfOne.\r\nTwo.\r\n\r\n\r\n \r\nThree \xc3\xa9.\r\n")
    assert read(path=path) == [["One.", "Two."], ["Three é."]]


def test_a_file_is_a_document_of_unwrapped_paragraphs(tmp_path: Path) -> None:
    text(tmp_path / "b.txt", "Wrapped\nprose here.\n\n\nSecond\n  paragraph.")
    text(tmp_path / "a.txt", "First file.\n")
    files = str(tmp_path / "*.txt")
    odd = text(tmp_path / "[odd name]?.md", "Odd.")
    assert read(path=odd) == [["Odd."]]  # an existing file is no glob
    assert read(path=files, documents="file") == [
        ["First file."],
        ["Wrapped prose here.", "Second paragraph."],
    ]


def test_a_regex_opens_documents_and_what_precedes_is_not_lost(tmp_path: Path) -> None:
    wiki = "\nBefore.\n = One = \n\n A b \n c .\n = = Part = = \n = Two = \n\n D .\n"
    path = text(tmp_path / "w.txt", wiki)
    first, *rest = read(path=path, documents="^ = [^=].* = $")
    assert first == ["Before."]
    assert rest == [["= One =", "A b c . = = Part = ="], ["= Two =", "D ."]]
    framed = text(tmp_path / "d.txt", '<doc id="1">\nT\n\nx.\n</doc>\n<doc id="2">\ny.\n</doc>\n')
    assert read(path=framed, documents="^<doc") == [["T", "x."], ["y."]]


def test_gzip_jsonl_parquet_and_hub_folders_agree(tmp_path: Path) -> None:
    rows = [{"id": 1, "text": "A b.\nc.\n\nD."}, {"id": 2, "text": "E."}]
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "data.jsonl").write_bytes(lines)
    (tmp_path / "x.jsonl").write_bytes(lines)
    (tmp_path / "x.jsonl.gz").write_bytes(gzip.compress(lines))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "x.parquet")
    expected = [["A b. c.", "D."], ["E."]]
    assert read("jsonl", path=str(tmp_path / "x.jsonl")) == expected
    assert read("jsonl", path=str(tmp_path / "x.jsonl.gz")) == expected
    assert read("parquet", path=str(tmp_path / "x.parquet")) == expected
    assert read("hub", path=str(tmp_path / "hub")) == expected
    twice = [str(tmp_path / "x.jsonl"), str(tmp_path / "*.jsonl")]
    assert read("jsonl", path=twice) == expected  # a file that two globs match is read once


def test_a_row_may_hold_a_list_of_sentences(tmp_path: Path) -> None:
    path = text(tmp_path / "x.jsonl", '{"s": ["A.", "B."]}\n\n{"s": null}\n')
    assert read("jsonl", path=path, column="s") == [["A.", "B."], []]


def test_pythons_own_documentation_is_prose_of_more_than_200_000_words() -> None:
    found = python_documents()
    assert [name for name, _ in found if name.startswith("topics")] == sorted(n for n, _ in found if "topics/" in n)
    words = [word for _, paragraphs in found for p in paragraphs for word in p.split()]
    assert len(words) > 200_000
    assert sum(any(c.isalpha() for c in word) for word in words) > 0.97 * len(words)
    assert not any(">>>" in p or "::" in p or ":func:" in p for _, paragraphs in found for p in paragraphs)


BAD = [
    ("text", b"ok\nb\xe9d\nfine\n", {}, r"x:2: byte 0xe9 at offset 4 is not valid UTF-8 text. It looks like CP1252"),
    ("jsonl", b'{"text": "a"}\n{"text": "b\n', {}, r"x:2: no valid JSON at column 10 .*Correct or"),
    ("jsonl", b'{"texts": "", "n": 1}', {}, r"1: no column 'text'. Did you mean 'texts'\? It has: texts, n"),
    ("jsonl", b'["a"]\n', {}, r"x:1: no column 'text'. It has: none, it is a list"),
    ("jsonl", b'{"text": 7}\n', {}, r"x:1: column 'text' holds 7, not a text"),
    ("parquet", b"PAR1 no", {}, r"x: cannot be read as parquet after row 0 .*Replace the file"),
    ("text", b"a\n", {"documents": "^Chapter"}, r"x: data.documents='\^Chapter' matches no line. Correct"),
]  # fmt: skip


@pytest.mark.parametrize(("format", "content", "data", "message"), BAD)
def test_bad_input_is_named_or_skipped(
    tmp_path: Path, format: str, content: bytes, data: dict[str, Any], message: str
) -> None:
    path = text(tmp_path / "x", content)
    with pytest.raises(DataError, match=message + ".*data.on_error=skip") as raised:
        read(format, path=path, **data)
    assert "\n" not in str(raised.value) and str(tmp_path) in str(raised.value)
    problems = Problems("skip")
    read(format, problems, path=path, **data)
    assert problems.skipped == 1 and problems.first[0].startswith(str(tmp_path))


def test_skipping_loses_nothing_else(tmp_path: Path) -> None:
    lines = [json.dumps({"text": f"Text {i}."}).encode() for i in range(50)]
    lines[7], lines[20], lines[21] = b'{"text": "cut', b"\xff\xfe", b"7"
    path = text(tmp_path / "x.jsonl", b"\n".join(lines))
    problems = Problems("skip")
    kept = read("jsonl", problems, path=path)
    assert kept == [[f"Text {i}."] for i in range(50) if i not in (7, 20, 21)]
    assert problems.skipped == 3 and [m.split(":")[1] for m in problems.first] == ["8", "21", "22"]


def test_a_cut_gzip_file_gives_what_is_readable(tmp_path: Path) -> None:
    whole = gzip.compress("".join(f"Line {i * 7919 % 1000}.\n\n" for i in range(20000)).encode())
    cut = text(tmp_path / "a.txt.gz", whole[: len(whole) // 2])
    after = text(tmp_path / "b.txt", "After.\n")
    with pytest.raises(DataError, match=r"a.txt.gz: cannot be read after line \d+ .*Replace the file"):
        read(path=[cut, after])
    problems = Problems("skip")
    kept = read(path=[cut, after], problems=problems)
    assert problems.skipped == 1 and len(kept) > 500 and kept[-1] == ["After."]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"format": "text"}, r"data.path is not set, but data.format=text reads from it. Set data.path to"),
        ({"format": "hub"}, r"data.path is not set, .*names of hub data sets"),
        ({"format": "text", "path": "/no/such/*.txt"}, r"data.path=/no/such/\*.txt: no file matches"),
        ({"format": "text", "path": "/tmp"}, r"data.path=/tmp: is a folder. .*data.path='/tmp/\*'"),
        ({"format": "text", "path": __file__, "documents": "("}, r"data.documents='\(': is no regex"),
        ({"format": "hub", "path": __file__}, r"data.path=.*: is a file, no data set of the hub. Set data.format"),
        ({"format": "hub", "path": "nobody/nothing:x"}, r"data.path=nobody/nothing:x: .*cannot .*Check"),
    ],
)  # fmt: skip
def test_a_wrong_path_is_named(data: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match=message):
        list(documents(Data.model_validate(data)))


def test_parquet_names_the_columns_it_has(tmp_path: Path) -> None:
    pq.write_table(pa.table({"body": ["a"], "txt": ["b"]}), tmp_path / "x.parquet")
    with pytest.raises(DataError, match=r"no column 'text'. Did you mean 'txt'\? It has: body, txt"):
        read("parquet", path=str(tmp_path / "x.parquet"))


def test_sentences_respect_abbreviations_and_quotes() -> None:
    prose = 'Mr. Holmes met Dr. Watson at 10 a.m. on Jan. 5th. "Is that so?" he asked. It cost $3.50.'
    assert split(prose) == [
        "Mr. Holmes met Dr. Watson at 10 a.m. on Jan. 5th.",
        '"Is that so?" he asked.',
        "It cost $3.50.",
    ]


def test_a_very_long_paragraph_loses_no_character_and_takes_linear_time() -> None:
    for unit in ("A sentence here. ", "word ", "x"):
        long = unit * (5 * LONGEST // len(unit))
        assert "".join(split(long)).replace(" ", "") == long.replace(" ", "")


@needs_shared
def test_real_books_and_wikipedia_articles_are_read_whole() -> None:
    assert len(read(path=str(PRETRAIN / "gutenberg" / "*.gz"), documents="file")) == 6
    (alice,) = read(path=str(PRETRAIN / "gutenberg" / "11_*.gz"), documents="file")
    assert sum(len(p.split()) for p in alice) == 29_465
    assert not any("\ufeff" in p or "\r" in p for p in alice)
    articles = read(path=str(PRETRAIN / "wikitext2_valid.txt.gz"), documents="^ = [^=].* = $")
    assert len(articles) == 60 and sum(len(p.split()) for a in articles for p in a) == 213_886
    assert len(read(path=str(PRETRAIN / "wiki_00.txt"), documents="^<doc")) == 2
    assert len(read(path=str(PRETRAIN / "bert_sample_text.txt"))) > 1


@needs_shared
def test_the_real_file_that_is_not_utf8_is_named_and_its_bad_lines_skipped(tmp_path: Path) -> None:
    with zipfile.ZipFile(io.BytesIO((PRETRAIN / "inaugural.zip").read_bytes())) as archive:
        archive.extractall(tmp_path)
    path = str(tmp_path / "inaugural" / "*.txt")
    with pytest.raises(DataError, match=r"\.txt:\d+: byte 0x\w\w at offset \d+ is not valid UTF-8"):
        read(path=path, documents="file")
    problems = Problems("skip")
    kept = read(path=path, documents="file", problems=problems)
    raw = [file.read_bytes() for file in sorted((tmp_path / "inaugural").glob("*.txt"))]
    good = [b"\n".join(line for line in data.split(b"\n") if _valid(line)) for data in raw]
    assert len(kept) == 59 and problems.skipped >= 1
    assert [" ".join(p).split() for p in kept] == [data.decode().split() for data in good]


def _valid(line: bytes) -> bool:
    try:
        line.decode()
    except UnicodeDecodeError:
        return False
    return True
