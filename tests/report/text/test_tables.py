"""Tables on narrow terminals: every column, every digit."""

from __future__ import annotations

from io import StringIO

from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from trilens.report.text.tables import Column, print_table

COLUMNS = [Column("name", left=True, fold=10), *(f"number {i}" for i in range(8))]
ROWS = [[f"model.layers.{i}.weight", *(f"{i + j / 7:.5f}" for j in range(8))] for i in range(3)]


def drawn(width: int, columns=COLUMNS, rows=ROWS, **options) -> str:
    out = StringIO()
    print_table(Console(file=out, width=width), columns, rows, **options)
    return out.getvalue()


@given(st.integers(24, 200))
def test_nothing_is_lost_and_nothing_sticks_out(width: int) -> None:
    text = drawn(width)
    assert max(map(len, text.splitlines())) <= width
    for heading in COLUMNS[1:]:
        assert heading in text
    for cell in (cell for row in ROWS for cell in row[1:]):
        assert cell in text


def test_each_table_begins_with_the_keys() -> None:
    text = drawn(60)
    assert text.count("name") == len(text.split("\n\n")) > 1
    assert text.count("model.layers.0.w") == text.count("name")


def test_rows_without_a_word_are_left_out_below() -> None:
    rows = [["a", "1" * 20, ""], ["b", "2" * 20, "why" * 5]]
    first, second = drawn(30, ["key", "number", "reason"], rows).split("\n\n")
    assert "a" in first.splitlines()[2]
    assert second.count("\n") == 3 and "why" in second


def test_a_wide_terminal_has_one_table() -> None:
    assert drawn(200).count("name") == 1
    assert "\n\n" not in drawn(200)
