"""Shrink any transformers config: defaults by field name, then what a family adds.

A config class of transformers 5 is a dataclass, so the names it understands can be read off it.
Every name below means the same thing in all families that have it, which is why one table of
tiny values carries most of the 189 types and the override tables only hold the exceptions.
"""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

from transformers import PreTrainedConfig

HIDDEN = 64
VOCAB = 120
"""Unlike every other size, so that a mixed-up axis does not go unnoticed."""
LAYERS = 4
HEADS = 4
KV_HEADS = 2
HEAD_DIM = 16
POSITIONS = 160
WINDOW = 8

_WIDTH = ("hidden_size", "d_model", "n_embd", "emb_dim", "lru_width")
_INNER = [
    "intermediate_size",
    "intermediate_size_mlp",
    "ffn_dim",
    "decoder_ffn_dim",
    "encoder_ffn_dim",
    "n_inner",
    "dff",
    "dim_ff",
    "d_inner",
    "feed_forward_size",
    "ffn_hidden_size",
    "dense_intermediate_size",
    "mlp_dim",
    "prefix_dense_intermediate_size",
    "d_ff",
]
_DEPTH = [
    "num_hidden_layers",
    "n_layer",
    "n_layers",
    "num_layers",
    "decoder_layers",
    "num_decoder_layers",
]
_HEADS = [
    "num_attention_heads",
    "n_head",
    "n_heads",
    "num_heads",
    "decoder_attention_heads",
    "encoder_attention_heads",
    "attention_heads",
    "num_decoder_attention_heads",
    "num_encoder_attention_heads",
]
_POSITIONS = [
    "max_position_embeddings",
    "n_positions",
    "n_ctx",
    "max_seq_len",
    "max_target_positions",
    "context_length",
    "model_max_length",
]
_EXPERTS = ["num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"]
_TOP_K = ["num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k"]

TINY: dict[str, Any] = {
    **dict.fromkeys(_WIDTH, HIDDEN),
    **dict.fromkeys(_INNER, 96),
    **dict.fromkeys(_DEPTH, LAYERS),
    **dict.fromkeys(("encoder_layers", "num_encoder_layers"), 1),
    **dict.fromkeys(_HEADS, HEADS),
    **dict.fromkeys(_POSITIONS, POSITIONS),
    **dict.fromkeys(_EXPERTS, 8),
    **dict.fromkeys(_TOP_K, 2),
    "vocab_size": VOCAB,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD_DIM,
    "sliding_window": WINDOW,
    "attention_chunk_size": WINDOW,
    # mixtures of experts
    "moe_intermediate_size": 32,
    "expert_ffn_hidden_size": 32,
    "shared_expert_intermediate_size": 32,
    "shared_intermediate_size": 32,
    "moe_shared_expert_intermediate_size": 32,
    "n_group": 2,
    "num_expert_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "num_dense_layers": 1,
    # latent attention and its indexers
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 12,
    "index_topk": 8,
    "index_n_heads": 2,
    "index_head_dim": 16,
    # recurrent mixers
    "state_size": 8,
    "time_step_rank": 4,
    "mamba_d_state": 16,
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_n_groups": 2,
    "mamba_chunk_size": 8,
    "mamba_dt_rank": 4,
    "chunk_size": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 12,
    "linear_head_dim": 8,
    "linear_num_heads": 4,
    # towers of the multimodal types: present, and as small as they can be
    "image_size": 32,
    "patch_size": 16,
    "depth": 1,
    "num_mel_bins": 8,
    "max_source_positions": 16,
}

_TOKENS = {
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "cls_token_id": 1,
    "sep_token_id": 2,
    "decoder_start_token_id": 1,
    "forced_eos_token_id": 2,
}
"""Set only where the class has one: a pad id given to a family without makes a dead embedding."""

_LEAVE_NONE = ("sliding_window", "head_dim", "n_group", "q_lora_rank", "n_inner", "topk_group")
"""Fields whose default None (or 1 group) switches a mechanism off; a number would turn it on."""


def _fields(cls: type[PreTrainedConfig]) -> dict[str, Any]:
    """The names a config class understands, with their defaults."""
    return {
        f.name: None if f.default is dataclasses.MISSING else f.default
        for f in dataclasses.fields(cls)
    }


def _sub_configs(cls: type[PreTrainedConfig]) -> dict[str, Any]:
    """The nested configs a class declares; older families only have the bare classes."""
    declared = getattr(cls, "sub_configs_defaults", None) or getattr(cls, "sub_configs", None)
    return dict(declared or {})


def _sub_config_class(spec: Any) -> type[PreTrainedConfig] | None:
    """The class of a nested config, however the outer class declares it."""
    if inspect.isclass(spec):
        return spec if issubclass(spec, PreTrainedConfig) and "Auto" not in spec.__name__ else None
    found = getattr(spec, "config_class", None)
    if inspect.isclass(found) and issubclass(found, PreTrainedConfig):
        return found
    return spec.get_config_class(spec.model_type) if getattr(spec, "model_type", None) else None


def tiny_kwargs(cls: type[PreTrainedConfig], overrides: dict[str, Any]) -> dict[str, Any]:
    """Keyword arguments for a tiny config of this class.

    An override that is a dict and names a nested config is merged into that nested config; a
    nested config overridden with None is left out. An override of ``...`` keeps the class's own
    default, for a generic value that would do harm.
    """
    known = _fields(cls)
    specs = _sub_configs(cls)
    values: dict[str, Any] = {}
    for name, default in known.items():
        if name in specs or name in ("layer_types",):
            continue
        if name in TINY:
            off = default is None or (name in ("n_group", "topk_group") and default == 1)
            if not (off and name in _LEAVE_NONE):
                values[name] = TINY[name]
        elif isinstance(default, float) and any(
            part in name for part in ("dropout", "pdrop", "layerdrop", "jitter")
        ):
            values[name] = 0.0
        elif name in _TOKENS and default is not None:
            values[name] = _TOKENS[name]
    if "qk_rope_head_dim" in known:
        # Multi-head latent attention: rope only sees its own slice, and every head has its key.
        values["num_key_value_heads"] = values["num_attention_heads"]
        if "head_dim" in values:
            values["head_dim"] = values["qk_rope_head_dim"]
    for name, spec in specs.items():
        wanted = overrides.get(name, {})
        sub = _sub_config_class(spec)
        if wanted is None:
            values[name] = None
        elif sub is not None and isinstance(wanted, dict):
            # What the outer class asks of its nested one (an activation, a norm) still holds;
            # its sizes do not.
            asked = getattr(spec, "init_kwargs", None) or {}
            kept = {key: value for key, value in asked.items() if key not in TINY}
            values[name] = sub(**tiny_kwargs(sub, {**kept, **wanted}))
    for name, value in overrides.items():
        if name in specs:
            continue
        if value is ...:
            values.pop(name, None)
        else:
            values[name] = value
    return values
