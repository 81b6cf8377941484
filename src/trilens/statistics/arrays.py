"""Numbers as a caller may hand them over, read as an array."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from trilens.errors import DtypeError, ShapeError

__all__ = ["real_array"]


def real_array(values: object, subject: str, demand: str) -> NDArray[Any]:
    """Real numbers as an array, by reference where they are one.

    Args:
        values: what the caller gave.
        subject: how an error begins: "gate values are".
        demand: how it goes on: "they have to be".

    Raises:
        ShapeError: nested lists of different lengths.
        DtypeError: not real numbers.
    """
    try:
        array = np.asarray(values)
    except ValueError as error:
        raise ShapeError(f"{subject} ragged: {error}") from error
    if array.dtype.kind not in "biuf":
        raise DtypeError(f"{subject} {array.dtype}: {demand} real numbers")
    return array
