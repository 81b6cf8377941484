"""Which sums are counted, and what a tensor held before it was written into."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from trilens.models.sites.head_out import by_head, is_projection, projection_bias
from trilens.models.sites.sums import is_stream_sum
from trilens.taps.overwritten import Overwritten

BATCH, SEQ, WIDTH = 2, 5, 8


@pytest.mark.parametrize("shape", [(BATCH, SEQ, WIDTH), (SEQ, BATCH, WIDTH), (BATCH * SEQ, WIDTH)])
@pytest.mark.parametrize("name", ["add", "__add__", "__iadd__", "add_"])
def test_sums_of_two_streams_count(shape: tuple[int, ...], name: str) -> None:
    streams = torch.zeros(shape), torch.ones(shape)
    assert is_stream_sum(name, streams, {}, BATCH, SEQ, WIDTH)


@pytest.mark.parametrize(
    ("name", "left", "right", "options"),
    [
        ("sub", torch.zeros(BATCH, SEQ, WIDTH), torch.zeros(BATCH, SEQ, WIDTH), {}),
        ("add", torch.zeros(BATCH, SEQ, WIDTH), 1.0, {}),
        ("add", torch.zeros(BATCH, SEQ, WIDTH), torch.zeros(WIDTH), {}),
        ("add", torch.zeros(BATCH, SEQ, WIDTH), torch.zeros(BATCH, SEQ, WIDTH), {"alpha": 2}),
        ("add", torch.zeros(3, WIDTH), torch.zeros(3, WIDTH), {}),
        ("add", torch.zeros(BATCH, SEQ, WIDTH, dtype=int), torch.zeros(BATCH, SEQ, WIDTH), {}),
        (
            "add",
            torch.zeros(BATCH, SEQ, WIDTH),
            nn.Parameter(torch.zeros(BATCH, SEQ, WIDTH)),
            {},
        ),
    ],
)
def test_other_sums_do_not(name: str, left: object, right: object, options: dict) -> None:
    assert not is_stream_sum(name, (left, right), options, BATCH, SEQ, WIDTH)


def test_a_tensor_is_given_back_as_it_was_seen() -> None:
    kept = Overwritten()
    whole = torch.arange(12.0).reshape(3, 4)
    part = whole[1:, ::2]
    first, view = kept.see(whole), kept.see(part)
    kept.before_write(whole)
    whole += 100
    second = kept.see(part)
    kept.before_write(part)
    part.mul_(0)
    assert torch.equal(kept.as_seen(first), torch.arange(12.0).reshape(3, 4))
    assert torch.equal(kept.as_seen(view), torch.arange(12.0).reshape(3, 4)[1:, ::2])
    assert torch.equal(kept.as_seen(second), torch.arange(12.0).reshape(3, 4)[1:, ::2] + 100)
    assert kept.as_seen(kept.see(part)) is part


def test_what_nobody_recorded_is_not_copied() -> None:
    kept = Overwritten()
    tensor = torch.zeros(4)
    kept.before_write(tensor)
    assert not kept._copies


class Wrapped(nn.Linear):
    """A linear map whose weight is not kept plainly."""


@pytest.mark.parametrize("kind", [nn.Linear, Wrapped])
def test_the_heads_and_the_bias_sum_to_the_projection(kind: type[nn.Linear]) -> None:
    torch.manual_seed(0)
    projection = kind(12, 7).double()
    assert is_projection(projection)
    value = torch.randn(2, 5, 12, dtype=torch.float64)
    with torch.no_grad():
        parts = by_head(value.unflatten(-1, (3, 4)), projection)
        assert parts.shape == (2, 5, 3, 7)
        alone = value.clone()
        alone[..., 4:] = 0
        bias = projection_bias(projection, value)
        assert torch.allclose(parts[..., 0, :], projection(alone) - projection.bias)
        assert torch.allclose(parts.sum(-2) + bias, projection(value))
