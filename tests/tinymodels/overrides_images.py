"""Overrides of vision–language types, so that each is as small as it can be."""

from __future__ import annotations

from typing import Any

from tinymodels.images import IMAGE, SETTINGS

_MROPE = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}
_HALF = {**_MROPE, "mrope_section": [1, 1, 2], "partial_rotary_factor": 0.5}
_GLM = {"text_config": {"rope_parameters": _MROPE},
        "vision_config": {"out_hidden_size": 64, "hidden_size": 32, "num_heads": 2}}  # fmt: skip
_SIGLIP = {"model_type": "siglip_vision_model", "hidden_size": 32, "num_hidden_layers": 2,
           "num_attention_heads": 2, "intermediate_size": 48, "image_size": 32, "patch_size": 8,
           "vision_use_head": False}  # fmt: skip
_GEMMA = {"model_type": "gemma", "vocab_size": 120, "hidden_size": 64, "intermediate_size": 96,
          "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
          "head_dim": 16}  # fmt: skip
_KOSMOS = {"layers": 4, "embed_dim": 64, "attention_heads": 4, "ffn_dim": 96, "vocab_size": 120,
           "max_position_embeddings": 160}  # fmt: skip
_VQ = {"embed_dim": 8, "num_embeddings": 16, "base_channels": 32, "channel_multiplier": [1, 1],
       "latent_channels": 32, "num_res_blocks": 1, "attn_resolutions": []}  # fmt: skip

IMAGE_OVERRIDES: dict[str, dict[str, Any]] = {
    **{name: settings for name, settings in SETTINGS.items() if name != "pixtral"},
    "blip-2": {"image_token_index": IMAGE},
    "chameleon": {
        "vocabulary_map": {"<image>": IMAGE, "IMGIMGAAZ": 91, "IMGIMGABZ": 92},
        "vq_config": _VQ,
    },
    "cohere_compass": {
        "text_config": {
            "rope_parameters": {
                "full_attention": {"rope_type": "default", "rope_theta": 10000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            }
        }
    },
    "cosmos3_edge": {"text_config": {"rope_parameters": _MROPE}},
    "deepseek_ocr2": {"text_config": {"mlp_layer_types": ["dense", "sparse", "sparse", "sparse"]}},
    "emu3": {
        "vocabulary_map": {"<image>": IMAGE},
        "vq_config": {
            "codebook_size": 16,
            "base_channels": 32,
            "channel_multiplier": [1, 1],
            "num_res_blocks": 1,
            "hidden_size": 32,
        },
    },
    "ernie4_5_vl_moe": {
        "text_config": {
            "moe_intermediate_size": [32, 16],
            "rope_parameters": {**_MROPE, "mrope_section": [3, 3, 2]},
        }
    },
    "fast_vlm": {"vision_config": _SIGLIP},
    "florence2": {
        "vision_config": {
            "patch_size": [7, 3],
            "patch_stride": [4, 2],
            "patch_padding": [3, 1],
            "patch_prenorm": [False, True],
            "embed_dim": [16, 32],
            "num_heads": [2, 2],
            "num_groups": [2, 2],
            "depths": [1, 1],
            "projection_dim": 64,
        }
    },
    "glm46v": _GLM,
    "glm4v": _GLM,
    "glm4v_moe": {**_GLM, "text_config": {"rope_parameters": _HALF}},
    "glm5_next": {"text_config": {"index_topk": 16, "qk_rope_head_dim": 0}},
    "glm_ocr": _GLM,
    "glmga": _GLM,
    "granite4_vision": {"deepstack_layer_map": [[0, 0]], "downsample_rate": "1/2"},
    "granite_docling": {"vision_config": {"out_hidden_size": 64}},
    "hunyuan_vl": {"text_config": {"head_dim": 16}},
    "inkling2": {"vision_config": {"text_hidden_size": 64}},
    "instructblip": {"image_token_index": IMAGE},
    "instructblipvideo": {"video_token_index": IMAGE},
    "janus": {"vq_config": _VQ},
    "kosmos-2": {"text_config": _KOSMOS},
    "kosmos-2.5": {"text_config": _KOSMOS},
    "molmo2": {
        "vision_config": {"image_size": [32, 32]},
        "text_config": {"additional_vocab_size": 8},
        "adapter_config": {"vision_feature_layer": [-1, -2]},
    },
    "muse_glimmer": {"out_hidden_size": 128, "projector_hidden_size": 64},
    "muse_spark": {
        "audio_config": {"out_hidden_size": 64, "hidden_size": 32, "intermediate_size": 48},
        "out_hidden_size": 128,
        "projector_hidden_size": 64,
    },
    "nemotron_h_omni": {"audio_config": {"projection_hidden_size": 64, "projection_bias": False}},
    "paddleocr_vl": {"text_config": {"rope_parameters": _MROPE}},
    "pi0": {
        "vlm_config": {
            "model_type": "paligemma",
            "projection_dim": 64,
            "image_token_id": IMAGE,
            "text_config": _GEMMA,
            "vision_config": _SIGLIP,
        },
        "dit_config": _GEMMA,
    },
    "qwen2_5_omni_thinker": {"text_config": {"rope_parameters": _MROPE}},
    "qwen2_vl": {
        "text_config": {"rope_parameters": _MROPE},
        "vision_config": {"embed_dim": 32, "hidden_size": 64, "num_heads": 2},
    },
    # Its eager attention takes as many keys as queries.
    "unlimited_ocr": {"text_config": {"num_key_value_heads": 4}},
    "step3p7": {"text_config": {"sliding_window": 8}},
}

NOT_BUILT: dict[str, str] = {
    "perception_lm": "not tried: transformers builds its vision tower with the package timm only",
}
"""Types that cannot be made here, and why."""
