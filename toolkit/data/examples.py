"""The rows of a table as checked examples of what a task learns from.

    labels = find_labels(rows(data.train, data, "train"), data, task.kind)    # ('negative', 'positive')
    read(data.train, "train", data, task, labels)    # [Text('0', 'hide …', None, 0), …]

A row that does not fit is an error that names it, before anything is trained.
"""

import ast
import json
import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from toolkit.config.schema import Data, Task
from toolkit.data import schemes, tables
from toolkit.data.lines import Problems
from toolkit.data.prepared import role
from toolkit.data.tables import number
from toolkit.errors import DataError, first_of, nearest

Labels = tuple[str, ...]  # in the order of their numbers
ABSENT = (None, "", -1, "-1")  # what stands for a label that is not known


@dataclass(frozen=True)
class Text:
    """A text, or a pair, with its class, its score, or 1 for each label that it has and 0 for the others."""

    id: str
    text: str
    text_pair: str | None
    label: int | float | tuple[int, ...] | None


@dataclass(frozen=True)
class Tagged:
    """Words, each with the number of its tag in IOB2."""

    id: str
    words: list[str]
    tags: list[int] | None
    misspelt: Mapping[str, int] = field(default_factory=dict, compare=False)  # entities that a scheme spells otherwise


@dataclass(frozen=True)
class Question:
    """A question on a context with answers that stand in it, as (text, its first character)."""

    id: str
    question: str
    context: str
    answers: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Choice:
    """A prompt and its possible endings, with the number of the right one."""

    id: str
    prompt: str
    endings: tuple[str, ...]
    label: int | None


Example = Text | Tagged | Question | Choice


def find_labels(rows: Iterable[tables.Row], data: Data, kind: str) -> Labels:
    """``data.labels``, or those in the rows, sorted; of tags ``O``, then B- and I- of every type, in IOB2 whatever the
    file's scheme; of columns that are each a label, those. () for other kinds. Passes over rows that :func:`read`
    refuses."""
    if kind not in _NAMES:
        return ()
    if given := data.labels or (data.columns.labels if kind == "multi_label" else None):
        if twice := [name for name in given if given.count(name) > 1]:
            raise DataError(f"data.labels or data.columns.labels names {twice[0]} twice: every label has one number.")
        return _as_iob2(given) if kind == "tag" else given
    seen: set[str] = set()
    for _, values in rows:
        try:
            seen.update(_NAMES[kind](_Row(0, values, data, labelled=True)) or ())
        except _BadRow:
            continue
    if kind != "tag":
        numbers = all(number(name) is not None for name in seen)
        return tuple(sorted(seen, key=lambda name: (float(name) if numbers else 0, name)))
    types = sorted({tag[2:] for tag in seen if tag != "O"})
    return ("O", *(f"{begin}-{name}" for name in types for begin in "BI"))


def read(
    source: str, split: str, data: Data, task: Task, labels: Labels, problems: Problems | None = None
) -> list[Example]:
    """Every row of a source as an example of ``task.kind``; rows of ``test`` may lack their labels. Raises DataError on
    the first row that does not fit, or counts those in ``problems``."""
    problems = problems or Problems(data.on_error)
    skipped = problems.skipped
    found: list[Example] = []
    ids: dict[str, str] = {}
    for place, (where, values) in enumerate(tables.rows(source, data, split, problems)):
        try:
            example = _MAKE[task.kind](_Row(place, values, data, role(split) != "test"), task, labels)
            if task.kind == "span_qa" and example.id in ids:
                raise _BadRow(f"id '{example.id}' is that of {ids[example.id]} too", "Give every question its own id")
        except _BadRow as bad:
            what, way_out = bad.args
            problems.found(f"{where}: {what}", way_out)
        else:
            found.append(example)
            ids[example.id] = where
    if not found:
        bad_rows = problems.skipped - skipped
        raise DataError(f"{source}: all of its {bad_rows} rows are skipped. See why with data.on_error=raise.")
    return found


class _BadRow(Exception):
    """What is wrong with a row, and the way out."""


