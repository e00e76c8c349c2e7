"""The rows of labelled tables: CSV, TSV, JSON, parquet, SQuAD and CoNLL files, or a data set of the hub.

    for where, values in rows("SST-2/dev.tsv", config.data, "validation"):
        where, values    # 'SST-2/dev.tsv:2', {'sentence': "it 's a charming …", 'label': '1'}

Everything streams but JSON.
"""

import csv
import itertools
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from toolkit.config.schema import Data
from toolkit.data import hub
from toolkit.data.sources import Problems, json_lines, matching, parquet_rows, read_lines
from toolkit.errors import DataError

Row = tuple[str, dict[str, Any]]
HUB_SPLIT = {"train": "train", "eval": "validation", "test": "test"}  # what the hub calls data.train and so on
KEYS = {name: f"data.{ours}" for ours, name in HUB_SPLIT.items()}


def rows(source: str, data: Data, split: str, problems: Problems | None = None, key: str = "") -> Iterator[Row]:
    """(where, values by column) of each row of files, a glob, or ``owner/name[:config][@split]`` of the hub.

    ``where`` is ``path:line``, or ``path:row N`` where there are no lines. Raises DataError on bad input.
    """
    problems, key = problems or Problems(data.on_error), key or KEYS[split]
    if data.format == "hub" or (data.format is None and _is_hub(source)):
        yield from _objects(source, _hub(source, data, split, key), problems)
        return
    unset = source.startswith("None/")  # what ${data.path}/… of a preset is without data.path
    for file in matching(source, "data.path is not set: " * unset + key):
        yield from _objects(str(file), _READ[_format(file, data)](file, data, problems), problems)


def _objects(name: str, found: Iterable[tuple[str, Any]], problems: Problems) -> Iterator[Row]:
    empty, skipped = True, problems.skipped
    for where, values in found:
        empty = False
        if isinstance(values, dict):
            yield where, values
        else:
            problems.found(f"{where}: holds {values!r:.40}, not an object of columns", "Correct or remove the row")
    if empty and problems.skipped == skipped:
        raise DataError(f"{name}: has no rows. Name a file that has some.")


_OWNER_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")


def _is_hub(source: str) -> bool:
    """Whether a source without a format is of the hub: a folder, or owner/name that is and ends like no file."""
    name = Path(_name_and_split(source, "")[0].partition(":")[0])
    named = _OWNER_NAME.fullmatch(str(name)) is not None and _suffix(name) not in _READ
    return name.is_dir() or (named and not Path(source).is_file())


def _name_and_split(source: str, split: str) -> tuple[str, str]:
    name, at, chosen = source.rpartition("@")
    return (name, chosen) if at and not Path(source).is_dir() else (source, split)  # a folder's name may have an @


def _hub(source: str, data: Data, split: str, key: str) -> Iterator[Row]:
    name, chosen = _name_and_split(source, split)
    dataset = hub.load(name, chosen, data.streaming, key)
    classes = hub.class_names(dataset)
    for number, row in enumerate(dataset, 1):
        yield f"{source}:row {number}", row | {column: _named(row[column], names) for column, names in classes.items()}


def _named(value: Any, names: list[str]) -> Any:
    if isinstance(value, list):
        return [_named(item, names) for item in value]
    return None if value in (None, -1) else names[value]  # -1: the label of an unlabelled row


def _suffix(path: Path) -> str:
    return Path(path.name.removesuffix(".gz")).suffix[1:]


def _format(path: Path, data: Data) -> str:
    chosen = data.format or _suffix(path)
    if chosen not in _READ:
        said = f"data.format={chosen} is no table" if data.format else f"the suffix '.{chosen}' is unknown"
        raise DataError(f"{path}: {said}. Set data.format={', '.join(_READ)} or hub.")
    return chosen


def _unquoted(path: Path, problems: Problems) -> Iterator[tuple[int, list[str]]]:
    """Not by csv: a lone quote in GLUE's files is text."""
    return ((number, text.split("\t")) for number, text in read_lines(path, problems))


def _is_header(path: Path, line: int, cells: list[str]) -> bool:
    numbers = [_is_number(cell) for cell in cells]
    if any(numbers) and not all(numbers):
        other = cells[numbers.index(False)]
        raise DataError(
            f"{path}:{line}: holds numbers, but also {other!r:.40}: a header, or a row with a bad cell? Set "
            "data.header=true or data.header=false."
        )
    return not any(numbers)


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _columns(path: Path, problems: Problems) -> Iterator[tuple[int, list[str]]]:
    return ((number, text.split()) for number, text in read_lines(path, problems) if text.strip())


def _quoted(path: Path, problems: Problems) -> Iterator[tuple[int, list[str]]]:
    """(number of the first line, cells) of each record that is not blank; quoted cells may hold line ends."""
    csv.field_size_limit(sys.maxsize)  # a cell may be a document of more than csv's 131,072 characters
    last = 0

    def texts() -> Iterator[str]:
        nonlocal last
        for last, text in read_lines(path, problems):  # noqa: B007
            yield text + "\n"

    reader = csv.reader(texts(), strict=True)
    while True:
        before = reader.line_num
        try:
            cells = next(reader, None)
        except csv.Error as error:
            first = last - (reader.line_num - before) + 1
            problems.found(f"{path}:{first}: no valid CSV ({error})", "Correct the quotes, or set data.format=tsv")
            continue
        if cells is None:
            return
        if cells:
            yield last - (reader.line_num - before) + 1, cells


