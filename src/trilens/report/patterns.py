"""Attention patterns of all heads, small enough for a page: pooled, and in few steps of weight."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from trilens.caches.attention import AttentionCache
from trilens.caches.patterns.protocol import Pattern
from trilens.errors import NonFiniteError

__all__ = ["MAX_SIDE", "HeadPatterns", "head_patterns"]

MAX_SIDE = 512
"""Cells of a pattern's side; of longer prompts, the largest weight of each cell is shown."""

_MAX_CELLS = 19_000_000  # 144 heads of 512 × 512 causal cells
_BUDGET_BYTES = 2_200_000
_BUDGET_PER_CELL = 0.35
_BLOCK_ELEMENTS = 4_000_000
_STEPS = (255, 127, 63, 31, 15)
_SIGNED_STEPS = (127, 63, 31, 15)

Codes = NDArray[np.uint8]


@dataclass(frozen=True, slots=True, eq=False)
class HeadPatterns:
    """Weights as codes: weight = scale · (code / steps)², with the code's sign where signed.

    The square root spends steps where weights are small.

    Attributes:
        kind: "softmax", or "effective": what a recurrence's weights amount to.
        layers: the model's own numbers.
        heads: of each layer.
        side: cells of a side.
        pool: tokens of a cell; the largest weight by size stands for all.
        causal: only cells at or below the diagonal are held, row by row.
        signed: a code is 128 + sign · size.
        steps: largest size of a code.
        scales: of each head of each layer, its largest weight by size.
        codes: all heads one after the other.
    """

    kind: Literal["softmax", "effective"]
    layers: tuple[int, ...]
    heads: tuple[int, ...]
    side: int
    pool: int
    causal: bool
    signed: bool
    steps: int
    scales: NDArray[np.float32]
    codes: Codes

    @property
    def n_heads(self) -> int:
        """Of all layers."""
        return sum(self.heads)

    @property
    def note(self) -> str:
        """How exact the picture is."""
        words = f"Weights are stored in {self.steps} steps of their square root, per head."
        if self.pool > 1:
            words += (
                f" The prompt is long: each cell is the largest weight of {self.pool} × "
                f"{self.pool} tokens."
            )
        return words

    def weights(self, layer: int, head: int) -> NDArray[np.float32]:
        """What the page shows of a head: [side, side]."""
        at = sum(self.heads[: self.layers.index(layer)]) + head
        size = self.side * (self.side + 1) // 2 if self.causal else self.side**2
        codes = self.codes[at * size : (at + 1) * size].astype(np.float32)
        parts = codes - 128 if self.signed else codes
        flat: NDArray[np.float32] = (
            np.sign(parts) * (np.abs(parts) / self.steps) ** 2 * self.scales[at]
        )
        if not self.causal:
            return flat.reshape(self.side, self.side)
        found = np.zeros((self.side, self.side), np.float32)
        found[np.tril_indices(self.side)] = flat
        return found


def head_patterns(
    cache: AttentionCache, kind: Literal["softmax", "effective"], layers: tuple[int, ...]
) -> HeadPatterns:
    """Read every head's pattern once, in blocks.

    Raises:
        NonFiniteError: a weight is NaN or infinite.

    Args:
        cache: of one prompt; queries and keys are the same tokens.
        kind: what it holds.
        layers: of the cache.

    Memory
        A byte per cell, and 16 MB of weights at once.
    """
    patterns = [cache.pattern(layer) for layer in layers]
    seq = patterns[0].seq_k
    heads = tuple(pattern.heads for pattern in patterns)
    side = min(MAX_SIDE, seq, max(16, math.isqrt(2 * _MAX_CELLS // sum(heads))))
    pool = -(-seq // side)
    side = -(-seq // pool)
    pooled = [_pooled(pattern, side, pool) for pattern in patterns]
    for layer, each in zip(layers, pooled, strict=True):
        if not np.isfinite(each).all():
            raise NonFiniteError(
                f"attention of layer {layer} holds NaN or infinite weights: load the model in "
                "another dtype"
            )
    signed = any(bool((each < 0).any()) for each in pooled)
    upper = np.triu_indices(side, 1)
    causal = side > 1 and not any(bool(each[:, upper[0], upper[1]].any()) for each in pooled)
    scales = np.concatenate([np.abs(each).max((1, 2)) for each in pooled]).astype(np.float32)
    lower = np.tril_indices(side)
    flat = [
        each[:, lower[0], lower[1]] if causal else each.reshape(len(each), -1) for each in pooled
    ]
    del pooled
    steps, codes = _coded(flat, scales, signed=signed)
    return HeadPatterns(kind, layers, heads, side, pool, causal, signed, steps, scales, codes)


def _pooled(pattern: Pattern, side: int, pool: int) -> NDArray[np.float32]:
    """[heads, side, side]: the weight of largest size in each cell."""
    seq, heads = pattern.seq_k, pattern.heads
    found = np.zeros((heads, side, side), np.float32)
    rows = max(1, _BLOCK_ELEMENTS // (heads * seq * pool))
    for start in range(0, side, rows):
        queries = range(start * pool, min((start + rows) * pool, pattern.seq_q))
        block = pattern.rows(queries).float().cpu().numpy()
        if pool > 1:
            block = _cells(_cells(block, pool, 2), pool, 1)
        found[:, start : start + block.shape[1]] = block
    return found


def _cells(block: NDArray[np.float32], pool: int, axis: int) -> NDArray[np.float32]:
    """Each `pool` entries of an axis by the one of largest size."""
    short = -block.shape[axis] % pool
    width = [(0, short if i == axis else 0) for i in range(3)]
    padded = np.pad(block, width)
    shape = [*padded.shape]
    shape[axis : axis + 1] = [shape[axis] // pool, pool]
    cut = padded.reshape(shape)
    high, low = cut.max(axis + 1), cut.min(axis + 1)
    found: NDArray[np.float32] = np.where(-low > high, low, high)
    return found


def _coded(
    flat: list[NDArray[np.float32]], scales: NDArray[np.float32], *, signed: bool
) -> tuple[int, Codes]:
    """As many steps as fit: a byte is what its entropy says once it is compressed."""
    known = _SIGNED_STEPS if signed else _STEPS
    finest = known[0]
    parts, at = [], 0
    for each in flat:
        scale = scales[at : at + len(each), None]
        at += len(each)
        size = np.sqrt(np.abs(each) / np.where(scale > 0, scale, 1)) * finest
        parts.append((np.rint(size) * np.sign(each)).astype(np.int16).ravel())
    exact = np.concatenate(parts)
    budget = max(_BUDGET_BYTES, _BUDGET_PER_CELL * len(exact))
    offset = 128 if signed else 0
    counts = np.bincount(exact + 256, minlength=512)
    sizes = np.arange(512) - 256
    chosen, table = finest, sizes
    for steps in known:
        chosen = steps
        table = np.rint(np.abs(sizes) * steps / finest).astype(np.int64) * np.sign(sizes)
        if _entropy_bytes(np.bincount(table + 256, weights=counts, minlength=512)) <= budget:
            break
    return chosen, (table[exact + 256] + offset).astype(np.uint8)


def _entropy_bytes(counts: NDArray[Any]) -> float:
    there = counts[counts > 0]
    bits: float = -(there * np.log2(there / there.sum())).sum()
    return bits / 8