@dataclass(frozen=True)
class _Row:
    """The cells of a row by the key of data.columns that names their column."""

    number: int  # of the row, from 0
    values: dict[str, Any]
    data: Data
    labelled: bool

    @property
    def id(self) -> str:
        return str(self.number if self.data.columns.id is None else self.cell("id"))

    def cell(self, key: str, column: str | None = None) -> Any:
        column = column or getattr(self.data.columns, key)
        if column not in self.values:
            what = f"no column '{column}'.{nearest(column, self.values)} It has: {', '.join(self.values)}"
            raise _BadRow(what, f"Set data.columns.{key}=<one of these>")
        return self.values[column]

    def text(self, key: str, column: str | None = None) -> str:
        value = self.cell(key, column)
        if not isinstance(value, str) or not value.strip():
            what = f"column '{column or getattr(self.data.columns, key)}' holds {value!r:.40}, which is no text"
            raise _BadRow(what, f"Fill it in, or set data.columns.{key}=<a column of texts>")
        return value

    def texts(self, key: str) -> list[str]:
        value = self.cell(key)
        if not isinstance(value, list) or not value or not all(isinstance(item, str) for item in value):
            what = f"column '{getattr(self.data.columns, key)}' holds {value!r:.40}, which is no list of texts"
            raise _BadRow(what, f"Set data.columns.{key}=<a column of lists>, of JSON, parquet, CoNLL or the hub")
        return value

    def label(self, key: str, absent: tuple[Any, ...] = ABSENT) -> Any:
        """The cell; None only where the row has no label and needs none."""
        column = getattr(self.data.columns, key)
        if not self.labelled and _holds_only(absent, self.values.get(column)):
            return None
        value = self.cell(key)
        if _blank(value):
            raise _BadRow(f"column '{column}' is empty", "Fill it in, or name rows without labels as data.test")
        return value


def _holds_only(absent: tuple[Any, ...], value: Any) -> bool:
    values = value.values() if isinstance(value, dict) else value
    if isinstance(value, (list, dict)):
        return all(_holds_only(absent, v) for v in values)
    return value in absent or _blank(value)


def _blank(cell: Any) -> bool:
    return cell is None or cell != cell or (isinstance(cell, str) and not cell.strip())  # NaN is not itself


def _text(row: _Row, task: Task, labels: Labels) -> Text:
    low, high = row.data.range or (-math.inf, math.inf)
    scored = task.kind == "regress"
    is_label = low <= -1 if scored else "-1" in labels
    label = row.label("label", ABSENT[:2] if is_label else ABSENT)
    if label is not None:
        label = _score(label, low, high) if scored else _index(_name(label), labels, row.data)
    return _of_texts(row, label)


def _several(row: _Row, task: Task, labels: Labels) -> Text:
    names = _marked(row)
    mine = {_index(name, labels, row.data) for name in names or ()}
    return _of_texts(row, None if names is None else tuple(int(i in mine) for i in range(len(labels))))


def _of_texts(row: _Row, label: Any) -> Text:
    pair = row.text("text_pair") if row.data.columns.text_pair else None
    return Text(row.id, row.text("text"), pair, label)


def _score(label: Any, low: float, high: float) -> float:
    score = number(label)
    if score is None:
        raise _BadRow(f"score {label!r:.40} is no finite number", "Correct it, or data.columns.label")
    if not low <= score <= high:
        raise _BadRow(f"score {label} is outside {low:g} to {high:g}", "Correct it, or data.range")
    return score


def _name(label: Any) -> str:
    """What a class is called, without white space around it."""
    if _listed(label) is not None or _blank(label) or not isinstance(label, str | int | float):
        way_out = "Write its name or number; rows with any number of classes are learned by task=multi_label"
        raise _BadRow(f"label {label!r:.40} is no name of one class", way_out)
    if isinstance(label, float) and label.is_integer():  # of a column of whole numbers with gaps
        label = int(label)
    return str(label).strip()


