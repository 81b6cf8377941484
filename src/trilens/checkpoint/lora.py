"""LoRA adapters on packed layers, through PEFT's own registration."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from trilens.errors import UsageError
from trilens.ternary.packed.experts import TernaryExperts
from trilens.ternary.packed.linear import TernaryLinear

if TYPE_CHECKING:
    from peft import LoraConfig

__all__ = ["enable_lora"]


def enable_lora(config: LoraConfig) -> LoraConfig:
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

    Returns:
        The same config, in which the layer's class is entered.

    Raises:
        UsageError: the target is "all-linear", by which PEFT finds dense layers alone.
    """
    if config.target_modules == "all-linear":
        raise UsageError(
            "target_modules is 'all-linear', by which PEFT finds dense layers alone: name the "
            "packed layers, for example target_modules=['q_proj', 'v_proj']"
        )
    layers = import_module("trilens.checkpoint.lora_layer")
    config._register_custom_module(
        {TernaryLinear: layers.TernaryLora, TernaryExperts: layers.refuse_experts}
    )
    return config
