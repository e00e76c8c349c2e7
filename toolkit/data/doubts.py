"""What the labels of the splits make wrong, which is refused, and what they make doubtful, said when a run starts.

seen = {"train": counted(rows, labels)}    # Counter({'good': 102, 'bad': 101})
refuse(seen["train"], len(rows), config)
warnings(seen, counts, labels, "classify")    # ["train: labels 'Good' (3 rows), 'good' (9 rows) differ …"]
"""

import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from itertools import groupby
from typing import Any

from toolkit.config.schema import RunConfig, Task
from toolkit.data.examples import Labels, Tagged, Text
from toolkit.data.tables import number
from toolkit.errors import DataError, first_of

FEW = 20  # classes that may be more than half as many as the rows
EMPTY = ("nan", "null", "none", "n/a", "<na>", "-", "?")  # how programs and people write an empty cell


def counted(rows: list[Any], labels: Labels) -> Counter[str]:
    """How many rows have each class, score, one of several labels, or type of tag; empty for other kinds."""
    found: Counter[str] = Counter()
    for row in rows:
        if isinstance(row, Tagged):
            found.update({labels[tag][2:] or "O" for tag in row.tags or ()})
        elif isinstance(row, Text) and isinstance(row.label, tuple):
            found.update(name for name, has in zip(labels, row.label, strict=True) if has)
        elif isinstance(row, Text) and row.label is not None:
            found[labels[row.label] if isinstance(row.label, int) else str(row.label)] += 1
    return found


def unlabelled(rows: list[Any], task: Task) -> int:
    """How many rows of a test split lack their labels. No answer, and none of several labels, is one too where other
    rows have some."""
    labels = [getattr(row, "label", getattr(row, "tags", getattr(row, "answers", ()) or None)) for row in rows]
    if task.kind in ("multi_label", "span_qa") and not any(label and any(label) for label in labels):
        return len(rows)
    return 0 if task.kind == "span_qa" and task.null_answers else labels.count(None)


def refuse(seen: Counter[str], rows: int, config: RunConfig) -> None:
    """Raises DataError where the training rows have nothing to tell apart, or no classes."""
    data, kind = config.data, config.task.kind
    where = f"data.train={data.train}"
    if kind == "multi_label" and not seen:
        raise DataError(f"{where}: none of its {rows:,} rows has a label. Correct data.columns.label or .labels.")
    if [*seen] == ["O"] or (kind != "tag" and set(seen.values()) == {rows}):  # a list of flags may look like names
        raise DataError(
            f"{where}: all {rows:,} rows have the same label, {_listed([*seen])}: there is nothing to tell apart. Add "
            "rows of another, or correct data.columns."
        )
    if kind == "classify" and not data.labels and len(seen) > max(FEW, rows / 2):
        raise DataError(
            f"{where}: data.columns.label={data.columns.label} holds {len(seen):,} different labels in {rows:,} rows, "
            f"such as {_listed(sorted(seen))}: ids, texts or scores? Name the column of classes, "
            "learn scores by task=regress, or name every class in data.labels=[…]."
        )


def warnings(
    seen: Mapping[str, Counter[str]], counts: Mapping[str, Mapping[str, int]], labels: Labels, kind: str
) -> Iterator[str]:
    """A line for each thing that makes what is learned, or its score, doubtful."""
    train = seen["train"]
    if labels and train:
        yield from _names(train)
        types = dict.fromkeys(name[2:] for name in labels if name != "O")
        yield from _untaught(seen, types if kind == "tag" else labels)
    for split, found in seen.items():
        rows, missing = counts[split]["rows"], counts[split]["unlabelled"]
        if train and split != "train" and missing < rows and len(found) < 2 and found.total() in (0, rows):
            yield (
                f"{split}: all {rows:,} rows have the same label, {_listed([*found]) or 'none'}: its metrics say "
                "little, and correlations are undefined and count as 0. Hold out rows of others."
            )
        if 0 < missing < rows:
            yield (
                f"{split}: {missing:,} of {rows:,} rows have no label, so no metrics are computed on it. Label them, "
                "or leave them out."
            )


def _names(train: Counter[str]) -> Iterator[str]:
    groups = [list(group) for _, group in groupby(sorted(sorted(train), key=_plain), key=_plain)]
    if alike := [names for names in groups if len(names) > 1]:
        yield (
            f"train: labels {_listed(alike[0], train)} differ only in case, white space or notation, and are learned "
            f"as labels of their own{f', as are {len(alike) - 1:,} others' if alike[1:] else ''}. Write them alike "
            "if they are one."
        )
    # as SNLI has -1 where nobody agrees; -1, 0 and 1 may be bad, neutral and good
    if empty := [name for name in train if name.lower() in EMPTY or (name == "-1" and len(train) > 3)]:
        yield f"train: {_listed(empty, train)} is learned as a label. Leave these rows out if it is an empty cell."
    numbers = [number(name) for name in train]
    if None not in numbers and any(n and n % 1 for n in numbers):
        yield (
            f"train: labels are fractions ({_listed(sorted(train), train)}), learned as classes without an order. "
            "Scores are learned by task=regress."
        )


def _plain(name: str) -> str:
    """The same for names that a person would read as one."""
    if (value := number(name)) is not None:
        return str(value)
    visible = (c for c in unicodedata.normalize("NFKC", name).casefold() if unicodedata.category(c) != "Cf")
    return " ".join("".join(visible).split())


def _untaught(seen: Mapping[str, Counter[str]], names: Iterable[str]) -> Iterator[str]:
    train = seen["train"]
    if rare := [name for name in names if train[name] == 1]:
        yield (
            f"train: {len(rare):,} of {len(train):,} labels have one row ({_listed(rare)}), too few to be learned. Add "
            "rows, or merge labels."
        )
    if unseen := [name for name in names if name not in train]:
        held = ", ".join(f"{n:,} in {s}" for s, found in seen.items() if (n := sum(found[name] for name in unseen)))
        yield (
            f"train: {len(unseen):,} of the labels have no row ({_listed(unseen)}; {held or 'none held out either'}), "
            "so nothing is learned of them. Add rows, or leave them out of data.labels; where the weights name them, "
            "model.new_head=true draws a head without."
        )


def _listed(names: list[str], counts: Counter[str] | None = None) -> str:
    return first_of([f"{name!r:.40}" + (f" ({counts[name]:,} rows)" if counts else "") for name in names], 5)
