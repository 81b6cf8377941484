"""Weights from a caller, checked once and read in blocks.

Whatever comes in (torch tensor, array, nested list; any float dtype, device and stride) is read as
flat contiguous blocks of float32 or float64 in row-major order, without a copy where the memory
already looks like that. Every value of float8, float16 and bfloat16 is exact in float32, so nothing
is rounded on the way. bfloat16 can also be had as its bits, which the hot loops widen themselves.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trilens.errors import DtypeError, NonFiniteError, ShapeError, UsageError, ValueRangeError

__all__ = ["BLOCK", "FloatArray", "WeightsLike", "WeightsView", "as_floats", "view_weights"]

FloatArray: TypeAlias = NDArray[Any]  # float32 or float64: a union makes NumPy's overloads explode
WeightsLike: TypeAlias = "Tensor | NDArray[Any] | Sequence[Any]"

BLOCK = 1 << 20
"""Weights in one block of a long unit. Sums are taken block by block, so it fixes their order."""

_TORCH_FLOATS = {
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
}
_FLOATS_WANTED = "float8, float16, bfloat16, float32 or float64"


@dataclass(frozen=True, slots=True)
class WeightsView:
    """Checked weights `[*shape]`, readable in flat row-major blocks.

    Attributes:
        name: What errors call them.
        shape: The shape they are understood to have.
        dtype: What `read` gives: float64 for float64 weights, else float32.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    _rows: NDArray[Any] | Tensor  # [rows, cols], any strides; bfloat16 as its bits, uint16

    @property
    def size(self) -> int:
        """How many weights."""
        return math.prod(self.shape)

    @property
    def cols(self) -> int:
        """Length of the last dimension; a row is one index of all the others."""
        return self.shape[-1]

    @property
    def rows(self) -> int:
        """How many rows: the product of all dimensions but the last."""
        return self.size // self.cols

    @property
    def reads_in_place(self) -> bool:
        """Whether `stored` gives the caller's own memory, however much is asked for."""
        rows = self._rows
        in_place = {self.dtype, np.dtype(np.uint16)}
        return isinstance(rows, np.ndarray) and rows.dtype in in_place and rows.flags.c_contiguous

    def read(self, start: int, stop: int) -> FloatArray:
        """The weights start … stop − 1 in row-major order, contiguous, not to be written to."""
        return as_floats(self.stored(start, stop))

    def stored(self, start: int, stop: int) -> NDArray[Any]:
        """As `read`, but bfloat16 as its bits (uint16), which is half as much to read."""
        cols = self.cols
        first, last = start // cols, (stop - 1) // cols
        if first == last:
            return self._native(self._rows[first, start - first * cols : stop - first * cols])
        head, tail = start - first * cols, stop - last * cols
        if head == 0 and tail == cols:
            return self._native(self._rows[first : last + 1])
        if isinstance(self._rows, np.ndarray) and self._rows.flags.c_contiguous:
            return self._native(self._rows.reshape(-1)[start:stop])
        pieces = [self._native(self._rows[first, head:])]
        if last > first + 1:
            pieces.append(self._native(self._rows[first + 1 : last]))
        pieces.append(self._native(self._rows[last, :tail]))
        return np.concatenate(pieces)

    def blocks(self, size: int = BLOCK) -> Iterator[tuple[int, FloatArray]]:
        """(start, block) over all weights."""
        for start in range(0, self.size, size):
            yield start, self.read(start, min(start + size, self.size))

    def sum_error(self) -> NonFiniteError | ValueRangeError:
        """Why a sum over the weights is not finite: NaN or Inf (how many, where), or too large."""
        count, first, value = 0, -1, math.nan
        for start, block in self.blocks():
            bad = np.flatnonzero(~np.isfinite(block))
            if bad.size and first < 0:
                first, value = start + int(bad[0]), float(block[bad[0]])
            count += bad.size
        if count == 0:
            return ValueRangeError(
                f"weights {self.name!r} add up to more than float64 holds: scale them down"
            )
        index = tuple(int(i) for i in np.unravel_index(first, self.shape))
        values = "value" if count == 1 else "values"
        return NonFiniteError(
            f"weights {self.name!r} hold {count} non-finite {values} of {self.size}, the first is "
            f"{value} at index {index}: ternary codes need finite weights; repair the tensor or "
            "keep it dense"
        )

    def _native(self, part: NDArray[Any] | Tensor) -> FloatArray:
        if isinstance(part, Tensor):
            part = part.to(device="cpu", dtype=torch.float32).contiguous().numpy()
        dtype = part.dtype if part.dtype == np.uint16 else self.dtype
        return np.ascontiguousarray(part, dtype=dtype).reshape(-1)


