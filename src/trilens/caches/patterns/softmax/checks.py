"""What a `SoftmaxPattern` is built from: checked once, where it comes in."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from trilens.errors import DtypeError, ShapeError, UsageError, ValueRangeError

__all__ = ["check_four_axes", "check_number", "check_q_k", "check_sinks", "check_term"]


def check_number(value: float, what: str) -> float:
    """A finite number, as a float.

    Raises:
        ValueRangeError: not a number, or not finite.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueRangeError(f"{what} {value!r} is out of range: it has to be a finite number")
    return float(value)


def check_four_axes(tensor: Tensor, what: str, axes: str) -> None:
    """Refuse what is not floating point with four axes, none empty; `axes` names them.

    Raises:
        UsageError: not a tensor.
        ShapeError: not four axes, or an empty one.
        DtypeError: not floating point.
    """
    if not isinstance(tensor, Tensor):
        raise UsageError(f"{what} of type {type(tensor).__name__}: it has to be a Tensor")
    if tensor.ndim != 4 or tensor.numel() == 0:
        raise ShapeError(
            f"{what} of shape {list(tensor.shape)}: it has to be [{axes}], no axis empty"
        )
    if not tensor.is_floating_point():
        raise DtypeError(f"{what} of dtype {tensor.dtype}: it has to be floating point")


def check_q_k(q: Tensor, k: Tensor) -> None:
    """Refuse queries and keys that do not belong together.

    Shapes
        q [batch, heads, seq_q, d_head], k [batch, kv_heads, seq_k, d_head]

    Raises:
        UsageError: not a tensor, or on two devices.
        ShapeError: axes that do not fit each other.
        DtypeError: not floating point.
    """
    for name, tensor in (("q", q), ("k", k)):
        check_four_axes(tensor, name, "batch, heads, seq, d_head")
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ShapeError(
            f"q {list(q.shape)} and k {list(k.shape)} do not fit: batch and d_head have to be equal"
        )
    if q.shape[1] % k.shape[1]:
        raise ShapeError(
            f"{q.shape[1]} query heads cannot share {k.shape[1]} key heads: the first has to be "
            "a multiple of the second"
        )
    if q.device != k.device:
        raise UsageError(f"q is on {q.device}, k on {k.device}: put both on one device")


def check_sinks(sinks: Tensor, q: Tensor) -> Tensor:
    """Sink logits [heads], detached.

    Raises:
        UsageError: not a tensor, or on another device than q.
        ShapeError: not one per query head.
        DtypeError: not floating point.
    """
    if not isinstance(sinks, Tensor):
        raise UsageError(f"sinks of type {type(sinks).__name__}: they have to be a Tensor")
    if sinks.shape != (q.shape[1],):
        raise ShapeError(f"sinks of shape {list(sinks.shape)}: they have to be [{q.shape[1]}]")
    if not sinks.is_floating_point():
        raise DtypeError(f"sinks of dtype {sinks.dtype}: they have to be floating point")
    if sinks.device != q.device:
        raise UsageError(f"sinks are on {sinks.device}, q on {q.device}: put both on one device")
    return sinks.detach()


def check_term(term: Tensor, shape: tuple[int, int, int, int], what: str, like: Tensor) -> Tensor:
    """A mask or bias, detached, once it is known to broadcast over the scores.

    Args:
        term: the mask or bias.
        shape: (batch, heads, seq_q, seq_k) of the scores.
        what: "mask" or "bias".
        like: a tensor on the device where it has to be.

    Raises:
        UsageError: not a tensor, or on another device.
        ShapeError: does not broadcast.
        DtypeError: neither bool nor floating point; a bias has to be floating point.
    """
    if not isinstance(term, Tensor):
        raise UsageError(f"{what} of type {type(term).__name__}: it has to be a Tensor")
    fits = term.ndim == 4 and all(
        own in (1, full) for own, full in zip(term.shape[:3], shape[:3], strict=True)
    )
    if not fits or term.shape[3] != shape[3]:
        batch, heads, seq_q, seq_k = shape
        raise ShapeError(
            f"{what} of shape {list(term.shape)} does not fit the scores: it has to be "
            f"[1 or {batch}, 1 or {heads}, 1 or {seq_q}, {seq_k}]"
        )
    if not (term.is_floating_point() or (what == "mask" and term.dtype == torch.bool)):
        allowed = "bool or floating point" if what == "mask" else "floating point"
        raise DtypeError(f"{what} of dtype {term.dtype}: it has to be {allowed}")
    if term.device != like.device:
        raise UsageError(f"{what} is on {term.device}, q on {like.device}: put both on one device")
    term = term.detach()
    for axis in range(3):
        # An expanded axis says one thing many times: a copy of it would be that much larger.
        if term.stride(axis) == 0:
            term = term.narrow(axis, 0, 1)
    return term
