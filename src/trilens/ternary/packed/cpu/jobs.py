"""What a compiled loop over packed codes is told, and what several of them do. Needs numba.

A loop is called with the address of a job: 64-bit numbers in the order of `JOB`, some of them
addresses of memory that the caller holds. Several threads may run the same job at once: each takes
the next stripe of rows until none is left. The loops never call Python and hold no lock.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from trilens.ternary.packed.cpu import vectors as v

__all__ = [
    "BATCH",
    "CODES",
    "COLS",
    "FIRST_ROW",
    "GROUPS",
    "GROUP_WORDS",
    "INPUTS",
    "INPUT_BYTES",
    "JOB",
    "NEXT",
    "OFFSET",
    "OUT",
    "OUT_BYTES",
    "OUT_KIND",
    "OUT_ROUNDING",
    "ROUNDING",
    "ROWS",
    "ROW_BYTES",
    "SCALE",
    "SCALE_STEP",
    "SECOND_CODES",
    "SECOND_SCALE",
    "WORDS",
    "X",
    "last_word",
    "rounded",
    "value_at",
]

JOB = (
    "next",  # the stripe that the next thread takes; starts at 0
    "rows",  # of the matrix; `unpack`: one past the last row to unpack
    "first_row",  # `unpack`: the first row to unpack
    "row_bytes",  # of the codes
    "words",  # 16 columns each, in a row
    "group_words",  # in a group; more than `words` where a row has one scale
    "groups",  # of a row
    "scale_step",  # numbers from row to row of the scales; 0 for one scale for all
    "rounding",  # of the scales: 0 none, 1 bfloat16, 2 float16
    "codes",  # address
    "scale",  # address of float32
    "second_codes",  # address or 0
    "second_scale",  # address or 0
    "offset",  # `unpack`: address of float32, or 0
    "batch",  # inputs
    "inputs",  # address of what `prepare` made
    "input_bytes",  # of one input there
    "x",  # `prepare`: address of float32 [batch, cols]
    "cols",  # `prepare`: in a row of x
    "out",  # address: float32 [batch, rows]; `unpack`: [rows, out_bytes]
    "out_bytes",  # `unpack`: from row to row
    "out_rounding",  # `unpack`: of the sums, as `rounding`
    "out_kind",  # `unpack`: what is stored: 0 float32, 1 bfloat16, 2 float16
)
(
    NEXT,
    ROWS,
    FIRST_ROW,
    ROW_BYTES,
    WORDS,
    GROUP_WORDS,
    GROUPS,
    SCALE_STEP,
    ROUNDING,
    CODES,
    SCALE,
    SECOND_CODES,
    SECOND_SCALE,
    OFFSET,
    BATCH,
    INPUTS,
    INPUT_BYTES,
    X,
    COLS,
    OUT,
    OUT_BYTES,
    OUT_ROUNDING,
    OUT_KIND,
) = range(len(JOB))


@njit(inline="always")
def rounded(values: Any, rounding: Any) -> Any:
    """Values rounded as a job's field says: 0 not at all, 1 to bfloat16, 2 to float16."""
    if rounding == 1:
        values = v.rounded_bfloat16(values)
    elif rounding == 2:
        values = v.rounded_float16(values)
    return values


@njit(inline="always")
def last_word(address: Any, n_bytes: Any) -> Any:
    """A word of which only the first bytes may be read."""
    word = np.int64(0)
    for i in range(n_bytes):
        word |= v.read_byte(address + i) << (8 * i)
    return word


@njit(inline="always")
def value_at(values: Any, group: Any) -> Any:
    """A group's float32, sixteen times."""
    return v.splat(v.read_float(values + 4 * group))
