"""How far apart two computations of the same sums may be, whatever adds them up.

A float sum of n terms is within n · u · Σ|terms| of the exact one, u = eps / 2, in any order, with
any number of lanes, blocks or threads, fused multiplications or not; a product is one of the n
roundings. Two such sums differ by twice that at most. The errors have either sign, so that for many
terms λ · √n takes the place of n: λ = 4 is missed once in a thousand by terms that conspire
(2 · exp(−λ²/2), Higham and Mary 2019), and stands ten standard deviations away for those that do
not. What counts is Σ|terms|, never the sum itself, which may cancel.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

__all__ = ["assert_close_sums", "assert_near", "largest", "roundings", "sum_error"]


def _array(values: Any) -> np.ndarray:
    if isinstance(values, torch.Tensor):
        values = values.detach()
        values = values.double() if values.is_floating_point() else values
        return values.cpu().numpy()
    return np.asarray(values)


def largest(values: Any) -> float:
    """The largest absolute value."""
    return float(np.abs(_array(values)).max())


def roundings(n_terms: int) -> float:
    """By how many eps of Σ|terms| two sums of n terms may differ."""
    return min(float(n_terms), 4 * n_terms**0.5)


def sum_error(n_terms: int, terms: Any = 1.0, dtype: torch.dtype = torch.float64) -> Any:
    """How far apart two sums of n terms may be.

    Args:
        n_terms: terms of a sum; where sums are summed again, all of them.
        terms: Σ|terms|, one number or one for each sum.
        dtype: what the less exact of the two is computed in.
    """
    return roundings(n_terms) * torch.finfo(dtype).eps * _array(terms)


def assert_close_sums(
    actual: Any, expected: Any, terms: Any, n_terms: int, dtype: torch.dtype = torch.float64
) -> None:
    """Both are the same sums, with the arguments of `sum_error`."""
    gap = np.abs(_array(actual) - _array(expected))
    bound = sum_error(n_terms, terms, dtype) + torch.finfo(dtype).tiny
    assert gap.shape == np.broadcast_shapes(gap.shape, np.shape(bound))
    assert (gap <= bound).all(), f"off by up to {float((gap / bound).max()):.2g} × the bound"


def assert_near(actual: Any, expected: Any, tolerance: float, least: float = 0.0) -> None:
    """No entry is off by more than `tolerance` of the largest one, or of `least`.

    For what goes through a whole model, where no one knows the terms of each entry: the errors of
    one layer are as large as its largest values make them, in every entry of the next.
    """
    actual, expected = _array(actual), _array(expected)
    assert actual.shape == expected.shape
    scale = max(largest(expected), least)
    gap = largest(actual - expected) if actual.size else 0.0
    assert gap <= tolerance * scale, f"off by {gap / scale:.2g} of {scale:.3g}"
