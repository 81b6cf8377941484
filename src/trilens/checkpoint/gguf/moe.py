"""Settings of architectures with experts; see `families`."""

from __future__ import annotations

from typing import Any

from gguf import GGUFWriter

from trilens.checkpoint.gguf.dense import multipliers
from trilens.checkpoint.gguf.settings import Extra, experts, require, rotary

__all__ = ["granitemoe", "mixtral", "olmoe", "qwen2_moe", "qwen3_moe"]


def mixtral(writer: GGUFWriter, config: Any) -> Extra:
    """Mixtral: Llama's blocks with experts."""
    require(config, hidden_act="silu")
    experts(writer, config)
    return rotary(writer, config)


def qwen3_moe(writer: GGUFWriter, config: Any) -> Extra:
    """Qwen 3 with experts in every layer."""
    require(config, hidden_act="silu", decoder_sparse_step=1, mlp_only_layers=[])
    experts(writer, config, width=config.moe_intermediate_size, normalized=True)
    return rotary(writer, config)


def qwen2_moe(writer: GGUFWriter, config: Any) -> Extra:
    """Qwen 2 with experts in every layer, and one that every token gets."""
    require(config, hidden_act="silu", decoder_sparse_step=1, mlp_only_layers=[])
    experts(writer, config, width=config.moe_intermediate_size, normalized=False)
    writer.add_expert_shared_feed_forward_length(config.shared_expert_intermediate_size)
    return rotary(writer, config)


def olmoe(writer: GGUFWriter, config: Any) -> Extra:
    """OLMoE."""
    require(config, hidden_act="silu", attention_bias=False, clip_qkv=None)
    require(config, num_key_value_heads=config.num_attention_heads)
    experts(writer, config, normalized=False)
    return rotary(writer, config)


def granitemoe(writer: GGUFWriter, config: Any) -> Extra:
    """Granite with experts."""
    require(config, hidden_act="silu", attention_bias=False)
    experts(writer, config)
    multipliers(writer, config)
    return rotary(writer, config)