def _listed(cell: Any) -> list[Any] | dict[str, Any] | None:
    """A cell that holds a list or an object, also as JSON or Python write one into a cell of text."""
    text = cell.strip() if isinstance(cell, str) else ""
    for parse in (json.loads, ast.literal_eval) if text[:1] in ("[", "{", "(") else ():
        with suppress(ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            found = parse(text)
            # to Python ['a' 'b'], as numpy prints an array, is ['ab']
            if parse is json.loads or "".join(str(found).split()) == "".join(text.split()):
                cell = list(found) if isinstance(found, tuple) else found
                break
    return cell if isinstance(cell, list | dict) else None


def _marked(row: _Row) -> list[str] | None:
    """The labels of a row that has any number of them: columns of 0 and 1, a list, or a text with separators."""
    data, key = row.data, row.data.columns.label
    if columns := data.columns.labels:
        if not row.labelled and _holds_only(ABSENT, [row.values.get(column) for column in columns]):
            return None
        return [column for column in columns if _flag(column, row.cell("labels", column))]
    cell = row.cell("label") if row.labelled or key in row.values else None
    listed = _listed(cell)
    if isinstance(cell, str) and data.label_separator and listed is None:  # an empty cell has none of the labels
        listed = [part for part in cell.split(data.label_separator) if part.strip()]
    elif not row.labelled and cell in ABSENT:
        return None
    if not isinstance(listed, list):
        way_out = "Set data.label_separator=<what is between them>, or name columns of 0 and 1 in data.columns.labels"
        raise _BadRow(f"column '{key}' holds {cell!r:.40}, which is no list of labels", way_out)
    names = [_name(item) for item in listed]
    if len(set(names)) < len(names):
        what = f"labels {cell!r:.40} hold one twice"
        raise _BadRow(what, "Write the names of those that apply; 0 or 1 for each is read from data.columns.labels")
    return names


def _flag(column: str, cell: Any) -> bool:
    flag = {"true": 1, "false": 0}.get(str(cell).strip().lower(), number(cell))
    if flag not in (0, 1):
        way_out = "Write 1 where the label applies, else 0, or correct data.columns.labels"
        raise _BadRow(f"column '{column}' holds {cell!r:.40}, which is neither 0 nor 1", way_out)
    return bool(flag)


def _index(name: str, labels: Labels, data: Data) -> int:
    """The number of a label: of its name, or the file's own where data.labels has names for numbers."""
    if name in labels:
        return labels.index(name)
    known = first_of(labels, 20)
    if data.labels and name.isdecimal() and all(number(label) is None for label in labels):
        if int(name) < len(data.labels):
            return labels.index(data.labels[int(name)])  # weights may have the same labels in another order
        what = (
            f"label {name} is none of the numbers 0 to {len(data.labels) - 1} of data.labels ({', '.join(data.labels)})"
        )
    else:
        what = f"unknown label '{name}'.{nearest(name, labels)} Known: {known}"
    raise _BadRow(what, "Correct the row, or name every label in data.labels=[…]")


def _as_iob2(labels: Labels) -> Labels:
    """Where they are IOB2 already, as they are: weights may know them in this order."""
    if bad := [label for label in labels if not schemes.TAG.fullmatch(label)]:
        raise DataError(f"data.labels: '{bad[0]}' is neither O nor a letter and a type. Write tags: [O,B-PER,I-PER,…].")
    types = dict.fromkeys(label[2:] for label in labels if label != "O" and label[0] != "B")
    kept = [label for label in labels if label[0] in "OBI"]
    return tuple(dict.fromkeys([*kept, *(f"{begin}-{name}" for name in types for begin in "BI")]))


def _tags(row: _Row, task: Task, labels: Labels) -> Tagged:
    tags = _tag_names(row)
    if tags is None:
        return Tagged(row.id, row.texts("tokens"), None)
    found = schemes.entities(tags)
    numbers = [_index(tag, labels, row.data) for tag in schemes.spelt(found, len(tags), "iob2")]
    misspelt = {scheme: schemes.misspelt(found, tags, scheme) for scheme in schemes.LETTERS} if found else {}
    return Tagged(row.id, row.texts("tokens"), numbers, misspelt)


def _tag_names(row: _Row) -> list[str] | None:
    """As they stand in the file, of numbers the names in data.labels."""
    if row.label("tags", (*ABSENT, "_")) is None:  # CoNLL's placeholder
        return None
    words, tags, names = row.texts("tokens"), row.cell("tags"), row.data.labels
    if names and isinstance(tags, list):
        tags = [names[_index(_name(tag), names, row.data)] for tag in tags]
    elif isinstance(tags, list) and any(isinstance(tag, int) for tag in tags):
        raise _BadRow(f"column '{row.data.columns.tags}' holds numbers", "Name them in data.labels=[O,B-…,I-…]")
    else:
        tags = [tag.strip() for tag in row.texts("tags")]
    if len(words) != len(tags):
        raise _BadRow(f"has {len(words)} tokens but {len(tags)} tags", "Give every token one tag")
    if bad := [tag for tag in tags if not schemes.TAG.fullmatch(tag)]:
        way_out = "Write the tags so, or name numbers in data.labels=[O,B-…,I-…]"
        raise _BadRow(f"tag '{bad[0]}' is neither O nor a letter of task.scheme and a type, as B-person", way_out)
    return tags


def _choice(row: _Row, task: Task, labels: Labels) -> Choice:
    columns = row.data.columns
    start = f"{row.cell('start') or ''} ".lstrip() if columns.start else ""
    endings = tuple(start + row.text("endings", column) for column in columns.endings)
    label = row.label("label")
    if label is not None and _name(label) not in map(str, range(len(endings))):
        raise _BadRow(f"label {label!r:.40} is no ending's number, 0 to {len(endings) - 1}", "Correct the row")
    return Choice(row.id, row.text("prompt"), endings, None if label is None else int(_name(label)))


def _question(row: _Row, task: Task, labels: Labels) -> Question:
    context, value = row.text("context"), row.label("answers")
    impossible = row.values.get("is_impossible")
    if impossible not in (None, False, True):  # the text "False" would be true
        raise _BadRow(f"is_impossible {impossible!r:.40} is neither true nor false", "Correct it, or leave it out")
    answers = () if value is None or impossible else _answers(value)
    if value is not None and not answers and not task.null_answers:
        raise _BadRow("has no answer", "Let questions have none with task.null_answers=true (task=squad_v2)")
    for text, start in answers:
        if not text.strip():
            raise _BadRow(f"answer {text!r:.60} is blank", "Correct it, or leave it out")
        stands = context[start : start + len(text)]
        if stands != text:
            elsewhere = f", but at {context.find(text)}" if text in context else ""
            what = f"answer {text!r:.60} is not at answer_start={start}, where {stands!r:.60} stands{elsewhere}"
            raise _BadRow(what, "Count answer_start in characters of the context, from 0")
    return Question(row.id, row.text("question"), context, answers)


def _answers(value: Any) -> tuple[tuple[str, int], ...]:
    """Of ``{text: […], answer_start: […]}`` or ``[{text, answer_start}, …]``, as both are in use."""
    try:
        if isinstance(value, dict):
            pairs = tuple(zip(value["text"], value["answer_start"], strict=True))
        else:
            pairs = tuple((answer["text"], answer["answer_start"]) for answer in value)
    except (KeyError, TypeError, ValueError):
        pairs = ((None, None),)
    if not all(isinstance(text, str) and isinstance(start, int) and start >= 0 for text, start in pairs):
        way_out = "Write {text: [text, …], answer_start: [number, …]}"
        raise _BadRow(f"answers {value!r:.60} are no texts with their starts", way_out)
    return pairs


_Make = Callable[[_Row, Task, Labels], Example]
_MAKE: dict[str, _Make] = {
    "classify": _text,
    "multi_label": _several,
    "regress": _text,
    "tag": _tags,
    "span_qa": _question,
    "choose": _choice,
}
# The kinds whose labels have names, and those of a row
_NAMES: dict[str, Callable[[_Row], list[str] | None]] = {
    "classify": lambda row: [_name(row.label("label"))],
    "multi_label": _marked,
    "tag": _tag_names,
}
