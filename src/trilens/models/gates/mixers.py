"""Recurrences that no kernel function carries: the module calls between which each one runs.

RG-LRU and mLSTM run inside a module of their own; lightning attention runs in its mixer's forward,
between its activation and its norm. What passes there is recorded as if it were a kernel's call.

Source: Griffin, arXiv 2402.19427; xLSTM, arXiv 2405.04517; lightning attention, arXiv 2401.04658.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from trilens.models.gates.block import BlockView

__all__ = ["NOT_LINEAR", "Boundary", "Edge", "Recurrent", "find_recurrent"]

_RGLRU = ("recurrent_param", "input_gate_weight", "input_gate_bias", "recurrent_gate_weight",
          "recurrent_gate_bias")  # fmt: skip
_MLSTM = {"query", "key", "value", "igate", "fgate"}
_LIGHTNING = ("act_fn", "norm", "qkv_proj", "slope_rate")

NOT_LINEAR: Mapping[str, str] = {
    "slstm_cell": "an sLSTM is not linear in its values: its gates read the state before",
}
"""Child module by which a recurrence without effective attention is known → the reason."""


@dataclass(frozen=True, slots=True)
class Edge:
    """One moment of a block's pass: a module is called, or gives its output."""

    event: Literal["input", "output"]
    module: nn.Module


@dataclass(frozen=True, slots=True)
class Boundary:
    """Where a recurrence begins and ends.

    Attributes:
        function: the recurrence, a key of `EFFECTIVE_KERNELS`.
        module: holds its parameters; among the recorded arguments as `module`.
        enter: what the recurrence is given: a module's arguments by parameter name, or its
            output, as `output`.
        leave: what it gave: a module's output, or the first tensor of its input.
    """

    function: str
    module: nn.Module
    enter: Edge
    leave: Edge


@dataclass(frozen=True, slots=True)
class Recurrent:
    """A layer's recurrence, as a probe saw it.

    Attributes:
        mixer: the class that runs it.
        boundary: where it begins and ends; None where a kernel function carries it.
        refusal: why it has no effective attention, "" where it has.
    """

    mixer: str
    boundary: Boundary | None = None
    refusal: str = ""


def find_recurrent(view: BlockView) -> Recurrent | None:
    """The block's recurrence; None where the block has none that is known."""
    classes = {call.path: type(call.module).__name__ for call in view.calls}
    if view.kernels:
        first, times = view.kernels[0], len(view.kernels)
        mixer = classes.get(first.path, first.path)
        if times == 1 or view.side_by_side():
            return Recurrent(mixer)
        why = f"it calls {first.function} {times} times, and not as heads side by side"
        return Recurrent(mixer, refusal=why)
    mixer = view.other_mixer
    if not mixer:
        return None
    for call in view.calls[1:]:
        for rule in (_rglru, _mlstm, _lightning):
            boundary = rule(call.module)
            if boundary is not None:
                return Recurrent(mixer, boundary)
    for call in view.calls[1:]:
        for name, reason in NOT_LINEAR.items():
            if name in dict(call.module.named_children()):
                return Recurrent(mixer, refusal=f"{mixer}: {reason}")
    return Recurrent(mixer, refusal=f"the recurrence of {mixer} calls no known kernel function")


def _rglru(module: nn.Module) -> Boundary | None:
    if not all(hasattr(module, name) for name in _RGLRU):
        return None
    return _around("rg_lru", module, {"activations", "position_ids"})


def _mlstm(module: nn.Module) -> Boundary | None:
    backend = dict(module.named_children()).get("mlstm_backend")
    return None if backend is None else _around("mlstm", backend, _MLSTM)


def _lightning(module: nn.Module) -> Boundary | None:
    if not all(hasattr(module, name) for name in _LIGHTNING):
        return None
    act, norm = module.get_submodule("act_fn"), module.get_submodule("norm")
    return Boundary("lightning_attention", module, Edge("output", act), Edge("input", norm))


def _around(function: str, module: nn.Module, wanted: set[str]) -> Boundary | None:
    """A module that is the recurrence, if it takes arguments of these names."""
    forward: Callable[..., Any] = module.forward
    if not wanted <= set(inspect.signature(forward).parameters):
        return None
    return Boundary(function, module, Edge("input", module), Edge("output", module))
