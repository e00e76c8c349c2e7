"""Every reader of files ends in the right samples, or in one line that names the file: whatever the file holds, no row
is lost without being counted."""

import csv
import gzip
import io
import json
import os
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from composing import compose
from world_cases import Case, cases, parts

from toolkit.config.schema import Data, Task
from toolkit.data import parallel, sources, tables
from toolkit.data.lines import Problems
from toolkit.deepspeed.ds_config import refuse_unread
from toolkit.errors import DataError, ToolkitError

Rows = list[tuple[Any, ...]]
GOOD = [
    ["Das Öl für Jürgen ist über Nacht kühl geworden.", "ja"],
    ["Où était le garçon ?", "nein"],
    ["Drei Tage später kam er mit dem Rad.", "ja"],
]
TASK = Task(kind="translate", source="de", target="en")


def _csv(rows: Rows, **how: Any) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n", **how).writerows([("text", "label"), *rows])
    return text.getvalue()


def _parquet(rows: Rows) -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.table({"text": [row[0] for row in rows], "label": [row[1] for row in rows]}), file)
    return file.getvalue()


def _objects(rows: Rows) -> list[dict[str, str]]:
    return [{"text": text, "label": label} for text, label in rows]


_dumped = partial(json.dumps, ensure_ascii=False)


def _squad(rows: Rows) -> dict[str, Any]:
    asked = [{"context": t, "qas": [{"id": f"{i}", "question": label}]} for i, (t, label) in enumerate(rows)]
    return {"data": [{"title": "", "paragraphs": [paragraph]} for paragraph in asked]}


def _table(path: str, problems: Problems, *columns: str, **data: Any) -> Rows:
    checked = Data.model_validate({"format": None, **data})
    columns = columns or ("text", "label")
    return [tuple(row.get(c) for c in columns) for _, row in tables.rows(path, checked, "train", problems)]


def _documents(path: str, problems: Problems, format: Any = "text") -> Rows:
    found = list(sources.documents(Data(format=format, path=path), problems))
    problems.skipped += found.count([])  # which the audit counts
    return [tuple(document) for document in found if document]


def _tagged(path: str, problems: Problems) -> Rows:
    columns = {"tokens": "0", "tags": "-1"}
    found = _table(path, problems, "0", "-1", format="conll", columns=columns)
    return [(tokens[0], tags[0]) for tokens, tags in found]


def _pairs(path: str, problems: Problems) -> Rows:
    prefix = re.sub(r"\.de(\.gz)?$", "", path)
    found = list(parallel.pairs(prefix, "train", Data(format=None), TASK, problems))
    problems.skipped += sum(not pair.source for pair in found)  # which the audit counts
    return [(pair.source, pair.target) for pair in found if pair.source]


class Reader(NamedTuple):
    name: str  # of its file
    write: Callable[[Rows], str | bytes]
    read: Callable[[str, Problems], Rows]


READERS = {
    "text": Reader("x.txt", lambda rows: "".join(f"{text}\n{label}\n\n" for text, label in rows), _documents),
    "csv": Reader("x.csv", _csv, _table),
    "tsv": Reader("x.tsv", lambda rows: "".join("\t".join(row) + "\n" for row in [("text", "label"), *rows]), _table),
    "jsonl": Reader("x.jsonl", lambda rows: "".join(f"{_dumped(row)}\n" for row in _objects(rows)), _table),
    "json": Reader("x.json", lambda rows: _dumped(_objects(rows), indent=1), _table),
    "texts of jsonl": Reader(
        "x.jsonl",
        lambda rows: "".join(_dumped({"text": "\n\n".join(row)}) + "\n" for row in rows),
        partial(_documents, format="jsonl"),
    ),
    "squad": Reader(
        "x.json", lambda rows: _dumped(_squad(rows), indent=1),
        lambda path, problems: _table(path, problems, "context", "question"),
    ),
    "conll": Reader("x.conll", lambda rows: "".join(f"{text}\t{label}\n\n" for text, label in rows), _tagged),
    "pairs": Reader("x.de", lambda rows: "".join(f"{text}\n" for text, _ in rows), _pairs),
    "parquet": Reader("x.parquet", _parquet, _table),
}  # fmt: skip

