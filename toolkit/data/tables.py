"""The rows of labelled tables: CSV, TSV, JSON, parquet, SQuAD and CoNLL files, or a data set of the hub.

    for where, values in rows("SST-2/dev.tsv", config.data, "eval"):
        where, values    # 'SST-2/dev.tsv:2', {'sentence': "it 's a charming …", 'label': '1'}

Everything streams but JSON.
"""

import csv
import glob
import itertools
import math
import os
import re
import string
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from toolkit.config.schema import Data
from toolkit.data import schemes, sources
from toolkit.data.lines import Problems, every_line, from_json, json_fault, json_lines, read_lines
from toolkit.data.prepared import role
from toolkit.data.sources import matching, parquet_rows
from toolkit.errors import DataError

Row = tuple[str, dict[str, Any]]
Cells = Iterator[tuple[int, list[str]]]  # of each record, with the number of its line
Lines = list[tuple[int, list[str]]]  # likewise, of a sentence
SEPARATORS = ",;\t|"
HEAD = 20  # lines that tell which of these a CSV file has
HUB_SPLIT = {"train": "train", "eval": "validation", "test": "test"}  # what the hub calls data.train and so on


def rows(source: str, data: Data, split: str, problems: Problems | None = None, key: str = "") -> Iterator[Row]:
    """(where, values by column) of each row of files, a glob, or ``owner/name[:config][@split]`` of the hub. ``where``
    is ``path:line``, or ``path:row N`` where there are no lines. Of a ``key`` that is no split's, ``split`` is the
    hub's. Raises DataError on bad input."""
    problems = problems or Problems(data.on_error)
    split, key = (split, key) if key else (HUB_SPLIT[role(split)], f"data.{role(split)}")
    if _is_hub(source, data):
        yield from _objects(source, _hub(source, data, split, key), problems)
        return
    unset = source.startswith("None/")  # what ${data.path}/… of a preset is without data.path
    for file in matching(source, "data.path is not set: " * unset + key):
        chosen = _suffix(file) if data.format in (None, "hub") else data.format
        if chosen not in _READ:
            by_name = chosen != data.format
            said = f"the suffix '.{chosen}' is unknown" if by_name else f"data.format={chosen} is no table"
            raise DataError(f"{file}: {said}. Set data.format={', '.join(_READ)} or hub.")
        yield from _objects(str(file), _READ[chosen](file, data, problems), problems)


def identity(source: str, data: Data, split: str) -> list[Any]:
    """What identifies the rows for a cache without reading them: path, size and time of files, the hub's commit."""
    if _is_hub(source, data):
        name, chosen = _name_and_split(source, HUB_SPLIT[role(split)])
        return [chosen, *sources.hub_identity(name, chosen, data.streaming, f"data.{role(split)}")]
    return sources.stamps(matching(source, f"data.{role(split)}"))


def number(cell: Any, *, finite: bool = True) -> float | None:
    """The number that a cell holds; None of anything else."""
    try:
        found = float(cell)
    except (TypeError, ValueError, OverflowError):
        return None
    return found if math.isfinite(found) or not finite else None


def _objects(name: str, found: Iterable[tuple[str, Any]], problems: Problems) -> Iterator[Row]:
    skipped, values = problems.skipped, None
    for where, values in found:
        if isinstance(values, dict):
            yield where, values
        else:
            problems.found(f"{where}: holds {values!r:.40}, not an object of columns", "Correct or remove the row")
    if values is None and problems.skipped == skipped:
        raise DataError(f"{name}: has no rows. Name a file that has some.")


_OWNER_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")


