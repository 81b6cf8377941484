"""The error of a coded matrix on text that it was not fitted to."""

from __future__ import annotations

import math

import pytest
import torch

from trilens.ternary.calibrated.held_out import HeldOutError
from trilens.ternary.calibrated.hessian import MomentSums


def test_batches_sum_to_the_error_over_all_tokens() -> None:
    torch.manual_seed(0)
    dense, coded, x = torch.randn(5, 7), torch.randn(5, 7), torch.randn(3, 4, 7)
    y = torch.randn(3, 4, 5)
    for target, wanted in ((None, x.double() @ dense.double().T), (y, y.double())):
        error = HeldOutError(coded)
        for i in range(3):
            error.add(x[i], dense=dense, target=None if target is None else target[i])
        gap = x.double() @ coded.double().T - wanted
        assert error.n_tokens == 12
        assert error.value == pytest.approx(
            float(gap.square().sum() / wanted.square().sum()), rel=1e-5
        )


def test_moments_say_what_their_tokens_say() -> None:
    torch.manual_seed(0)
    dense, coded, x = torch.randn(5, 7), torch.randn(5, 7), torch.randn(12, 7)
    sums = MomentSums("x", 7, {})
    sums.add(x, {})
    one, other, exact = HeldOutError(coded), HeldOutError(coded), HeldOutError(dense)
    one.add(x, dense=dense)
    other.add_moments(sums.hessian(), dense=dense)
    exact.add_moments(sums.hessian(), dense=dense)
    assert other.n_tokens == 12
    assert other.value == pytest.approx(one.value, rel=1e-5)
    assert exact.value == 0.0


def test_exact_weights_have_no_error_and_no_token_no_value() -> None:
    dense, x = torch.randn(5, 7), torch.randn(4, 7)
    exact = HeldOutError(dense.clone())
    assert exact.value is None
    exact.add(x, dense=dense)
    assert exact.value == 0.0
    silent = HeldOutError(dense + 1)
    silent.add(x, dense=0 * dense)
    assert silent.value == math.inf
