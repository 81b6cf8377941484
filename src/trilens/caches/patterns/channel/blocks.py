"""A few rows or columns of the mean over channels of diagonal recurrences, pair by pair.

    W[t, j] = mean over c of write_j[c] Σ_n q_t[n] k_j[n] exp((s_t[c] − s_j[c]) · rate[c, n])

with s the steps' running sum. One exponential per (token, channel, state) and nothing carried from
token to token: for a handful of rows that is several times cheaper than the walk through chunks,
which pays for decays of its own before the first query comes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from trilens.caches.patterns.recurrent.blocks import decay_of

__all__ = ["ChannelInputs"]

# Exponentials of one block: what a processor keeps close.
_SCRATCH_BYTES = 2 * 2**20
# From here on e^x is 0, in float64 too.
_FORGETS = 1000.0


@dataclass(frozen=True, slots=True)
class ChannelInputs:
    """One prompt's inputs, in the dtype to compute in.

    Shapes
        sums [seq, channels] float64, rate [channels, states], q, k [seq, states], write [seq,
        channels]
    """

    sums: Tensor
    rate: Tensor
    q: Tensor
    k: Tensor
    write: Tensor

    @classmethod
    def of(cls, step: Tensor, rate: Tensor, q: Tensor, k: Tensor, write: Tensor) -> ChannelInputs:
        """With the running sum of the steps [seq, channels]."""
        # A step that empties every state of its channel need not be longer, and infinite ones may
        # not be: the sums after them could not be told apart.
        slowest = rate.double().abs().masked_fill(rate == 0, torch.inf).amin(1)
        # PROMOTE: differences of sums of float32 steps lose the digits that the sums do not have.
        steps = step.double().clamp(max=_FORGETS / slowest.clamp(max=1e300))
        return cls(sums=steps.cumsum(0), rate=rate, q=q, k=k, write=write)

    def row(self, position: int) -> Tensor:
        """Weights from one query position: [seq]."""
        return self._weights(range(position + 1), position, query=True)

    def column(self, position: int) -> Tensor:
        """Weights to one key position: [seq]."""
        return self._weights(range(position, self.q.shape[0]), position, query=False)

    def _weights(self, others: range, fixed: int, *, query: bool) -> Tensor:
        """The pairs of one token with others, as the query or as the key."""
        out = self.q.new_zeros(self.q.shape[0])
        channels, states = self.rate.shape
        step = max(1, _SCRATCH_BYTES // (channels * states * self.q.element_size()))
        for start in range(others.start, others.stop, step):
            block = slice(start, min(start + step, others.stop))
            gap = (self.sums[block] - self.sums[fixed]).abs_().to(self.q.dtype)
            left = decay_of(gap[..., None] * self.rate, gap.dtype)
            fixed_, moving = (self.q, self.k) if query else (self.k, self.q)
            both = (fixed_[fixed] * moving[block])[..., None]
            write = self.write[block] if query else self.write[fixed]
            out[block] = ((left @ both)[..., 0] * write).mean(1)
        return out
