"""GLU gates with a limit and a slope of their own: min(x, limit) · σ(alpha · min(x, limit))."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from trilens.caches.gate_functions import GATE_FUNCTIONS
from trilens.caches.gates import GateSpec
from trilens.models.gates.block import BlockView
from trilens.models.gates.kernels import is_recorded
from trilens.models.gates.site import GateSite, GateSource, layout_of

__all__ = ["find_limited_glu"]

_QUICK = 1.702


def find_limited_glu(view: BlockView) -> list[GateSite]:
    """The gate of an MLP whose first half is limited, where its sigmoid was recorded."""
    found = []
    for mlp in view.calls[1:]:
        limit = getattr(mlp.module, "swiglu_limit", None)
        alpha = getattr(mlp.module, "swiglu_alpha", None)
        fused = dict(mlp.module.named_children()).get("gate_up_proj")
        source = next((call for call in view.calls if call.module is fused), None)
        if source is None or limit is None or alpha != _QUICK:
            continue
        read, output = _half(float(limit)), source.outputs[0]
        inside = [f for f in view.functions if f.path == mlp.path and f.function == "sigmoid"]
        pre = read({"tensors": (output,)})
        layout = layout_of(output, view.seq)
        if layout is None or not is_recorded(torch.sigmoid(alpha * pre), [f.y for f in inside]):
            continue
        view.explain(inside)
        spec = GateSpec(
            name="mlp.gate",
            kind="activation",
            formula=f"quick_gelu(min(x, {limit:g}))",
            function="quick_gelu",
            range=GATE_FUNCTIONS["quick_gelu"].range,
            shape=(pre.shape[-1],),
            where=source.path,
        )
        module: nn.Module = source.module
        found.append(GateSite(spec, GateSource("output", module), layout, read))
    return found


def _half(limit: float) -> Callable[[Mapping[str, Any]], Tensor]:
    def read(tensors: Mapping[str, Any]) -> Tensor:
        first: Tensor = tensors["tensors"][0].chunk(2, dim=-1)[0]
        return first.clamp(max=limit)

    return read