def view_weights(
    weights: WeightsLike, name: str, shape: Sequence[int] | None = None
) -> WeightsView:
    """Check weights and make them readable in blocks.

    Args:
        weights: Tensor, array or nested list. Strides do not matter; only of rank 3 and higher
            with strides that cannot be seen as rows of a matrix is a copy made.
        name: What errors call them.
        shape: The shape of flat weights; None takes theirs.

    Raises:
        DtypeError: no floating-point numbers.
        ShapeError: empty, 0-D, ragged, or a `shape` that does not hold them.
        UsageError: a meta or sparse tensor, or a `shape` that is none.
    """
    array = (
        _readable_tensor(weights, name) if isinstance(weights, Tensor) else _array(weights, name)
    )
    full = _target_shape(tuple(int(n) for n in array.shape), shape, name)
    dtype: np.dtype[Any] = np.dtype(np.float32)
    if isinstance(array, np.ndarray) and array.dtype.itemsize == 8:
        dtype = np.dtype(np.float64)
    return WeightsView(name, full, dtype, array.reshape(math.prod(full[:-1]), full[-1]))


def _readable_tensor(weights: Tensor, name: str) -> NDArray[Any] | Tensor:
    if weights.dtype not in _TORCH_FLOATS:
        raise DtypeError(
            f"weights {name!r} are {weights.dtype}: ternary codes are made from {_FLOATS_WANTED}; "
            "dequantize or convert them first"
        )
    if weights.layout != torch.strided:
        raise UsageError(
            f"weights {name!r} are {weights.layout}: pass a dense tensor (.to_dense())"
        )
    if weights.is_meta:
        raise UsageError(
            f"weights {name!r} lie on the meta device and hold no values: load the checkpoint first"
        )
    plain = weights.detach().resolve_neg()
    if plain.device.type == "cpu" and plain.dtype in {torch.float16, torch.float32, torch.float64}:
        return plain.numpy()
    if plain.device.type == "cpu" and plain.dtype == torch.bfloat16:
        return plain.view(torch.uint16).numpy()
    # NumPy has no float8 and no other devices: `stored` converts block by block.
    # PROMOTE: float64 on another device would lose half its digits in `read`'s float32.
    return plain.cpu().numpy() if plain.dtype == torch.float64 else plain


def _array(weights: NDArray[Any] | Sequence[Any], name: str) -> NDArray[Any]:
    if isinstance(weights, np.ndarray):
        array = weights
    else:
        try:
            array = np.array(weights)
        except (ValueError, TypeError) as error:
            raise ShapeError(
                f"weights {name!r} are no regular nested list of numbers ({error}): every row "
                "must have the same length"
            ) from error
        if array.dtype.kind in "iu":  # whole numbers in a list are numbers, not an integer tensor
            array = array.astype(np.float64)
    if array.dtype.kind != "f" or array.dtype.itemsize > 8:
        raise DtypeError(
            f"weights {name!r} are {array.dtype}: ternary codes are made from {_FLOATS_WANTED}; "
            "dequantize or convert them first"
        )
    return array


def as_floats(stored: NDArray[Any]) -> FloatArray:
    """What `WeightsView.stored` gives as numbers: bfloat16 is the upper half of float32.

    Not `Tensor.to`: its own threads would fight with those of `parallel_map`.

    Shapes: stored [...] → [...]
    """
    if stored.dtype != np.uint16:
        return stored
    bits = stored.astype(np.uint32)
    return np.left_shift(bits, 16, out=bits).view(np.float32)


def _target_shape(
    given: tuple[int, ...], wanted: Sequence[int] | None, name: str
) -> tuple[int, ...]:
    if not given:
        raise ShapeError(f"weights {name!r} are 0-D: pass at least one dimension, as shape (1,)")
    if math.prod(given) == 0:
        raise ShapeError(f"weights {name!r} are empty (shape {given}): there is nothing to code")
    if wanted is None:
        return given
    try:
        target = tuple(operator.index(n) for n in wanted)
    except TypeError as error:
        raise UsageError(
            f"shape {wanted!r} of weights {name!r} is no sequence of whole numbers"
        ) from error
    if target == given:
        return target
    if len(given) > 1:
        raise ShapeError(
            f"weights {name!r} have shape {given}, not the shape {target} asked for: only flat "
            "weights are given another shape; leave `shape` out"
        )
    if not target or min(target) < 1 or math.prod(target) != given[0]:
        raise ShapeError(
            f"shape {target} of weights {name!r} does not hold {given[0]} weights: the product of "
            "its sizes, each 1 or more, must be that number"
        )
    return target