MAKE: dict[str, Callable[[bytes], bytes]] = {
    "bom": lambda raw: b"\xef\xbb\xbf" + raw,
    "bom in the last line": lambda raw: b"\n\xef\xbb\xbf".join(raw.rstrip(b"\n").rsplit(b"\n", 1)),
    "crlf": lambda raw: raw.replace(b"\n", b"\r\n"),
    "doubled cr": lambda raw: raw.replace(b"\n", b"\r\r\n"),
    "lone cr": lambda raw: raw.replace(b"\n", b"\r"),
    "no last newline": lambda raw: raw.rstrip(b"\n"),
    "gzip": lambda raw: gzip.compress(raw),
    "gzip cut off": lambda raw: gzip.compress(raw)[:-12],
    "gzip cut in its header": lambda raw: gzip.compress(raw)[:5],
    "gzip of gzip": lambda raw: gzip.compress(gzip.compress(raw)),
    "gzip and rubbish": lambda raw: gzip.compress(raw) + b"rubbish",
    "two gzips": lambda raw: gzip.compress(raw[:20]) + gzip.compress(raw[20:]),
    "zip": lambda raw: b"PK\x03\x04" + raw,
    "zstd": lambda raw: b"(\xb5/\xfd" + raw,
    "lfs": lambda raw: b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n",
    "nul": lambda raw: raw.replace(b"t", b"t\0", 2),
    "bad byte": lambda raw: raw.replace(b"sp\xc3\xa4ter", b"sp\xffter"),
    "half a character": lambda raw: raw.replace(b"sp\xc3\xa4ter", b"sp\xc3ter"),
    "surrogates as utf-8": lambda raw: raw.replace(b"sp\xc3\xa4ter", b"sp\xed\xa0\x80ter"),
    "broken page": lambda raw: raw[:4] + b"\xff" * 40 + raw[44:],
    "cut in half": lambda raw: raw[: len(raw) // 2],
    "empty": lambda raw: b"",
    "only a bom": lambda raw: b"\xef\xbb\xbf",
    "only blank lines": lambda raw: b"\n \n\n",
    "zeros": lambda raw: bytes(len(raw)),
    "every byte": lambda raw: bytes(range(256)),
}


def _made(case: Case, name: str, folder: Path) -> tuple[Path, Rows]:
    """The file of a case for this reader, and the rows that went in."""
    reader = READERS[name]
    rows: Rows = [tuple(str(cell) * (case.times or 1) for cell in row) for row in case.cells or GOOD]
    written = reader.write(rows)
    raw = written if isinstance(written, bytes) else written.encode(case.encoding or "utf-8")
    raw = MAKE[case.make](raw) if case.make else raw
    path = folder / (reader.name + (case.suffix or ""))
    path.write_bytes(raw)
    (folder / "x.en").write_text("".join(f"{label}\n" for _, label in rows))
    return path, rows


def _holds(case: Case, path: str, rows: Rows | None, read: Callable[[str, Problems], Rows]) -> None:
    """What comes of it, read once with data.on_error=raise and once with skip."""
    found = None
    try:
        found = read(path, Problems("raise"))
    except ToolkitError as error:
        said = str(error)
        assert "\n" not in said and Path(path).name.split(".")[0] in said and len(said) < 1000, said
        assert case.expect is None, said
        for part in parts(case.error):
            assert part in said, said
    else:
        assert case.error is None, f"no error, but {found!r:.500}"
        if rows is not None:
            assert found == rows
    problems = Problems("skip")
    try:
        kept = read(path, problems)
    except DataError as error:
        assert "\n" not in str(error) and found is None
        return
    assert kept == found or (found is None and problems.skipped)
    if rows is not None:
        assert len(kept) == len(rows) or problems.skipped
    for cell in (cell for row in kept for cell in row if isinstance(cell, str)):
        cell.encode()  # as the tokenizer will


def _swept() -> Iterator[Any]:
    for given in cases("readers"):
        case = given.values[0]
        lines = case.encoding or case.make in ("crlf", "doubled cr", "lone cr", "bom in the last line")
        for name in () if case.files else case.of or READERS:
            if name not in (case.but or ()) and not (lines and name == "parquet"):
                yield pytest.param(case, name, id=f"{given.id}, {name}")


@pytest.mark.parametrize(("case", "name"), list(_swept()))
def test_a_variant_of_a_good_file_is_read_right_or_told(case: Case, name: str, tmp_path: Path) -> None:
    path, rows = _made(case, name, tmp_path)
    _holds(case, str(path), rows, READERS[name].read)


@pytest.mark.parametrize("case", [p for p in cases("readers") if p.values[0].files])
def test_a_file_as_it_is_ends_in_its_rows_or_one_line(case: Case, tmp_path: Path) -> None:
    case.write(tmp_path)
    (name,) = case.files
    kind = (
        next(k for k, reader in READERS.items() if name.endswith(reader.name[1:]))
        if case.reader is None
        else case.reader
    )
    rows = None if case.expect is None else [tuple(row) for row in case.expect]
    _holds(case, str(tmp_path / name), rows, lambda p, problems: READERS[kind].read(p, problems))


JSON = {
    "lists in lists": "[" * 100_000 + "]" * 100_000,
    "objects in objects": '{"a": ' * 5_000 + "1" + "}" * 5_000,
    "some lists in lists": "[" * 400 + "]" * 400,
    "a number of 5,000 digits": "7" * 5_000,
    "a number beyond floats": "1" * 400,
    "an exponent beyond floats": "1e999999",
    "a boolean": "true",
}


@pytest.mark.parametrize("name", ["text", "jsonl", "json"])
@pytest.mark.parametrize("kind", JSON)
def test_json_values_of_any_size_are_read_or_told(kind: str, name: str, tmp_path: Path) -> None:
    row = f'{{"text": "a", "label": {JSON[kind]}}}'
    path = tmp_path / ("x.json" if name == "json" else "x.jsonl")
    path.write_text(f"[{row}]" if name == "json" else row)
    data = Data(format="jsonl", path=str(path), column="label")
    as_text = lambda path, problems: [tuple(d) for d in sources.documents(data, problems)]  # noqa: E731
    error = "nested more than 100 deep" if " in " in kind else None
    _holds(Case({"error": error}), str(path), None, as_text if name == "text" else _table)
    for _, row in tables.rows(str(path), Data(format=None), "train", Problems("skip")) if name != "text" else []:
        assert tables.number(row["label"]) in (None, 1.0)


@pytest.mark.parametrize("before", [0, 1, 2, 2**18 + 1, 2**20 + 1])
def test_an_encoding_is_known_wherever_in_a_large_file_it_is_met(before: int, tmp_path: Path) -> None:
    line = "今天天气很好，我们去公园散步。孩子们在草地上玩耍！\n".encode("gb18030")
    (tmp_path / "x.txt").write_bytes(b"a" * before + b"\n" + line * 20_000)
    with pytest.raises(DataError, match=f"byte 0xbd at offset {before + 1} .* It looks like GB18030: iconv"):
        _documents(str(tmp_path / "x.txt"), Problems())


def test_a_cell_may_go_on_where_separators_are_looked_for(tmp_path: Path) -> None:
    rows = "".join(f"a, {i};b\n" for i in range(tables.HEAD - 2))
    (tmp_path / "x.csv").write_text(f'text;label\n{rows}"c\nd\ne";f\n')
    assert _table(str(tmp_path / "x.csv"), Problems())[-1] == ("c\nd\ne", "f")


PARQUET: dict[str, Callable[[], pa.Table]] = {
    "numbers": lambda: pa.table({"text": [1, 2], "label": [0.5, None]}),
    "bytes": lambda: pa.table({"text": [b"\xff", b"b"], "label": ["a", "b"]}),
    "strings that are no utf-8": lambda: pa.table({"text": pa.array([b"\xff"]).view(pa.string())}),
    "a time out of range": lambda: pa.table({"text": pa.array([2**62], pa.timestamp("ms"))}),
    "a dictionary": lambda: pa.table({"text": pa.array(["a", "b"]).dictionary_encode(), "label": ["a", "b"]}),
    "large strings": lambda: pa.table({"text": pa.array(["a"], pa.large_string()), "label": ["a"]}),
    "a column twice": lambda: pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"]),
    "nested": lambda: pa.table({"text": [{"a": [{"b": 1}]}], "label": ["a"]}),
    "no rows": lambda: pa.table({"text": pa.array([], pa.string()), "label": pa.array([], pa.string())}),
    "no columns": lambda: pa.table({}),
    "nothing but nulls": lambda: pa.table({"text": pa.nulls(2), "label": pa.nulls(2)}),
}  # fmt: skip


@pytest.mark.parametrize("kind", PARQUET)
def test_parquet_of_any_type_is_read_or_told(kind: str, tmp_path: Path) -> None:
    pq.write_table(PARQUET[kind](), tmp_path / "x.parquet")
    case = Case({"case": kind})
    _holds(case, str(tmp_path / "x.parquet"), None, READERS["parquet"].read)

    def documents(path: str, problems: Problems) -> Rows:
        found = sources.documents(Data(format="parquet", path=path), problems)
        return [tuple(document) for document in found]

    _holds(case, str(tmp_path / "x.parquet"), None, documents)


PLACES: dict[str, Callable[[Path], Any]] = {
    "a folder": lambda path: path.mkdir(),
    "a link to nothing": lambda path: path.symlink_to("gone"),
    "a link to itself": lambda path: path.symlink_to(path.name),
    "a pipe": lambda path: os.mkfifo(path),
    "nothing": lambda path: None,
}


@pytest.mark.parametrize("kind", PLACES)
@pytest.mark.parametrize("name", READERS)
def test_what_is_no_file_is_told(name: str, kind: str, tmp_path: Path) -> None:
    path = tmp_path / READERS[name].name
    PLACES[kind](path)
    (tmp_path / "x.en").write_text("a\n")
    with pytest.raises(ToolkitError) as caught:
        READERS[name].read(str(path), Problems("raise"))
    assert "\n" not in str(caught.value) and "x" in str(caught.value)


@pytest.mark.parametrize("name", READERS)
def test_a_file_without_permission_is_told(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, _ = _made(Case({"case": ""}), name, tmp_path)

    def refused(self: Path, *arguments: Any) -> Any:  # root may read anything
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refused)
    monkeypatch.setattr(pq, "ParquetFile", refused)
    _holds(Case({"error": "Permission denied"}), str(path), None, READERS[name].read)


def test_a_broken_link_among_good_files_is_told(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a\n")
    (tmp_path / "b.txt").symlink_to("gone")
    with pytest.raises(DataError, match=r"b.txt is a link to what is not there"):
        list(sources.documents(Data(format="text", path=str(tmp_path / "*.txt"))))


@pytest.mark.parametrize(
    "path", ["~nobody-of-that-name/x.csv", "x" * 5000 + ".csv", "a\0b.csv", "/proc/1/root/x\n.csv"]
)
def test_a_path_that_cannot_be_is_told(path: str) -> None:
    for format in (None, "hub"):
        with pytest.raises(ToolkitError):
            _table(path, Problems("raise"), format=format)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_broken_file_of_a_hub_folder_is_told(streaming: bool, tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text('{"text": "a", "label": "b"}\n{"text": ["no', encoding="utf-8")
    with pytest.raises(DataError) as caught:
        _table(str(tmp_path), Problems("raise"), streaming=streaming)
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


class BrokenOff:
    features = None

    def __iter__(self) -> Iterator[dict[str, str]]:
        yield {"text": "One. Two.", "label": "a"}
        raise ConnectionError("reset by peer")


def test_a_stream_of_the_hub_that_breaks_off_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "load", lambda *arguments: BrokenOff())
    for read in (_table, partial(_documents, format="hub")):
        with pytest.raises(DataError, match=r"owner/name: the hub data set cannot be loaded \(reset by peer\)"):
            read("owner/name", Problems("skip"))


def test_the_key_is_named_of_which_the_hub_has_no_data_set(monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(*arguments: Any, **options: Any) -> Any:
        raise ConnectionError("no network")

    monkeypatch.setattr("datasets.load_dataset", gone)
    with pytest.raises(DataError, match=r"data.eval=owner/name: the hub data set cannot be loaded \(no network\)"):
        tables.identity("owner/name", Data(format="hub", streaming=False), "eval")


def test_a_file_is_read_where_the_preset_names_the_hub(tmp_path: Path) -> None:
    rows: Rows = [tuple(row) for row in GOOD]
    (tmp_path / "x.csv.gz").write_bytes(gzip.compress(_csv(rows).encode()))
    for place in ("x.csv.gz", "*.csv.gz"):
        assert _table(str(tmp_path / place), Problems(), format="hub") == rows
    (tmp_path / "x.txt.gz").write_bytes(gzip.compress(b"text\tlabel\na\tb\n"))
    with pytest.raises(DataError, match=r"x.txt.gz: the suffix '.txt' is unknown. Set data.format=csv, tsv"):
        _table(str(tmp_path / "x.txt.gz"), Problems(), format="hub")
    refuse_unread(compose("task=cola", f"data.train={tmp_path / 'x.csv.gz'}", "data.header=false"))
    with pytest.raises(DataError, match=r"data.train=owner/x.txt.gz: no file matches"):
        _table("owner/x.txt.gz", Problems(), format="hub")
