"""What a recurrence was given → its state after chosen tokens, proven by what was read of it.

A state is computed from what the recurrence was given, so that any position can be asked and the
padding of a batch is not in it. What the kernel's output says of it is checked in the same pass:
read by the position's own query, with the kernel's skip and gate, it is the kernel's output.

Source: as `trilens.models.gates.effective`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from trilens.caches.patterns.channel.pattern import ChannelPattern, DecayedSoftmaxPattern
from trilens.caches.patterns.recurrent.pattern import RecurrentPattern, running_maximum
from trilens.caches.patterns.recurrent.states import (
    channel_states,
    matrix_reads,
    matrix_states,
    softmax_reads,
    softmax_states,
)
from trilens.caches.states import StatePart, StateSpec
from trilens.errors import RecurrentStateError, TrilensError
from trilens.models.gates.effective import effective_of
from trilens.models.gates.effective_terms import Effective, tolerance_of

__all__ = ["STATE_KINDS", "LayerState", "StateKind", "join_states", "states_of"]


@dataclass(frozen=True, slots=True)
class StateKind:
    """What the state of one recurrence is called and how it stands.

    Attributes:
        kind: the recurrence.
        formula: how a token changes the state.
        read: how the output is read.
        parts: name → axes.
        values_first: a matrix is kept with its value axis before its key axis.
    """

    kind: str
    formula: str
    read: str
    parts: Mapping[str, tuple[str, ...]]
    values_first: bool = False


_MATRIX = {"S": ("heads", "k", "v")}
_DELTA = "S_t = (I − β_t k_t k_tᵀ) diag(exp(g_t)) S_{t−1} + β_t k_t v_tᵀ"

STATE_KINDS: Mapping[str, StateKind] = {
    "mamba_selective_scan": StateKind(
        "Mamba-1",
        "h_t = exp(dt_t·A) ⊙ h_{t−1} + dt_t·x_t B_tᵀ",
        "y_t = h_t C_t",
        {"h": ("inner", "state")},
    ),
    "mamba2_chunk_scan": StateKind(
        "Mamba-2",
        "S_t = exp(dt_t·A) S_{t−1} + dt_t·x_t B_tᵀ",
        "y_t = S_t C_t",
        {"S": ("heads", "head_dim", "state")},
        values_first=True,
    ),
    "torch_chunk_gated_delta_rule": StateKind(
        "gated delta net", _DELTA, "y_t = S_tᵀ q_t/√d", _MATRIX
    ),
    "chunk_kimi_delta_attention": StateKind(
        "Kimi delta attention", _DELTA, "y_t = S_tᵀ q_t/√d", _MATRIX
    ),
    "rwkv7_attention": StateKind(
        "RWKV-7", "S_t = (diag(w_t) + b_t a_tᵀ) S_{t−1} + k_t v_tᵀ", "y_t = S_tᵀ r_t", _MATRIX
    ),
    "rwkv_linear_attention": StateKind(
        "RWKV-4",
        "maximum m_t = max(m_{t−1} − e^w, k_t); numerator n_t and denominator d_t are "
        "Σ_j exp(−(t−j)·e^w + k_j − m_t) with and without v_j",
        "y_t = (e^m·n + exp(u + k_t)·v_t) / (e^m·d + exp(u + k_t)) of the state after t−1",
        {"numerator": ("hidden",), "denominator": ("hidden",), "maximum": ("hidden",)},
    ),
    "rg_lru": StateKind(
        "RG-LRU", "h_t = a_t ⊙ h_{t−1} + √(1 − a_t²) ⊙ i_t ⊙ x_t", "y_t = h_t", {"h": ("width",)}
    ),
    "mlstm": StateKind(
        "mLSTM",
        "m_t = max(log σ(f_t) + m_{t−1}, i_t); C and n are kept divided by exp(m_t): "
        "C_t = σ(f_t) C_{t−1} + exp(i_t) k_t v_tᵀ, n_t likewise with k_t",
        "y_t = C_tᵀ q_t/√d / max(|n_tᵀ q_t/√d|, exp(−m_t))",
        {"C": _MATRIX["S"], "n": ("heads", "k"), "m": ("heads",)},
    ),
    "lightning_attention": StateKind(
        "lightning attention", "S_t = exp(−slope) S_{t−1} + k_t v_tᵀ", "y_t = S_tᵀ q_t", _MATRIX
    ),
}
"""Kernel function, or recurrence with a boundary → what its state is."""


@dataclass(frozen=True, slots=True, eq=False)
class LayerState:
    """The state of one layer after some positions of one prompt: parts [n, …] and what they are."""

    spec: StateSpec
    parts: Mapping[str, Tensor]


@torch.no_grad()
def states_of(
    function: str,
    arguments: Mapping[str, Any],
    result: Any,
    *,
    positions: Sequence[Sequence[int]],
    lengths: Sequence[int],
) -> list[LayerState]:
    """The states of each prompt of one call.

    Args:
        function: the kernel function or recurrence, a key of `STATE_KINDS`.
        arguments: what it was given, by parameter name.
        result: what it gave back.
        positions: after which tokens, per prompt: from 0, ascending, below its length.
        lengths: real tokens of each prompt.

    Raises:
        RecurrentStateError: no such kernel is known, its values have no state, or what is read of
            the state is not what the kernel gave.
    """
    if function not in STATE_KINDS:
        raise RecurrentStateError(
            f"the recurrent state of {function} is not known; known are {', '.join(STATE_KINDS)}"
        )
    try:
        effective = effective_of(function, arguments, result)
    except TrilensError as error:
        raise RecurrentStateError(
            f"{function} was called with values that have no recurrent state: {error}"
        ) from error
    kind = STATE_KINDS[function]
    found = []
    for row, (places, length) in enumerate(zip(positions, lengths, strict=True)):
        if function == "mlstm":
            parts, read = _normalised(effective, arguments, row, places)
        else:
            parts, read = _read(effective, row, places)
        off = effective.deviation(read, places, row, range(effective.units), length)
        allowed = tolerance_of(effective)
        # Not off > allowed: a NaN proves nothing.
        if not off <= allowed:
            raise RecurrentStateError(
                f"the recurrent state of {function} is not proven: what is read of it differs from "
                f"the kernel's output by {off:.2g} of its largest value ({allowed:.0e} is "
                "allowed); capture without states"
            )
        found.append(_named(kind, function, parts))
    return found


def join_states(calls: Sequence[LayerState]) -> LayerState:
    """The state of a layer that called its kernel once per head: one more axis, the heads."""
    first = calls[0]
    if len(calls) == 1:
        return first
    parts = {name: torch.stack([call.parts[name] for call in calls], dim=1) for name in first.parts}
    spec = first.spec
    named = tuple(
        StatePart(part.name, ("heads", *part.axes), (len(calls), *part.shape))
        for part in spec.parts
    )
    return LayerState(StateSpec(spec.kind, spec.formula, spec.read, named, spec.where), parts)


def _read(
    effective: Effective, row: int, positions: Sequence[int]
) -> tuple[tuple[Tensor, ...], Tensor]:
    """The parts of the state after each position, and what each position's output read of it."""
    pattern = effective.pattern
    values = effective.values[row]
    if isinstance(pattern, RecurrentPattern):
        (recurrence,) = pattern.recurrences(row)
        states = matrix_states(recurrence, values, positions)
        return (states,), matrix_reads(recurrence, states, positions)
    if isinstance(pattern, ChannelPattern):
        inputs = pattern.inputs(row)
        states = channel_states(inputs, values[..., 0], positions)
        read = (states * inputs.q[list(positions), None]).sum(2)
        return (states,), read.T[..., None]
    if isinstance(pattern, DecayedSoftmaxPattern):
        return _softmax(pattern, values[..., 0].T, row, positions)
    raise RecurrentStateError(f"a {type(pattern).__name__} has no recurrent state that is known")


