"""Tables on the terminal: each column in its own form, nothing taken for markup, nothing cut off."""

from collections.abc import Sequence
from io import StringIO
from typing import Any

import pytest
from rich.console import Console

from toolkit.run.table import grouped, table
from toolkit.train.loop import clock, held_out, line


def lines(columns: dict[str, str], rows: Sequence[Sequence[Any]], width: int = 80, **options: Any) -> list[str]:
    console = Console(record=True, width=width, file=StringIO())
    console.print(table(columns, rows, **options))
    return [text.rstrip() for text in console.export_text().splitlines() if text.strip()]


def test_numbers_stand_to_the_right_in_their_columns_form() -> None:
    head, rule, first, second = lines({"name": "", "GiB": ",.1f", "MFU": ".0%"}, [("a", 1234.56, 0.5), ("bb", 2, None)])
    assert (head, first, second) == (" name      GiB  MFU", " a     1,234.6  50%", " bb        2.0")
    assert set(rule.strip()) == {"─"}


def test_what_is_unknown_is_said_and_a_text_in_a_number_column_is_itself() -> None:
    shown = lines({"name": "", "GiB": ",.1f"}, [("a", None), ("b", "~3")], missing="unknown")
    assert [text.split() for text in shown[2:]] == [["a", "unknown"], ["b", "~3"]]


def test_brackets_are_no_markup_and_long_words_are_folded_not_cut() -> None:
    assert "[bold]x[/]" in lines({"a": ""}, [("[bold]x[/]",)])[2]
    folded = lines({"a": "", "b": "d"}, [("x" * 50, 7)], width=30)
    assert "…" not in "".join(folded) and sum(text.count("x") for text in folded) == 50


def test_a_row_without_its_cells_is_a_mistake() -> None:
    with pytest.raises(ValueError, match="zip"):
        table({"a": "", "b": ""}, [("one",)])


def test_groups_are_apart() -> None:
    assert list(grouped([("a", 1), ("a", 2), ("b", 3)])) == [("a", 1), ("a", 2), (), ("b", 3)]


def test_the_lines_of_a_training() -> None:
    record = {"step": 3, "loss": 1.5, "mlm_loss": 1.0, "nsp_loss": 0.5, "lr": 1e-4}
    assert line(record, 9) == "step 3/9  loss 1.500  mlm 1.000  nsp 0.500  lr 1.00e-04"
    rates = {"samples_per_second": 8.0, "tokens_per_second": 1024.0, "mfu": 0.41, "eta_seconds": 3723.4}
    assert line(record | rates, 9).endswith("  1,024 tokens/s  MFU 41.0%  ETA 1:02:03")
    assert clock(123) == "2:03"
    assert held_out(3, {"eval_loss": 1.25, "train_mlm_loss": 2}) == "step 3  held out: loss 1.250  train mlm loss 2.000"
