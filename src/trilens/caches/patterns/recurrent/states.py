"""What a recurrence remembers after chosen tokens: its state, walked forward chunk by chunk.

Three kinds of state cover the recurrences that are known: a matrix per head, a row of states per
channel, and a softmax per channel kept as numerator, denominator and running maximum.

Positions are ascending and distinct; a state costs what the recurrence costs, once for all of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from trilens.caches.patterns.channel.blocks import ChannelInputs
from trilens.caches.patterns.recurrent.blocks import Recurrence, chunks, decay_of, per_head

__all__ = ["channel_states", "matrix_reads", "matrix_states", "softmax_reads", "softmax_states"]

# Scratch memory of the decays of one block of tokens, channels and states.
_SCRATCH_BYTES = 2 * 2**20
# Tokens of one block of a softmax per channel.
_BLOCK = 256
# What a running maximum begins with: below every key, and no infinity that could make a NaN.
_LOWEST = -1e38


@torch.no_grad()
def matrix_states(recurrence: Recurrence, values: Tensor, positions: Sequence[int]) -> Tensor:
    """S after each position: [n, heads, d, d_v].

    Shapes
        values [heads, seq, d_v].
    """
    heads, _, d = recurrence.heads, *recurrence.q.shape[1:]
    state = values.new_zeros((heads, d, values.shape[2]), dtype=recurrence.dtype)
    found, ends = [], [position + 1 for position in positions]
    with torch.autocast(device_type=values.device.type, enabled=False):
        for chunk in chunks(recurrence, ends[-1], ends=ends):
            own = values[:, chunk.start : chunk.stop].to(recurrence.dtype)
            state = chunk.advance(state, own)
            if chunk.stop in ends:
                found.append(state)
            if len(found) == len(ends):
                break
    return torch.stack(found)


@torch.no_grad()
def matrix_reads(recurrence: Recurrence, states: Tensor, positions: Sequence[int]) -> Tensor:
    """What each position's own query reads of the state after it: [heads, n, d_v]."""
    index = torch.tensor(positions, device=states.device)
    queries = per_head(recurrence.q[:, index].to(states.dtype), recurrence.heads)
    read = (queries[:, :, None] @ states.transpose(0, 1))[:, :, 0] * recurrence.scaling
    if recurrence.row_scale is not None:
        scale = per_head(recurrence.row_scale[:, index].to(states.dtype), recurrence.heads)
        read = read * scale[..., None]
    return read


@torch.no_grad()
def channel_states(inputs: ChannelInputs, values: Tensor, positions: Sequence[int]) -> Tensor:
    """h after each position: [n, channels, states].

    Shapes
        values [channels, seq].
    """
    channels, states = inputs.rate.shape
    dtype = inputs.rate.dtype
    size = max(1, _SCRATCH_BYTES // (channels * states * dtype.itemsize))
    state = inputs.rate.new_zeros(channels, states)
    # PROMOTE: differences of the steps' float32 sums would lose the digits that they do not have.
    reached = inputs.sums.new_zeros(channels)
    found, ends = [], {position + 1 for position in positions}
    for block in _blocks(sorted(ends), size):
        last = inputs.sums[block.stop - 1]
        gap = (last - inputs.sums[block]).to(dtype)
        left = decay_of(gap[..., None] * inputs.rate, dtype)
        writes = inputs.write[block] * values[:, block].T.to(dtype)
        state = decay_of((last - reached).to(dtype)[:, None] * inputs.rate, dtype) * state
        # In place, ten times as fast as an einsum of the three.
        state = state + left.mul_(writes[..., None]).mul_(inputs.k[block, None]).sum(0)
        reached = last
        if block.stop in ends:
            found.append(state)
    return torch.stack(found)


@torch.no_grad()
def softmax_states(
    keys: Tensor, values: Tensor, log_w: Tensor, positions: Sequence[int]
) -> dict[str, Tensor]:
    """Numerator, denominator and maximum after each position, −1 for none, each [n, channels].

        maximum m_t = max(m_{t−1} + log_w, k_t)
        numerator = Σ_j exp((t − j) · log_w + k_j − m_t) v_j, the denominator without v

    Shapes
        keys, values [seq, channels]; log_w [channels], up to 0.
    """
    # PROMOTE: exponents of size seq · log_w leave a float32 no digits behind the point.
    k, v, log_w = keys.double(), values.double(), log_w.double()
    above, below = torch.zeros_like(log_w), torch.zeros_like(log_w)
    highest = torch.full_like(log_w, _LOWEST)
    ends = {position + 1 for position in positions}
    found = [(above, below, highest)] if 0 in ends else []
    for block in _blocks(sorted(ends), _BLOCK):
        count = block.stop - block.start
        ages = torch.arange(count - 1, -1, -1, device=k.device)[:, None]
        logs = k[block] + ages * log_w
        before = highest + count * log_w
        highest = torch.maximum(before, logs.amax(0))
        weights, kept = (logs - highest).exp(), (before - highest).exp()
        above = kept * above + (weights * v[block]).sum(0)
        below = kept * below + weights.sum(0)
        if block.stop in ends:
            found.append((above, below, highest))
    work = torch.promote_types(keys.dtype, torch.float32)
    parts = (torch.stack(part).to(work) for part in zip(*found, strict=True))
    return dict(zip(("numerator", "denominator", "maximum"), parts, strict=True))


@torch.no_grad()
def softmax_reads(
    parts: dict[str, Tensor], keys: Tensor, values: Tensor, bonus: Tensor, positions: Sequence[int]
) -> Tensor:
    """What each position reads: of the state after the token before it, and of its own token.

    Shapes
        parts of `softmax_states` at the positions before, [n, channels]; keys, values [seq,
        channels]; result [n, channels].
    """
    own = (keys[list(positions)] + bonus).double()
    highest = torch.maximum(parts["maximum"].double(), own)
    old, new = (parts["maximum"].double() - highest).exp(), (own - highest).exp()
    above = old * parts["numerator"] + new * values[list(positions)]
    return above / (old * parts["denominator"] + new)


def _blocks(ends: Sequence[int], size: int) -> Iterator[slice]:
    """Slices of at most `size` tokens, in order, that end at each of `ends`, too."""
    start = 0
    for end in ends:
        while start < end:
            stop = min(start + size, end)
            yield slice(start, stop)
            start = stop