def _normalised(
    effective: Effective, arguments: Mapping[str, Any], row: int, positions: Sequence[int]
) -> tuple[tuple[Tensor, ...], Tensor]:
    """An mLSTM's normaliser is what its matrix would be if every value were 1."""
    ones = torch.ones_like(effective.values[..., :1])
    wide = replace(effective, values=torch.cat([effective.values, ones], dim=-1))
    (states,), read = _read(wide, row, positions)
    gates = arguments["igate"][row], arguments["fgate"][row]
    maximum = running_maximum(*gates)[1][:, list(positions)].T.to(states.dtype)
    return (states[..., :-1], states[..., -1], maximum), read[..., :-1]


def _softmax(
    pattern: DecayedSoftmaxPattern, values: Tensor, row: int, positions: Sequence[int]
) -> tuple[tuple[Tensor, ...], Tensor]:
    """Each position reads the state after the token before it: that one is made too."""
    given = pattern.tensors()
    keys = given["k"][row]
    places = sorted({*positions, *(position - 1 for position in positions)})
    made = softmax_states(keys, values, given["log_w"], places)
    before = [places.index(position - 1) for position in positions]
    earlier = {name: tensor[before] for name, tensor in made.items()}
    read = softmax_reads(earlier, keys, values, given["bonus"], positions)
    after = [places.index(position) for position in positions]
    return tuple(tensor[after] for tensor in made.values()), read.T[..., None]


def _named(kind: StateKind, function: str, tensors: tuple[Tensor, ...]) -> LayerState:
    if kind.values_first:
        tensors = (tensors[0].mT.contiguous(), *tensors[1:])
    # A vector state has no second axis for its single state.
    shaped = [
        tensor.squeeze(-1) if tensor.dim() == len(axes) + 2 else tensor
        for tensor, axes in zip(tensors, kind.parts.values(), strict=True)
    ]
    parts = tuple(
        StatePart(name, axes, tuple(tensor.shape[1:]))
        for (name, axes), tensor in zip(kind.parts.items(), shaped, strict=True)
    )
    spec = StateSpec(kind.kind, kind.formula, kind.read, parts, function)
    return LayerState(spec, dict(zip(kind.parts, shaped, strict=True)))