def _is_hub(source: str, data: Data) -> bool:
    """A folder is of the hub, and an owner/name that is no file and ends like none; with data.format=hub whatever is
    no file and ends like none: a file may be named where the preset reads the hub."""
    if data.format not in (None, "hub"):
        return False
    name = _name_and_split(source, "")[0].partition(":")[0]
    if os.path.isdir(name):  # noqa: PTH112  (never raises)
        return True
    ends = name.endswith(".gz") or _suffix(Path(name)) in (*_READ, "txt")
    is_file = ends or glob.has_magic(name) or os.path.isfile(source)  # noqa: PTH113
    named = data.format == "hub" or _OWNER_NAME.fullmatch(name) is not None
    return named and not is_file and not name.startswith(("/", ".", "~"))


def _name_and_split(source: str, split: str) -> tuple[str, str]:
    name, at, chosen = source.rpartition("@")
    return (name, chosen) if at and not Path(source).is_dir() else (source, split)  # a folder's name may have an @


def _hub(source: str, data: Data, split: str, key: str) -> Iterator[Row]:
    """Rows with the names of classes in the place of their numbers."""
    from datasets import ClassLabel

    name, chosen = _name_and_split(source, split)
    dataset = sources.load(name, chosen, data.streaming, key)
    features = {column: getattr(feature, "feature", feature) for column, feature in (dataset.features or {}).items()}
    classes = {column: feature.names for column, feature in features.items() if isinstance(feature, ClassLabel)}
    for where, row in sources.hub_rows(source, dataset, key):
        yield where, row | {column: _named(row[column], names) for column, names in classes.items()}


def _named(value: Any, names: list[str]) -> Any:
    if isinstance(value, list):
        return [_named(item, names) for item in value]
    return None if value in (None, -1) else names[value]  # -1: the label of an unlabelled row


def _suffix(path: Path) -> str:
    return Path(path.name.removesuffix(".gz")).suffix[1:].lower()


def _words(path: Path, problems: Problems) -> Cells:
    """At white space, without blank lines."""
    return ((line, cells) for line, text in read_lines(path, problems) if (cells := text.split()))


_IN_QUOTES = re.compile('".*"')
_OWN_DOUBLED = re.compile('"[^"]*""([^"]|"")*"')  # in quotes, and those that it has are doubled


def _tabs(path: Path, data: Data, problems: Problems) -> Cells:
    """Not by csv, as a lone quote in GLUE's files is text. Where nobody said so, what looks quoted is a problem."""
    for line, text in read_lines(path, problems):
        cells, quoted = text.split("\t"), _IN_QUOTES if line == 1 else _OWN_DOUBLED
        if data.format != "tsv" and (cell := next(filter(quoted.fullmatch, cells), None)):
            way_out = "Set data.format=csv to read such cells without their quotes, or data.format=tsv with them"
            problems.found(f"{path}:{line}: has the quoted cell {cell!r:.40}", way_out)
        else:
            yield line, cells


def _quoted(path: Path, problems: Problems) -> Cells:
    """Of each record that is not blank, with its first line; quoted cells may hold line ends."""
    csv.field_size_limit(sys.maxsize)  # a cell may be a document of more than csv's 131,072 characters
    found = ((line, text + "\n") for line, text in read_lines(path, problems))
    head = list(itertools.islice(found, HEAD))
    record: list[int] = []  # its lines

    def texts() -> Iterator[str]:
        for line, text in itertools.chain(head, found):
            record.append(line)
            yield text

    reader = csv.reader(texts(), delimiter=_separator([text for _, text in head]), strict=True)
    while True:
        record.clear()
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            way_out = 'Correct the quotes (one in a quoted cell is "", not \\"), or set data.format=tsv'
            problems.found(f"{path}:{record[0]}: no valid CSV ({error})", way_out)
        else:
            if cells:
                yield record[0], cells


def _separator(head: list[str]) -> str:
    """What gives the first lines of a file equally many cells, and more than one; a comma where nothing does."""
    for separator in SEPARATORS:
        try:
            rows = [row for row in csv.reader(head, delimiter=separator) if row]
        except csv.Error:
            continue
        whole = rows[:-1] if len(head) == HEAD else rows  # the last may go on
        if len(widths := {len(row) for row in whole}) == 1 and widths != {1}:
            return separator
    return ","


