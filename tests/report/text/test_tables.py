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
        assert all(word in text for word in heading.split())
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


def test_headings_break_before_columns_move() -> None:
    columns = ["part", "relative error", "newly saturated"]
    rows = [["block 0", "0.25", "18"]]
    whole, broken = drawn(42, columns, rows), drawn(30, columns, rows)
    assert "relative error" in whole
    assert "relative error" not in broken and broken.count("part") == 1
    assert max(map(len, broken.splitlines())) <= 30


def test_a_name_stays_whole_where_a_number_fits_beside_it() -> None:
    assert ROWS[0][0] in drawn(31)
    assert ROWS[0][0] not in drawn(30)


def test_a_row_of_dashes_is_left_out_below() -> None:
    rows = [["a", "1" * 20, "–"], ["b", "2" * 20, "why" * 5]]
    first, second = drawn(30, ["key", "number", "reason"], rows).split("\n\n")
    assert "a" in first.splitlines()[2]
    assert second.count("\n") == 3 and "–" not in second


def test_a_wide_terminal_has_one_table() -> None:
    assert drawn(200).count("name") == 1
    assert "\n\n" not in drawn(200)