def _table(path: Path, records: Iterator[tuple[int, list[str]]], data: Data, problems: Problems) -> Iterator[Row]:
    first = next(records, None)
    if first is None:
        return
    named = _is_header(path, *first) if data.header is None else data.header
    names = first[1] if named else [str(i) for i in range(len(first[1]))]
    if twice := [name for name in names if names.count(name) > 1 and (name or data.header is None)]:
        raise DataError(f"{path}:{first[0]}: the header has '{twice[0]}' twice. Give each column a name of its own.")
    for number, cells in records if named else itertools.chain([first], records):
        if len(cells) == len(names):
            yield f"{path}:{number}", dict(zip(names, cells, strict=True))
        else:
            header = "header" if named else "first row"
            problems.found(
                f"{path}:{number}: has {len(cells)} cells where the {header} has {len(names)}",
                "Correct the row, or set the data.format that the file has",
            )


def _json(path: Path, problems: Problems) -> Iterator[tuple[str, Any]]:
    text = "\n".join(line for _, line in read_lines(path, problems))
    try:
        content = json.loads(text if text.strip() else "[]")
    except json.JSONDecodeError as error:
        where = f"{path}:{error.lineno}: no valid JSON at column {error.colno} ({error.msg})"
        problems.found(where, "Correct the file, or set data.format=jsonl for an object a line")
        return
    found = content.get("data") if isinstance(content, dict) else content
    if not isinstance(found, list):
        problems.found(f"{path}: holds {text!r:.40}, not a list of rows", 'Write [row, …] or {"data": [row, …]}')
    elif found and isinstance(found[0], dict) and "paragraphs" in found[0]:
        yield from _squad(path, found, problems)
    else:
        yield from ((f"{path}:row {number}", row) for number, row in enumerate(found, 1))


def _squad(path: Path, articles: list[Any], problems: Problems) -> Iterator[Row]:
    for number, article in enumerate(articles, 1):
        try:
            questions = list(_questions(article))
        except (KeyError, TypeError, AttributeError) as error:
            problems.found(
                f"{path}: article {number} is not of SQuAD's shape ({type(error).__name__}: {error})",
                "An article has a title and paragraphs, these a context and qas, these id, question and answers",
            )
        else:
            yield from ((f"{path}: question {question['id']}", question) for question in questions)


def _questions(article: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for paragraph in article["paragraphs"]:
        for qa in paragraph["qas"]:
            answers = qa.get("answers")
            if answers is not None:
                answers = {key: [answer[key] for answer in answers] for key in ("text", "answer_start")}
            yield {
                "id": qa["id"],
                "title": article.get("title"),
                "question": qa["question"],
                "context": paragraph["context"],
                "answers": answers,
                "is_impossible": qa.get("is_impossible", False),
            }


def _conll(path: Path, data: Data, problems: Problems) -> Iterator[Row]:
    """A row a sentence: the lists of its tokens and, unless every line is a token alone, of its tags."""
    columns = {key: _number(getattr(data.columns, key), key) for key in ("tokens", "tags")}
    for apart, lines in itertools.groupby(read_lines(path, problems), _parts_sentences):
        if apart:
            continue
        sentence = [(number, text.split("\t") if "\t" in text else text.split()) for number, text in lines]
        keys = ("tokens", "tags") if any(len(cells) > 1 for _, cells in sentence) else ("tokens",)
        short = ((number, cells, key) for number, cells in sentence for key in keys if _lacks(cells, key, columns))
        if bad := next(short, None):
            number, cells, key = bad
            has = f"{path}:{number}: has {len(cells)} columns ({' '.join(cells):.40})"
            way_out = f"Correct the line, or set data.columns.{key} to a number from 0, or from the end with -1"
            problems.found(f"{has}, so none for data.columns.{key}={columns[key]}", way_out)
        else:
            values = {getattr(data.columns, key): [cells[columns[key]] for _, cells in sentence] for key in keys}
            yield f"{path}:{sentence[0][0]}", values


def _parts_sentences(line: tuple[int, str]) -> bool:
    return not line[1].strip() or line[1].startswith("-DOCSTART-")


def _number(column: str, key: str) -> int:
    try:
        return int(column)
    except ValueError:
        raise DataError(
            f"data.columns.{key}={column}: the columns of CoNLL files have no names. "
            "Set their numbers: data.columns.tokens=0 data.columns.tags=-1."
        ) from None


def _lacks(cells: list[str], key: str, columns: dict[str, int]) -> bool:
    """Whether a line has no such column; its last one is no tag where that is the token."""
    tokens, at = (c + len(cells) if c < 0 else c for c in (columns["tokens"], columns[key]))
    return not 0 <= at < len(cells) or (key == "tags" and at == tokens)


_READ: dict[str, Callable[[Path, Data, Problems], Iterator[tuple[str, Any]]]] = {
    "csv": lambda path, data, problems: _table(path, _quoted(path, problems), data, problems),
    "tsv": lambda path, data, problems: _table(path, _unquoted(path, problems), data, problems),
    "columns": lambda path, data, problems: _table(path, _columns(path, problems), data, problems),
    "jsonl": lambda path, data, problems: json_lines(path, problems),
    "json": lambda path, data, problems: _json(path, problems),
    "parquet": lambda path, data, problems: parquet_rows(path, problems),
    "conll": _conll,
}


def identity(source: str, data: Data, split: str) -> list[Any]:
    """What identifies the rows for a cache without reading them: path, size and time of files, the hub's commit."""
    if data.format == "hub" or (data.format is None and _is_hub(source)):
        name, chosen = _name_and_split(source, split)
        return [chosen, *hub.identity(name, data.model_copy(update={"split": chosen}))]
    files = [path.resolve() for path in matching(source, KEYS[split])]
    return [[str(path), path.stat().st_size, path.stat().st_mtime_ns] for path in files]
