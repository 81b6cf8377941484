"""Overrides for recurrent models and for hybrids of recurrence, convolution and attention."""

from __future__ import annotations

from typing import Any

from tinymodels.names import (
    CONV,
    DENSE,
    FULL,
    HYBRID,
    HYBRID_SLIDE,
    INDEXED,
    LINEAR,
    SLIDE,
    SPARSE,
)
from tinymodels.overrides_dense import GRANITE

# Compressed index keys, an n-gram embedding on the first layer and hyper-connections: all three
# are off or huge by default.
QWEN4_TEXT: dict[str, Any] = {
    "layer_types": [LINEAR, INDEXED, LINEAR, INDEXED],
    "hc_lowrank": 16,
    "eos_token_id": 2,  # n-grams do not reach over it
    "ple_layer_ids": [1],
    "ple_embed_dim": 64,
    "heads_per_ngram": 2,
    "ngram_vocab_size_base": 50,
    "make_ngram_vocab_size_divisible_by": 8,
    "split_ngram_parts": 1,
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 8,
    "indexer_compress_ratio": 4,
}

_INKLING: dict[str, Any] = {
    "layer_types": [HYBRID_SLIDE, HYBRID, HYBRID_SLIDE, HYBRID],
    "sliding_window_size": 8,
    "swa_num_attention_heads": 8,
    "swa_num_key_value_heads": 4,
    "swa_head_dim": 8,
    "d_rel": 4,
    "rel_extent": 24,
    "log_scaling_n_floor": 16,
    "unpadded_vocab_size": 112,
}

OVERRIDES: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {"layer_group_size": 2, "num_nextn_predict_layers": 0},
    # By default no layer attends.
    "bamba": {"attn_layer_indices": [1, 3]},
    # The multipliers are 1.0 by default, see Granite.
    "falcon_h1": {
        "mamba_d_ssm": 128,
        "embedding_multiplier": 2.0,
        "lm_head_multiplier": 0.5,
        "key_multiplier": 0.8,
        "attention_in_multiplier": 1.2,
        "attention_out_multiplier": 0.9,
        "mlp_multipliers": [0.8, 1.1],
        "ssm_multipliers": [0.9, 1.1, 0.8, 1.2, 0.7],
        "ssm_in_multiplier": 1.1,
        "ssm_out_multiplier": 0.8,
    },
    "granitemoehybrid": {
        **GRANITE,
        "layer_types": [LINEAR, FULL, LINEAR, FULL],
        "intermediate_size": 32,
    },
    "inkling2_text": {**_INKLING, "n_layers_per_attn_res_block": 2},
    "inkling_text": {
        **_INKLING,
        "logits_mup_width_multiplier": 2.0,
        "mlp_layer_types": [DENSE, SPARSE, SPARSE, SPARSE],
    },
    # Periods of 3 and 2 make all four pairs of mixer and feed-forward among five layers.
    "jamba": {
        "num_hidden_layers": 5,
        "attn_layer_period": 3,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "intermediate_size": 32,
        "num_experts": 4,
    },
    # By default the fifth layer is the first that attends.
    "kimi_linear": {"layer_types": [LINEAR, FULL, LINEAR, FULL]},
    "lfm2": {"layer_types": [CONV, FULL, CONV, FULL], "block_multiple_of": 16},
    # No default for the layers' kinds.
    "lfm2_moe": {"layer_types": [CONV, FULL, CONV, FULL]},
    "lfm3": {"num_hidden_layers": 5, "layer_types": [CONV, CONV, FULL, CONV, SLIDE]},
    # num_heads x head_dim has to be hidden_size x expand.
    "mamba2": {"num_heads": 8, "n_groups": 2, "state_size": 16},
    "minimax": {"block_size": 8, "intermediate_size": 32, "num_local_experts": 4},
    # The layers' kinds also give their number.
    "nemotron_h": {
        "layers_block_type": [LINEAR, "moe", FULL, "mlp", LINEAR, FULL],
        "mamba_num_heads": 8,
        "mamba_head_dim": 16,
        "ssm_state_size": 16,
        "mamba_n_groups": 2,
        "n_routed_experts": 4,
    },
    "olmo_hybrid": {"layer_types": [LINEAR, FULL, LINEAR, FULL]},
    "qwen3_next": {"mlp_only_layers": [0]},
    "qwen4_exp_text": QWEN4_TEXT,
    "recurrent_gemma": {
        "num_hidden_layers": 5,
        "attention_window_size": 8,
        "logits_soft_cap": 6.0,
        "num_key_value_heads": 1,
    },
    # In eval mode the weights of later layers and the stream are halved every rescale_every
    # layers: the default of 6 would never do that among four layers.
    "rwkv": {"rescale_every": 2},
    "xlstm": {"ffn_round_up_to_multiple_of": 16, "output_logit_soft_cap": 6.0},
    # Two hybrid layers at least: their shared block is declared as tied to the first one's.
    "zamba": {
        "num_hidden_layers": 6,
        "layers_block_type": [LINEAR, LINEAR, HYBRID, LINEAR, HYBRID, LINEAR],
    },
    # Two shared blocks taking turns over three hybrid layers.
    "zamba2": {
        "num_hidden_layers": 6,
        "layers_block_type": [LINEAR, HYBRID, LINEAR, HYBRID, LINEAR, HYBRID],
        "num_mem_blocks": 2,
        "num_key_value_heads": 4,  # the adapters only fit ungrouped heads
        "n_mamba_heads": 4,
        "mamba_ngroups": 2,
        "adapter_rank": 8,
        "use_mem_rope": True,
        "use_shared_attention_adapter": True,
    },
    # Only one expert per token is supported.
    "zaya": {
        "num_experts_per_tok": 1,
        "layer_types": [HYBRID, HYBRID_SLIDE, HYBRID, HYBRID_SLIDE],
        "sliding_window": 8,
        "router_hidden_size": 32,
    },
}
