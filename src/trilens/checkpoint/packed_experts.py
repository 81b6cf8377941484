"""Packed experts as one of transformers' implementations of experts, under the name "trilens"."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, grouped_mm_experts_forward

from trilens.checkpoint.format.names import QUANT_METHOD
from trilens.ternary.packed.experts import TernaryExperts

__all__ = ["restore_experts", "ternary_experts_forward", "use_packed_experts"]

_DEFAULT = "grouped_mm"


def ternary_experts_forward(
    self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """The experts of a layer, by packed products: tokens sorted by expert, one expert at a time.

    A layer with dense experts, or some of them dense, goes the way of "grouped_mm".

    Shapes: hidden_states [tokens, d_model]; top_k_index, top_k_weights [tokens, chosen] → [tokens,
    d_model]
    """
    up_name = "gate_up_proj" if self.has_gate else "up_proj"
    up, down = getattr(self, up_name), self.down_proj
    packed = isinstance(up, TernaryExperts) and isinstance(down, TernaryExperts)
    if not packed or self._is_expert_parallel:
        found: Tensor = grouped_mm_experts_forward(self, hidden_states, top_k_index, top_k_weights)
        return found
    n_chosen = top_k_index.shape[-1]
    experts, order = torch.sort(top_k_index.reshape(-1))
    numbers = torch.arange(up.n_experts, device=experts.device)
    ends = torch.searchsorted(experts, numbers, right=True)
    x = up.multiply(hidden_states[order // n_chosen], ends)
    if self.has_bias:
        x = x + getattr(self, f"{up_name}_bias")[experts]
    x = self._apply_gate(x) if self.has_gate else self.act_fn(x)
    x = down.multiply(x, ends)
    if self.has_bias:
        x = x + self.down_proj_bias[experts]
    if self.has_post_expert_norm:
        x = self.post_expert_norm(x)
    x = x * top_k_weights.reshape(-1)[order].unsqueeze(-1)
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order), device=order.device)
    # PROMOTE: a sum keeps float32 inside, adding one by one in half precision would not
    summed: Tensor = x[back].view(len(hidden_states), n_chosen, -1).sum(dim=1)
    return summed.to(hidden_states.dtype)


def use_packed_experts(model: nn.Module) -> None:
    """Choose packed products for the modules that hold packed experts and follow the default."""
    _switch(model, _DEFAULT, QUANT_METHOD)


def restore_experts(model: nn.Module) -> None:
    """Choose transformers' default again, for a model that became dense."""
    _switch(model, QUANT_METHOD, _DEFAULT)


def _switch(model: nn.Module, old: str, new: str) -> None:
    for module in model.modules():
        config: Any = getattr(module, "config", None)
        if getattr(config, "_experts_implementation", None) == old:
            config._experts_implementation_internal = new


ALL_EXPERTS_FUNCTIONS.register(QUANT_METHOD, ternary_experts_forward)
