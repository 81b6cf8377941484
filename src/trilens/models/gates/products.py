"""Gates by what they do: an activation of the token multiplies data of the token.

Output gates of attention, z and output gates of mixers, receptances, gates of shared experts and
GLUs whose activation is a function rather than a module.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from trilens.caches.gate_functions import GATE_FUNCTIONS, INNER_FUNCTIONS
from trilens.caches.gates import GateKind, GateSpec
from trilens.models.gates.block import BlockView
from trilens.models.gates.events import FunctionCall, WeightedCall
from trilens.models.gates.site import GateSite
from trilens.models.trace import parent_path, same

__all__ = ["find_product_gate"]

_FUNCTIONS = {**GATE_FUNCTIONS, **INNER_FUNCTIONS}
_TOLERANCE = 1e-6
_NAMES: dict[str, dict[str, str]] = {
    "rwkv_linear_attention": {"": "mixer.receptance"},
    "rwkv7_attention": {"a_act": "mixer.in_context_rate", "v_act": "mixer.value_mix"},
}
"""Kernel function → the last part of a module's path ("" for any) → the gate's name."""


def find_product_gate(call: FunctionCall, view: BlockView) -> GateSite | None:
    """The gate that a gating call is; None where nothing tappable holds what went into it."""
    function = _function_of(call)
    if function is None:
        return None
    place, read = view.locate(call.x, call.tick), None
    if place is None:
        weighted = view.locate_weighted(call.x, call.tick)
        if weighted is None:
            return None
        place, read = weighted[:3], _with_weight(weighted[3], weighted[0].index)
    source, layout, path = place
    entry = _FUNCTIONS[function]
    kinds: dict[str, GateKind] = {"sigmoid": "sigmoid", "softplus": "linear"}
    shape = list(call.x.shape)
    units = view.rows(call.x).shape[1]
    axes = [size for size in shape if size not in (1, view.seq)]
    spec = GateSpec(
        name=_name(call, view, function, units),
        kind=kinds.get(function, "activation"),
        formula="σ(x)" if function == "sigmoid" else f"{function}(x)",
        function=function,
        range=entry.range,
        shape=tuple(axes) if axes and math.prod(axes) == units else (units,),
        where=path,
    )
    view.explain([call])
    return GateSite(spec, source, layout, read)


def _with_weight(call: WeightedCall, index: int) -> Callable[[Mapping[str, Any]], Tensor]:
    axes, operation, weight = tuple(call.x.shape[2:]), call.operation, call.weight

    def read(tensors: Mapping[str, Any]) -> Tensor:
        tensor: Tensor = tensors["tensors"][index]
        return operation(tensor.reshape(*tensor.shape[:2], *axes), weight)

    return read


def _function_of(call: FunctionCall) -> str | None:
    """The table's function that gives the recorded output bit for bit or within 1e-6."""
    names: dict[str, tuple[str, ...]] = {
        "sigmoid": ("sigmoid",),
        "silu": ("silu",),
        "gelu": ("gelu", "gelu_tanh"),
        "softplus": ("softplus",),
    }
    for name in names.get(call.function, ()):
        value: Any = _FUNCTIONS[name].value(call.x)
        if same(value, call.y) or float((value - call.y).abs().max()) <= _TOLERANCE:
            return name
    return None


def _name(call: FunctionCall, view: BlockView, function: str, units: int) -> str:
    mixer = view.mixer_of(call.path)
    for kernel in view.kernels:
        names = _NAMES.get(kernel.function, {})
        last = call.path.rpartition(".")[2]
        if kernel.path == mixer and (last in names or "" in names):
            return names.get(last) or names[""]
    if view.in_attention(call.path) and not call.kernel:
        return "attn.out_gate"
    if mixer is not None:
        return "mixer.out_gate" if function == "sigmoid" else "mixer.z"
    if parent_path(call.path) == view.block.path and not view.has_children(call.path):
        return "block.gate"
    if function != "sigmoid":
        return "mlp.gate"
    return "mlp.shared_gate" if units == 1 else "mlp.receptance"
