"""Overrides for plain decoders: rotary or learned positions, dense or per-layer sliding windows."""

from __future__ import annotations

from typing import Any

from tinymodels.names import FULL, SLIDE

# Half of the layers slide: these families choose per layer from `max_window_layers` on.
_QWEN_WINDOWS = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2}

# The defaults of 1.0 multiply by nothing, which would hide a capture that skips a multiplier;
# 0.25 is 1/sqrt(head_dim), so the scores keep their usual size.
GRANITE = {
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.5,
    "logits_scaling": 2.0,
    "attention_multiplier": 0.25,
}

# The caps of 50 and 30 never bite at this size.
_GEMMA2_CAPS = {
    "query_pre_attn_scalar": 16,
    "attn_logit_softcapping": 4.0,
    "final_logit_softcapping": 6.0,
}

OVERRIDES: dict[str, dict[str, Any]] = {
    # mp_num = 4 divides the heads; the default rotary_dim 64 is wider than a tiny head.
    "codegen": {"rotary_dim": 8},
    # The default logit_scale 1/16 leaves tiny logits nearly equal.
    "cohere": {"logit_scale": 0.5, "use_qk_norm": True},
    "cohere2": {"logit_scale": 0.5},
    # The default rope parameters are empty and the model indexes them by layer type; a type with
    # None has no positions, as the full layers of Cohere's interleaved families. The sections of
    # the three position axes add up to head_dim / 2.
    "cohere_compass_text": {
        "layer_types": [SLIDE, SLIDE, SLIDE, FULL],
        "rope_parameters": {
            SLIDE: {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]},
            FULL: None,
        },
    },
    # Text is preceded by a learned prompt of this length inside the model.
    "cpmant": {
        "dim_head": 16,
        "position_bias_num_buckets": 32,
        "position_bias_max_distance": 64,
        "prompt_length": 4,
        "prompt_types": 4,
        "segment_types": 4,
    },
    # Beyond keep_window_size keys, the dynamic mask drops the least wanted ones.
    "doge": {"keep_window_size": 8},
    "exaone4": {"layer_types": [SLIDE, SLIDE, SLIDE, FULL]},
    "gemma2": _GEMMA2_CAPS,
    # The default pattern has its first full layer at the sixth place.
    "gemma3_text": {"query_pre_attn_scalar": 16, "layer_types": [SLIDE, SLIDE, FULL, SLIDE]},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "window_size": 8},
    "gptj": {"rotary_dim": 8},
    "granite": GRANITE,
    "granite_swa": GRANITE,
    # Each stack is run H_cycles x (L_cycles + 1) times; the default embedding_scale is the inverse
    # of an initialiser's std that is not used here.
    "hrm_text": {
        "num_hidden_layers": 2,
        "H_cycles": 2,
        "L_cycles": 1,
        "L_bp_cycles": [1],
        "embedding_scale": 3.0,
    },
    # The modeling code raises to head_dim, whose default is None.
    "hunyuan_v1_dense": {"head_dim": 16},
    "hyperclovax": {
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.5,
        "logits_scaling": 2.0,
        "attention_multiplier": 0.25,
    },
    # Logits are divided by hidden_size / dim_model_base, which a tiny width turns into a product.
    "minicpm3": {"dim_model_base": 32, "scale_emb": 3},
    "ministral": {"head_dim": 16, "layer_types": [FULL, SLIDE, SLIDE, SLIDE]},
    # The layers read sliding_window, half of local_attention.
    "modernbert-decoder": {"local_attention": 16, "sliding_window": ...},
    "qwen2": _QWEN_WINDOWS,
    "qwen3": _QWEN_WINDOWS,
    "vaultgemma": _GEMMA2_CAPS,
}
