"""The rows of a table as checked examples of what a task learns from.

    labels = find_labels(rows(data.train, data, "train"), data, task.kind)    # ('negative', 'positive')
    read(data.train, "train", data, task, labels)    # [Text('0', 'hide …', None, 0), …]

A row that does not fit is an error that names it, before anything is trained.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from toolkit.config.schema import Data, Task
from toolkit.data import tables
from toolkit.data.lines import Problems
from toolkit.data.prepared import role
from toolkit.data.tables import number
from toolkit.errors import DataError, nearest

Labels = tuple[str, ...]  # in the order of their numbers
ABSENT = (None, "", -1, "-1")  # what stands for a label that is not known


@dataclass(frozen=True)
class Text:
    """A text, or a pair, with its class or score."""

    id: str
    text: str
    text_pair: str | None
    label: int | float | None


@dataclass(frozen=True)
class Tagged:
    """Words, each with its tag's number."""

    id: str
    words: list[str]
    tags: list[int] | None


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
    """``data.labels``, or those in the rows, sorted; of tags ``O``, then B- and I- of every type. () for other kinds.
    Passes over rows that :func:`read` refuses."""
    if kind not in ("classify", "tag"):
        return ()
    if data.labels:
        return data.labels
    seen: set[str] = set()
    for _, values in rows:
        row = _Row(0, values, data, labelled=True)
        try:
            seen.update(_tag_names(row) or () if kind == "tag" else [_name(row.label("label"))])
        except _BadRow:
            continue
    if kind == "classify":
        return tuple(sorted(seen, key=float if all(number(name) is not None for name in seen) else str))
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
        if value is None or value == "":
            raise _BadRow(f"column '{column}' is empty", "Fill it in, or name rows without labels as data.test")
        return value


def _holds_only(absent: tuple[Any, ...], value: Any) -> bool:
    values = value.values() if isinstance(value, dict) else value
    return all(_holds_only(absent, v) for v in values) if isinstance(value, (list, dict)) else value in absent


def _text(row: _Row, task: Task, labels: Labels) -> Text:
    low, high = row.data.range or (-math.inf, math.inf)
    scored = task.kind == "regress"
    label = row.label("label", ABSENT[:2] if scored and low <= -1 else ABSENT)
    if label is not None:
        label = _score(label, low, high) if scored else _index(_name(label), labels, row.data)
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
    whole = isinstance(label, float) and label.is_integer()  # of a column of whole numbers with gaps
    return str(int(label) if whole else label)


def _index(name: str, labels: Labels, data: Data) -> int:
    """The number of a label: of its name, or the file's own where data.labels has names for numbers."""
    if name in labels:
        return labels.index(name)
    known = ", ".join(labels[:20]) + ", …" * (len(labels) > 20)
    if data.labels and name.isdecimal() and all(number(label) is None for label in labels):
        if int(name) < len(labels):
            return int(name)
        what = f"label {name} is none of the numbers 0 to {len(labels) - 1} of data.labels ({known})"
    else:
        what = f"unknown label '{name}'.{nearest(name, labels)} Known: {known}"
    raise _BadRow(what, "Correct the row, or name every label in data.labels=[…]")


def _tags(row: _Row, task: Task, labels: Labels) -> Tagged:
    tags = _tag_names(row)
    if tags and task.scheme == "iob1":  # where B- only parts an entity from one of its type right before it
        before = ["O", *tags]
        tags = [f"B-{t[2:]}" if t[0] == "I" and b[2:] != t[2:] else t for b, t in zip(before, tags, strict=False)]
    numbers = None if tags is None else [_index(tag, labels, row.data) for tag in tags]
    return Tagged(row.id, row.texts("tokens"), numbers)


def _tag_names(row: _Row) -> list[str] | None:
    if row.label("tags") is None:
        return None
    words, tags = row.texts("tokens"), row.texts("tags")
    if len(words) != len(tags):
        raise _BadRow(f"has {len(words)} tokens but {len(tags)} tags", "Give every token one tag")
    if bad := [tag for tag in tags if tag != "O" and "-" not in tag]:
        raise _BadRow(f"tag '{bad[0]}' is neither O nor B-<type> or I-<type>", "Write the tags as BIO")
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
    answers = () if value is None or row.values.get("is_impossible") else _answers(value)
    if value is not None and not answers and not task.null_answers:
        raise _BadRow("has no answer", "Let questions have none with task.null_answers=true (task=squad_v2)")
    for text, start in answers:
        stands = context[start : start + len(text)]
        if not text or stands != text:
            elsewhere = f", but at {context.find(text)}" if text and text in context else ""
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
    "regress": _text,
    "tag": _tags,
    "span_qa": _question,
    "choose": _choice,
}
