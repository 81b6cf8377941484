"""ChannelPattern and DecayedSoftmaxPattern: the mean over channels of what the kernels do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.mamba.modeling_mamba import mamba_selective_scan
from transformers.models.recurrent_gemma.modeling_recurrent_gemma import RecurrentGemmaRglru
from transformers.models.rwkv.modeling_rwkv import rwkv_linear_attention_cpu

from recurrent_cases import assert_consistent, assert_gives, normal
from tolerances import assert_close_sums, assert_near, sum_error
from trilens.caches.attention import AttentionCache, rebuild_pattern
from trilens.caches.patterns.channel.pattern import ChannelPattern, DecayedSoftmaxPattern
from trilens.errors import DtypeError, ShapeError, UsageError, ValueRangeError

SEQ, CHANNELS, STATES = 150, 12, 4


def selective(seed: int = 0, seq: int = SEQ) -> dict[str, Tensor]:
    return {
        "step": torch.nn.functional.softplus(normal(2, seq, CHANNELS, seed=seed)),
        "rate": -normal(CHANNELS, STATES, seed=seed + 1).exp(),
        "q": normal(2, seq, STATES, seed=seed + 2),
        "k": normal(2, seq, STATES, seed=seed + 3),
    }


def scan(x: dict[str, Tensor], v: Tensor) -> Tensor:
    """The model's own scan, the same values in every channel of [batch, seq, channels]."""
    same = v[..., None].expand(-1, -1, x["step"].shape[2])
    out = mamba_selective_scan(
        same.transpose(1, 2).double(),
        x["step"].transpose(1, 2).double(),
        x["rate"].double(),
        x["k"].transpose(1, 2).double(),
        x["q"].transpose(1, 2).double(),
    )
    return out.transpose(1, 2)


def mean_over_channels(pattern: Any, v: Tensor, out: Tensor) -> None:
    """With the same values in every channel, the mean output is the mean pattern's."""
    assert_gives(pattern.dense(), v[:, None, :, None], out.mean(2)[:, None, :, None])


@pytest.mark.parametrize("block_bytes", [2**25, 4 * SEQ * STATES * 4 * 5])
def test_a_selective_scan_against_the_kernel(
    monkeypatch: pytest.MonkeyPatch, block_bytes: int
) -> None:
    monkeypatch.setattr("trilens.caches.patterns.channel.pattern.BLOCK_BYTES", block_bytes)
    x, v = selective(), normal(2, SEQ, seed=9)
    pattern = ChannelPattern(**x)
    assert (pattern.heads, pattern.n_channels, pattern.signed) == (1, CHANNELS, True)
    blocks = len(list(pattern.recurrences(0)))
    assert blocks == (1 if block_bytes == 2**25 else 3)
    out = scan(x, v)
    mean_over_channels(pattern, v, out)
    assert_consistent(pattern)
    for channel in (0, 7, CHANNELS - 1):
        one = pattern.channels(channel, channel + 1)
        mean_over_channels(one, v, out[..., channel : channel + 1])


def test_a_scan_that_forgets_at_once_and_one_that_never_does() -> None:
    x, v = selective(), normal(2, SEQ, seed=9)
    x["rate"] = torch.tensor([0.0, -1e-6, -1.0, -5000.0]).expand(CHANNELS, STATES)
    pattern = ChannelPattern(**x)
    mean_over_channels(pattern, v, scan(x, v))
    assert_consistent(pattern)


@pytest.mark.parametrize("gated", [True, False])
def test_a_gated_linear_recurrence_against_the_kernel(gated: bool) -> None:
    w = torch.sigmoid(3 * normal(2, SEQ, CHANNELS))
    w[:, 0] = 0
    w[1, 70] = 0
    w[0, 90:99] = 1
    gate = torch.sigmoid(normal(2, SEQ, CHANNELS, seed=1)) if gated else None
    v = normal(2, SEQ, seed=2)
    values = v[..., None] * (torch.ones_like(w) if gate is None else gate)
    no_reset = torch.zeros(2, SEQ, 1, dtype=torch.bool)
    out, _ = RecurrentGemmaRglru._rnn_scan(
        None, values.double(), w.double(), no_reset, None, torch.float64
    )
    pattern = ChannelPattern.gated(w.log(), gate)
    mean_over_channels(pattern, v, out)
    assert_consistent(pattern)
    assert_consistent(pattern.channels(3, 5))


def decayed(scale: float = 1.0) -> tuple[DecayedSoftmaxPattern, Tensor, Tensor, Tensor]:
    k = scale * normal(2, SEQ, CHANNELS)
    time_decay = 2 * normal(CHANNELS, seed=1)
    bonus = normal(CHANNELS, seed=2)
    pattern = DecayedSoftmaxPattern(k, log_w=-time_decay.exp(), bonus=bonus)
    return pattern, k, time_decay, bonus


