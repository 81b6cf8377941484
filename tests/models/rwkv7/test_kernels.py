"""The chunked recurrence against a float64 loop that is written from the paper alone."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import normalize

from tolerances import assert_near
from trilens.errors import ShapeError, ValueRangeError
from trilens.models.rwkv7.kernels import rwkv7_attention, rwkv7_recurrent

STEEPEST = -math.exp(-0.5)
# fp32 rounds at 6e-8; sums over 64 channels and 300 tokens measured at most 7e-7 of the largest
# output. The bar is the one that the project promises.
BAR = 1e-5


def reference(r, log_w, k, v, a, b, state=None):
    """S ← S diag(w) + S a bᵀ + v kᵀ, y = S r, with S [d_value, d_key] as the paper has it."""
    r, log_w, k, v, a, b = (x.detach().double().numpy() for x in (r, log_w, k, v, a, b))
    batch, seq, heads, d = r.shape
    y = np.zeros_like(r)
    final = np.zeros((batch, heads, d, d))
    for row in range(batch):
        for head in range(heads):
            s = np.zeros((d, d))
            if state is not None:
                s = state[row, head].detach().double().numpy().T.copy()
            for t in range(seq):
                at = (row, t, head)
                s = s * np.exp(log_w[at]) + np.outer(s @ a[at], b[at]) + np.outer(v[at], k[at])
                y[at] = s @ r[at]
            final[row, head] = s.T
    return y, final


def random_inputs(seq, *, batch=2, heads=2, d=8, seed=0, decay="trained"):
    generator = torch.Generator().manual_seed(seed)

    def noise():
        return torch.randn(batch, seq, heads, d, generator=generator)

    r, k, v = noise(), noise(), noise()
    kappa, rate = normalize(noise(), dim=-1), torch.sigmoid(noise())
    shape = (batch, seq, heads, d)
    log_w = {
        "trained": lambda: STEEPEST * torch.sigmoid(3 * noise()),
        "steepest": lambda: torch.full(shape, STEEPEST),
        "flattest": lambda: torch.full(shape, -1e-7),
        "none": lambda: torch.zeros(shape),
        "mixed": lambda: torch.where(noise() > 0, STEEPEST, -1e-7),
        "beyond": lambda: -60 * torch.rand(shape, generator=generator),
        "forget": lambda: torch.where(noise() > 1, float("-inf"), -0.1),
    }[decay]()
    state = torch.randn(batch, heads, d, d, generator=generator)
    return [r, log_w, k, v, -kappa, kappa * rate], state


def relative(ours, theirs):
    return np.abs(ours.detach().double().numpy() - theirs).max() / np.abs(theirs).max()


@pytest.mark.parametrize(
    "decay", ["trained", "steepest", "flattest", "none", "mixed", "beyond", "forget"]
)
@pytest.mark.parametrize("chunk_size", [1, 16, 64])
def test_chunks_match_the_float64_loop_at_every_decay(decay, chunk_size):
    inputs, state = random_inputs(150, d=16, decay=decay)
    y, final = rwkv7_attention(*inputs, state, chunk_size)
    true_y, true_final = reference(*inputs, state)
    assert relative(y, true_y) <= BAR
    assert relative(final, true_final) <= BAR


def test_one_key_over_and_over_is_stable():
    """The hardest triangular system: every token removes what every other one wrote."""
    inputs, state = random_inputs(200, d=64, heads=1, batch=1)
    kappa = normalize(torch.ones(64), dim=-1).expand_as(inputs[0])
    inputs[1] = torch.full_like(inputs[1], -1e-5)
    inputs[4], inputs[5] = -kappa, kappa.clone()
    y, _ = rwkv7_attention(*inputs, state)
    assert relative(y, reference(*inputs, state)[0]) <= BAR


@settings(max_examples=25, deadline=None)
@given(
    seq=st.integers(1, 40),
    cut=st.integers(0, 39),
    chunk_size=st.integers(1, 20),
    seed=st.integers(0, 1000),
)
def test_two_halves_make_the_whole(seq, cut, chunk_size, seed):
    inputs, state = random_inputs(seq, d=4, seed=seed)
    cut = 1 + cut % seq
    y, final = rwkv7_attention(*inputs, state, chunk_size)
    first, middle = rwkv7_attention(*(x[:, :cut] for x in inputs), state, chunk_size)
    if cut == seq:
        assert_near(final, middle, BAR)
        return
    second, end = rwkv7_attention(*(x[:, cut:] for x in inputs), middle, chunk_size)
    # Two fp32 computations in another order: each may be off by a few 1e-6 of the largest value.
    assert_near(torch.cat([first, second], 1), y, BAR)
    assert_near(end, final, BAR)


def test_a_batch_gives_what_its_rows_give():
    inputs, state = random_inputs(37)
    y, final = rwkv7_attention(*inputs, state)
    for row in range(2):
        one, end = rwkv7_attention(*(x[row : row + 1] for x in inputs), state[row : row + 1])
        assert_near(one[0], y[row], BAR)
        assert_near(end[0], final[row], BAR)


@pytest.mark.parametrize("decay", ["trained", "steepest", "flattest", "forget"])
def test_gradients_match_the_sequential_path(decay):
    inputs, state = random_inputs(45, decay=decay)
    weights = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(1))

    def gradients(run, dtype):
        leaves = [x.to(dtype, copy=True).requires_grad_() for x in (*inputs, state)]
        y, final = run(*leaves)
        ((y * weights).sum() + final.square().sum()).backward()
        return [leaf.grad for leaf in leaves]

    ours = gradients(rwkv7_attention, torch.float32)
    theirs = gradients(rwkv7_recurrent, torch.float64)
    for mine, true in zip(ours, theirs, strict=True):
        assert torch.isfinite(mine).all()
        # A gradient sums over all later tokens, so it gets a little more room than the output.
        assert relative(mine, true.numpy()) <= 5e-5


def test_float64_goes_through_as_float64():
    inputs, state = random_inputs(50)
    y, final = rwkv7_attention(*(x.double() for x in inputs), state.double())
    assert y.dtype == final.dtype == torch.float64
    assert relative(y, reference(*inputs, state)[0]) <= 1e-13


def test_half_precision_keeps_a_wide_state():
    inputs, state = random_inputs(50)
    halves = [x.bfloat16() for x in inputs]
    y, final = rwkv7_attention(*halves, state)
    assert y.dtype == torch.bfloat16
    assert final.dtype == torch.float32
    # The state is exact for the rounded inputs; only y is rounded once more.
    assert relative(final, reference(*halves, state)[1]) <= BAR


def test_autocast_does_not_reach_the_state():
    inputs, state = random_inputs(50)
    _, plain = rwkv7_attention(*inputs, state)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, cast = rwkv7_attention(*inputs, state)
    assert torch.equal(plain, cast)


def test_what_does_not_fit_is_refused_by_name():
    inputs, state = random_inputs(3)
    r, log_w, k, v, a, b = inputs
    with pytest.raises(ShapeError, match=r"v has shape \(2, 3, 2, 7\): r has \(2, 3, 2, 8\)"):
        rwkv7_attention(r, log_w, k, v[..., :7], a, b)
    with pytest.raises(ShapeError, match="at least one token"):
        rwkv7_attention(*(x[:, :0] for x in inputs))
    with pytest.raises(ShapeError, match=r"need \(2, 2, 8, 8\)"):
        rwkv7_attention(*inputs, state[:1])
    with pytest.raises(ValueRangeError, match="chunk_size is 0"):
        rwkv7_attention(*inputs, chunk_size=0)
