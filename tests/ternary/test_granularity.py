"""Units cover the weights once, also beyond 2³¹ of them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trilens.ternary.granularity import Units, resolve_units
from trilens.ternary.weights_view import BLOCK

SIZES = st.one_of(st.integers(1, 600), st.integers(200_000, 3_000_000))


@settings(max_examples=200, deadline=None)
@given(
    st.integers(1, 40),
    SIZES,
    st.sampled_from([("tensor", None), ("row", None), ("group", 1), ("group", 7), ("group", 128)])
    | st.tuples(st.just("group"), st.integers(200_000, 2_000_000)),
)
def test_spans_and_blocks_tile_the_weights(rows: int, cols: int, kind: tuple) -> None:
    per, group = kind
    if rows * -(-cols // (group or cols)) > 30_000:
        rows, cols = 1, min(cols, 60_000)
    units = Units(rows, cols, per, group)
    for parts in (list(units.spans()), list(units.blocks())):
        position = 0
        for part in parts:
            assert part.start == position
            position = part.stop
            assert part.stop > part.start
            assert (part.stop - part.start) % part.n_rows == 0
        assert position == rows * cols
    assert max(block.stop - block.start for block in units.blocks()) <= BLOCK
    for block in units.blocks():
        width = (block.stop - block.start) // block.n_rows
        first = block.start % cols
        row = block.start // cols
        expected = {"tensor": 0, "row": row, "group": row * units.per_row}[per]
        expected += first // group if per == "group" else 0
        assert block.first_unit == expected
        assert per == "tensor" or first + width <= cols


@settings(max_examples=100, deadline=None)
@given(
    st.integers(1, 6),
    st.integers(1, 50),
    st.sampled_from(["tensor", "row", "group"]),
    st.integers(1, 60),
)
def test_spread_gives_every_weight_its_units_value(
    rows: int, cols: int, per: str, size: int
) -> None:
    units = resolve_units(rows, cols, per, size if per == "group" else None)
    values = np.arange(units.count, dtype=np.float32)
    for block in units.blocks():
        width = (block.stop - block.start) // block.n_rows
        table = np.broadcast_to(units.spread(values, block), (block.n_rows, width))
        for position, value in enumerate(table.reshape(-1), start=block.start):
            row, col = divmod(position, cols)
            groups = -(-cols // size)
            assert value == {"tensor": 0, "row": row, "group": row * groups + col // size}[per]


def test_shapes() -> None:
    assert resolve_units(4, 300).shape == ()
    assert resolve_units(4, 300, "row").shape == (4,)
    groups = resolve_units(4, 300, None, 128)
    assert (groups.shape, groups.count, groups.length, groups.last_length) == ((4, 3), 12, 128, 44)


@pytest.mark.parametrize(
    ("per", "group"), [("tensor", None), ("row", None), ("group", 1 << 20), ("group", 100_000)]
)
def test_more_than_2_to_the_31_weights(per: str, group: int | None) -> None:
    rows, cols = 70_001, 100_000
    units = Units(rows, cols, per, group)
    last = None
    for block in units.blocks():
        assert last is None or block.start == last.stop
        last = block
    assert last.stop == rows * cols > 1 << 32
    assert last.first_unit == (0 if per == "tensor" else rows - 1)