_ROW = (
    "Correct the row (in CSV a cell with a separator or line end is in quotes, with no backslash before it), or set "
    "the data.format that the file has"
)


def _table(path: Path, records: Cells, data: Data, problems: Problems) -> Iterator[Row]:
    skipped = problems.skipped
    first = next(records, None)
    if first is None:
        return
    named = data.header
    if named is not False and first[0] > 1 and problems.skipped > skipped:
        raise DataError(f"{path}: data.on_error=skip left out its header. {problems.first[-1]}. Correct the file.")
    if named is None:
        numbers = [number(cell, finite=False) is not None for cell in first[1]]
        if any(numbers) and not all(numbers):
            other = first[1][numbers.index(False)]
            raise DataError(
                f"{path}:{first[0]}: holds numbers, but also {other!r:.40}: a header, or a row with a bad cell? Set "
                "data.header=true or data.header=false."
            )
        named = not any(numbers)
    names = first[1] if named else [str(i) for i in range(len(first[1]))]
    if named and len(names) == 1 and any(separator in names[0] for separator in SEPARATORS):
        raise DataError(
            f"{path}:{first[0]}: the header is one cell, {names[0]!r:.40}. Set the data.format that the file has: csv "
            "takes a comma, semicolon, tab or bar between cells, if all rows have as many."
        )
    if twice := [name for name in names if names.count(name) > 1 and (name or data.header is None)]:
        raise DataError(f"{path}:{first[0]}: the header has {twice[0]!r:.40} twice. Give each its own name.")
    for line, cells in records if named else itertools.chain([first], records):
        if len(cells) != len(names):
            what = f"has {len(cells)} cells where the {'header' if named else 'first row'} has {len(names)}"
            problems.found(f"{path}:{line}: {what}", _ROW)
        elif named and cells == names:
            problems.found(f"{path}:{line}: is the header again", "Take it out")
        else:
            yield f"{path}:{line}", dict(zip(names, cells, strict=True))


def _json(path: Path, problems: Problems) -> Iterator[tuple[str, Any]]:
    text = "\n".join(line or "" for _, line in every_line(path, problems))
    try:
        content = from_json(text if text.strip() else "[]")
    except ValueError as error:
        where = f"{path}:{getattr(error, 'lineno', 1)}: no valid JSON {json_fault(error)}"
        problems.found(where, "Correct the file, or set data.format=jsonl for an object a line")
        return
    found = content.get("data") if isinstance(content, dict) else content
    if not isinstance(found, list):
        problems.found(f"{path}: holds {text!r:.40}, not a list of rows", 'Write [row, …] or {"data": [row, …]}')
    elif found and isinstance(found[0], dict) and "paragraphs" in found[0]:
        yield from _squad(path, found, problems)
    else:
        yield from ((f"{path}:row {line}", row) for line, row in enumerate(found, 1))


def _squad(path: Path, articles: list[Any], problems: Problems) -> Iterator[Row]:
    for place, article in enumerate(articles, 1):
        try:
            questions = [_question(article, p, qa) for p in article["paragraphs"] for qa in p["qas"]]
        except (KeyError, TypeError, AttributeError) as error:
            what = f"{path}: article {place} is not of SQuAD's shape ({type(error).__name__}: {error})"
            way_out = "An article has a title and paragraphs, these a context and qas, these id, question and answers"
            problems.found(what, way_out)
        else:
            yield from ((f"{path}: question {question['id']}", question) for question in questions)


def _question(article: dict[str, Any], paragraph: dict[str, Any], qa: dict[str, Any]) -> dict[str, Any]:
    answers = qa.get("answers")
    if answers is not None:
        answers = {key: [answer[key] for answer in answers] for key in ("text", "answer_start")}
    return {
        "id": qa["id"],
        "title": article.get("title"),
        "question": qa["question"],
        "context": paragraph["context"],
        "answers": answers,
        "is_impossible": qa.get("is_impossible", False),
    }