@pytest.mark.parametrize("scale", [0.1, 2.0, 60.0])
def test_a_decayed_softmax_against_the_kernel(scale: float) -> None:
    pattern, k, time_decay, bonus = decayed(scale)
    v = normal(2, SEQ, seed=3)
    same = v[..., None].expand(-1, -1, CHANNELS)
    # In float64: the kernel's own running maximum costs float32 five digits of keys of 60.
    out, _ = rwkv_linear_attention_cpu(*(t.double() for t in (time_decay, bonus, k, same)))
    mean_over_channels(pattern, v, out)
    assert_consistent(pattern)
    ones = torch.ones(2, 1, SEQ)
    assert_close_sums(pattern.dense().sum(-1), ones, 1.0, SEQ * CHANNELS, torch.float32)


def test_a_decayed_softmax_has_statistics() -> None:
    pattern = decayed()[0]
    assert not pattern.signed
    weights = pattern.dense()[1].double()
    cache = AttentionCache.from_layers({0: pattern}, n_model_layers=1)
    assert cache.relu_l1().pattern(0) is pattern
    gap = torch.arange(SEQ)[:, None] - torch.arange(SEQ)
    want = {
        "entropy": torch.special.entr(weights).sum(-1),
        "mean_distance": (weights * gap.clamp(min=0)).sum(-1),
        "received": weights.sum(1) / torch.arange(SEQ, 0, -1),
        "sink_mass": torch.zeros(1, SEQ),
    }
    for question, answer in want.items():
        got = torch.from_numpy(getattr(cache, question)(0, batch=1))
        # Sums over the tokens of positive terms: of the distances, and of p · ln p.
        terms = answer.clamp(min=1.0)
        assert_close_sums(got, answer, terms, SEQ, torch.float32)


@pytest.mark.parametrize("name", ["selective", "gated", "softmax"])
def test_unpadded_rebuilt_and_saved(name: str) -> None:
    pattern = {
        "selective": lambda: ChannelPattern(**selective()),
        "gated": lambda: ChannelPattern.gated(torch.sigmoid(normal(2, SEQ, CHANNELS)).log()),
        "softmax": lambda: decayed()[0],
    }[name]()
    dense = pattern.dense()
    one = pattern.unpad(1, 40)
    # Sums over channels and states.
    close = float(sum_error(CHANNELS * STATES, 1, torch.float32))
    assert_near(one.dense(), dense[1:, :, :40, :40], close)
    assert one.nbytes < pattern.nbytes / 5
    rebuilt = rebuild_pattern(pattern.tensors(), pattern.params())
    assert type(rebuilt) is type(pattern)
    assert torch.equal(rebuilt.dense(), dense)
    assert torch.equal(pattern.to("cpu").dense(), dense)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"step": -torch.ones(2, 5, 3)}, ValueRangeError, "step down to -1"),
        ({"rate": torch.ones(3, 4)}, ValueRangeError, "rate of up to 1"),
        ({"rate": -torch.ones(4, 4)}, ShapeError, "rate of shape"),
        ({"q": torch.ones(2, 5, 3)}, ShapeError, "q of shape"),
        ({"write": torch.ones(2, 5, 2)}, ShapeError, "write of shape"),
        ({"k": torch.ones(2, 5, 4).int()}, DtypeError, "k of dtype"),
        ({"k": 1.0}, UsageError, "k of type float"),
    ],
)
def test_what_does_not_fit_is_refused(
    change: dict[str, Any], error: type[Exception], match: str
) -> None:
    good = {
        "step": torch.ones(2, 5, 3),
        "rate": -torch.ones(3, 4),
        "q": torch.ones(2, 5, 4),
        "k": torch.ones(2, 5, 4),
    }
    pattern = ChannelPattern(**good)
    with pytest.raises(ValueRangeError, match="channels 2–4 are out of range"):
        pattern.channels(2, 4)
    with pytest.raises(error, match=match):
        ChannelPattern(**{**good, **change})


def test_a_decayed_softmax_refuses_what_does_not_fit() -> None:
    k = torch.zeros(1, 4, 3)
    with pytest.raises(ValueRangeError, match="log_w of up to 2"):
        DecayedSoftmaxPattern(k, log_w=torch.full((3,), 2.0), bonus=torch.zeros(3))
    with pytest.raises(ShapeError, match="bonus of shape"):
        DecayedSoftmaxPattern(k, log_w=-torch.ones(3), bonus=torch.zeros(4))
