"""Overrides for the multimodal types: the towers reduced, the text part as in its own type."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import PreTrainedConfig, SiglipVisionConfig

from tinymodels.names import FULL, SLIDE
from tinymodels.overrides_hybrid import QWEN4_TEXT
from tinymodels.overrides_moe import DOTS3_TEXT, LLAMA4_TEXT

_VISION: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}
_GEMMA4_LAYERS = [SLIDE, SLIDE, FULL, SLIDE, SLIDE, FULL]

# As Gemma 3n and 4 E2B: the last layers reuse the keys and values of earlier ones, and every layer
# gets an embedding of its own.
_GEMMA4_SHARED: dict[str, Any] = {
    "num_hidden_layers": 6,
    "layer_types": _GEMMA4_LAYERS,
    "num_kv_shared_layers": 2,
    "global_head_dim": 32,
    "final_logit_softcapping": 6.0,
}
_PER_LAYER_INPUT = {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 120}
# As the larger Gemma 4: full layers use their keys as values.
_GEMMA4_KEYS_AS_VALUES: dict[str, Any] = {
    "num_hidden_layers": 6,
    "layer_types": _GEMMA4_LAYERS,
    "attention_k_eq_v": True,
    "num_global_key_value_heads": 1,
    "global_head_dim": 32,
    "final_logit_softcapping": 6.0,
}
_GEMMA4_ASSISTANT: dict[str, Any] = {
    "num_hidden_layers": 4,
    "layer_types": [SLIDE, FULL, SLIDE, FULL],
    "num_kv_shared_layers": 4,
    "global_head_dim": 32,
}
_GEMMA4_TOKENS = {
    "boi_token_id": 3,
    "eoi_token_id": 4,
    "image_token_id": 5,
    "video_token_id": 6,
    "boa_token_id": 7,
    "eoa_token_index": 8,
    "audio_token_id": 9,
}
GEMMA3N_TEXT: dict[str, Any] = {
    "num_hidden_layers": 6,
    "layer_types": _GEMMA4_LAYERS,
    "num_kv_shared_layers": 2,
    "laurel_rank": 8,
    "activation_sparsity_pattern": [0.95, 0.95, 0.0, 0.0, 0.0, 0.0],
    "final_logit_softcapping": 6.0,
    **_PER_LAYER_INPUT,
}

OVERRIDES: dict[str, dict[str, Any]] = {
    "dots3_note": {
        "text_config": DOTS3_TEXT,
        "vision_config": {
            **_VISION,
            "mlp_layer_types": ["dense"],
            "adapter_in_dim": 32,
            "adapter_out_dim": 64,
        },
        "audio_config": {**_VISION, "adapter_input_size": 32, "adapter_out_dim": 64},
    },
    "gemma3": {
        "text_config": {"query_pre_attn_scalar": 16, "layer_types": [SLIDE, SLIDE, FULL, SLIDE]},
        "vision_config": _VISION,
        "mm_tokens_per_image": 4,
        "boi_token_index": 3,
        "eoi_token_index": 4,
        "image_token_index": 5,
    },
    "gemma3n": {
        "text_config": GEMMA3N_TEXT,
        "audio_config": {
            "hidden_size": 32,
            "vocab_size": 8,
            "vocab_offset": 112,
            "input_feat_size": 16,
            "conf_num_attention_heads": 2,
            "conf_num_hidden_layers": 1,
            "sscp_conv_channel_size": [4, 4],
        },
        "vision_config": {"vocab_size": 8, "vocab_offset": 104, "hidden_size": 32},
        "boi_token_id": 3,
        "eoi_token_id": 4,
        "image_token_id": 5,
        "boa_token_id": 7,
        "eoa_token_id": 8,
        "audio_token_id": 9,
    },
    "gemma3n_text": GEMMA3N_TEXT,
    "gemma4": {
        "text_config": {**_GEMMA4_SHARED, **_PER_LAYER_INPUT, "use_double_wide_mlp": True},
        "vision_config": None,
        "audio_config": None,
        **_GEMMA4_TOKENS,
    },
    "gemma4_assistant": {
        "text_config": {
            **_GEMMA4_ASSISTANT,
            "hidden_size_per_layer_input": 0,
            "vocab_size_per_layer_input": 0,
        },
        "backbone_hidden_size": 48,
    },
    "gemma4_text": {
        **_GEMMA4_KEYS_AS_VALUES,
        "hidden_size_per_layer_input": 0,
        "vocab_size_per_layer_input": 120,
        "enable_moe_block": True,
        "num_experts": 4,
        "top_k_experts": 2,
        "moe_intermediate_size": 32,
    },
    "gemma4_unified": {
        "text_config": _GEMMA4_SHARED,
        "vision_config": None,
        "audio_config": None,
        **_GEMMA4_TOKENS,
    },
    "gemma4_unified_assistant": {"text_config": _GEMMA4_ASSISTANT, "backbone_hidden_size": 48},
    "gemma4_unified_text": _GEMMA4_KEYS_AS_VALUES,
    "git": {"vision_config": _VISION},
    "got_ocr2": {"vision_config": {**_VISION, "output_channels": 16, "mlp_dim": 32}},
    "llama4": {"text_config": LLAMA4_TEXT, "vision_config": _VISION},
    "moss_transcribe_diarize": {
        "audio_config": _VISION,
        "audio_token_id": 9,
        "projector_hidden_size": 32,
    },
    "musicgen": {"decoder": {"num_codebooks": 2}},
    "musicgen_melody": {"decoder": {"num_codebooks": 2}},
    "phi4_multimodal": {
        "vision_config": {**_VISION, "crop_size": 32, "image_token_id": 5},
        "audio_config": {
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_blocks": 1,
            "num_attention_heads": 2,
            "ext_pw_out_channel": 32,
            "depthwise_separable_out_channel": 32,
            "nemo_conv_channels": 8,
            "input_size": 16,
            "audio_token_id": 6,
        },
    },
    # Text alone passes the cross-attention layers by.
    "mllama": {"text_config": {"num_hidden_layers": 5, "cross_attention_layers": [1, 3]}},
    "qwen4_exp": {"text_config": QWEN4_TEXT},
}


def _siglip_for_timm(config: PreTrainedConfig) -> None:
    """Give Gemma 3n a vision tower that needs no timm; its embedder asks for three more names."""
    declared = config.vision_config
    tower = SiglipVisionConfig(image_size=32, patch_size=16, **_VISION)
    for name in ("vocab_size", "vocab_offset", "rms_norm_eps"):
        setattr(tower, name, getattr(declared, name))
    config.__dict__["vision_config"] = tower  # past the class's check of types


def _share_only_the_last(config: PreTrainedConfig) -> None:
    """Let an assistant's first layers have keys of their own.

    An assistant's layers should all read the keys and values of the model it assists, and the
    config insists on it, but transformers 5.23 cannot build one: Gemma4TextConfig.kv_sharing_modes
    raises where no layer is left to produce what the others share.
    """
    config.text_config.num_kv_shared_layers = 2


AMEND: dict[str, Callable[[PreTrainedConfig], None]] = {
    "gemma3n": _siglip_for_timm,
    "gemma4_assistant": _share_only_the_last,
    "gemma4_unified_assistant": _share_only_the_last,
}
"""What a finished config still has changed, where its class would refuse it from the start."""
