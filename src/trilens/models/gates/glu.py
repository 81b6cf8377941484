"""GLU gates of MLPs, found by what they do: act(x) · up = the down projection's input.

An activation module is not yet a gate: several families call the activation of an ungated MLP by
the same name. A gate is claimed only where the product was seen in the probe. Its input is what a
capture keeps: a silu's output does not give σ(x) back.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from trilens.caches.gate_functions import GATE_FUNCTIONS
from trilens.caches.gates import GateSpec
from trilens.caches.storage import address_of
from trilens.io.messages import listed
from trilens.models.anatomy import Anatomy
from trilens.models.gates.events import GateEvents
from trilens.models.gates.site import (
    GateSite,
    GateSource,
    GluCheck,
    UpSource,
    is_numbered,
    layout_of,
)
from trilens.models.trace import ModuleCall, Trace, parent_path, same, wide_points

__all__ = ["find_glu_gates"]

_NAME = "mlp.gate"


def find_glu_gates(
    trace: Trace, events: GateEvents, anatomy: Anatomy
) -> tuple[dict[tuple[str, int], GateSite], dict[int, str]]:
    """The proven GLU gates per layer, and per layer without one the reason, in words."""
    gates: dict[tuple[str, int], GateSite] = {}
    unclaimed: dict[int, str] = {}
    for layer, block in enumerate(_block_calls(trace, anatomy)):
        inside = trace.inside(block)
        own = [call for call in inside if not is_numbered(block.module, _within(call, block))]
        found = [claim for call in own if (claim := _claim(call, inside, trace, events))]
        claims = [claim for claim in found if isinstance(claim, GateSite)]
        claims = [claim for claim in claims if _is_local(claim, inside)] or claims
        if len(claims) == 1:
            gates[_NAME, layer] = claims[0]
        elif claims:
            places = listed(claim.spec.where for claim in claims)
            unclaimed[layer] = f"{len(claims)} GLU gates in one block ({places})"
        else:
            refused = [claim for claim in found if isinstance(claim, str)]
            unclaimed[layer] = refused[0] if refused else _why_none(inside, own, trace)
    return gates, unclaimed


def _within(call: ModuleCall, block: ModuleCall) -> str:
    return call.path.removeprefix(f"{block.path}.")


def _why_none(inside: list[ModuleCall], own: list[ModuleCall], trace: Trace) -> str:
    for call in inside:
        if not call.keeps_shape or _function_of(call, trace) is None:
            continue
        if call not in own or _rows(call.inputs[0]) != trace.seq:
            return f"{call.path} belongs to routed experts, whose rows are sorted by expert"
    return "no activation module whose output times another projection is the next one's input"


def _is_local(claim: GateSite, inside: list[ModuleCall]) -> bool:
    """Whether everything beside the gate works token by token: an MLP, not a recurrent mixer.

    A mixer that ends in a gated projection has a convolution, a recurrence or an attention among
    the modules of the same parent; an MLP has projections, activations, norms and dropout.
    """
    parent = parent_path(claim.spec.where)
    beside = [call.module for call in inside if parent_path(call.path) == parent]
    return not any(isinstance(module, nn.Conv1d) or not _is_pointwise(module) for module in beside)


def _is_pointwise(module: nn.Module) -> bool:
    if any(True for _ in module.children()):
        return False
    shapes = [parameter.dim() for parameter in module.parameters(recurse=False)]
    if not shapes:
        return type(module).__module__.startswith(("torch.nn.modules", "transformers.activations"))
    return max(shapes) <= 2 and len(shapes) <= 2


def _block_calls(trace: Trace, anatomy: Anatomy) -> list[ModuleCall]:
    paths = {block.path for block in anatomy.blocks}
    return [call for call in trace.calls if call.path in paths]


def _claim(
    call: ModuleCall, inside: list[ModuleCall], trace: Trace, events: GateEvents
) -> GateSite | str | None:
    """This call as a gate, if its output times something is the next projection's input.

    Returns:
        The gate; a sentence where its output, as it was or changed, is a factor of such a product,
        and what the gate is cannot be told; None where there is no such product.
    """
    if not call.keeps_shape or _rows(call.inputs[0]) != trace.seq or _has_weight(call.module):
        return None
    product = _product(call, inside)
    if product is None:
        return None
    up, down = product
    title = f"{call.path} ({type(call.module).__name__})"
    function = _function_of(call, trace)
    if function is None:
        known = ", ".join(name for name in GATE_FUNCTIONS if name != "identity")
        return f"{title} gates a GLU with a function that is none of {known}"
    if not _is_factor(call, down, events):
        return f"the output of {title} is changed, as by a limit, before it gates the GLU"
    layout = layout_of(call.inputs[0], trace.seq)
    if layout is None:
        return None
    spec = GateSpec(
        name=_NAME,
        kind="sigmoid" if function == "sigmoid" else "activation",
        formula=f"{function}(x)",
        function=function,
        range=GATE_FUNCTIONS[function].range,
        shape=(call.outputs[0].shape[-1],),
        where=call.path,
        static=False,
    )
    check = GluCheck(call.module, function, up, down.module)
    return GateSite(spec, GateSource("input", call.module), layout, check=check)


def _product(call: ModuleCall, inside: list[ModuleCall]) -> tuple[UpSource, ModuleCall] | None:
    """The projection that takes call's output times another one's, and that other one."""
    parent = parent_path(call.path)
    siblings = [other for other in inside if other.path.startswith(parent + ".")]
    for down in siblings:
        if down.start < call.end or not down.inputs or not _has_weight(down.module):
            continue
        product = down.inputs[0]
        if product.shape != call.outputs[0].shape:
            continue
        before = [other for other in siblings if other.end < down.start and other is not call]
        for up, values in _halves(before, call.outputs[0]):
            if same(call.outputs[0] * values, product) or same(values * call.outputs[0], product):
                return up, down
    return None


def _is_factor(call: ModuleCall, down: ModuleCall, events: GateEvents) -> bool:
    """Whether the call's own output, or a copy of its values, was multiplied before `down` ran.

    What a limit makes of it may have the same values on the probe, and others beyond it.
    """
    wanted = address_of(call.outputs[0])

    def is_output(tensor: Tensor | None) -> bool:
        place = 0 if tensor is None else address_of(tensor)
        while place in events.copies and place != wanted:
            place = events.copies[place]
        return place == wanted

    between = [p for p in events.products if call.end < p.tick < down.start]
    return not call.is_overwritten and any(is_output(p.left) or is_output(p.right) for p in between)


def _rows(tensor: Tensor) -> int:
    return tensor.numel() // tensor.shape[-1]


def _function_of(call: ModuleCall, trace: Trace) -> str | None:
    """The function that a module computes: on the probe, and on a grid far beyond it."""
    x, y = call.inputs[0], call.outputs[0]
    response = trace.responses.get(call.module)
    if response is None:
        return None
    grid = wide_points(x)
    for name, entry in GATE_FUNCTIONS.items():
        fits = name != "identity" and torch.equal(entry.value(x), y)
        if fits and torch.equal(entry.value(grid), response):
            return name
    return None


def _has_weight(module: nn.Module) -> bool:
    return any(True for _ in module.parameters(recurse=True))


def _halves(calls: list[ModuleCall], like: Tensor) -> Iterator[tuple[UpSource, Tensor]]:
    """What the other factor may be: an output of the same shape, or half of a fused one."""
    for call in calls:
        for index, output in enumerate(call.outputs):
            if output.shape == like.shape:
                yield UpSource(call.module, index, "whole"), output
            elif (*output.shape[:-1], output.shape[-1] // 2) == tuple(like.shape):
                for part in ("first", "second", "even", "odd"):
                    source = UpSource(call.module, index, part)
                    yield source, source.read(output)
