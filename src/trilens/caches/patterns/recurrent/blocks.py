"""Weights of a linear recurrence, pulled back and pushed forward chunk by chunk.

    S_t = (diag(w_t) + b_t a_tᵀ) S_{t−1} + k_t v_tᵀ        y_t = q_tᵀ S_t

The weights W of y = W v are W[t, j] = q_tᵀ M_t ⋯ M_{j+1} k_j with M_t = diag(w_t) + b_t a_tᵀ. A row
pulls its query back from t to 0, a column pushes its key forward from j to the end. Both go chunk
by chunk: within a chunk the readings of the state by the vectors a solve a unit triangular system,
so that a chunk is a few matrix products for all heads at once.

Log decays are summed within chunks, in float64. A float32 weight that has decayed by e⁻ˣ is off by
about (1 + x) · 6e−8 of itself, however long the sequence: measured up to 20,000 tokens, without a
and b, 2e−7 of the row's largest weight.

Boundaries are counted inside a chunk: boundary i lies before its token i. Token j writes at
boundary j + 1 (its own decay does not touch it), a_i reads at boundary i.

Source: arXiv 2406.06484 (the chunked form of delta rules), arXiv 2403.01590 (hidden attention).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import pad

__all__ = [
    "Chunk",
    "Recurrence",
    "chunks",
    "column_weights",
    "decay_of",
    "per_head",
    "row_sums",
    "row_weights",
]

# A log decay below this forgets everything, in float64 too; −inf − (−inf) would be no number.
_FORGETS = -1000.0
# Log decay that a chunk may span if its products are split around the middle: factors of exp(±20),
# and products up to exp(40) of what is hidden, are far from the ends of float32.
_SPAN = 40.0
# Scratch memory of one pairwise product of steep decays.
_SCRATCH_BYTES = 8 * 2**20


@dataclass(frozen=True, slots=True)
class Recurrence:
    """One prompt's recurrence. Head h of n heads reads index h // (n // own) of a tensor with own.

    Shapes
        q, k, a, b [own, seq, d]; log_w [own, 1 or seq, 1 or d]; k_scale, b_scale, row_scale,
        diagonal [own, seq].

    Attributes:
        heads: heads of the pattern.
        dtype: what to compute in.
        q: queries.
        k: keys; k_scale multiplies them.
        log_w: log of the decay, up to 0; minus infinity forgets.
        a: what the state is read with before a token changes it; with b, or neither.
        b: where that reading is added back; b_scale multiplies it.
        scaling: factor of every weight.
        row_scale: factor of every row.
        diagonal: where given, a query reads the state before its own token, and this is the weight
            of its own token (before scaling and row_scale).
    """

    heads: int
    dtype: torch.dtype
    q: Tensor
    k: Tensor
    log_w: Tensor
    k_scale: Tensor | None = None
    a: Tensor | None = None
    b: Tensor | None = None
    b_scale: Tensor | None = None
    scaling: float = 1.0
    row_scale: Tensor | None = None
    diagonal: Tensor | None = None

    @property
    def seq(self) -> int:
        """Tokens."""
        return self.q.shape[1]

    @property
    def chunk_tokens(self) -> int:
        """Tokens taken at once: fewer where a pair of tokens costs more."""
        if self.a is None:
            return 256 if self.log_w.shape[-1] == 1 else 64
        return 64 if self.log_w.shape[-1] == 1 else 32


class Chunk:
    """Tokens start … stop − 1, in the dtype to compute in, one entry for every head.

    Writers are what the tokens add to the state: every b, where there are any, then every k.
    """

    def __init__(self, recurrence: Recurrence, start: int, stop: int, steep: bool) -> None:
        self.start = start
        self.stop = stop
        self._steep = steep
        # A query that reads the state before its own token stands one boundary earlier.
        self.query_shift = int(recurrence.diagonal is None)
        cut, heads = slice(start, self.stop), recurrence.heads

        def part(tensor: Tensor, scale: Tensor | None = None) -> Tensor:
            own = per_head(tensor[:, cut].to(recurrence.dtype), heads)
            if scale is None:
                return own
            return own * per_head(scale[:, cut].to(recurrence.dtype), heads)[..., None]

        log_w = recurrence.log_w
        log_w = log_w if log_w.shape[1] == 1 else log_w[:, cut]
        log_w = per_head(log_w, heads).expand(-1, self.stop - start, -1)
        # PROMOTE: differences of sums of float32 logs lose the digits that the sums do not have.
        self.bounds = pad(log_w.double().clamp(min=_FORGETS).cumsum(1), (0, 0, 1, 0))
        self.tokens = torch.arange(self.stop - start, device=log_w.device)
        self.q = part(recurrence.q)
        self.a: Tensor | None = None
        self.writers = part(recurrence.k, recurrence.k_scale)
        self.wrote, self.wrote_at, self._first_key = self.bounds[:, 1:], self.tokens + 1, 0
        if recurrence.a is not None and recurrence.b is not None:
            self.a = part(recurrence.a)
            self.writers = torch.cat([part(recurrence.b, recurrence.b_scale), self.writers], 1)
            self.wrote, self.wrote_at = self.wrote.repeat(1, 2, 1), self.wrote_at.repeat(2)
            self._first_key = self.stop - start
        self._raised: Tensor | None = None

    @property
    def total(self) -> Tensor:
        """Decay over the chunk: [heads, 1, 1 or d]."""
        return decay_of(self.bounds[:, -1:], self.q.dtype)

    def ended(self) -> Tensor:
        """The writers, decayed to the chunk's end."""
        return self.writers * decay_of(self.bounds[:, -1:] - self.wrote, self.q.dtype)

    def found(self, x: Tensor, at: Tensor, some: Tensor | slice = slice(None)) -> Tensor:
        """What x, read at the boundaries `at`, finds of some writers; 0 of what is written later.

        Shapes
            x [heads, n, d], at [n]; result [heads, n, writers].
        """
        wrote, later = self.wrote[:, some], at[:, None] < self.wrote_at[some]
        read = self._bounds_at(at)
        if read.shape[-1] == 1:
            decay = decay_of((read - wrote.mT).masked_fill_(later, -torch.inf), x.dtype)
            return (x @ self.writers[:, some].mT).mul_(decay)
        if self._steep:
            return _pair_by_pair(x, read, self.writers[:, some], wrote, later)
        # PROMOTE: exponents of up to 20 in float32 are off by 1e-6, and so would be the factors.
        middle = self.bounds[:, -1:] / 2
        if self._raised is None:
            self._raised = self.writers * (middle - self.wrote).exp_().to(x.dtype)
        lowered = x * (read - middle).exp_().to(x.dtype)
        return (lowered @ self._raised[:, some].mT).mul_(~later)

    def from_start(self, readers: Tensor, at: Tensor) -> Tensor:
        """Vectors read at the boundaries `at`, decayed from the chunk's start to there."""
        return readers * decay_of(self._bounds_at(at), readers.dtype)

    def pull(self, pulled: Tensor, queries: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
        """Pull queries from later chunks and this chunk's own back to its start.

        Shapes
            pulled [heads, m, d], queries [heads, n, d], at [n] boundaries; weights [heads, m + n,
            tokens] and the queries at the chunk's start [heads, m + n, d].
        """
        found, passed = pulled @ self.ended().mT, pulled * self.total
        if len(at):
            found = torch.cat([found, self.found(queries, at)], dim=1)
            passed = torch.cat([passed, self.from_start(queries, at)], dim=1)
        if self.a is None:
            return found, passed
        read, weights = found.tensor_split(2, dim=2)
        of_b, of_k = self.found(self.a, self.tokens).tensor_split(2, dim=2)
        # The diagonal of the system is 1 by construction, so only −of_b is handed over.
        read = torch.linalg.solve_triangular(
            -of_b, read, upper=False, left=False, unitriangular=True
        )
        return weights + read @ of_k, passed + read @ self.from_start(self.a, self.tokens)

    def push(self, pushed: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Push what earlier chunks wrote, and this chunk's own keys, forward to its end.

        Shapes
            pushed [heads, d, m], keys [n] tokens of the chunk; weights [heads, tokens, m + n] and
            the written vectors at the chunk's end [heads, d, m + n].
        """
        at, own, ended = self.tokens + self.query_shift, keys + self._first_key, self.ended()
        weights, passed = self.from_start(self.q, at) @ pushed, self.total.mT * pushed
        if len(keys):
            weights = torch.cat([weights, self.found(self.q, at, own)], dim=2)
            passed = torch.cat([passed, ended[:, own].mT], dim=2)
        if self.a is None:
            return weights, passed
        read = self.from_start(self.a, self.tokens) @ pushed
        if len(keys):
            read = torch.cat([read, self.found(self.a, self.tokens, own)], dim=2)
        of_b = slice(0, self._first_key)
        system = -self.found(self.a, self.tokens, of_b)
        read = torch.linalg.solve_triangular(system, read, upper=False, unitriangular=True)
        weights = weights + self.found(self.q, at, of_b) @ read
        return weights, passed + ended[:, of_b].mT @ read

    def advance(self, state: Tensor, values: Tensor) -> Tensor:
        """The state after the chunk's tokens have written their values.

        Shapes
            state [heads, d, d_v], values [heads, tokens, d_v]; result [heads, d, d_v].
        """
        wrote = values
        if self.a is not None:
            of_b, of_k = self.found(self.a, self.tokens).tensor_split(2, dim=2)
            read = self.from_start(self.a, self.tokens) @ state + of_k @ values
            read = torch.linalg.solve_triangular(-of_b, read, upper=False, unitriangular=True)
            wrote = torch.cat([read, values], dim=1)
        return self.total.mT * state + self.ended().mT @ wrote

    def _bounds_at(self, at: Tensor) -> Tensor:
        if at is self.tokens:
            return self.bounds[:, :-1]
        return self.bounds[:, at]


@torch.no_grad()
def row_weights(recurrence: Recurrence, positions: Sequence[int]) -> Tensor:
    """Weights from the given query positions: [heads, n, seq].

    Costs O(n · seq · d) per head. What comes after a query is exactly 0.
    """
    device, (_, seq, d) = recurrence.q.device, recurrence.q.shape
    # How many tokens each query has behind it when it reads.
    reads = [position + int(recurrence.diagonal is None) for position in positions]
    order = sorted(range(len(reads)), key=lambda i: -reads[i])
    places = torch.tensor(order, dtype=torch.long, device=device)
    out = recurrence.q.new_zeros((recurrence.heads, len(reads), seq), dtype=recurrence.dtype)
    pulled = out.new_zeros((recurrence.heads, 0, d))
    taken = 0
    with torch.autocast(device_type=device.type, enabled=False):
        for chunk in chunks(recurrence, max(reads, default=0), backwards=True):
            first = taken
            while taken < len(order) and reads[order[taken]] > chunk.start:
                taken += 1
            own = order[first:taken]
            tokens = torch.tensor([positions[i] for i in own], dtype=torch.long, device=device)
            queries = per_head(recurrence.q[:, tokens].to(out.dtype), recurrence.heads)
            at = torch.tensor(
                [reads[i] - chunk.start for i in own], dtype=torch.long, device=device
            )
            weights, pulled = chunk.pull(pulled, queries, at)
            out[:, places[:taken], chunk.start : chunk.stop] = weights
    index = torch.tensor(list(positions), dtype=torch.long, device=device)
    if recurrence.diagonal is not None:
        own_weight = per_head(recurrence.diagonal[:, index].to(out.dtype), recurrence.heads)
        out.scatter_(2, index.expand(recurrence.heads, -1)[..., None], own_weight[..., None])
    return _scaled(out, recurrence, index)


@torch.no_grad()
def column_weights(recurrence: Recurrence, positions: Sequence[int]) -> Tensor:
    """Weights to the given key positions: [heads, seq, n].

    Costs O(n · seq · d) per head. What comes before a key is exactly 0.
    """
    device, (_, seq, d) = recurrence.q.device, recurrence.q.shape
    order = sorted(range(len(positions)), key=lambda i: positions[i])
    places = torch.tensor(order, dtype=torch.long, device=device)
    out = recurrence.q.new_zeros((recurrence.heads, seq, len(order)), dtype=recurrence.dtype)
    pushed = out.new_zeros((recurrence.heads, d, 0))
    taken = 0
    with torch.autocast(device_type=device.type, enabled=False):
        for chunk in chunks(recurrence, seq, first=min(positions, default=seq)):
            first = taken
            while taken < len(order) and positions[order[taken]] < chunk.stop:
                taken += 1
            own = [positions[i] - chunk.start for i in order[first:taken]]
            keys = torch.tensor(own, dtype=torch.long, device=device)
            weights, pushed = chunk.push(pushed, keys)
            out[:, chunk.start : chunk.stop, places[:taken]] = weights
    index = torch.tensor(list(positions), dtype=torch.long, device=device)
    if recurrence.diagonal is not None:
        own_weight = per_head(recurrence.diagonal[:, index].to(out.dtype), recurrence.heads)
        out.scatter_(1, index.expand(recurrence.heads, -1)[:, None], own_weight[:, None])
    return _scaled(out, recurrence, slice(None))


@torch.no_grad()
def row_sums(recurrence: Recurrence) -> Tensor:
    """Sum of every row's weights [heads, seq], without building the rows: O(seq · d) per head."""
    scratch = recurrence.q.new_zeros((recurrence.heads, recurrence.q.shape[2], 1))
    pushed = scratch.to(recurrence.dtype)
    sums = []
    with torch.autocast(device_type=scratch.device.type, enabled=False):
        for chunk in chunks(recurrence, recurrence.seq):
            weights, passed = chunk.push(pushed, chunk.tokens)
            sums.append(weights.sum(2))
            pushed = passed.sum(2, keepdim=True)
    total = torch.cat(sums, dim=1)
    if recurrence.diagonal is not None:
        total = total + per_head(recurrence.diagonal.to(total.dtype), recurrence.heads)
    return _scaled(total[..., None], recurrence, slice(None))[..., 0]


def decay_of(log: Tensor, dtype: torch.dtype) -> Tensor:
    """exp of logs up to 0, 0 where less than e⁻⁸⁰ is left (e⁻⁷⁰⁰ in float64); a new tensor.

    Where exp nears the smallest normal number and below, it takes fifty times as long.
    """
    lowest = -700.0 if dtype == torch.float64 else -80.0
    return torch.threshold_(log.to(dtype).clamp(min=lowest).exp_(), math.exp(lowest) * 1.001, 0.0)


def chunks(
    recurrence: Recurrence,
    stop: int,
    *,
    first: int = 0,
    backwards: bool = False,
    ends: Sequence[int] = (),
) -> Iterator[Chunk]:
    """The chunks that hold tokens first … stop − 1.

    Args:
        recurrence: one prompt's.
        stop: where to stop; the last chunk goes on to its own end.
        first: a token of the first chunk.
        backwards: begin with the last chunk.
        ends: boundaries at which a chunk has to end, too: ascending.
    """
    size, seq = recurrence.chunk_tokens, recurrence.seq
    steep = _steep_chunks(recurrence)
    numbers = range(first // size, -(-stop // size))
    for number in reversed(numbers) if backwards else numbers:
        start, end = number * size, min((number + 1) * size, seq)
        cuts = [start, *(cut for cut in ends if start < cut < end), end]
        parts = list(pairwise(cuts))
        for begin, until in reversed(parts) if backwards else parts:
            yield Chunk(recurrence, begin, until, steep[number])


def _steep_chunks(recurrence: Recurrence) -> list[bool]:
    """For every chunk, whether any channel decays too far to split products around the middle."""
    size, log_w = recurrence.chunk_tokens, recurrence.log_w
    n = -(-recurrence.seq // size)
    if log_w.shape[-1] == 1:
        return [False] * n
    if log_w.shape[1] == 1:
        return [bool(log_w.amin() * size < -_SPAN)] * n
    steep = []
    for start in range(0, recurrence.seq, size):
        # Asked of the device once, below: one wait instead of one per chunk.
        steep.append(log_w[:, start : start + size].float().sum(1).amin() < -_SPAN)
    return torch.stack(steep).tolist()


def _pair_by_pair(x: Tensor, read: Tensor, y: Tensor, wrote: Tensor, later: Tensor) -> Tensor:
    """Σ_d x[n, d] exp(read[n, d] − wrote[m, d]) y[m, d], every exponent on its own."""
    heads, n, d = x.shape
    m = y.shape[1]
    out = x.new_zeros((heads, n, m))
    step = max(1, _SCRATCH_BYTES // (8 * max(1, heads * n * m)))
    for start in range(0, d, step):
        part = slice(start, start + step)
        gap = read[..., None, part] - wrote[:, None, :, part]
        decay = decay_of(gap.masked_fill_(later[..., None], -torch.inf), x.dtype)
        out += (decay * x[..., None, part] * y[:, None, :, part]).sum(-1)
    return out


def _scaled(out: Tensor, recurrence: Recurrence, queries: Tensor | slice) -> Tensor:
    if recurrence.scaling != 1.0:
        out *= recurrence.scaling
    if recurrence.row_scale is not None:
        scale = recurrence.row_scale[:, queries].to(out.dtype)
        out *= per_head(scale, recurrence.heads)[..., None]
    return out


def per_head(tensor: Tensor, heads: int) -> Tensor:
    """One entry per head out of one per group of heads (or one for all)."""
    own = tensor.shape[0]
    return tensor if own == heads else tensor.repeat_interleave(heads // own, dim=0)
