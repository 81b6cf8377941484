"""What one scale covers: the tensor, a row, or a group of consecutive weights in a row.

A row is one index of all dimensions but the last. Groups lie along the last dimension; where their
size does not divide it, the last group of each row is shorter. Units are numbered row by row.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

import numpy as np
from numpy.typing import NDArray

from trilens.errors import ShapeError, UsageError, ValueRangeError
from trilens.numbers import whole_number
from trilens.ternary.weights_view import BLOCK

__all__ = ["DEFAULT_GROUP_SIZE", "Per", "Span", "Units", "resolve_units"]

Per: TypeAlias = Literal["tensor", "row", "group"]

DEFAULT_GROUP_SIZE = 128

_SPAN = 1 << 18  # weights of short units handled together: 1 MB of float32 stays in the cache


@dataclass(frozen=True, slots=True)
class Span:
    """Consecutive units that are coded together: whole rows, or whole groups of one row.

    Attributes:
        start: First weight, in row-major order.
        stop: One past the last weight.
        n_rows: Rows, or 1 for a part of a row; each is cut into units from its own start.
        first_unit: Number of the first unit.
    """

    start: int
    stop: int
    n_rows: int
    first_unit: int


@dataclass(frozen=True, slots=True)
class Units:
    """How weights `[rows, cols]` are cut into units.

    Attributes:
        rows: Rows of the weights.
        cols: Weights in a row.
        per: What one unit is.
        group_size: Weights in a group; None unless `per` is "group".
    """

    rows: int
    cols: int
    per: Per
    group_size: int | None

    @property
    def length(self) -> int:
        """Weights in a unit (but for the last group of a row, see `last_length`)."""
        if self.per == "tensor":
            return self.rows * self.cols
        return self.cols if self.group_size is None else min(self.group_size, self.cols)

    @property
    def last_length(self) -> int:
        """Weights in the last unit of a row: shorter where the group size does not divide it."""
        return self.cols % self.length or self.length if self.per == "group" else self.length

    @property
    def per_row(self) -> int:
        """Units in a row (of the tensor, for per tensor)."""
        return -(-self.cols // self.length) if self.per == "group" else 1

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one number per unit: (), (rows,) or (rows, groups)."""
        if self.per == "tensor":
            return ()
        return (self.rows,) if self.per == "row" else (self.rows, self.per_row)

    @property
    def count(self) -> int:
        """How many units."""
        return 1 if self.per == "tensor" else self.rows * self.per_row

    @property
    def are_long(self) -> bool:
        """Whether a unit is too long to be held at once, and is read in blocks."""
        return self.length > BLOCK

    def spans(self) -> Iterator[Span]:
        """The parts that are coded one by one: a long unit each, or several short units."""
        if self.per == "tensor":
            yield Span(0, self.rows * self.cols, 1, 0)
        elif self.cols <= _SPAN:
            n = _SPAN // self.cols
            for row in range(0, self.rows, n):
                last = min(row + n, self.rows)
                yield Span(row * self.cols, last * self.cols, last - row, row * self.per_row)
        else:
            step = max(1, _SPAN // self.length)
            for row in range(self.rows):
                for unit in range(0, self.per_row, step):
                    start = unit * self.length
                    stop = min(start + step * self.length, self.cols)
                    yield Span(
                        row * self.cols + start,
                        row * self.cols + stop,
                        1,
                        row * self.per_row + unit,
                    )

    def blocks(self) -> Iterator[Span]:
        """The spans, long ones cut into blocks, each of which has the unit's number."""
        for span in self.spans():
            if span.stop - span.start <= BLOCK:
                yield span
                continue
            for start in range(span.start, span.stop, BLOCK):
                yield Span(start, min(start + BLOCK, span.stop), 1, span.first_unit)

    def spread(self, values: NDArray[np.float32], span: Span) -> NDArray[np.float32]:
        """The values of a block's units, for every weight in it.

        Shapes: values [units] → [n_rows, weights of a row], or [n_rows, 1] where that is the same
        """
        width = (span.stop - span.start) // span.n_rows
        per_row = 1 if width <= self.length else -(-width // self.length)
        of_span = values[span.first_unit : span.first_unit + span.n_rows * per_row]
        table = of_span.reshape(span.n_rows, per_row)
        return table if per_row == 1 else table.repeat(self.length, axis=1)[:, :width]

    def per_block(self, values: NDArray[np.float32], block: int) -> NDArray[np.float32]:
        """The units' values for every block of `block` weights along the rows.

        Shapes: values [units] → [rows, cols / block]

        Raises:
            ShapeError: blocks that do not fit the rows, or that reach over two units.
        """
        if self.cols % block:
            raise ShapeError(
                f"rows of {self.cols} weights are no whole number of blocks of {block}"
            )
        if self.per == "group" and self.per_row > 1 and self.length % block:
            raise ShapeError(
                f"groups of {self.length} weights do not fit blocks of {block}, which store one "
                f"scale each: take a group size that is a multiple of {block}"
            )
        n_blocks = self.cols // block
        if self.per == "group" and self.per_row > 1:
            groups = values.reshape(self.rows, self.per_row)
            return groups.repeat(self.length // block, axis=1)[:, :n_blocks]
        return np.broadcast_to(values.reshape(-1, 1), (self.rows, n_blocks))


def resolve_units(
    rows: int, cols: int, per: Per | None = None, group_size: int | None = None
) -> Units:
    """Read the options `per` and `group_size`.

    Without `per`, a `group_size` means groups and nothing means the whole tensor. Groups without
    a size have 128 weights.

    Raises:
        ValueRangeError: a group size below 1.
        UsageError: an unknown `per`, a group size that is no whole number, or one given together
            with something else than groups.
    """
    if per is not None and per not in get_args(Per):
        raise UsageError(f"per={per!r} is unknown: one scale per 'tensor', 'row' or 'group'")
    if group_size is None:
        return Units(rows, cols, per or "tensor", DEFAULT_GROUP_SIZE if per == "group" else None)
    size = whole_number(group_size, "group size")
    if size < 1:
        raise ValueRangeError(f"group size {size} is out of range: pass 1 or more")
    if per not in {None, "group"}:
        raise UsageError(
            f"group size {group_size} has no meaning with one scale per {per}: leave one out"
        )
    return Units(rows, cols, "group", size)
