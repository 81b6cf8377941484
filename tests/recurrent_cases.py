"""Recurrences to ask, and a float64 reference that runs them token by token."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from trilens.caches.patterns.protocol import Pattern
from trilens.taps.kernels import kernel_places

__all__ = [
    "APPLIED",
    "assert_consistent",
    "assert_gives",
    "error_of_decays",
    "normal",
    "recurrent",
    "tamper",
    "unit",
]

# What W · v may differ from the recurrence's output, of the largest output: the project's bar.
# Weights and products in float32 are off by 2⁻²⁴ of their terms, and terms cancel: a hundred times
# that.
APPLIED = 1e-5


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def unit(x: Tensor) -> Tensor:
    return torch.nn.functional.normalize(x, dim=-1)


def recurrent(q, k, v, log_w, a=None, b=None, bonus=None) -> Tensor:
    """y of the recurrence, token by token in float64; every tensor [batch, heads, seq, d]."""
    q, k, v = q.double(), k.double(), v.double()
    w = log_w.double().exp().expand_as(q)
    state = q.new_zeros(*q.shape[:2], q.shape[3], v.shape[3])
    outputs = []
    for t in range(q.shape[2]):
        write = k[:, :, t, :, None] * v[:, :, t, None]
        if bonus is not None:
            outputs.append(
                (q[:, :, t, None] @ (state + bonus.double()[..., None] * write))[:, :, 0]
            )
        before, state = state, w[:, :, t, :, None] * state
        if a is not None and b is not None:
            state = state + b.double()[:, :, t, :, None] * (a.double()[:, :, t, None] @ before)
        state = state + write
        if bonus is None:
            outputs.append((q[:, :, t, None] @ state)[:, :, 0])
    return torch.stack(outputs, dim=2)


def error_of_decays(arguments: Mapping[str, Any]) -> float:
    """What a state can be off, of its size, where logarithms of decays are summed up in float32.

    Kernels in chunks take exp of differences of such sums, each rounded to half a unit: one unit
    of the largest sum for two of them. How much of it is seen depends on the processor.
    """
    decays = arguments.get("g")
    if decays is None:
        return 0.0
    return float(decays.double().cumsum(1).abs().max()) * torch.finfo(torch.float32).eps


def assert_gives(weights: Tensor, v: Tensor, y: Tensor, tolerance: float = APPLIED) -> None:
    """W · v is y."""
    assert torch.isfinite(y).all() and y.abs().max() > 0
    error = (weights.double() @ v.double() - y.double()).abs().max() / y.double().abs().max()
    assert error <= tolerance, f"W · v is off by {error:.1e} of the largest output"


def assert_consistent(pattern: Pattern) -> None:
    """Rows and columns, one by one and together, in any order, are those of the matrix."""
    dense, seq = pattern.dense(), pattern.seq_q
    assert dense.shape == (pattern.batch, pattern.heads, seq, seq)
    assert dense.numel() * dense.element_size() == pattern.dense_bytes
    later = torch.ones(seq, seq).triu(1).bool()
    assert (dense[..., later] == 0).all()
    # Two orders of the same float32 products: half of what W · v may be off by.
    close = {"rtol": 0, "atol": APPLIED / 2 * float(dense.abs().max())}
    some = [seq - 1, 0, seq // 2, -1, seq // 3]
    for batch in range(pattern.batch):
        own = dense[batch]
        torch.testing.assert_close(pattern.rows(some, batch=batch), own[:, some], **close)
        torch.testing.assert_close(pattern.columns(some, batch=batch), own[:, :, some], **close)
        for head in {0, pattern.heads - 1}:
            row = pattern.rows([seq - 1], head, batch)
            torch.testing.assert_close(row, own[head : head + 1, -1:], **close)
            column = pattern.columns([seq // 2], head, batch)
            torch.testing.assert_close(column, own[head : head + 1, :, [seq // 2]], **close)
    columns = torch.stack([pattern.columns(range(seq), batch=i) for i in range(pattern.batch)])
    torch.testing.assert_close(columns, dense, **close)


def tamper(patch: pytest.MonkeyPatch, model: PreTrainedModel, kernels: Iterable[str]) -> None:
    """Let the model's kernels give a thousandth more than they computed."""
    for namespace, name in kernel_places(model, kernels):
        original = namespace[name]

        @functools.wraps(original)
        def other(*args: Any, _original: Any = original, **kwargs: Any) -> Any:
            result = _original(*args, **kwargs)
            if isinstance(result, tuple):
                return (result[0] * 1.001, *result[1:])
            return result * 1.001

        patch.setitem(namespace, name, other)
