"""A recurrence run in parts, with its state changed between two tokens.

Each part is a call of the model's own kernel function, which goes on from the state that it is
given. Mamba-1's scan takes none: it is linear in its state, so that what the state adds to each
output is added to a part that began empty.

Source: as `trilens.models.gates.kernels`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from trilens.models.gates.decoding import TOKEN_AXES
from trilens.models.gates.kernels import DECODE_KERNELS, Arguments, scan_step

__all__ = ["SPLIT_KERNELS", "run_split", "state_shape"]

Change = Callable[[int, Tensor], Tensor]
"""Of a column of the call and the state after its token, [batch, *shape], the new state."""


@dataclass(frozen=True, slots=True)
class _Split:
    """How a kernel function hands its state on.

    Attributes:
        given: the argument that it begins with; "" where there is none.
        asked: the argument that asks for the last state; "" where it is always given.
        shape: arguments → the shape of the state of one text.
    """

    given: str
    asked: str
    shape: Callable[[Arguments], tuple[int, ...]]


def _scan_shape(args: Arguments) -> tuple[int, ...]:
    return args["dt"].shape[1], args["A"].shape[-1]


def _chunk_shape(args: Arguments) -> tuple[int, ...]:
    return (*args["hidden_states"].shape[2:], args["B"].shape[-1])


def _delta_shape(args: Arguments) -> tuple[int, ...]:
    heads, width = args["value"].shape[2:]
    return heads, args["key"].shape[-1], width


def _rwkv7_shape(args: Arguments) -> tuple[int, ...]:
    heads, width = args["r"].shape[2:]
    return heads, width, width


_DELTA = _Split("initial_state", "output_final_state", _delta_shape)

_SPLIT: Mapping[str, _Split] = {
    "mamba_selective_scan": _Split("", "return_last_state", _scan_shape),
    "mamba2_chunk_scan": _Split("initial_states", "return_final_states", _chunk_shape),
    "torch_chunk_gated_delta_rule": _DELTA,
    "chunk_kimi_delta_attention": _DELTA,
    "rwkv7_attention": _Split("state", "", _rwkv7_shape),
}
"""Kernel function of prefill → how it hands its state on."""

_STEPS = {DECODE_KERNELS[name]: name for name in _SPLIT if name in DECODE_KERNELS}

SPLIT_KERNELS = (*_SPLIT, *_STEPS)
"""Kernel functions, of prefill and decoding, whose state can be changed."""


def state_shape(function: str, arguments: Arguments) -> tuple[int, ...] | None:
    """The shape of one text's state; None where the function is not known to hand one on."""
    return _SPLIT[function].shape(arguments) if function in _SPLIT else None


def run_split(
    name: str,
    original: Callable[..., Any],
    arguments: Arguments,
    columns: Sequence[int],
    change: Change,
) -> Any:
    """What the function gives where its state is changed after some tokens.

    Args:
        name: of `SPLIT_KERNELS`.
        original: the function.
        arguments: by parameter name, defaults included.
        columns: after which tokens of the call, ascending, at least one.
        change: makes the new state; a new tensor.

    Returns:
        As the function itself: its output, and the last state where that was asked for.
    """
    if name in _STEPS and "state" in arguments:
        # A step that writes its state where the cache keeps it.
        result, kept = _call(original, arguments), arguments["state"]
        kept.copy_(change(0, kept.clone()))
        return result
    split = _SPLIT[_STEPS.get(name, name)]
    axes = TOKEN_AXES[_STEPS.get(name, name)]
    token = next(key for key in axes if isinstance(arguments.get(key), Tensor))
    seq = arguments[token].shape[axes[token]]
    ends = [*(column + 1 for column in columns), seq]
    outputs: list[Tensor] = []
    state: Tensor | None = arguments.get(split.given) if split.given else None
    begin = 0
    for end in ends:
        if end > begin:
            part = _part(arguments, axes, begin, end)
            output, state = _continued(split, original, part, state)
            outputs.append(output)
        if end - 1 in columns and state is not None and end > begin:
            state = change(end - 1, state)
        begin = end
    whole = torch.cat(outputs, dim=axes["output"])
    if split.asked and not arguments.get(split.asked):
        # A delta rule always gives a pair.
        return (whole, None) if split.given == "initial_state" else whole
    return whole, state


def _part(arguments: Arguments, axes: Mapping[str, int], begin: int, end: int) -> dict[str, Any]:
    return {
        key: value.narrow(axes[key], begin, end - begin)
        if key in axes and isinstance(value, Tensor)
        else value
        for key, value in arguments.items()
    }


def _continued(
    split: _Split, original: Callable[..., Any], part: dict[str, Any], state: Tensor | None
) -> tuple[Tensor, Tensor]:
    asked = {split.asked: True} if split.asked else {}
    if split.given:
        output, last = _call(original, {**part, **asked, split.given: state})
        return output, last
    output, last = _call(original, {**part, **asked})
    if state is None:
        return output, last
    # PROMOTE: the sum of steps is an exponent.
    log = scan_step(part).double().cumsum(-1)[..., None] * part["A"].double()[None, :, None]
    held = state.double()[:, :, None] * log.exp()
    read = torch.einsum("bcsn,bns->bcs", held, part["C"].double())
    if part.get("z") is not None:
        read = read * functional.silu(part["z"].double())
    return (output.double() + read).to(output.dtype), last + held[:, :, -1].to(last.dtype)


def _call(original: Callable[..., Any], arguments: Arguments) -> Any:
    extra = arguments.get("kwargs") or {}
    return original(**{k: v for k, v in arguments.items() if k != "kwargs"}, **extra)
