"""RecurrentPattern: W · v is what the recurrence gives, for every kind of recurrence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import logsigmoid
from transformers.models.kimi_linear.modeling_kimi_linear import chunk_kimi_delta_attention
from transformers.models.mamba2.modeling_mamba2 import mamba2_chunk_scan
from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule
from transformers.models.xlstm.modeling_xlstm import mlstm_recurrent_sequence_native

from recurrent_cases import APPLIED, assert_consistent, assert_gives, normal, recurrent, unit
from tolerances import assert_close_sums, assert_near
from trilens.caches.attention import AttentionCache, rebuild_pattern
from trilens.caches.patterns.protocol import Pattern
from trilens.caches.patterns.recurrent.blocks import decay_of, row_sums
from trilens.caches.patterns.recurrent.pattern import RecurrentPattern
from trilens.errors import DtypeError, OutOfRangeError, ShapeError, UsageError, ValueRangeError
from trilens.io.tensors import read_tensors, write_tensors
from trilens.models.rwkv7.kernels import rwkv7_attention


def decay(seq: int, d: int, kind: str, heads: int = 3) -> Tensor:
    """Log decays of every kind: gentle, steep beyond any splitting, none at all, and forgetting."""
    scale = {"gentle": 0.02, "usual": 0.6, "steep": 40.0, "none": 0.0}[kind]
    log_w = -scale * torch.rand(2, heads, seq, d, generator=torch.Generator().manual_seed(9))
    if kind == "steep":
        log_w[:, :, seq // 2] = 0
        log_w[:, 0, seq // 3] = -torch.inf
        log_w[:, 1, seq // 4 : seq // 4 + 3] = -1e-7
    return log_w


def delta(seq: int, d: int = 16, heads: int = 3) -> dict[str, Tensor]:
    key = unit(normal(2, heads, seq, d, seed=5))
    strength = torch.rand(2, heads, seq, 1, generator=torch.Generator().manual_seed(6))
    return {"a": -key, "b": key * strength}


@pytest.mark.parametrize("kind", ["gentle", "usual", "steep", "none"])
@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("with_delta", [False, True])
@pytest.mark.parametrize("seq", [1, 33, 300])
def test_w_v_is_the_output(kind: str, per_channel: bool, with_delta: bool, seq: int) -> None:
    q, k, v = (normal(2, 3, seq, 16, seed=i) for i in range(3))
    log_w = decay(seq, 16 if per_channel else 1, kind)
    more = delta(seq) if with_delta else {}
    pattern = RecurrentPattern(q, k, log_w=log_w, **more)
    assert pattern.signed and (pattern.batch, pattern.heads, pattern.seq_k) == (2, 3, seq)
    assert_gives(pattern.dense(), v, recurrent(q, k, v, log_w, **more))
    assert_consistent(pattern)


@settings(max_examples=20, deadline=None)
@given(
    seq=st.integers(1, 90),
    d=st.integers(1, 6),
    scale=st.floats(-6, 2),
    per_channel=st.booleans(),
    with_delta=st.booleans(),
    bonus=st.booleans(),
    seed=st.integers(0, 99),
)
def test_any_recurrence(
    seq: int, d: int, scale: float, per_channel: bool, with_delta: bool, bonus: bool, seed: int
) -> None:
    q, k, v = (normal(2, 2, seq, d, seed=seed + i) for i in range(3))
    log_w = -(10**scale) * normal(2, 2, seq, d if per_channel else 1, seed=seed + 3).abs()
    more = delta(seq, d, 2) if with_delta else {}
    extra = {"bonus": normal(2, d, seed=seed + 4)} if bonus else {}
    pattern = RecurrentPattern(q, k, log_w=log_w, **more, **extra)
    assert_gives(pattern.dense(), v, recurrent(q, k, v, log_w, **more, **extra))
    assert_consistent(pattern)
    sums = row_sums(next(pattern.recurrences(1)))
    want = pattern.dense()[1].double().sum(-1)
    terms = pattern.dense()[1].double().abs().sum(-1).max()
    assert (sums.double() - want).abs().max() <= APPLIED * terms


def test_in_float64_it_is_exact() -> None:
    q, k, v, key = (normal(1, 2, 200, 8, seed=i).double() for i in range(4))
    log_w = -0.3 * normal(1, 2, 200, 8, seed=4).abs().double()
    a, b = -unit(key), 0.9 * unit(key)
    pattern = RecurrentPattern(q, k, log_w=log_w, a=a, b=b)
    assert pattern.dtype == torch.float64
    assert_gives(pattern.dense(), v, recurrent(q, k, v, log_w, a, b), tolerance=1e-12)


def test_half_precision_is_computed_in_float32() -> None:
    q, k, v = (normal(1, 2, 130, 8, seed=i).bfloat16() for i in range(3))
    log_w = -0.1 * normal(1, 2, 130, 1, seed=4).abs()
    pattern = RecurrentPattern(q, k, log_w=log_w)
    assert pattern.dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_gives(pattern.dense(), v, recurrent(q, k, v, log_w))


# --- the models' own kernels as oracles ----------------------------------------------------------


@pytest.mark.parametrize("seq", [5, 150])
def test_a_vector_decay_with_removal_keys_against_the_kernel(seq: int) -> None:
    r, k, v, x, y = (normal(2, seq, 3, 16, seed=i) for i in range(5))
    log_w = -0.6065 * torch.sigmoid(normal(2, seq, 3, 16, seed=7))
    removal = unit(x)
    rate = torch.sigmoid(y)
    out, _ = rwkv7_attention(r, log_w, k, v, -removal, removal * rate)
    r, log_w, k, a, b = (t.transpose(1, 2) for t in (r, log_w, k, -removal, removal * rate))
    pattern = RecurrentPattern(r, k, log_w=log_w, a=a, b=b)
    assert_gives(pattern.dense(), v.transpose(1, 2), out.transpose(1, 2))


@pytest.mark.parametrize("scale", [0.05, 3.0])
def test_a_gated_delta_rule_against_the_kernel(scale: float) -> None:
    seq, d = 150, 16
    q, k = (unit(normal(2, seq, 2, d, seed=i)) for i in range(2))
    v = normal(2, seq, 4, d, seed=2)
    g = -scale * normal(2, seq, 4, seed=3).abs()
    beta = torch.sigmoid(normal(2, seq, 4, seed=4))
    out, _ = torch_chunk_gated_delta_rule(q, k, v, g, beta)
    q, k, g, beta = (t.transpose(1, 2) for t in (q, k, g, beta))
    pattern = RecurrentPattern.gated_delta(q, k, log_w=g[..., None], beta=beta, scaling=d**-0.5)
    assert pattern.heads == 4
    assert pattern.nbytes == 4 * 2 * seq * (2 * 2 * d + 3 * 4)  # q and k stay shared, no copy
    assert_gives(pattern.dense(), v.transpose(1, 2), out.transpose(1, 2))
    assert_consistent(pattern)


@pytest.mark.parametrize("scale", [0.05, 3.0])
def test_a_delta_rule_with_a_vector_decay_against_the_kernel(scale: float) -> None:
    seq, d = 150, 16
    q, k = (unit(normal(2, seq, 3, d, seed=i)) for i in range(2))
    v = normal(2, seq, 3, d, seed=2)
    g = -scale * normal(2, seq, 3, d, seed=3).abs()
    beta = torch.sigmoid(normal(2, seq, 3, seed=4))
    out, _ = chunk_kimi_delta_attention(q, k, v, g, beta)
    q, k, g, beta = (t.transpose(1, 2) for t in (q, k, g, beta))
    pattern = RecurrentPattern.gated_delta(q, k, log_w=g, beta=beta, scaling=d**-0.5)
    assert_gives(pattern.dense(), v.transpose(1, 2), out.transpose(1, 2))
    assert_consistent(pattern)


def test_a_state_space_with_a_scalar_decay_against_the_kernel() -> None:
    seq, heads, groups, states = 300, 6, 2, 16
    x = normal(2, seq, heads, 8)
    dt = torch.nn.functional.softplus(normal(2, seq, heads, seed=1))
    rate = -normal(heads, seed=2).abs().exp()
    b, c = (normal(2, seq, groups, states, seed=i) for i in (3, 4))
    out = mamba2_chunk_scan(x, dt, rate, b, c, chunk_size=64)
    dt = dt.transpose(1, 2)
    pattern = RecurrentPattern(
        c.transpose(1, 2),
        b.transpose(1, 2),
        log_w=(dt * rate[:, None])[..., None],
        k_scale=dt,
    )
    assert (pattern.heads, pattern.tensors()["k"].shape[1]) == (heads, groups)
    assert_gives(pattern.dense(), x.transpose(1, 2), out.transpose(1, 2))
    assert_consistent(pattern)


@pytest.mark.parametrize("gates", [1.0, 8.0])
def test_exponential_gates_against_the_kernel(gates: float) -> None:
    seq, d = 150, 16
    q, k, v = (normal(2, 3, seq, d, seed=i) for i in range(3))
    i, f = gates * normal(2, 3, seq, seed=3), 2 + gates * normal(2, 3, seq, seed=4)
    # In float64: the kernel's float32 carries a rounding of its own over the whole sequence.
    out = mlstm_recurrent_sequence_native(
        *(t.double() for t in (q, k, v, i, f)), dtype_state=torch.float64
    )
    pattern = RecurrentPattern.exponential_gating(
        q, k, input_gate=i, forget_gate=f, scaling=d**-0.5
    )
    # q · n may nearly cancel and is then divided by: its float32 rounding grows with it.
    assert_gives(pattern.dense(), v, out, tolerance=10 * APPLIED)
    assert_consistent(pattern)
    exact = RecurrentPattern.exponential_gating(
        q.double(), k.double(), input_gate=i, forget_gate=f, scaling=d**-0.5
    )
    assert_gives(exact.dense(), v, out, tolerance=1e-10)


def test_exponential_gates_beyond_any_float() -> None:
    q, k, v = (normal(1, 1, 40, 4, seed=i) for i in range(3))
    i = 400 * normal(1, 1, 40, seed=3)
    f = 5 * normal(1, 1, 40, seed=4)
    pattern = RecurrentPattern.exponential_gating(q, k, input_gate=i, forget_gate=f, scaling=0.5)
    out = mlstm_recurrent_sequence_native(
        *(t.double() for t in (q, k, v, i, f)), dtype_state=torch.float64
    )
    assert_gives(pattern.dense(), v, out, tolerance=10 * APPLIED)


@pytest.mark.parametrize("d", [1, 8])
def test_a_static_decay(d: int) -> None:
    q, k, v = (normal(2, 4, 300, 8, seed=i) for i in range(3))
    log_w = -normal(4, d, seed=3).abs().expand(4, d)
    pattern = RecurrentPattern(q, k, log_w=log_w)
    assert_gives(pattern.dense(), v, recurrent(q, k, v, log_w[None, :, None].expand(2, -1, 1, -1)))
    assert pattern.unpad(1, 9).tensors()["log_w"].data_ptr() == log_w.data_ptr()


def test_scales_are_factors() -> None:
    q, k, v = (normal(2, 2, 70, 8, seed=i) for i in range(3))
    log_w = decay(70, 8, "usual", heads=2)
    own = delta(70, 8, 2)
    of_k, of_b, of_row = (normal(2, 2, 70, seed=i) for i in (3, 4, 5))
    pattern = RecurrentPattern(
        q, k, log_w=log_w, **own, k_scale=of_k, b_scale=of_b, row_scale=of_row, scaling=0.3
    )
    b = own["b"] * of_b[..., None]
    want = recurrent(q, k * of_k[..., None], v, log_w, own["a"], b) * 0.3 * of_row[..., None]
    assert_gives(pattern.dense(), v, want)
    assert_consistent(pattern)


# --- errors of the decay --------------------------------------------------------------------------


def test_long_sequences_keep_their_digits() -> None:
    """Log decays are summed within chunks: the last of 5,000 tokens is as good as the first."""
    seq = 5000
    q, k = normal(1, 1, seq, 4), normal(1, 1, seq, 4, seed=1)
    for log_w in (-normal(1, 1, seq, 1, seed=2).abs(), -normal(1, 1, seq, 4, seed=2).abs()):
        pattern = RecurrentPattern(q, k, log_w=log_w)
        got = pattern.rows([seq - 1])[0, 0].double()
        total = log_w.double().expand(1, 1, seq, 4)[0, 0].flip(0).cumsum(0).flip(0)
        gap = torch.cat([total[1:], torch.zeros(1, 4)])
        want = (q[0, 0, -1].double() * gap.exp() * k[0, 0].double()).sum(-1)
        terms = (q[0, 0, -1].double() * gap.exp() * k[0, 0].double()).abs().sum(-1)
        # Four products, each with a decay whose logarithm is a sum of its own.
        assert_close_sums(got, want, terms.max(), 4 * 4, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_decay_is_an_exp_without_a_tail(dtype: torch.dtype) -> None:
    logs = torch.tensor([0.0, -1e-9, -1.0, -60.0, -81.0, -750.0, -torch.inf], dtype=torch.float64)
    given = logs.clone()
    got = decay_of(logs, dtype)
    want = logs.exp()
    want[want < (2e-35 if dtype == torch.float32 else 2e-304)] = 0
    # exp of 60 in float32 is off by 60 · 2⁻²⁴ of itself.
    torch.testing.assert_close(got.double(), want, rtol=4e-6, atol=0)
    assert got.dtype == dtype and got[-1] == 0 and got[0] == 1
    assert torch.equal(logs, given)


# --- the pattern as a part ------------------------------------------------------------------------


def whole() -> RecurrentPattern:
    q, k = normal(3, 2, 50, 8), normal(3, 2, 50, 8, seed=1)
    scales = {name: normal(3, 4, 50, seed=i) for i, name in enumerate(("k_scale", "row_scale"))}
    key = unit(normal(3, 2, 50, 8, seed=7))
    return RecurrentPattern(
        q, k, log_w=-normal(3, 4, 50, 1, seed=2).abs(), a=key, b=key, **scales, scaling=0.5,
        b_scale=-torch.sigmoid(normal(3, 4, 50, seed=8)),
    )  # fmt: skip


def test_unpadded_is_alone() -> None:
    pattern = whole()
    one = pattern.unpad(2, 17)
    assert (one.batch, one.heads, one.seq_q) == (1, 4, 17)
    assert_near(one.dense(), pattern.dense()[2:, :, :17, :17], APPLIED)
    # Nothing of the batch stays alive; the key that stands for a and b is there once.
    assert one.nbytes == 4 * 17 * (2 * 8 * 3 + 4 * 4)
    assert one.tensors()["a"].data_ptr() == one.tensors()["b"].data_ptr()
    with pytest.raises(ValueRangeError, match="n 51 is out of range"):
        pattern.unpad(0, 51)
    with pytest.raises(OutOfRangeError, match="batch row 3 is out of range"):
        pattern.unpad(3, 5)


def test_rebuilt_moved_and_saved_is_the_same() -> None:
    pattern = whole()
    assert isinstance(pattern, Pattern)
    for other in (
        rebuild_pattern(pattern.tensors(), pattern.params()),
        pattern.to("cpu"),
        RecurrentPattern.rebuild(pattern.tensors(), pattern.params()),
    ):
        assert torch.equal(other.dense(), pattern.dense())
        assert other.nbytes == pattern.nbytes
    bonus = RecurrentPattern(
        normal(1, 2, 9, 4), normal(1, 2, 9, 4), log_w=torch.zeros(2, 1), bonus=normal(2, 4)
    )
    assert torch.equal(rebuild_pattern(bonus.tensors(), bonus.params()).dense(), bonus.dense())
    assert_near(bonus.unpad(0, 5).dense(), bonus.dense()[..., :5, :5], APPLIED)
    assert "batch 3, heads 4, seq 50" in repr(pattern)


def test_saved_a_shared_tensor_is_stored_once(tmp_path: Path) -> None:
    pattern = whole()
    manifest = {"format": "test", "version": 1, "pattern": pattern.relu_l1().params()}
    path = write_tensors(tmp_path / "pattern.safetensors", pattern.tensors(), manifest)
    assert path.stat().st_size < pattern.nbytes + 2000
    tensors, read = read_tensors(path, "test", 1)
    view = rebuild_pattern(tensors, read["pattern"])
    # What was read may lie otherwise in memory, and be added up otherwise.
    assert all(torch.equal(tensors[name], part) for name, part in pattern.tensors().items())
    assert_near(view.dense(), pattern.relu_l1().dense(), APPLIED)


def test_nothing_is_copied() -> None:
    q, k, log_w = normal(2, 2, 9, 4), normal(2, 2, 9, 4), -normal(2, 2, 9, 1).abs()
    q.requires_grad_()
    pattern = RecurrentPattern(q, k, log_w=log_w)
    assert pattern.tensors()["q"].data_ptr() == q.data_ptr()
    assert not pattern.tensors()["q"].requires_grad
    assert not pattern.dense().requires_grad


def test_a_cache_asks_it() -> None:
    pattern = whole()
    cache = AttentionCache.from_layers({3: pattern}, n_model_layers=5)
    row = cache.attention_from_position(3, -1, head=2, batch=1)
    assert row.shape == (50,) and (row < 0).any()
    assert_near(row, pattern.rows([49], 2, 1)[0, 0], APPLIED)
    column = cache.attention_to_position(3, 4)
    columns = pattern.columns([4])[..., 0]
    assert_near(column, columns.mean(0), APPLIED, float(columns.abs().max()))
    for question in ("entropy", "mean_distance", "received", "sink_mass"):
        with pytest.raises(UsageError, match=r"relu_l1\(\)"):
            getattr(cache, question)(3)
        with pytest.raises(UsageError, match=r"relu_l1\(\)"):
            getattr(pattern, question)()
    view = cache.relu_l1()
    assert (view.layers, view.n_model_layers) == ((3,), 5)
    assert view.entropy(3, batch=2).shape == (4, 50)
    assert view.relu_l1().pattern(3) is view.pattern(3)


def test_no_positions_are_no_weights() -> None:
    pattern = whole()
    assert pattern.rows([]).shape == (4, 0, 50)
    assert pattern.columns([]).shape == (4, 50, 0)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"k": torch.zeros(2, 2, 5, 4)}, ShapeError, r"k of shape \[2, 2, 5, 4\] does not fit"),
        ({"q": torch.zeros(2, 5, 4)}, ShapeError, "q of shape"),
        ({"q": [1.0]}, UsageError, "q of type list"),
        ({"k": torch.zeros(2, 2, 6, 4).long()}, DtypeError, "k of dtype"),
        ({"k": torch.zeros(2, 3, 6, 4)}, ShapeError, "3 heads cannot share the 2 of q"),
        ({"log_w": torch.zeros(2, 2, 6, 3)}, ShapeError, r"log_w of shape .* 1 or 4"),
        ({"log_w": torch.full((2, 1), 0.1)}, ValueRangeError, "log_w of up to 0.1"),
        ({"a": torch.zeros(2, 2, 6, 4)}, UsageError, "belong together"),
        ({"b_scale": torch.zeros(2, 2, 6)}, UsageError, "belong together"),
        ({"k_scale": torch.zeros(2, 2, 6, 1)}, ShapeError, "k_scale of shape"),
        ({"bonus": torch.zeros(2, 5)}, ShapeError, "bonus of shape"),
        ({"scaling": float("nan")}, ValueRangeError, "scaling"),
    ],
)
def test_what_does_not_fit_is_refused(
    change: dict[str, Any], error: type[Exception], match: str
) -> None:
    good: dict[str, Any] = {
        "q": torch.zeros(2, 2, 6, 4),
        "k": torch.zeros(2, 2, 6, 4),
        "log_w": torch.zeros(2, 2, 6, 1),
    }
    RecurrentPattern(**good)
    with pytest.raises(error, match=match):
        RecurrentPattern(**{**good, **change})


def test_constructors_refuse_what_does_not_fit() -> None:
    q = torch.zeros(1, 2, 6, 4)
    gate = torch.zeros(1, 2, 6)
    with pytest.raises(ShapeError, match="forget_gate of shape"):
        RecurrentPattern.exponential_gating(
            q, q, input_gate=gate, forget_gate=gate[..., None], scaling=1.0
        )
    with pytest.raises(ShapeError, match="log_w of shape"):
        RecurrentPattern.gated_delta(q, q, log_w=gate, beta=gate)
    with pytest.raises(ShapeError, match="3 heads cannot share the 2 of"):
        three = torch.zeros(1, 3, 6)
        RecurrentPattern.gated_delta(q, q, log_w=torch.zeros(1, 3, 6, 4), beta=three)
    with pytest.raises(ValueRangeError, match="log_w of up to 1"):
        RecurrentPattern.gated_delta(q, q, log_w=gate[..., None] + 1, beta=gate)


def test_positions_that_are_not_there() -> None:
    with pytest.raises(OutOfRangeError, match="query position 50 is out of range"):
        whole().rows([50])
    with pytest.raises(OutOfRangeError, match="head 4 is out of range"):
        whole().columns([0], head=4)
    with pytest.raises(OutOfRangeError, match="batch row 3 is out of range"):
        whole().rows([0], batch=3)


def test_logsigmoid_is_a_decay() -> None:
    """A gate's log is never above 0, whatever the gate: what models give is taken."""
    gate = torch.tensor([-200.0, -1.0, 0.0, 30.0, 200.0])[None, None, :, None]
    q = normal(1, 1, 5, 3)
    assert_consistent(RecurrentPattern(q, q, log_w=logsigmoid(gate)))
