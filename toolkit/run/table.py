"""How a table stands on the terminal: words to the left, numbers to the right, each column in its own form.

console.print(table({"machine": "", "GiB": ",.1f", "MFU": ".0%"}, [("h100", 80.0, 0.41), ("this", None, None)]))
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.box import SIMPLE
from rich.table import Table
from rich.text import Text

MANY = 8  # columns that stand close, for a terminal of 80


def table(
    columns: Mapping[str, str] | Sequence[tuple[str, str]],
    rows: Iterable[Sequence[Any]],
    title: str = "",
    *,
    missing: str = "",
    heads: bool = True,
) -> Table:
    """``columns``: each heading and how its values are written, as in ``format(value, ",.2f")``; "" is for words.

    What is None is written as ``missing``, what is a string already as it is. A row without cells draws a line.
    """
    pairs = list(columns.items() if isinstance(columns, Mapping) else columns)
    shown = Table(title=title or None, title_justify="left", box=SIMPLE, show_header=heads, pad_edge=False)
    shown.padding = (0, 0 if len(pairs) >= MANY else 1, 0, 0)
    for name, form in pairs:
        shown.add_column(Text(name), justify="right" if form else "left", no_wrap=bool(form), overflow="fold")
    for row in rows:
        if row:
            shown.add_row(*(_cell(value, form, missing) for value, (_, form) in zip(row, pairs, strict=True)))
        else:
            shown.add_section()
    return shown


def grouped(rows: Iterable[Sequence[Any]]) -> Iterable[Sequence[Any]]:
    """``rows`` with a line where the first cell changes."""
    before: Any = None
    for row in rows:
        if before not in (None, row[0]):
            yield ()
        before = row[0]
        yield row


def _cell(value: Any, form: str, missing: str) -> Text:
    if isinstance(value, Text):
        return value
    return Text(missing if value is None else value if isinstance(value, str) else format(value, form))
