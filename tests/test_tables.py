"""Every format gives the same rows; a bad row is named by its line, and the presets read the real files."""

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from composing import compose
from data_helpers import SHARED, needs_shared
from datasets import ClassLabel, Dataset, Features, List, Value

from toolkit.config.schema import Data, conf_dir
from toolkit.data import tables
from toolkit.data.lines import Problems
from toolkit.errors import ConfigError, DataError

CONLL = {"columns": {"tokens": "0", "tags": "-1"}}


def rows(source: Path | str, problems: Problems | None = None, split: str = "train", **data: Any) -> list[tables.Row]:
    return list(tables.rows(str(source), Data.model_validate({"format": None, **data}), split, problems))


def values(source: Path | str, **data: Any) -> list[dict[str, Any]]:
    return [row for _, row in rows(source, **data)]


def wheres(source: Path | str, **data: Any) -> list[str]:
    return [where for where, _ in rows(source, **data)]


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def test_all_formats_and_their_gzip_agree(tmp_path: Path) -> None:
    expected = [{"text": "One.", "label": "a"}, {"text": "Two, é.", "label": "b"}]
    contents = {
        "x.csv": '\ufefftext,label\r\nOne.,a\r\n"Two, é.",b\r\n',
        "x.tsv": "\ufefftext\tlabel\nOne.\ta\nTwo, é.\tb\n",
        "x.jsonl": "".join(json.dumps(row) + "\n\n" for row in expected),
        "x.json": json.dumps(expected, indent=1),
        "data.json": json.dumps({"version": 1, "data": expected}),
    }
    for name, content in contents.items():
        assert values(write(tmp_path / name, content)) == expected
        assert values(write(tmp_path / f"{name}.gz", gzip.compress(content.encode()))) == expected
    pq.write_table(pa.Table.from_pylist(expected), tmp_path / "x.parquet")
    assert values(tmp_path / "x.parquet") == expected
    assert values(write(tmp_path / "x.txt", contents["x.tsv"]), format="tsv") == expected


def test_a_row_is_named_by_its_line_or_number_under_the_path_as_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "x.csv", 'a,b\n1,"two\nlines"\n\n2,c\n')
    assert rows("x.csv") == [("x.csv:2", {"a": "1", "b": "two\nlines"}), ("x.csv:5", {"a": "2", "b": "c"})]
    write(tmp_path / "x.tsv", "a\n1\n2\n")
    assert wheres("x.tsv") == ["x.tsv:2", "x.tsv:3"]
    write(tmp_path / "x.jsonl", '\n{"a": 1}\n\n{"a": 2}\n')
    assert wheres("x.jsonl") == ["x.jsonl:2", "x.jsonl:4"]
    write(tmp_path / "x.json", '[{"a": 1}, {"a": 2}]')
    assert wheres("x.json") == ["x.json:row 1", "x.json:row 2"]
    pq.write_table(pa.table({"a": [1, 2]}), "x.parquet")
    assert wheres("x.parquet") == ["x.parquet:row 1", "x.parquet:row 2"]
    assert wheres("x.[cj]s*") == [*wheres("x.csv"), *wheres("x.json"), *wheres("x.jsonl")]


def test_tsv_is_unquoted_and_csv_is_quoted(tmp_path: Path) -> None:
    assert values(write(tmp_path / "x.tsv", 'a\tb\n"One\t5"\n')) == [{"a": '"One', "b": '5"'}]
    assert values(write(tmp_path / "x.csv", 'a,b\n"One ""1"", 2",3\n')) == [{"a": 'One "1", 2', "b": "3"}]


def test_a_cell_of_csv_may_be_a_long_document(tmp_path: Path) -> None:
    assert values(write(tmp_path / "x.csv", "a\n" + 200_000 * "x")) == [{"a": 200_000 * "x"}]


def test_columns_without_a_header_are_numbered(tmp_path: Path) -> None:
    expected = [{"0": "u", "1": "v"}, {"0": "w", "1": "x"}]
    assert values(write(tmp_path / "x.csv", "u,v\nw,x\n"), header=False) == expected
    assert values(write(tmp_path / "x.tsv", "u\tv\nw\tx\n"), header=False) == expected