def _conll(path: Path, data: Data, problems: Problems) -> Iterator[Row]:
    """A row a sentence: the lists of its tokens and, unless every line is a token alone, of its tags."""
    columns = {}
    for key in ("tokens", "tags"):
        try:
            columns[key] = int(column := getattr(data.columns, key))
        except ValueError:
            raise DataError(
                f"data.columns.{key}={column}: the columns of CoNLL files have no names. "
                "Set their numbers: data.columns.tokens=0 data.columns.tags=-1."
            ) from None
    for word, group in itertools.groupby(every_line(path, problems), _is_word):
        lines = list(group)
        if not word or any(text is None for _, text in lines):  # nothing is read of a sentence with a bad line
            continue
        cut = [(line, _cells(text or "")) for line, text in lines]
        sentence = _without_comments(cut, columns["tags"], data.labels or ())
        if not sentence:
            continue
        keys = ("tokens", "tags") if any(len(cells) > 1 for _, cells in sentence) else ("tokens",)
        short = ((line, cells, key) for line, cells in sentence for key in keys if _lacks(cells, key, columns))
        if bad := next(short, None):
            line, cells, key = bad
            has = f"{path}:{line}: has {len(cells)} columns ({' '.join(cells):.40})"
            way_out = f"Correct the line, or set data.columns.{key} to a number from 0, or from the end with -1"
            problems.found(f"{has}, so none for data.columns.{key}={columns[key]}", way_out)
        else:
            values = {getattr(data.columns, key): [cells[columns[key]] for _, cells in sentence] for key in keys}
            yield f"{path}:{sentence[0][0]}", values


def _is_word(line: tuple[int, str | None]) -> bool:
    text = line[1]
    return text is None or (bool(text.strip(string.whitespace)) and not text.startswith("-DOCSTART-"))


def _cells(text: str) -> list[str]:
    """At tabs, else at blanks; a no-break or ideographic space is of its token."""
    return text.split("\t") if "\t" in text else [cell for cell in text.split(" ") if cell]


def _without_comments(lines: Lines, tags: int, names: tuple[str, ...]) -> Lines:
    """``# id 7`` and ``#begin document`` are no words; # or #topic is, with as many columns as others, and a tag."""
    usual = {len(cells) for _, cells in lines if cells[0][:1] != "#"}

    def is_word(cells: list[str]) -> bool:
        if cells[0][:1] != "#" or len(cells) == 1:
            return cells[0][:1] != "#" or not usual or 1 in usual
        tag = cells[tags] if -len(cells) <= tags < len(cells) else ""
        known = schemes.TAG.fullmatch(tag) or tag in ("_", *names) or (names and tag.isdecimal())
        return bool(known) and (not usual or len(cells) in usual)

    return [(line, cells) for line, cells in lines if is_word(cells)]


def _lacks(cells: list[str], key: str, columns: dict[str, int]) -> bool:
    """Whether a line has no such column; its last one is no tag where that is the token."""
    tokens, at = (c + len(cells) if c < 0 else c for c in (columns["tokens"], columns[key]))
    return not 0 <= at < len(cells) or (key == "tags" and at == tokens)


_READ: dict[str, Callable[[Path, Data, Problems], Iterator[tuple[str, Any]]]] = {
    "csv": lambda path, data, problems: _table(path, _quoted(path, problems), data, problems),
    "tsv": lambda path, data, problems: _table(path, _tabs(path, data, problems), data, problems),
    "columns": lambda path, data, problems: _table(path, _words(path, problems), data, problems),
    "jsonl": lambda path, data, problems: json_lines(path, problems),
    "json": lambda path, data, problems: _json(path, problems),
    "parquet": lambda path, data, problems: parquet_rows(path, problems),
    "conll": _conll,
}
