"""States of a recurrence after chosen tokens, against a float64 reference, token by token."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from recurrent_cases import normal, unit
from tolerances import assert_near
from trilens.caches.patterns.channel.pattern import ChannelPattern
from trilens.caches.patterns.recurrent.pattern import RecurrentPattern
from trilens.caches.patterns.recurrent.states import (
    channel_states,
    matrix_reads,
    matrix_states,
    softmax_reads,
    softmax_states,
)

# Float32 sums in another order.
TOLERANCE = 1e-5
# More than two chunks of the longest kind (256 tokens), and no multiple of one.
SEQ = 600


def off(ours: Tensor, theirs: Tensor) -> float:
    return float((ours.double() - theirs.double()).abs().max() / theirs.double().abs().max())


def reference(pattern: RecurrentPattern, values: Tensor, row: int = 0) -> Tensor:
    """S after every token, [seq, heads, d, d_v], in float64."""
    given = {name: tensor.double() for name, tensor in pattern.tensors().items()}
    heads, seq, d = pattern.heads, pattern.seq_q, given["q"].shape[3]

    def of(name: str) -> Tensor:
        tensor = given[name][row]
        return tensor.repeat_interleave(heads // tensor.shape[0], dim=0)

    w, k = of("log_w").exp().expand(heads, seq, -1), of("k")
    k = k * of("k_scale")[..., None] if "k_scale" in given else k
    state, states = torch.zeros(heads, d, values.shape[2], dtype=torch.float64), []
    for t in range(seq):
        before, state = state, w[:, t, :, None] * state
        if "a" in given:
            b = of("b") * (of("b_scale")[..., None] if "b_scale" in given else 1)
            state = state + b[:, t, :, None] * (of("a")[:, t, None] @ before)
        state = state + k[:, t, :, None] * values.double()[:, t, None]
        states.append(state)
    return torch.stack(states)


def scalar_decay(seq: int) -> RecurrentPattern:
    """Two heads that share queries and keys; a few decays forget everything."""
    log_w = -normal(1, 2, seq, 1, seed=3).abs() * 0.1
    log_w[0, 0, seq // 2] = -torch.inf
    log_w[0, 1, ::97] = -300
    step = normal(1, 2, seq, seed=4).abs()
    q, k = normal(1, 1, seq, 6), normal(1, 1, seq, 6, seed=1)
    return RecurrentPattern(q, k, log_w=log_w, k_scale=step)


def delta(seq: int) -> RecurrentPattern:
    q, k = normal(1, 2, seq, 6), unit(normal(1, 2, seq, 6, seed=1))
    log_w = -normal(1, 4, seq, 1, seed=3).abs() * 0.2
    beta = torch.sigmoid(normal(1, 4, seq, seed=4))
    return RecurrentPattern.gated_delta(q, k, log_w=log_w, beta=beta, scaling=0.4)


def steep_delta(seq: int) -> RecurrentPattern:
    """A decay per key channel, too steep to be split around the middle of a chunk."""
    q, k = normal(1, 2, seq, 6), unit(normal(1, 2, seq, 6, seed=1))
    log_w = -normal(1, 2, seq, 6, seed=3).abs() * 3
    beta = torch.sigmoid(normal(1, 2, seq, seed=4))
    return RecurrentPattern.gated_delta(q, k, log_w=log_w, beta=beta)


def static_decay(seq: int) -> RecurrentPattern:
    """One decay per head for all tokens."""
    log_w = torch.tensor([[-0.01], [-0.7]])
    return RecurrentPattern(normal(1, 2, seq, 6), normal(1, 2, seq, 6, seed=1), log_w=log_w)


@pytest.mark.parametrize("make", [scalar_decay, delta, steep_delta])
def test_matrix_states_are_those_of_the_recurrence(make) -> None:
    pattern = make(SEQ)
    values = normal(pattern.heads, SEQ, 5, seed=7)
    # First and last tokens, both sides of chunk ends, and several in one chunk.
    positions = [0, 1, 31, 32, 63, 64, 65, 100, 255, 256, 300, SEQ - 1]
    (recurrence,) = pattern.recurrences(0)
    ours, theirs = matrix_states(recurrence, values, positions), reference(pattern, values)
    assert ours.shape == (len(positions), pattern.heads, 6, 5)
    for state, position in zip(ours, positions, strict=True):
        assert off(state, theirs[position]) <= TOLERANCE
    # The last tokens alone give what all of them give.
    assert off(matrix_states(recurrence, values, [SEQ - 1])[0], theirs[-1]) <= TOLERANCE
    read = matrix_reads(recurrence, ours, positions)
    weights = pattern.rows(positions)
    assert off(read, weights @ values) <= TOLERANCE


def test_a_static_decay() -> None:
    pattern = static_decay(SEQ)
    values = normal(2, SEQ, 5, seed=7)
    (recurrence,) = pattern.recurrences(0)
    w = torch.tensor([-0.01, -0.7], dtype=torch.float64).exp()[:, None, None]
    k, state = pattern.tensors()["k"][0].double(), torch.zeros(2, 6, 5, dtype=torch.float64)
    for t in range(SEQ):
        state = w * state + k[:, t, :, None] * values.double()[:, t, None]
    assert off(matrix_states(recurrence, values, [SEQ - 1])[0], state) <= TOLERANCE


@settings(max_examples=20, deadline=None)
@given(st.sets(st.integers(0, 149), min_size=1, max_size=8))
def test_states_do_not_depend_on_what_else_is_asked(positions: set[int]) -> None:
    pattern = delta(150)
    values = normal(4, 150, 5, seed=7)
    (recurrence,) = pattern.recurrences(0)
    together = matrix_states(recurrence, values, sorted(positions))
    for state, position in zip(together, sorted(positions), strict=True):
        assert off(state, matrix_states(recurrence, values, [position])[0]) <= TOLERANCE


def test_values_of_later_tokens_are_never_read() -> None:
    pattern = delta(150)
    values = normal(4, 150, 5, seed=7)
    values[:, 90:] = torch.nan
    (recurrence,) = pattern.recurrences(0)
    assert torch.isfinite(matrix_states(recurrence, values, [3, 89])).all()


@pytest.mark.parametrize("wide", [False, True])
def test_channel_states_are_those_of_the_recurrence(wide: bool) -> None:
    # Wide enough that a block holds one token only.
    channels, states, seq = (400, 200, 40) if wide else (7, 4, 300)
    step = normal(1, seq, channels, seed=2).abs() * 0.3
    step[0, seq // 3] = 1e4  # forgets everything
    rate = -normal(channels, states, seed=3).abs() - 0.01
    k, q = normal(1, seq, states, seed=4), normal(1, seq, states, seed=5)
    values = normal(channels, seq, seed=6)
    inputs = ChannelPattern(step=step, rate=rate, q=q, k=k).inputs()
    positions = [0, 1, seq // 3 - 1, seq // 3, seq // 2, seq - 1]
    ours = channel_states(inputs, values, positions)
    h, found = torch.zeros(channels, states, dtype=torch.float64), []
    for t in range(seq):
        dt, x = step[0, t].double(), values[:, t].double()
        h = (dt[:, None] * rate.double()).exp() * h
        h = h + (dt * x)[:, None] * k[0, t].double()
        found.append(h)
    for state, position in zip(ours, positions, strict=True):
        assert off(state, found[position]) <= TOLERANCE


def test_a_gated_recurrence_has_one_state_per_channel() -> None:
    log_w, gate = -normal(1, 50, 6, seed=1).abs(), normal(1, 50, 6, seed=2)
    log_w[0, 0] = -torch.inf  # a reset
    values = normal(6, 50, seed=3)
    states = channel_states(ChannelPattern.gated(log_w, gate).inputs(), values, [0, 20, 49])
    h, found = torch.zeros(6, dtype=torch.float64), []
    for t in range(50):
        h = log_w[0, t].double().exp() * h + gate[0, t].double() * values[:, t].double()
        found.append(h)
    for state, position in zip(states, (0, 20, 49), strict=True):
        assert off(state[:, 0], found[position]) <= TOLERANCE


def test_softmax_states_and_what_is_read_of_them() -> None:
    keys, values = normal(SEQ, 6) * 8, normal(SEQ, 6, seed=1)
    log_w, bonus = -normal(6, seed=2).exp(), normal(6, seed=3)
    positions = [-1, 0, 1, 255, 256, 400, SEQ - 2]
    ours = softmax_states(keys, values, log_w, positions)
    n = d = torch.zeros(6, dtype=torch.float64)
    m = torch.full((6,), -1e38, dtype=torch.float64)
    found, outputs = {-1: (n, d, m)}, []
    for t in range(SEQ):
        k, v = keys[t].double(), values[t].double()
        top = torch.maximum(m, k + bonus.double())
        old, own = (m - top).exp(), (k + bonus.double() - top).exp()
        outputs.append((old * n + own * v) / (old * d + own))
        top = torch.maximum(m + log_w.double(), k)
        old, own = (m + log_w.double() - top).exp(), (k - top).exp()
        n, d, m = old * n + own * v, old * d + own, top
        found[t] = (n, d, m)
    for number, position in enumerate(positions):
        theirs = dict(zip(("numerator", "denominator", "maximum"), found[position], strict=True))
        for name, tensor in ours.items():
            assert_near(tensor[number], theirs[name], TOLERANCE, least=1e-30)
    after = [position + 1 for position in positions]
    read = softmax_reads(ours, keys, values, bonus, after)
    assert off(read, torch.stack([outputs[position] for position in after])) <= TOLERANCE
