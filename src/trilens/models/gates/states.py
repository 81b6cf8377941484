"""Decays of matrix states that no kernel function carries: mLSTM and lightning attention.

Source: xLSTM, arXiv 2405.04517; lightning attention, arXiv 2401.04658.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trilens.caches.gates import GateSpec
from trilens.models.gates.block import BlockView
from trilens.models.gates.kernels import is_recorded
from trilens.models.gates.site import GateSite, GateSource, Layout, layout_of

__all__ = ["find_state_gates"]


def find_state_gates(view: BlockView) -> list[GateSite]:
    """The forget gate of an mLSTM, or the fixed decay of lightning attention."""
    for call in view.calls[1:]:
        children = dict(call.module.named_children())
        buffers = dict(call.module.named_buffers(recurse=False))
        if "mlstm_backend" in children:
            return _forget_gate(children["mlstm_backend"], view)
        if "slope_rate" in buffers and "query_decay" in buffers:
            return _slope(call.module, call.path, view)
    return []


def _forget_gate(backend: nn.Module, view: BlockView) -> list[GateSite]:
    """The backend's input [batch, heads, seq] whose log σ was recorded, token by token or whole."""
    for call in view.calls:
        if call.module is not backend:
            continue
        inside = [f for f in view.functions if call.start < f.tick < call.end]
        made = [f.y for f in inside if f.function == "logsigmoid"]
        for index, x in enumerate(call.inputs):
            layout = layout_of(x, view.seq) if x.dim() == 3 else None
            if layout is None or not is_recorded(F.logsigmoid(x), made):
                continue
            spec = _decay("σ(f)", "sigmoid", view.rows(x).shape[1], call.path)
            view.explain(inside)
            return [GateSite(spec, GateSource("input", backend, index), layout)]
    return []


def _slope(module: nn.Module, path: str, view: BlockView) -> list[GateSite]:
    """exp(−slope) per head: the model takes it to the power of the tokens in a chunk."""
    inside = [f for f in view.functions if f.path == path and f.function == "exp"]
    slope = module.get_buffer("slope_rate")
    size = int(getattr(module, "block_size", 0)) or view.seq
    chunk = min(size, view.seq)
    if not is_recorded(torch.exp(-slope * chunk), [f.y for f in inside]):
        return []
    view.explain(inside)
    spec = replace(_decay("exp(−slope)", "log_decay", slope.numel(), path), static=True)
    return [GateSite(spec, GateSource("output", module), Layout("static"), _negative(module))]


def _decay(formula: str, function: str, units: int, path: str) -> GateSpec:
    return GateSpec("mixer.decay", "decay", formula, function, (0.0, 1.0), (units,), path)


def _negative(module: nn.Module) -> Callable[[Mapping[str, Any]], Tensor]:
    def read(_tensors: Mapping[str, Any]) -> Tensor:
        return -module.get_buffer("slope_rate")

    return read
