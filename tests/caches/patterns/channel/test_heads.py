"""ChannelHeadsPattern: every head is its own part, whatever is asked."""

from __future__ import annotations

import pytest
import torch

from tolerances import assert_near, sum_error
from trilens.caches.attention import rebuild_pattern
from trilens.caches.patterns.channel.heads import ChannelHeadsPattern
from trilens.caches.patterns.channel.pattern import ChannelPattern
from trilens.errors import OutOfRangeError, ShapeError, UsageError

SEQ, CHANNELS, STATES = 11, 6, 3
# Two orders of the same float32 sums, of the largest weight.
TOLERANCE = float(sum_error(CHANNELS * STATES, 1, torch.float32))


def part(seed: int, seq: int = SEQ) -> ChannelPattern:
    generator = torch.Generator().manual_seed(seed)
    q, k = (torch.randn(2, seq, STATES, generator=generator) for _ in range(2))
    return ChannelPattern(
        step=torch.rand(2, seq, CHANNELS, generator=generator),
        rate=-torch.rand(CHANNELS, STATES, generator=generator),
        q=q,
        k=k,
    )


def heads() -> ChannelHeadsPattern:
    return ChannelHeadsPattern([part(0), part(1), part(2)])


def test_a_head_is_its_part() -> None:
    pattern = heads()
    assert (pattern.batch, pattern.heads, pattern.seq_q, pattern.seq_k) == (2, 3, SEQ, SEQ)
    dense = pattern.dense()
    for head, own in enumerate(pattern.parts):
        assert_near(dense[:, head], own.dense()[:, 0], TOLERANCE)
        assert_near(pattern.rows([3, -1], head, 1), own.rows([3, -1], batch=1), TOLERANCE)
        assert_near(pattern.columns([2], head, 1), own.columns([2], batch=1), TOLERANCE)
    least = float(dense.abs().max())
    assert_near(pattern.rows([4])[:, 0], dense[0, :, 4], TOLERANCE, least)
    assert_near(pattern.columns([4])[..., 0], dense[0, :, :, 4], TOLERANCE, least)


def test_rebuilt_moved_and_unpadded() -> None:
    pattern = heads()
    dense = pattern.dense()
    again = rebuild_pattern(pattern.tensors(), pattern.params())
    assert isinstance(again, ChannelHeadsPattern)
    assert torch.equal(again.dense(), dense)
    assert torch.equal(pattern.to("cpu").dense(), dense)
    short = pattern.unpad(1, 7)
    assert_near(short.dense(), dense[1:, :, :7, :7], TOLERANCE)
    assert short.nbytes < pattern.nbytes
    assert pattern.relu_l1().entropy(1).shape == (3, SEQ)


def test_refusals() -> None:
    with pytest.raises(UsageError, match="one ChannelPattern or more"):
        ChannelHeadsPattern([])
    with pytest.raises(ShapeError, match="do not fit each other"):
        ChannelHeadsPattern([part(0), part(1, seq=5)])
    with pytest.raises(OutOfRangeError, match="head 3"):
        heads().rows([0], 3)
    with pytest.raises(OutOfRangeError, match="head -1"):
        heads().columns([0], -1)
    with pytest.raises(UsageError, match="name a head"):
        heads().recurrences(0)
    with pytest.raises(UsageError, match=r"relu_l1\(\)"):
        heads().entropy()