def test_squad_is_flattened_to_a_row_a_question(tmp_path: Path) -> None:
    answers = [{"text": "b", "answer_start": 2}, {"text": "a b", "answer_start": 0}]
    qas = [
        {"id": "1", "question": "q?", "answers": answers},
        {"id": "2", "question": "r?", "answers": [], "is_impossible": True},
        {"id": "3", "question": "s?"},
    ]
    content = {"data": [{"title": "T", "paragraphs": [{"context": "a b", "qas": qas}]}]}
    path = write(tmp_path / "x.json", json.dumps(content))
    same = {"title": "T", "context": "a b"}
    assert rows(path) == [
        (f"{path}: question {row['id']}", same | row)
        for row in (
            {
                "id": "1",
                "question": "q?",
                "answers": {"text": ["b", "a b"], "answer_start": [2, 0]},
                "is_impossible": False,
            },
            {"id": "2", "question": "r?", "answers": {"text": [], "answer_start": []}, "is_impossible": True},
            {"id": "3", "question": "s?", "answers": None, "is_impossible": False},
        )
    ]


def test_conll_gives_a_row_a_sentence(tmp_path: Path) -> None:
    content = "-DOCSTART- -X- O O\n\nEU NNP I-NP I-ORG\n. . O O\n\t\n\nPeter NNP I-NP I-PER\n"
    path = write(tmp_path / "x.conll", content)
    assert rows(path, **CONLL) == [
        (f"{path}:3", {"0": ["EU", "."], "-1": ["I-ORG", "O"]}),
        (f"{path}:7", {"0": ["Peter"], "-1": ["I-PER"]}),
    ]
    assert values(path, columns={"tokens": "-4", "tags": "1"})[0] == {"-4": ["EU", "."], "1": ["NNP", "."]}
    tabs = write(tmp_path / "t.conll", "two words\tB-x\n\u00a0\tO\n")
    assert values(tabs, **CONLL) == [{"0": ["two words", "\u00a0"], "-1": ["B-x", "O"]}]
    unlabelled = write(tmp_path / "u.conll", "EU\n.\n\nPeter\n")
    assert values(unlabelled, **CONLL) == [{"0": ["EU", "."]}, {"0": ["Peter"]}]


def hub_folder(folder: Path) -> Path:
    features = Features({"label": ClassLabel(names=["no", "yes"]), "tags": List(ClassLabel(names=["O", "B-x"]))})
    features |= {"text": Value("string")}
    folder.mkdir()
    for split, label in (("train", 1), ("validation", 0), ("test", -1)):
        row = {"label": [label, None], "tags": [[0, 1], [-1]], "text": [split, split]}
        Dataset.from_dict(row, features=features).to_parquet(folder / f"{split}.parquet")
    return folder


@pytest.mark.parametrize("streaming", [True, False])
def test_classes_of_the_hub_are_names_and_the_split_follows_the_name(tmp_path: Path, streaming: bool) -> None:
    folder = hub_folder(tmp_path / "a@b")
    for ours, split, label in (("train", "train", "yes"), ("eval", "validation", "no"), ("test", "test", None)):
        first = {"label": label, "tags": ["O", "B-x"], "text": split}
        second = {"label": None, "tags": [None], "text": split}
        expected = [(f"{folder}:row 1", first), (f"{folder}:row 2", second)]
        assert rows(folder, split=ours, streaming=streaming) == expected
        assert rows(folder, split=ours, streaming=streaming, format="hub") == expected
        assert values(f"{folder}@{split}", streaming=streaming) == [first, second]
        assert values(f"{folder}:default@{split}", streaming=streaming) == [first, second]


def test_a_hub_folder_of_json_is_as_good(tmp_path: Path) -> None:
    write(tmp_path / "set" / "train.jsonl", '{"a": "x"}\n{"a": "y"}\n')
    assert values(tmp_path / "set") == [{"a": "x"}, {"a": "y"}]


def test_a_name_without_a_file_is_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, ...]] = []
    monkeypatch.setattr(
        tables.sources, "load", lambda *arguments: asked.append(arguments) or Dataset.from_dict({"a": [1]})
    )
    assert wheres("nyu-mll/glue:mnli@validation_matched", streaming=False) == [
        "nyu-mll/glue:mnli@validation_matched:row 1"
    ]
    rows("rajpurkar/squad_v2.0", split="eval")
    rows("squad", split="test", format="hub")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"set/train: the suffix '.' is unknown"):
        rows(write(tmp_path / "set" / "train", "a").relative_to(tmp_path))
    assert asked == [
        ("nyu-mll/glue:mnli", "validation_matched", False, "data.train"),
        ("rajpurkar/squad_v2.0", "validation", True, "data.eval"),
        ("squad", "test", True, "data.test"),
    ]


