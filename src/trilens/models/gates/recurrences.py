"""Gates of recurrences whose inner values are arguments of a known kernel function."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trilens.caches.gates import GateSpec
from trilens.models.gates.block import BlockView
from trilens.models.gates.events import KernelCall
from trilens.models.gates.kernels import KERNEL_GATES, KernelGate
from trilens.models.gates.site import GateSite, GateSource, Layout

__all__ = ["find_recurrence_gates"]


def find_recurrence_gates(view: BlockView) -> list[GateSite]:
    """The gates among the arguments of the block's kernel calls, each proven on every call.

    A mixer that calls its kernel once per head gives one gate of all heads, in order.
    """
    sites: list[GateSite] = []
    for function in dict.fromkeys(kernel.function for kernel in view.kernels):
        calls = [kernel for kernel in view.kernels if kernel.function == function]
        for gate in KERNEL_GATES[function]:
            site = _proven(gate, calls, view)
            if site is not None:
                sites.append(site)
    names = {site.spec.name for site in sites}
    sites = [site for site in sites if not site.spec.rate or site.spec.rate in names]
    if not any(site.spec.rate for site in sites):
        sites = [site for site in sites if site.spec.name != "mixer.rate"]
    _settle(view, sites)
    return sites


def _proven(gate: KernelGate, calls: list[KernelCall], view: BlockView) -> GateSite | None:
    functions = {gate.function(call.arguments, view.outputs(call)) for call in calls}
    if len(functions) != 1 or "" in functions:
        return None
    function = functions.pop()
    values = [gate.read(call.arguments) for call in calls]
    if gate.axis is None:
        layout, shapes = Layout("static"), [tuple(value.shape) for value in values]
    else:
        layout = Layout("batched", axis=gate.axis)
        shapes = [value.movedim(gate.axis, 1).shape[2:] for value in values]
    shape = (sum(each[0] for each in shapes), *shapes[0][1:])
    if function == "step_decay":
        states = calls[0].arguments["A"].numel() // shapes[0][0]
        shape = (*shape, states) if states > 1 else shape
    kernel = calls[0]
    spec = GateSpec(
        name=gate.name,
        kind=gate.kind,
        formula="2·σ(b)" if function == "doubled" else gate.formula,
        function=function,
        range=(0.0, 2.0) if function == "doubled" else gate.range,
        shape=shape,
        where=f"{kernel.path}: {kernel.function}",
        static=gate.axis is None,
        rate=gate.rate,
    )
    return GateSite(spec, GateSource("kernel", kernel=kernel.function), layout, gate.read)


def _settle(view: BlockView, sites: list[GateSite]) -> None:
    """The calls that made β, dt and the decays are accounted for."""
    names = {site.spec.name for site in sites}
    for kernel in view.kernels:
        made: list[Tensor] = [
            value for value in kernel.arguments.values() if isinstance(value, Tensor)
        ]
        for call in view.open_calls():
            outside = not call.kernel and call.tick < kernel.end
            if not outside or not call.path.startswith(kernel.path):
                continue
            if call.function == "sigmoid":
                mine = any(_made(call.y, value) for value in made)
            else:
                mine = call.function in ("softplus", "exp") and "mixer.decay" in names
            if mine:
                view.explain([call])


def _made(y: Tensor, value: Any) -> bool:
    """Whether an argument is the gating call's output, or a constant times it."""
    if y.numel() != value.numel():
        return False
    a, b = y.double().flatten(), value.double().flatten()
    at = int(a.abs().argmax())
    scale = float(b[at] / a[at]) if float(a[at]) else 0.0
    return bool(scale) and torch.allclose(a * scale, b, rtol=1e-5, atol=1e-7)
