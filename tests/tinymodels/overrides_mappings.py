"""Overrides of the types that only other mappings than the causal one have."""

from __future__ import annotations

from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig

from tinymodels import overrides_hybrid as hybrid
from tinymodels.generic import tiny_kwargs

_AUDIO: dict[str, Any] = {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1}
_TOKENIZER: dict[str, Any] = {"num_filters": 4, "hidden_size": 32, "depths": [1] * 7}
_SEAMLESS: dict[str, Any] = {
    "speech_encoder_layers": 2,
    "speech_encoder_attention_heads": 4,
    "speech_encoder_intermediate_size": 32,
    "feature_projection_input_dim": 16,
    "adaptor_kernel_size": 4,
    "adaptor_stride": 2,
    "conv_depthwise_kernel_size": 3,
}

MAPPING_OVERRIDES: dict[str, dict[str, Any]] = {
    "dia": {
        "encoder_config": {},
        "decoder_config": {
            "cross_num_attention_heads": 4,
            "cross_head_dim": 16,
            "cross_num_key_value_heads": 2,
            "cross_hidden_size": 64,
        },
    },
    "distilbert": {"dim": 64, "hidden_dim": 96},
    "esm": {"mask_token_id": 4, "pad_token_id": 0},
    "esmc": {"num_key_value_heads": 4},
    "fsmt": {"src_vocab_size": 120, "tgt_vocab_size": 120},
    "fun_asr_nano": {
        "audio_config": {**_AUDIO, "num_timestamp_prediction_layers": 1, "hidden_size": 64},
        "adaptor_config": {"intermediate_size": 16, "projector_hidden_size": 32},
    },
    "granite_speech": {
        "encoder_config": {"hidden_dim": 32, "input_dim": 16, "num_layers": 2},
        "projector_config": {**_AUDIO, "intermediate_size": 32, "encoder_hidden_size": 32},
    },
    "kyutai_speech_to_text": {
        "codebook_vocab_size": 20,
        "num_codebooks": 2,
        "pad_token_id": 3,
        "audio_pad_token_id": 19,
        "audio_bos_token_id": 18,
        "codec_config": {"upsample_groups": 64, "num_filters": 8},
    },
    "luke": {"entity_vocab_size": 20, "entity_emb_size": 32},
    "mobilebert": {
        "embedding_size": 32,
        "intra_bottleneck_size": 32,
        "num_feedforward_networks": 2,
    },
    "moonshine": {"encoder_num_hidden_layers": 2, "decoder_num_hidden_layers": 4},
    "nemo_speechlm": {
        "word_timestamp_config": {"blank_token_id": 119},
        "audio_config": {"diarization_config": {"head_config": {"audio_hidden_size": 64}}},
        "text_config": dict(hybrid.OVERRIDES["nemotron_h"]),
    },
    "perceiver": {"num_latents": 7, "d_latents": 32, "num_self_attends_per_block": 2},
    "prophetnet": {"num_encoder_layers": 2},
    "moonshine_streaming": {
        "num_key_value_heads": 4,
        "encoder_config": {"num_key_value_heads": 4, "sliding_windows": [[4, 2]] * 4},
    },
    "seamless_m4t": _SEAMLESS,
    "seamless_m4t_v2": _SEAMLESS,
    "squeezebert": {"embedding_size": 64},
    "vibevoice": {
        "audio_config": _TOKENIZER,
        "semantic_model_config": _TOKENIZER,
        "diffusion_head_config": {"hidden_size": 64, "frequency_embedding_size": 16},
    },
    "vibevoice_asr": {
        "acoustic_tokenizer_encoder_config": _TOKENIZER,
        "semantic_tokenizer_encoder_config": _TOKENIZER,
    },
}
MAPPING_OVERRIDES["granite_speech_plus"] = MAPPING_OVERRIDES["granite_speech"]

_PARTS: dict[str, dict[str, tuple[str, dict[str, Any]]]] = {
    "encoder-decoder": {
        "encoder": ("bert", {}),
        "decoder": ("bert", {"is_decoder": True, "add_cross_attention": True}),
    },
    "speech-encoder-decoder": {
        "encoder": (
            "wav2vec2",
            {
                "conv_dim": [32, 32],
                "conv_kernel": [8, 4],
                "conv_stride": [4, 2],
                "num_feat_extract_layers": 2,
            },
        ),
        "decoder": ("bert", {"is_decoder": True, "add_cross_attention": True}),
    },
}
"""Types that are put together of two others."""


def parts_of(model_type: str) -> dict[str, PreTrainedConfig]:
    """The tiny configs that a type is put together of; empty for a type of its own."""
    return {
        name: CONFIG_MAPPING[part](**tiny_kwargs(CONFIG_MAPPING[part], dict(overrides)))
        for name, (part, overrides) in _PARTS.get(model_type, {}).items()
    }
