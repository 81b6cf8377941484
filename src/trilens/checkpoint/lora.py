"""LoRA adapters on packed layers, through PEFT's own registration."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from torch import nn

from trilens.errors import UsageError
from trilens.io.messages import listed
from trilens.ternary.packed.experts import TernaryExperts
from trilens.ternary.packed.linear import TernaryLinear

if TYPE_CHECKING:
    from peft import LoraConfig

__all__ = ["enable_lora"]


def enable_lora(config: LoraConfig, *, model: nn.Module | None = None) -> LoraConfig:
    """Let PEFT put LoRA adapters on the packed layers of a ternary model.

    The trits stay as they are and have no gradient; the adapters train. `merge_and_unload` and
    `merge_adapter` put dense layers with the sum in the place of packed ones, since a sum is not
    ternary, and `unmerge_adapter` puts the packed ones back.

    Example:
        `config = trilens.enable_lora(LoraConfig(target_modules=["q_proj"]))`, then
        `get_peft_model(model, config)`. For saved adapters the config is
        `LoraConfig.from_pretrained(path)`, passed on as `PeftModel.from_pretrained(…, config=…)`.

    Experts that are packed in one tensor take no adapters: their layers are refused by name.

    Args:
        config: of the adapters; `target_modules` names layers.
        model: needed where `target_parameters` names tensors, to see which of them are packed.

    Returns:
        The same config, in which the layer's class is entered.

    Raises:
        UsageError: the target is "all-linear", by which PEFT finds dense layers alone;
            `target_parameters` names packed experts, or there is no model to tell.
    """
    if config.target_modules == "all-linear":
        raise UsageError(
            "target_modules is 'all-linear', by which PEFT finds dense layers alone: name the "
            "packed layers, for example target_modules=['q_proj', 'v_proj']"
        )
    if config.target_parameters:
        _check_parameters(list(config.target_parameters), model)
    layers = import_module("trilens.checkpoint.lora_layer")
    config._register_custom_module(
        {TernaryLinear: layers.TernaryLora, TernaryExperts: layers.refuse_experts}
    )
    return config


def _check_parameters(targets: list[str], model: nn.Module | None) -> None:
    """Refuse parameters that are packed: PEFT would pass over them in silence."""
    if model is None:
        raise UsageError(
            f"target_parameters names {listed(targets)}: pass the model too, "
            "trilens.enable_lora(config, model=model), so that packed experts among them are seen"
        )
    packed = [
        name
        for name, module in model.named_modules()
        if isinstance(module, TernaryExperts)
        and any(name == target or name.endswith(f".{target}") for target in targets)
    ]
    if packed:
        raise UsageError(
            f"target_parameters names packed experts, which take no adapters: {listed(packed)}. "
            "Call model.dequantize() first, after which PEFT finds their tensors, or ternarize the "
            "checkpoint without them (keep=...)"
        )