BAD_ROWS: list[tuple[str, str | bytes, dict[str, Any], str]] = [
    ("x.csv", "a,b\n1\n2,3\n", {}, r"x.csv:2: has 1 cells where the header has 2. Correct the row .*, or set"),
    ("x.csv", "a,b\n\n1,2\n1,2,3\n", {}, r"x.csv:4: has 3 cells where the header has 2"),
    ("x.csv", "1,2\n1\n", {"header": False}, r"x.csv:2: has 1 cells where the first row has 2"),
    ("x.csv", 'a\n"b" c\nd\n', {}, r"x.csv:2: no valid CSV \(.*\). Correct the quotes .*, or set data.format=tsv"),
    ("x.csv", 'a\nb\n"c\nd\n', {}, r"x.csv:3: no valid CSV \(unexpected end of data\)"),
    ("x.csv", b"a\n\xff\nb\n", {}, r"x.csv:2: byte 0xff at offset 2 is not valid UTF-8"),
    ("x.tsv", "a\tb\n1\t2\t3\n1\t2", {}, r"x.tsv:2: has 3 cells where the header has 2"),
    ("x.tsv", "a\tb\n1\t2\n\n", {}, r"x.tsv:3: has 1 cells where the header has 2"),
    ("x.jsonl", '{"a": 1}\n{"a"\n', {}, r"x.jsonl:2: no valid JSON at column 5"),
    ("x.jsonl", '{"a": 1}\n[1]\n', {}, r"x.jsonl:2: holds \[1\], not an object of columns. Correct or remove the row"),
    ("x.json", '[{"a": 1}, 2]\n', {}, r"x.json:row 2: holds 2, not an object of columns"),
    (
        "x.json",
        '[{"title": "", "paragraphs": []}, {"title": "", "paragraphs": [{"qas": [{"id": 1, "question": ""}]}]},'
        '{"title": "", "paragraphs": [{"context": "", "qas": [{"id": 1, "question": ""}]}]}]',
        {},
        r"x.json: article 2 is not of SQuAD's shape \(KeyError: 'context'\). An article has",
    ),
    ("x.conll", "a O\nb\n\nc O\n", CONLL, r"x.conll:2: has 1 columns \(b\), so none for data.columns.tags=-1. Correct"),
    (
        "x.conll",
        "a x\n\nb x y\n",
        {"columns": {"tokens": "0", "tags": "2"}},
        r"x.conll:1: has 2 columns \(a x\), so none for data.columns.tags=2",
    ),
    ("x.conll", "a O\n\nb O y z\n", {"columns": {"tokens": "0", "tags": "-3"}}, r"1: .*none for data.columns.tags=-3"),
    ("x.conll", "a O\n\nb x O\n", {"columns": {"tokens": "2", "tags": "1"}}, r"1: .*none for data.columns.tokens=2"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "content", "data", "message"), BAD_ROWS)
def test_a_bad_row_is_named_or_skipped_alone(
    tmp_path: Path, name: str, content: str | bytes, data: dict[str, Any], message: str
) -> None:
    path = write(tmp_path / name, content)
    with pytest.raises(DataError, match=message + ".*data.on_error=skip") as raised:
        rows(path, **data)
    assert "\n" not in str(raised.value) and str(raised.value).startswith(str(path))
    problems = Problems("skip")
    assert len(rows(path, problems, **data)) == 1
    assert problems.skipped == 1


def test_lines_are_counted_past_skipped_ones(tmp_path: Path) -> None:
    path = write(tmp_path / "x.csv", b'a\n\xff\nb\n"c\nd"\ne\n')
    assert [where for where, _ in rows(path, Problems("skip"))] == [f"{path}:{n}" for n in (3, 4, 6)]


def test_a_sentence_is_skipped_with_its_bad_line_and_a_table_is_not_without_its_header(tmp_path: Path) -> None:
    path, problems = write(tmp_path / "x.conll", b"a O\n\nb O\n\xff O\nc O\n\nd O\n"), Problems("skip")
    assert [row["0"] for _, row in rows(path, problems, **CONLL)] == [["a"], ["d"]] and problems.skipped == 1
    path = write(tmp_path / "x.csv", b"text,Gr\xf6\xdfe\na,1\n")
    with pytest.raises(DataError, match=r"x.csv: data.on_error=skip left out its header. .*x.csv:1: byte 0xf6"):
        rows(path, Problems("skip"))


