"""Routers of experts, found by the top-k choice that follows a softmax or sigmoid over experts.

Their value is the probability of each expert before the top-k cut. A model that takes its softmax
over the chosen experts only is read the same way: over all of them, then renormalised.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from trilens.caches.gate_functions import INNER_FUNCTIONS
from trilens.caches.gates import GateSpec
from trilens.models.gates.block import BlockView
from trilens.models.gates.events import FunctionCall, TopkCall
from trilens.models.gates.kernels import is_recorded
from trilens.models.gates.site import GateSite

__all__ = ["find_routers"]

_FORMULAS = {
    "softmax": "softmax(x)",
    "sigmoid": "σ(x)",
    "chosen": "σ(x); the model takes it of the chosen experts",
    "cut": "softmax(x); the model renormalises over the chosen experts",
    "masked": "softmax(x); the model leaves out experts far below the best one",
    "unit": "probability of each expert",
}
_TOLERANCE = 1e-6


def find_routers(view: BlockView) -> list[GateSite]:
    """The block's router, at most one site per choice of experts."""
    found: list[GateSite] = []
    for topk in view.topk:
        if topk.x.shape[-1] == view.seq or not view.has_tokens(topk.x):
            continue
        for call in view.open_calls():
            if call.function not in ("softmax", "sigmoid") or not _together(call, topk):
                continue
            read = _what_was_cut(call, topk, view)
            if read is None:
                continue
            view.explain([call])
            site = _site(call, *read, view)
            if site is None:
                view.complaints.append(
                    f"{call.class_name} calls {call.function} for a top-k choice ({call.path}), "
                    "on values that no module shows"
                )
            else:
                found.append(site)
            break
    return found or _masked_router(view)


def _masked_router(view: BlockView) -> list[GateSite]:
    """A router without a top-k: it masks experts far below the best, and takes the maximum."""
    calls = [call for call in view.open_calls() if call.function == "softmax"]
    calls = [c for c in calls if c.x.dim() == 2 and c.x.shape[0] == view.seq != c.x.shape[1]]
    for call in calls:
        left_out = torch.isneginf(call.x)
        for module in view.calls:
            for logits in module.outputs:
                if logits.shape != call.x.shape or module.start > call.tick:
                    continue
                if not bool(((logits == call.x) | left_out).all()):
                    continue
                view.explain(calls)
                site = _site(call, logits, "masked", view)
                return [] if site is None else [site]
    return []


def _together(call: FunctionCall, topk: TopkCall) -> bool:
    a, b = f"{call.path}.", f"{topk.path}."
    return a.startswith(b) or b.startswith(a)


def _what_was_cut(call: FunctionCall, topk: TopkCall, view: BlockView) -> tuple[Tensor, str] | None:
    """What the choice was made of, and how the model turned it into probabilities."""
    if call.tick < topk.tick:
        return _before_cut(call, topk, view)
    chosen = torch.sigmoid(topk.values.to(call.x.dtype))
    if call.function == "sigmoid" and is_recorded(chosen, [call.y]):
        return topk.x, "chosen"
    # A cast to float32 in between changes no number.
    if call.function == "softmax" and torch.equal(call.x.double(), topk.values.double()):
        return topk.x, "cut"
    return None


def _before_cut(call: FunctionCall, topk: TopkCall, view: BlockView) -> tuple[Tensor, str] | None:
    if not view.has_tokens(call.y):
        return None
    scores, offered = view.rows(call.y), view.rows(topk.x)
    if scores.shape == offered.shape:
        return call.x, call.function
    # Scores of shared experts may stand beside those that are chosen from, with a bias per expert.
    experts = offered.shape[1]
    if call.function == "sigmoid" and scores.shape[1] > experts:
        bias = offered - scores[:, :experts]
        if float((bias - bias[:1]).abs().max()) <= _TOLERANCE:
            return view.rows(call.x)[:, :experts].contiguous(), "sigmoid"
    return None


def _site(call: FunctionCall, pre: Tensor, how: str, view: BlockView) -> GateSite | None:
    function = {"cut": "softmax", "masked": "softmax", "chosen": "sigmoid"}.get(how, how)
    if how == "softmax":
        value = INNER_FUNCTIONS["softmax"].value(call.x)
        if float((value - call.y).abs().max()) > _TOLERANCE:
            return None
    place = view.locate(pre, view.block.end)
    if place is None and how in ("softmax", "sigmoid"):
        # Some routers hand on their probabilities alone.
        place, function, how = view.locate(call.y, view.block.end), "unit", "unit"
    if place is None:
        return None
    source, layout, path = place
    if function != "unit" and call.x.dtype != pre.dtype:
        # The model casts after its top-k choice.
        layout = replace(layout, dtype=call.x.dtype)
    spec = GateSpec(
        name="attn.router" if view.in_attention(call.path) else "router",
        kind="router",
        formula=_FORMULAS[how],
        function=function,
        range=(0.0, 1.0),
        shape=(view.rows(pre).shape[1],),
        where=path,
    )
    return GateSite(spec, source, layout)
