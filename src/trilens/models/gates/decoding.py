"""A recurrence's decoding steps in the form of its prefill, and the calls of a text put end to end.

In a step, many recurrences call another function than for a prompt, without the axis of the tokens.
Given that axis, a step's call reads like a prompt of one token; and the calls of all passes, end to
end, like one call over the whole text, which begins without a state.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from trilens.errors import RecurrentStateError
from trilens.models.gates.kernels import DECODE_KERNELS, Arguments, KernelRecord
from trilens.models.trace import tensors_in

__all__ = [
    "STATE_ARGUMENTS",
    "TOKEN_AXES",
    "as_prefill",
    "join_calls",
    "step_argument",
    "with_step_argument",
]

STATE_ARGUMENTS = (
    "initial_state",
    "initial_states",
    "state",
    "c_initial",
    "n_initial",
    "m_initial",
)
"""Arguments by which a recurrence goes on from a state."""

_OUTPUT = "output"
_DELTA = {"query": 1, "key": 1, "value": 1, "g": 1, "beta": 1, _OUTPUT: 1}

TOKEN_AXES: Mapping[str, Mapping[str, int]] = {
    "mamba_selective_scan": {"hidden_states": 2, "dt": 2, "B": 2, "C": 2, "z": 2, _OUTPUT: 2},
    "mamba2_chunk_scan": {"hidden_states": 1, "dt": 1, "B": 1, "C": 1, _OUTPUT: 1},
    "torch_chunk_gated_delta_rule": _DELTA,
    "chunk_kimi_delta_attention": _DELTA,
    "rwkv_linear_attention": {"key": 1, "value": 1, _OUTPUT: 1},
    "rwkv7_attention": {"r": 1, "log_w": 1, "k": 1, "v": 1, "a": 1, "b": 1, _OUTPUT: 1},
    "rg_lru": {"activations": 1, "position_ids": 1, _OUTPUT: 1},
    "mlstm": {"query": 2, "key": 2, "value": 2, "igate": 2, "fgate": 2, _OUTPUT: 2},
    "lightning_attention": {"output": 1},
}
"""Kernel function, or recurrence with a boundary → the axis of the tokens, per argument and of what
it gives. A lightning attention's argument is called output, and has the same axis."""

_PREFILL = {decode: prefill for prefill, decode in DECODE_KERNELS.items()}


def _selective(args: Arguments) -> dict[str, Any]:
    names = {"dt_bias": "delta_bias", "dt_softplus": "delta_softplus"}
    return {names.get(name, name): value for name, value in args.items()}


def _chunked(args: Arguments) -> dict[str, Any]:
    """Per-head numbers are spread over the head's channels in a step."""
    found = dict(args)
    found["dt"] = args["dt"][..., 0] if args["dt"].dim() == 3 else args["dt"]
    for name, axes in (("A", 1), ("D", 1), ("dt_bias", 1)):
        value = args.get(name)
        while isinstance(value, Tensor) and value.dim() > axes:
            value = value[..., 0]
        found[name] = value
    found.setdefault("dt_limit", (0.0, float("inf")))
    return found


_RENAMED: Mapping[str, Callable[[Arguments], dict[str, Any]]] = {
    "mamba_selective_scan": _selective,
    "mamba2_chunk_scan": _chunked,
}
"""Those whose step has no axis of tokens → a step's arguments under the names of the prefill."""


def as_prefill(name: str, arguments: Arguments, result: Any) -> tuple[str, dict[str, Any], Any]:
    """A kernel call in the form that a prompt's has.

    Args:
        name: the function, of prefill or of decoding.
        arguments: by parameter name.
        result: what it gave.

    Returns:
        The prefill function's name, the arguments with the axis of the tokens, and the output.
        Those of a prefill function as they are.
    """
    if name not in _PREFILL:
        return name, dict(arguments), result
    function = _PREFILL[name]
    if function not in _RENAMED:
        return function, dict(arguments), result
    axes = TOKEN_AXES[function]
    given = {
        key: value.unsqueeze(axes[key]) if key in axes and isinstance(value, Tensor) else value
        for key, value in _RENAMED[function](arguments).items()
        if key != "state"
    }
    output = next(tensors_in(result))
    if function == "mamba2_chunk_scan" and isinstance(arguments.get("z"), Tensor):
        output = _before_gate(arguments, output)
        given["z"] = None
    return function, given, output.unsqueeze(axes[_OUTPUT])


def step_argument(name: str, argument: str, arguments: Arguments) -> Tensor:
    """One argument of a kernel call with the axis of the tokens, of prefill or of decoding."""
    tensor: Tensor = arguments[argument]
    function = _PREFILL.get(name, name)
    if function == name or function not in _RENAMED:
        return tensor
    if function == "mamba2_chunk_scan" and argument == "dt" and tensor.dim() == 3:
        tensor = tensor[..., 0]
    return tensor.unsqueeze(TOKEN_AXES[function][argument])


def with_step_argument(name: str, argument: str, arguments: Arguments, value: Tensor) -> Tensor:
    """The argument that a kernel is called with, of one that `step_argument` gave; a new tensor."""
    given: Tensor = arguments[argument]
    function = _PREFILL.get(name, name)
    if function == name or function not in _RENAMED:
        return value
    value = value.squeeze(TOKEN_AXES[function][argument])
    return value if value.dim() == given.dim() else value[..., None].expand_as(given)


def _before_gate(args: Arguments, output: Tensor) -> Tensor:
    """What a chunked step read of its new state, where the step gates it and the prefill does not.

    The gate can't be divided out, as it may be near 0. So the reading is done again, and has to
    give the step's output with the gate.
    """
    state, x, groups = args["state"], args["hidden_states"], args["C"]
    query = groups.repeat_interleave(x.shape[1] // groups.shape[1], dim=1)
    read = (state.to(query.dtype) @ query[..., None])[..., 0]
    if args.get("D") is not None:
        read = read + x * args["D"]
    again = (read * functional.silu(args["z"])).to(output.dtype)
    eps = torch.finfo(output.dtype).eps
    near = (again - output).abs().max() <= 16 * eps * output.abs().max()
    return read.to(output.dtype) if bool(near) else output


def join_calls(passes: Sequence[Sequence[KernelRecord]], layer: int) -> list[KernelRecord]:
    """The calls of one layer over the whole text, from those of each pass.

    Args:
        passes: per pass the layer's calls, one or one per head.
        layer: for messages.

    Raises:
        RecurrentStateError: the passes called another number of functions, or other ones.
    """
    names = {tuple(call.function for call in calls) for calls in passes}
    if len(names) != 1:
        raise RecurrentStateError(
            f"layer {layer} calls {' and '.join(map(str, sorted(names)))} in the passes of one "
            "generation: its recurrence can't be put end to end; capture the text afterwards"
        )
    return [_end_to_end(calls) for calls in zip(*passes, strict=True)]


def _end_to_end(calls: Sequence[KernelRecord]) -> KernelRecord:
    first = calls[0]
    axes = TOKEN_AXES[first.function]
    # All else is that of the first call. It began with the model's own empty state, if with any,
    # which later steps may have written into.
    joined = {k: None if k in STATE_ARGUMENTS else v for k, v in first.arguments.items()}
    for name in joined.keys() & axes.keys():
        if isinstance(joined[name], Tensor):
            joined[name] = torch.cat([call.arguments[name] for call in calls], dim=axes[name])
    outputs = [next(tensors_in(call.result)) for call in calls]
    return KernelRecord(first.function, joined, torch.cat(outputs, dim=axes[_OUTPUT]))
