"""Overrides for mixtures of experts, latent attention and sparse (indexed) attention."""

from __future__ import annotations

from typing import Any

from tinymodels.names import DENSE, FULL, INDEXED, SLIDE, SPARSE
from tinymodels.overrides_dense import GRANITE

_DENSE_THEN_SPARSE = [DENSE, SPARSE, SPARSE, SPARSE]

# Per layer and not per head: a Dots3 sliding layer has other head counts and ranks than an
# indexed one, given to the config as swa_* and kept in its per_layer_config.
DOTS3_TEXT: dict[str, Any] = {
    "layer_types": [INDEXED, INDEXED, SLIDE, SLIDE],
    "sliding_window": 8,  # its default None means 512
    "shared_experts_intermediate_size": 32,
    "swa_num_attention_heads": 2,
    "swa_num_key_value_heads": 2,
    "swa_q_lora_rank": 24,
    "swa_kv_lora_rank": 16,
    "swa_head_dim": 20,
    "swa_qk_nope_head_dim": 12,
    "swa_v_head_dim": 12,
}

# One dense layer before the experts, and the temperature tuning of unpositioned layers within
# reach of a short prompt.
LLAMA4_TEXT: dict[str, Any] = {
    "interleave_moe_layer_step": 2,
    "num_experts_per_tok": 1,
    "num_local_experts": 4,
    "floor_scale": 16,
}

OVERRIDES: dict[str, dict[str, Any]] = {
    "aria_text": {"moe_num_experts": 4, "intermediate_size": 32},
    "axk2": {"gated_norm_rank": 8},
    "beam": {"final_logit_softcapping": 6.0, "mlp_layer_types": _DENSE_THEN_SPARSE},
    "cohere2_moe": {
        "logit_scale": 0.5,
        "mlp_layer_types": _DENSE_THEN_SPARSE,
        "num_shared_experts": 1,
    },
    "dbrx": {
        # The block reads a rope_theta that only the checkpoints' own attn_config has.
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v3": {"num_nextn_predict_layers": 0},
    # Every kind of layer: window only, strongly and weakly compressed keys; both routers. The
    # compressed layers choose index_topk of the 40/4 compressed keys.
    "deepseek_v4": {
        "num_hidden_layers": 5,
        "num_key_value_heads": 1,
        "layer_types": [
            SLIDE,
            "heavily_compressed_attention",
            "compressed_sparse_attention",
            "compressed_sparse_attention",
            "heavily_compressed_attention",
        ],
        "compress_rates": {
            "compressed_sparse_attention": 4,
            "heavily_compressed_attention": 8,
        },
        "mlp_layer_types": ["hash_moe", "moe", "moe", "hash_moe", "moe"],
        "partial_rotary_factor": 0.5,
        "o_groups": 2,
        "o_lora_rank": 16,
        "index_topk": 4,
        "num_nextn_predict_layers": 0,
    },
    # Without counts of experts (all None by default) the dense layers' arithmetic fails.
    "dots1": {
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "layer_types": [FULL, SLIDE, FULL, SLIDE],
    },
    "dots3_note_text": DOTS3_TEXT,
    "ernie4_5_moe": {"moe_layer_start_index": 1, "moe_layer_end_index": 3},
    "flint": {"layer_types": [FULL, SLIDE, SLIDE, FULL], "mlp_only_layers": [0]},
    # Shared indexers reuse the choice of the last full one before them.
    "glm_moe_dsa": {"indexer_types": ["full", "shared", "full", "shared"]},
    "gpt_oss": {"intermediate_size": 32, "num_local_experts": 4},
    "granitemoe": {**GRANITE, "intermediate_size": 32},
    "granitemoe_swa": {**GRANITE, "intermediate_size": 32, "shared_intermediate_size": 32},
    "granitemoeshared": {**GRANITE, "intermediate_size": 32},
    "hunyuan_v1_moe": {"head_dim": 16, "num_experts": 4},
    "hy_v4": {"indexer_types": ["full", "shared", "full", "shared"]},
    # The number of query heads is num_key_value_heads x num_experts_per_tok.
    "jetmoe": {"kv_channels": 16, "intermediate_size": 32, "num_attention_heads": ...},
    "kolibri1": {"layer_types": [SLIDE, SLIDE, FULL, SLIDE]},
    # The layers differ in their number of query heads.
    "laguna": {
        "layer_types": [FULL, SLIDE, SLIDE, FULL],
        "num_attention_heads_per_layer": [4, 8, 8, 4],
    },
    "llama4_text": LLAMA4_TEXT,
    # Each layer holds two attentions and two dense blocks; identity experts join the others.
    "longcat_flash": {"num_layers": 2, "zero_expert_num": 4},
    "mellum": {
        "layer_types": [FULL, SLIDE, SLIDE, FULL],
        "mlp_layer_types": _DENSE_THEN_SPARSE,
        "rope_parameters": {
            FULL: {"rope_type": "default", "rope_theta": 500000.0},
            SLIDE: {"rope_type": "default", "rope_theta": 10000.0},
        },
    },
    "minimax_m2": {"intermediate_size": 32},
    # One indexer head per key-value head, each choosing 2 blocks of 4 keys.
    "minimax_m3_vl_text": {
        "layer_types": [FULL, "minimax_m3_sparse", "minimax_m3_sparse", FULL],
        "mlp_layer_types": _DENSE_THEN_SPARSE,
        "intermediate_size": 32,
        "rotary_dim": 8,
        "index_block_size": 4,
        "index_topk_blocks": 2,
        "index_local_blocks": 1,
    },
    "mixtral": {"intermediate_size": 32},
    "phimoe": {"intermediate_size": 32, "num_local_experts": 4},
    "qwen2_moe": {
        "use_sliding_window": True,
        "sliding_window": 8,
        "max_window_layers": 2,
        "mlp_only_layers": [0],
    },
    "qwen3_moe": {"mlp_only_layers": [0]},
}
