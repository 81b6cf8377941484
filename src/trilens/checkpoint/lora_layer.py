"""A packed layer with LoRA adapters, of PEFT's own kind."""

from __future__ import annotations

from typing import Any

from peft.tuners.lora.layer import Linear
from torch import nn

from trilens.checkpoint.arriving import dense_like
from trilens.errors import UsageError
from trilens.ternary.packed.experts import TernaryExperts
from trilens.ternary.packed.linear import TernaryLinear

__all__ = ["TernaryLora", "refuse_experts"]


def refuse_experts(experts: TernaryExperts, *_args: Any, **_options: Any) -> nn.Module:
    """Say what adapters on packed experts need.

    Raises:
        UsageError: always.
    """
    raise UsageError(
        f"target_modules names packed experts {list(experts.shape)}, which take no adapters: name "
        "linear layers, such as q_proj; to adapt the experts, call model.dequantize() and pass "
        "target_parameters"
    )


class TernaryLora(Linear):
    """A packed layer with adapters: y = x · Ŵᵀ + b + scaling · B·A·x.

    Merging puts a dense layer with the sum in place of the packed one, since the sum is not
    ternary; `unmerge` puts the packed one back, with all of its bits.
    """

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, config: Any, **kwargs: Any
    ) -> None:
        super().__init__(base_layer, adapter_name, config, **kwargs)
        self.fan_in_fan_out = bool(self.get_base_layer().transposed)
        self._packed: TernaryLinear | None = None

    def _get_in_out_features(self, module: Any) -> tuple[int, int]:
        return module.in_features, module.out_features

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the adapters to a dense copy of the weight, which takes the packed layer's place.

        Memory: the dense weight, beside the packed one.
        """
        packed = self.get_base_layer()
        if not isinstance(packed, TernaryLinear):
            super().merge(safe_merge=safe_merge, adapter_names=adapter_names)
            return
        self.base_layer = dense_like(packed, None).requires_grad_(False)
        try:
            super().merge(safe_merge=safe_merge, adapter_names=adapter_names)
        finally:
            if self.merged:
                # Not a submodule: it is out of the model until the adapters are unmerged.
                object.__setattr__(self, "_packed", packed)
            else:
                self.base_layer = packed

    def unmerge(self) -> None:
        """Put the packed layer back."""
        if self._packed is None:
            super().unmerge()
            return
        self.base_layer = self._packed
        self.merged_adapters.clear()
        object.__setattr__(self, "_packed", None)
