"""Gates as sites: what a gate's function is given, read and written where the model makes it.

A gate that a module shows is edited there; one that is an argument of a recurrence's kernel
function, in the call.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from trilens.axes import GATES_AS_SITES
from trilens.caches.gate_functions import GATE_FUNCTIONS, INNER_FUNCTIONS, LOG_OF_ZERO
from trilens.caches.gate_spec import GateSpec
from trilens.models.gates.block import BlockView
from trilens.models.gates.claims import GateClaims
from trilens.models.gates.events import KernelCall
from trilens.models.gates.site import GateSite, Layout
from trilens.models.sites.found import Found
from trilens.models.sites.site import Tap

__all__ = ["closed_at", "find_gate_sites"]

_DELTA = {"mixer.decay": ("g", 1), "mixer.beta": ("beta", 1)}
_ARGUMENTS: Mapping[str, Mapping[str, tuple[str, int]]] = {
    "mamba_selective_scan": {"mixer.dt": ("dt", 2)},
    "mamba2_chunk_scan": {"mixer.dt": ("dt", 1)},
    "torch_chunk_gated_delta_rule": _DELTA,
    "chunk_kimi_delta_attention": _DELTA,
    "rwkv7_attention": {"mixer.decay": ("log_w", 1)},
}
"""Kernel function → gate → the argument that is its alone, and the axis of its tokens."""

_SOFTPLUS = ("delta_softplus", "dt_softplus")
_FUNCTIONS = {**GATE_FUNCTIONS, **INNER_FUNCTIONS}


def closed_at(spec: GateSpec) -> float:
    """What a gate's function gives 0 for."""
    if spec.function not in _FUNCTIONS:
        return 0.0
    closed = _FUNCTIONS[spec.function].closed
    # Logs of decays are summed, and −inf − −inf is no number.
    return max(closed, LOG_OF_ZERO) if spec.kind == "decay" else closed


def find_gate_sites(view: BlockView, gates: GateClaims, layer: int, found: Found) -> None:
    """Claim a layer's gates that are no sites by another rule."""
    for name in GATES_AS_SITES:
        gate = gates.gates.get((name, layer))
        if gate is None:
            found.refuse((name,), "the layer has no such gate", absent=True)
        elif gate.spec.static:
            found.refuse(
                (name,), f"it is a parameter, the same for every token ({gate.spec.where})"
            )
        elif gate.source.event == "kernel":
            _claim_argument(name, gate, view, found)
        else:
            _claim_at_module(name, gate, found)


def _claim_at_module(name: str, gate: GateSite, found: Found) -> None:
    source, units = gate.source, math.prod(gate.spec.shape)
    event, module = source.event, source.module
    shown = gate.read is None and not gate.more and module is not None
    if not shown or module is None or event in ("kernel", "function"):
        found.refuse((name,), f"{gate.spec.where} makes it inside, of what its modules show")
        return
    tap = Tap("input" if event == "input" else "output", module, source.index, source.order)
    found.claim(name, tap, gate.layout, (units,), closed=closed_at(gate.spec))


def _claim_argument(name: str, gate: GateSite, view: BlockView, found: Found) -> None:
    function = gate.source.kernel
    calls: list[KernelCall] = [call for call in view.kernels if call.function == function]
    place = _ARGUMENTS.get(function, {}).get(name)
    if place is None:
        made_of = "mixer.dt and mixer.rate" if gate.spec.function == "step_decay" else "others"
        found.refuse((name,), f"{function} is not given it, but makes it of {made_of}")
        return
    if len(calls) != 1:
        found.refuse((name,), f"the mixer calls {function} {len(calls)} times, once per head")
        return
    argument, axis = place
    given = calls[0].arguments
    closed = closed_at(gate.spec)
    if name == "mixer.dt" and any(given.get(flag) for flag in _SOFTPLUS):
        closed = -math.inf
    tap = Tap("kernel", view.block.module, part=argument)
    units = math.prod(given[argument].movedim(axis, 1).shape[2:])
    found.claim(name, tap, Layout("batched", axis), (units,), closed=closed)
