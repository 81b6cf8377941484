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
from trilens.io.messages import listed
from trilens.models.anatomy import Anatomy
from trilens.models.gates.site import GateSite, GateSource, layout_of
from trilens.models.trace import ModuleCall, Trace, parent_path, same

__all__ = ["find_glu_gates"]

_NAME = "mlp.gate"


def find_glu_gates(
    trace: Trace, anatomy: Anatomy
) -> tuple[dict[tuple[str, int], GateSite], dict[int, str]]:
    """The proven GLU gates per layer, and per layer without one the reason, in words."""
    gates: dict[tuple[str, int], GateSite] = {}
    unclaimed: dict[int, str] = {}
    block_calls = _block_calls(trace, anatomy)
    for layer, block in enumerate(block_calls):
        inside = trace.inside(block)
        own = [call for call in inside if not _is_expert(call, anatomy)]
        claims = [claim for call in own if (claim := _claim(call, inside, trace.seq))]
        claims = [claim for claim in claims if _is_local(claim, inside)] or claims
        if len(claims) == 1:
            gates[_NAME, layer] = claims[0]
        elif claims:
            places = listed(claim.spec.where for claim in claims)
            unclaimed[layer] = f"{len(claims)} GLU gates in one block ({places})"
        else:
            unclaimed[layer] = _why_none(inside, own, trace.seq)
    return gates, unclaimed


def _why_none(inside: list[ModuleCall], own: list[ModuleCall], seq: int) -> str:
    for call in inside:
        if not _keeps_shape(call) or _function_of(call.inputs[0], call.outputs[0]) is None:
            continue
        if call not in own or _rows(call.inputs[0]) != seq:
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


def _claim(call: ModuleCall, inside: list[ModuleCall], seq: int) -> GateSite | None:
    """This call as a gate, if its output times something is the next projection's input."""
    if not _keeps_shape(call) or _rows(call.inputs[0]) != seq:
        return None
    function = _function_of(call.inputs[0], call.outputs[0])
    if function is None:
        return None
    parent = parent_path(call.path)
    siblings = [other for other in inside if other.path.startswith(parent + ".")]
    for down in siblings:
        if down.start < call.end or not down.inputs or not _has_weight(down.module):
            continue
        product = down.inputs[0]
        if product.shape != call.outputs[0].shape:
            continue
        before = [other for other in siblings if other.end < down.start and other is not call]
        for up in _halves(before, call.outputs[0]):
            if same(call.outputs[0] * up, product) or same(up * call.outputs[0], product):
                entry = GATE_FUNCTIONS[function]
                spec = GateSpec(
                    name=_NAME,
                    kind="sigmoid" if function == "sigmoid" else "activation",
                    formula=f"{function}(x)",
                    function=function,
                    range=entry.range,
                    shape=(product.shape[-1],),
                    where=call.path,
                    static=False,
                )
                layout = layout_of(call.inputs[0], seq)
                if layout is None:
                    return None
                return GateSite(spec, GateSource("input", call.module), layout)
    return None


def _keeps_shape(call: ModuleCall) -> bool:
    """A module without children that maps one tensor to one of the same shape."""
    if len(call.inputs) != 1 or len(call.outputs) != 1 or any(True for _ in call.module.children()):
        return False
    x, y = call.inputs[0], call.outputs[0]
    return x.shape == y.shape and x.is_floating_point() and x.numel() > 0


def _rows(tensor: Tensor) -> int:
    return tensor.numel() // tensor.shape[-1]


def _is_expert(call: ModuleCall, anatomy: Anatomy) -> bool:
    """Whether the call is in one of many siblings of its block: a routed expert's rows are
    sorted by expert, not by token, even where every token happens to go there."""
    homes = [block.path for block in anatomy.blocks if call.path.startswith(block.path + ".")]
    home = max(homes, key=len, default="")
    return any(part.isdigit() for part in call.path[len(home) :].split("."))


def _function_of(x: Tensor, y: Tensor) -> str | None:
    for name, entry in GATE_FUNCTIONS.items():
        if name != "identity" and torch.equal(entry.value(x), y):
            return name
    return None


def _has_weight(module: nn.Module) -> bool:
    return any(True for _ in module.parameters(recurse=True))


def _halves(calls: list[ModuleCall], like: Tensor) -> Iterator[Tensor]:
    """What the other factor may be: an output of the same shape, or half of a fused one."""
    for call in calls:
        for output in call.outputs:
            if output.shape == like.shape:
                yield output
            elif (*output.shape[:-1], output.shape[-1] // 2) == tuple(like.shape):
                yield from output.chunk(2, dim=-1)
                yield output[..., 0::2]
                yield output[..., 1::2]
