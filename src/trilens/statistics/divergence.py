"""How far two things are apart: divergences of distributions, angles, relative errors.

Pure functions of tensors or arrays of any real dtype, computed in float64 on the device of the
first argument, block by block. Units and bounds are in the names and docstrings. Equal inputs give
exactly 0 (and a cosine of exactly 1).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from trilens.errors import DtypeError, NonFiniteError, ShapeError, ValueRangeError
from trilens.statistics.arrays import real_array

__all__ = [
    "cosine",
    "js_nats",
    "js_nats_of_rows",
    "kl_nats",
    "max_relative",
    "relative_error",
    "relative_errors",
]

Operand = Tensor | ArrayLike

_BLOCK_ELEMENTS = 1 << 22  # 32 MB of float64 per operand and step, whatever the size of the inputs
_CACHED_ELEMENTS = 1 << 15  # 256 KB: what several steps read again stays in the processor's cache
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_SUM_TOLERANCE = 1e-2  # a row of bfloat16 probabilities may sum to 1 ± 0.004


def kl_nats(p_logits: Operand, q_logits: Operand) -> NDArray[np.float64]:
    """KL(p ‖ q) per row, of the distributions that the logits stand for; p is the model before.

    An entry that p excludes (logit −Inf) counts nothing; one that only q excludes gives Inf.
    A negative rounding error is cut off at 0.

    Shapes:
        p_logits, q_logits [..., vocab]; returns [...].

    Args:
        p_logits: Logits of the reference, "before".
        q_logits: Logits that are compared to it, "after".

    Returns:
        The divergence in nats, in [0, Inf].

    Raises:
        ShapeError: shapes that differ, or an empty axis.
        DtypeError: something else than real numbers.
        NonFiniteError: NaN, +Inf, or a row of −Inf alone, naming the row.
    """
    return _per_row(p_logits, q_logits, _kl_block, "vocab")


def js_nats(p: Operand, q: Operand) -> NDArray[np.float64]:
    """Jensen–Shannon divergence per row, of probabilities.

    Rows are divided by their sum, which may be off by the rounding of a narrow dtype. A row that
    leaves mass out, as an attention row with a sink does, is refused: divide it by its sum first
    if the remaining shares are meant.

    Shapes:
        p, q [..., n]; returns [...].

    Returns:
        The divergence in nats, in [0, ln 2].

    Raises:
        ShapeError: shapes that differ, or an empty axis.
        DtypeError: something else than real numbers.
        NonFiniteError: NaN or Inf, naming the row.
        ValueRangeError: a negative entry, or a row whose sum is not 1 ± 0.01.
    """
    return _per_row(p, q, _js_block, "n")


def js_nats_of_rows(p: Tensor, q: Tensor) -> Tensor:
    """Jensen–Shannon divergence of each pair of rows, without cancellation.

    With m = (p + q)/2 and d = (p − q)/(p + q) it is ½ Σ m [(1 + d) ln(1 + d) + (1 − d) ln(1 − d)]:
    no difference of logarithms, so that a divergence of 1e-9 still has digits in float32.

    Nothing is checked, and the dtype stays: for blocks that fit in a cache. `js_nats` is exact
    where rows are disjoint.

    Shapes:
        p, q [..., n], rows of sum 1 or less; returns [...], in [0, ln 2].
    """
    both = p + q
    # 1 − |d| of at least half an ulp keeps 0 · ln 0 away; where both are 0, d is 0.
    gap = (p - q).div_(both.clamp(min=torch.finfo(p.dtype).tiny))
    gap.clamp_(-1 + torch.finfo(p.dtype).eps / 2, 1 - torch.finfo(p.dtype).eps / 2)
    up = torch.log1p(gap).mul_(1 + gap)
    down = torch.log1p(-gap).mul_(1 - gap)
    return up.add_(down).mul_(both).sum(-1).div_(4).clamp_(0, math.log(2.0))


def cosine(a: Operand, b: Operand) -> NDArray[np.float64]:
    """Cosine of the angle between two vectors, per row.

    Two zero vectors are equal: 1. A zero vector and another: 0.

    Shapes:
        a, b [..., n]; returns [...].

    Returns:
        The cosine, in [−1, 1].

    Raises:
        ShapeError: shapes that differ, or an empty axis.
        DtypeError: something else than real numbers.
        NonFiniteError: NaN or Inf, naming the row.
    """
    return _per_row(a, b, _cosine_block, "n")


def relative_errors(a: Operand, b: Operand) -> NDArray[np.float64]:
    """‖a − b‖² / ‖a‖² per row; see `relative_error`, and `cosine` for shapes and errors."""
    return _per_row(a, b, _relative_block, "n")


def relative_error(a: Operand, b: Operand) -> float:
    """‖a − b‖² / ‖a‖² over all elements: squared, relative to the original `a`.

    Where a is all zero: 0 if b is too, else Inf.

    Shapes:
        a, b of the same shape.

    Returns:
        The error, in [0, Inf].

    Raises:
        ShapeError: shapes that differ, or no elements.
        DtypeError: something else than real numbers.
        NonFiniteError: NaN or Inf.
    """
    x, y = _pair(a, b)
    # Squares overflow above 1e154 and vanish below 1e-162: a power of two scales both exactly.
    scale = _power_of_two(max(_largest(x), _largest(y)))
    error = norm = 0.0
    for left, right in _flat_blocks(x, y):
        # PROMOTE: a sum over 2e8 squares drifts in float32.
        error += float(((left - right) * scale).square_().sum())
        norm += float((left * scale).square_().sum())
    return _ratio(error, norm)


def max_relative(a: Operand, b: Operand) -> float:
    """max|a − b| / max|a| over all elements; all else as in `relative_error`."""
    x, y = _pair(a, b)
    largest = _largest(x)
    scale = _power_of_two(max(largest, _largest(y)))
    error = max(
        float((left * scale - right * scale).abs().max()) for left, right in _flat_blocks(x, y)
    )
    return _ratio(error, largest * scale)


def _kl_block(p_logits: Tensor, q_logits: Tensor, first_row: int) -> Tensor:
    for side, logits in (("p_logits", p_logits), ("q_logits", q_logits)):
        # The largest logit is NaN, Inf or −Inf exactly where the row is no distribution.
        bad = ~logits.amax(-1).isfinite()
        _refuse(bad, side, first_row, "holds NaN or +Inf, or −Inf alone: find where it arises")
    log_p, log_q = _log_softmax(p_logits), _log_softmax(q_logits)
    terms = log_p.exp() * (log_p - log_q)
    # What q alone excludes costs Inf, also where p is so small that it rounds to 0 and 0 · Inf is
    # NaN; what p excludes counts 0 · ln 0 = 0, whatever q says.
    terms = terms.masked_fill(log_q == -math.inf, math.inf).masked_fill(log_p == -math.inf, 0.0)
    return terms.sum(-1).clamp(min=0.0)


def _log_softmax(logits: Tensor) -> Tensor:
    # sum() adds in a cascade; torch's log_softmax one by one, which costs 1e-12 nats at 1e6 words.
    shifted = logits - logits.amax(-1, keepdim=True)
    return shifted - shifted.exp().sum(-1, keepdim=True).log()


def _js_block(p: Tensor, q: Tensor, first_row: int) -> Tensor:
    shares = []
    for side, rows in (("p", p), ("q", q)):
        _refuse(~rows.isfinite().all(-1), side, first_row, "holds NaN or Inf")
        sums = rows.sum(-1, keepdim=True)
        bad = (rows < 0.0).any(-1) | ((sums[..., 0] - 1.0).abs() > _SUM_TOLERANCE)
        if bad.any():
            row = int(bad.nonzero()[0, 0])
            raise ValueRangeError(
                f"row {first_row + row} of {side} is no distribution: its smallest entry is "
                f"{float(rows[row].min()):g} and its sum {float(sums[row, 0]):g}; entries are 0 or "
                "more and sum to 1"
            )
        shares.append(rows / sums)
    left, right = shares
    both = left + right

    def half(share: Tensor) -> Tensor:
        # 2p/(p+q) instead of p/m: the mean m of two smallest numbers would round to 0.
        terms = share * (2.0 * share / both).log()
        return terms.masked_fill(share == 0.0, 0.0).sum(-1)

    return (0.5 * (half(left) + half(right))).clamp(0.0, math.log(2.0))


def _cosine_block(a: Tensor, b: Tensor, first_row: int) -> Tensor:
    units = []
    for side, rows in (("a", a), ("b", b)):
        _refuse(~rows.isfinite().all(-1), side, first_row, "holds NaN or Inf")
        largest = rows.abs().amax(-1, keepdim=True)
        # Squares overflow above 1e154: rows are scaled by their largest entry. 0/0 stays 0.
        units.append(rows / largest.masked_fill(largest == 0.0, 1.0))
    x, y = units
    xx, yy = x.square().sum(-1), y.square().sum(-1)
    # One root of the product, not a product of roots: √(s·s) is exactly s.
    product = (xx * yy).sqrt()
    inner = (x * y).sum(-1) / product.masked_fill(product == 0.0, 1.0)
    both_zero = (xx == 0.0) & (yy == 0.0)
    return inner.clamp(-1.0, 1.0).masked_fill(both_zero, 1.0)


def _relative_block(a: Tensor, b: Tensor, first_row: int) -> Tensor:
    for side, rows in (("a", a), ("b", b)):
        _refuse(~rows.isfinite().all(-1), side, first_row, "holds NaN or Inf")
    largest = torch.maximum(a.abs().amax(-1, keepdim=True), b.abs().amax(-1, keepdim=True))
    scale = largest.masked_fill(largest == 0.0, 1.0)
    error = ((a - b) / scale).square().sum(-1)
    return (error / (a / scale).square().sum(-1)).masked_fill(error == 0.0, 0.0)


def _per_row(
    a: Operand, b: Operand, block: Callable[[Tensor, Tensor, int], Tensor], axis: str
) -> NDArray[np.float64]:
    """`block` of the rows along the last axis, some rows at a time."""
    x, y = _pair(a, b)
    if x.dim() == 0:
        raise ShapeError(f"a single number has no rows: pass [..., {axis}]")
    leading, length = x.shape[:-1], x.shape[-1]
    x, y = x.reshape(-1, length), y.reshape(-1, length)
    step = max(1, _BLOCK_ELEMENTS // length)
    parts = [
        block(_wide(x[at : at + step]), _wide(y[at : at + step], like=x), at)
        for at in range(0, len(x), step)
    ]
    values: NDArray[np.float64] = torch.cat(parts).cpu().numpy().reshape(tuple(leading))
    return values


def _flat_blocks(x: Tensor, y: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    x, y = x.reshape(-1), y.reshape(-1)
    step = _CACHED_ELEMENTS if x.device.type == "cpu" else _BLOCK_ELEMENTS
    for at in range(0, len(x), step):
        left = _wide(x[at : at + step])
        yield left, _wide(y[at : at + step], like=x)


def _wide(block: Tensor, like: Tensor | None = None) -> Tensor:
    """The block in float64, on the device of `like`."""
    device = (block if like is None else like).device
    # Apple's GPUs have no float64.
    return block.to("cpu" if device.type == "mps" else device).double()


def _pair(a: Operand, b: Operand) -> tuple[Tensor, Tensor]:
    x, y = _tensor(a, "the first"), _tensor(b, "the second")
    if x.shape != y.shape:
        raise ShapeError(
            f"shapes {list(x.shape)} and {list(y.shape)} differ: both operands have the same shape"
        )
    if not x.numel():
        raise ShapeError(
            f"operands of shape {list(x.shape)} are empty: there is nothing to compare"
        )
    return x, y


def _tensor(operand: Operand, which: str) -> Tensor:
    if isinstance(operand, Tensor):
        tensor = operand.detach()
        if tensor.is_complex():
            raise DtypeError(f"{which} operand is {tensor.dtype}: it has to be real")
        return tensor
    array = real_array(operand, f"{which} operand is", "it has to be")
    if array.dtype.kind != "f" or array.dtype.itemsize > 8:
        array = array.astype(np.float64)
    # torch takes neither foreign byte orders nor negative strides, and warns of read-only memory.
    native = array.dtype.newbyteorder("=")
    return torch.from_numpy(np.require(array, native, ["C_CONTIGUOUS", "WRITEABLE"]))


def _refuse(bad: Tensor, side: str, first_row: int, problem: str) -> None:
    if bad.any():
        row = first_row + int(bad.nonzero()[0, 0])
        raise NonFiniteError(f"row {row} of {side} {problem}")


def _largest(x: Tensor) -> float:
    largest = 0.0
    # The extremes of a float are exact in its own dtype.
    whole = x.dtype in _FLOATS
    for part in (x,) if whole else (block for block, _ in _flat_blocks(x, x)):
        low, high = torch.aminmax(part)
        top = max(-float(low), float(high))
        if not math.isfinite(top):
            raise NonFiniteError(f"an operand holds {top}: its error cannot be measured")
        largest = max(largest, top)
    return largest


def _power_of_two(largest: float) -> float:
    """1 / largest, rounded to a power of two that is a float itself."""
    return 2.0 ** -max(-1000, math.frexp(largest)[1])


def _ratio(error: float, reference: float) -> float:
    if reference == 0.0:
        return math.inf if error else 0.0
    return error / reference
