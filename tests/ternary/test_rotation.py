"""Hadamard rotations: orthogonal for every width, undone exactly, products kept."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial

import pytest
import torch
from torch._subclasses import FakeTensorMode

from tolerances import assert_close_sums, assert_near
from trilens.ternary.rotation import _signs, block_orders, hadamard, rotate, rotate_back

WIDTHS = [1, 2, 3, 7, 12, 16, 20, 28, 36, 40, 48, 65, 96, 100, 112, 144, 160, 256, 320, 344, 576]


@pytest.mark.parametrize("order", [1, 2, 4, 8, 12, 16, 20, 24, 28, 32, 36, 44, 48, 60, 64])
def test_hadamard_matrices(order: int) -> None:
    h = torch.tensor(hadamard(order))
    assert set(h.flatten().tolist()) <= {1.0, -1.0}
    assert torch.equal(h @ h.T, order * torch.eye(order, dtype=torch.float64))


@pytest.mark.parametrize("width", [12, 28, 40, 344])
@pytest.mark.parametrize(
    "mode",
    [partial(torch.device, "meta"), torch.inference_mode, FakeTensorMode],
    ids=["device", "inference", "fake"],
)
def test_what_is_kept_does_not_depend_on_the_mode_it_was_made_in(
    width: int, mode: Callable[[], AbstractContextManager]
) -> None:
    x = torch.randn(2, width, dtype=torch.float64)
    expected = rotate(x)
    for kept in (hadamard, _signs):
        kept.cache_clear()
    with mode() as fake:
        rotate(fake.from_tensor(x) if isinstance(fake, FakeTensorMode) else x)
    y = x.clone().requires_grad_()
    rotate(y).sum().backward()
    assert torch.equal(rotate(x), expected) and type(y.grad) is torch.Tensor


@pytest.mark.parametrize("width", WIDTHS)
def test_turned_and_turned_back(width: int) -> None:
    generator = torch.Generator().manual_seed(width)
    x = torch.randn(5, 3, width, generator=generator, dtype=torch.float64)
    w = torch.randn(7, width, generator=generator, dtype=torch.float64)
    # Each turn sums `width` terms ±x/√width: Σ|terms| is at most the length of the row.
    long, wide = x.norm(dim=-1, keepdim=True), w.norm(dim=-1)
    assert_close_sums(rotate_back(rotate(x)), x, long, 2 * width)
    assert_close_sums(rotate(rotate_back(x)), x, long, 2 * width)
    assert_close_sums(rotate(x) @ rotate(w).T, x @ w.T, long * wide, 3 * width)
    q = rotate(torch.eye(width, dtype=torch.float64))
    assert_close_sums(q @ q.T, torch.eye(width, dtype=torch.float64), 1.0, 3 * width)
    assert sum(block_orders(width)) == width


def test_the_blocks_are_as_large_as_may_be() -> None:
    known = {256: (256,), 2560: (2560,), 5632: (5632,), 576: (576,), 11008: (256,) * 43}
    assert {width: block_orders(width) for width in known} == known
    assert block_orders(65) == (64, 1)
    assert block_orders(21) == (16, 4, 1)


def test_outliers_are_spread() -> None:
    x = torch.zeros(4096)
    x[17] = 64.0
    assert float(rotate(x).abs().max()) == pytest.approx(1.0, rel=1e-5)
    flat = rotate(torch.ones(4096))  # a mean does not gather in one place: signs differ
    assert float(flat.abs().max()) < 8


def test_dtypes() -> None:
    x = torch.randn(3, 96, generator=torch.Generator().manual_seed(0))
    assert rotate(x.bfloat16()).dtype == torch.bfloat16
    exact = rotate(x.bfloat16().double())
    # Rounded to bfloat16 once before and once after.
    assert_near(rotate(x.bfloat16()).double(), exact, torch.finfo(torch.bfloat16).eps)
    long = x.norm(dim=-1, keepdim=True)
    assert_close_sums(rotate(x), rotate(x.double()), long, 96, torch.float32)
    assert rotate(torch.zeros(0, 8)).shape == (0, 8)
    x.requires_grad_(True)
    rotate(x).sum().backward()
    assert x.grad is not None
    assert_close_sums(x.grad, rotate_back(torch.ones(3, 96)), 96**0.5, 96, torch.float32)


@pytest.mark.parametrize("width", [48, 768, 1536, 2048])
def test_any_number_of_threads_gives_the_same_bits(width: int) -> None:
    """Workers of one run share the processors: what they write may not depend on their share."""
    before = torch.get_num_threads()
    values = torch.randn(130, width)
    found = []
    try:
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            found.append(rotate(values))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(found[0], other) for other in found[1:])