BAD_FILES: list[tuple[str, str, dict[str, Any], str]] = [
    ("x.csv", "", {}, r"x.csv: has no rows. Name a file that has some"),
    ("x.csv", "a,b\n", {}, r"x.csv: has no rows"),
    ("x.tsv", "", {"header": False}, r"x.tsv: has no rows"),
    ("x.jsonl", "\n", {}, r"x.jsonl: has no rows"),
    ("x.json", "\n\n", {}, r"x.json: has no rows"),
    ("x.json", '{"data": []}', {}, r"x.json: has no rows"),
    ("x.conll", "-DOCSTART- O\n\n", CONLL, r"x.conll: has no rows"),
    ("x.json", '\n[{"a": 1}\n', {}, r"x.json:2: no valid JSON at column 10 .* data.format=jsonl for an object a line"),
    ("x.json", '{"a": 1}', {}, r"x.json: holds '\{\"a\": 1\}', not a list of rows. Write \[row, …\]"),
    ("x.parquet", "PAR1", {}, r"x.parquet: cannot be read as parquet after row 0 .*Replace the file"),
    ("x.txt", "a", {}, r"x.txt: the suffix '.txt' is unknown. Set data.format=csv, tsv, .*conll or hub"),
    ("x", "a", {}, r"x: the suffix '.' is unknown"),
    ("x.csv", "a", {"format": "text"}, r"x.csv: data.format=text is no table. Set data.format=csv, tsv"),
    ("x.conll", "a O\n", {}, r"data.columns.tokens=tokens: .* no names. .*data.columns.tokens=0 data.columns.tags=-1"),
]


@pytest.mark.parametrize(("name", "content", "data", "message"), BAD_FILES)
def test_a_bad_file_is_named(tmp_path: Path, name: str, content: str, data: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message) as raised:
        rows(write(tmp_path / name, content), **data)
    assert "\n" not in str(raised.value)


def test_a_file_that_cannot_be_read_is_skipped_alone(tmp_path: Path) -> None:
    write(tmp_path / "a.json", "[")
    write(tmp_path / "b.json", '[{"a": 1}]')
    problems = Problems("skip")
    assert [row for _, row in rows(tmp_path / "*.json", problems)] == [{"a": 1}]
    assert problems.skipped == 1


def test_of_several_files_the_empty_one_is_named(tmp_path: Path) -> None:
    write(tmp_path / "a.csv", "a\n1\n")
    write(tmp_path / "b.csv", "a\n")
    with pytest.raises(DataError, match=r"b.csv: has no rows"):
        rows(tmp_path / "*.csv")


@pytest.mark.parametrize(
    ("source", "split", "data", "message"),
    [
        ("no/such.tsv", "train", {}, r"data.train=no/such.tsv: no file matches \(working directory "),
        ("no/such.tsv.gz", "eval", {}, r"data.eval=no/such.tsv.gz: no file matches"),
        ("no/*.csv", "test", {}, r"data.test=no/\*.csv: no file matches"),
        ("reviews", "train", {}, r"data.train=reviews: no file matches"),
        ("/tmp", "train", {"format": "csv"}, r"data.train=/tmp: is a folder. Name its files: data.train='/tmp/\*'"),
        ("None/SST-2/dev.tsv", "train", {"format": "tsv"}, r"data.path is not set: data.train=None/SST-2/dev.tsv"),
        ("no/such:x@y", "eval", {}, r"data.eval=no/such:x: the hub data set cannot .*\[:config\]\), the split"),
    ],
)  # fmt: skip
def test_a_wrong_name_is_named(
    source: str, split: str, data: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match=message):
        rows(source, split=split, **data)


def every(group: str) -> list[str]:
    files = (conf_dir() / "data" / group).glob("*.yaml")
    return sorted(file.stem for file in files if file.stem != "glue")  # which is made of the others


@pytest.mark.parametrize("preset", [*(f"files/{n}" for n in every("files")), *(f"hub/{n}" for n in every("hub"))])
def test_a_preset_names_tables_and_its_columns(preset: str) -> None:
    data = compose(f"data={preset}", "data.path=/some").data
    sources = [data.train, *(data.eval.values() if isinstance(data.eval, dict) else [data.eval] if data.eval else [])]
    hub = preset.startswith("hub")
    assert all(
        name and (tables._is_hub(name, Data(format=None)) if hub else name.startswith("/some/")) for name in sources
    )
    assert data.workers == 0 and data.columns != Data().columns


def test_a_misspelt_nested_option_is_named() -> None:
    with pytest.raises(ConfigError, match=r"data=files/sst: no such option. Did you mean 'files/sst2'\? data has: "):
        compose("data=files/sst")
    with pytest.raises(ConfigError, match=r"Did you mean 'hub/squad'\?"):
        compose("data=hub/squat")


@needs_shared
def test_real_named_entities_are_read_whole() -> None:
    data = compose("data=files/wnut17", f"data.path={SHARED / 'ner' / 'wnut17'}").data
    for source, sentences, tokens in ((data.train, 3394, 62_730), (data.eval, 1009, 15_733)):
        found = values(str(source), **data.model_dump())
        assert len(found) == sentences
        assert sum(len(row["0"]) for row in found) == sum(len(row["-1"]) for row in found) == tokens
