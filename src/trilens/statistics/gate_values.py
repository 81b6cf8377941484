"""Gate values as a caller may hand them over, read as one matrix [steps, units]."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trilens.errors import DtypeError, NonFiniteError, ShapeError, ValueRangeError
from trilens.statistics.arrays import real_array

__all__ = ["GateValues", "read_gate_values", "refuse_bad_values"]

GateValues = Tensor | NDArray[Any] | Sequence[Any]
"""Gate values [steps, units]: tensor, array, nested lists, or a list of one vector per step."""

_LARGEST = 1e100  # far beyond any gate, and its products with step counts are still finite


def read_gate_values(values: GateValues) -> NDArray[Any]:
    """The values as one matrix, by reference where their dtype allows.

    Shapes:
        returns float64 or float32 [steps, units]; half precision becomes float32.

    Raises:
        ShapeError: no units, steps of different length, or not two axes.
        DtypeError: values that are not real numbers.
    """
    if not isinstance(values, Tensor | np.ndarray):
        values = _stacked(values)
    array = _as_float(values)
    if array.ndim != 2:
        raise ShapeError(
            f"gate values have shape {list(array.shape)}: pass [steps, units], one vector per step"
        )
    if not array.shape[1]:
        raise ShapeError(f"gate values have shape {list(array.shape)}: a gate has 1 unit or more")
    return array


def _stacked(steps: Sequence[Any]) -> NDArray[Any]:
    """A list of one vector per step as one array."""
    if isinstance(steps, str | bytes) or not isinstance(steps, Sequence):
        raise DtypeError(
            f"gate values are a {type(steps).__name__}: pass a tensor, an array or a list of one "
            "vector per step"
        )
    if not steps:
        raise ShapeError("gate values have no steps: pass one vector per step, at least one")
    rows = [_as_float(step) for step in steps]
    for index, row in enumerate(rows):
        if row.ndim != 1:
            raise ShapeError(
                f"gate values of step {index} have shape {list(row.shape)}: each step is a vector "
                "[units]"
            )
        if row.shape != rows[0].shape:
            raise ShapeError(
                f"gate values of step {index} have {row.size} units, step 0 has {rows[0].size}: "
                "all steps have the same units"
            )
    return np.stack(rows)


def _as_float(values: object) -> NDArray[Any]:
    if isinstance(values, Tensor):
        tensor = values.detach().cpu()
        if tensor.dtype in (torch.bfloat16, torch.float16):
            tensor = tensor.float()
        # A conjugate or negative view has to be resolved before NumPy can see it.
        values = tensor.resolve_conj().resolve_neg().numpy()
    array = real_array(values, "gate values are", "they have to be")
    if array.dtype == np.float16:
        return array.astype(np.float32)
    return array if array.dtype in (np.float64, np.float32) else array.astype(np.float64)


def refuse_bad_values(chunk: NDArray[np.float64], first_step: int) -> None:
    """Refuse values that cannot be averaged, naming the first one.

    Shapes:
        chunk [steps, units], of which row 0 is step `first_step`.

    Raises:
        NonFiniteError: NaN or Inf.
        ValueRangeError: a value beyond ±1e100.
    """
    fine = np.abs(chunk) <= _LARGEST  # NaN fails every comparison
    if fine.all():
        return
    step, unit = (int(index) for index in np.argwhere(~fine)[0])
    value = float(chunk[step, unit])
    where = f"gate value of step {first_step + step}, unit {unit} is {value}"
    if math.isfinite(value):
        raise ValueRangeError(f"{where}: out of range, allowed is ±{_LARGEST:g}")
    raise NonFiniteError(f"{where}: NaN and Inf cannot be averaged; find where they arise")
