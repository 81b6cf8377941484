"""The real-gated linear recurrent unit: input gate, recurrence gate and decay.

No module shows the gates' pre-activations: they are computed once more from the unit's input and
its own weights, and proven against the sigmoids and exponentials that it called.

Source: Griffin, arXiv 2402.19427.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trilens.caches.gates import GateKind, GateSpec
from trilens.models.gates.block import BlockView
from trilens.models.gates.kernels import is_recorded
from trilens.models.gates.site import GateSite, GateSource, Layout
from trilens.models.trace import ModuleCall

__all__ = ["find_rglru_gates", "rglru_terms"]

_ATTRIBUTES = ("recurrent_param", "input_gate_weight", "input_gate_bias", "recurrent_gate_weight",
               "recurrent_gate_bias")  # fmt: skip
_SHARPNESS = -8.0


def find_rglru_gates(view: BlockView) -> list[GateSite]:
    """The unit's three gates, where the block has one and every value is recorded."""
    for call in view.calls[1:]:
        if all(hasattr(call.module, name) for name in _ATTRIBUTES) and call.inputs:
            return _gates(call, view)
    return []


def rglru_terms(unit: nn.Module, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
    """What the unit multiplies its state and its input with: log decay and write strength.

    Shapes
        x, and both results [batch, seq, width]; position_ids [1 or batch, seq]

    A text's first token resets the state: its log decay is minus infinity.
    """
    tensors = {"x": x}
    log = _log_decay(unit)(tensors)
    reset = position_ids[:, :, None] == 0
    # The unit's own arithmetic, in its own dtype: its rounding of 1 − a² and of a is what ran.
    kept = torch.sqrt(1 - torch.exp(2 * log)).to(x.dtype)
    write = torch.sigmoid(_pre(unit, "input")(tensors)) * torch.where(reset, 1.0, kept)
    # PROMOTE: the float32 log of a rounded decay next to 1 has no digits left.
    decay = torch.exp(log).double().log().float()
    return decay.masked_fill(reset, -torch.inf), write.float()


def _gates(call: ModuleCall, view: BlockView) -> list[GateSite]:
    unit, x = call.module, {"x": call.inputs[0]}
    inside = [f for f in view.functions if call.start < f.tick < call.end]
    made = {name: [f.y for f in inside if f.function == name] for name in ("sigmoid", "exp")}
    enters, recurs, decays = _pre(unit, "input"), _pre(unit, "recurrent"), _log_decay(unit)
    proven = (
        is_recorded(torch.sigmoid(enters(x)), made["sigmoid"])
        and is_recorded(torch.sigmoid(recurs(x)), made["sigmoid"])
        and is_recorded(torch.exp(decays(x)), made["exp"])
    )
    if not proven:
        return []
    view.explain(inside)
    width = call.inputs[0].shape[-1]

    def site(
        name: str, kind: GateKind, formula: str, function: str, read: Callable[..., Tensor]
    ) -> GateSite:
        spec = GateSpec(name, kind, formula, function, (0.0, 1.0), (width,), call.path)
        return GateSite(spec, GateSource("input", unit), Layout("batched", axis=1), read)

    decay = "exp(−8·r·softplus(Λ)), before the reset at a text's first token"
    return [
        site("mixer.input", "sigmoid", "σ(W·x + b)", "sigmoid", enters),
        site("mixer.recurrence", "sigmoid", "r = σ(W·x + b)", "sigmoid", recurs),
        site("mixer.decay", "decay", decay, "log_decay", decays),
    ]


def _pre(unit: nn.Module, gate: str) -> Callable[[Mapping[str, Any]], Tensor]:
    def read(tensors: Mapping[str, Any]) -> Tensor:
        x: Tensor = tensors["x"]
        weight = unit.get_parameter(f"{gate}_gate_weight")
        bias = unit.get_parameter(f"{gate}_gate_bias")
        batch, seq, width = x.shape
        heads = x.reshape(batch * seq, weight.shape[0], -1).permute(1, 0, 2)
        pre = torch.baddbmm(bias[:, None, :], heads, weight)
        return pre.transpose(0, 1).reshape(batch, seq, width)

    return read


def _log_decay(unit: nn.Module) -> Callable[[Mapping[str, Any]], Tensor]:
    gate = _pre(unit, "recurrent")

    def read(tensors: Mapping[str, Any]) -> Tensor:
        rate = F.softplus(unit.get_parameter("recurrent_param"))
        return _SHARPNESS * torch.sigmoid(gate(tensors)) * rate

    return read
