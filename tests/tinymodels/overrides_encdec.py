"""Overrides for decoders cut from encoder-decoders and for encoders run as decoders."""

from __future__ import annotations

from typing import Any

# An encoder run as a language model attends both ways unless it is told to be a decoder.
_DECODER = {"is_decoder": True}

_BLT_LOCAL = {"hidden_size_global": 64, "num_hidden_layers": 2}

OVERRIDES: dict[str, dict[str, Any]] = {
    **dict.fromkeys(
        (
            "bert",
            "bert-generation",
            "camembert",
            "data2vec-text",
            "ernie",
            "megatron-bert",
            "roberta",
            "roberta-prelayernorm",
            "xlm-roberta",
            "xlm-roberta-xl",
        ),
        _DECODER,
    ),
    # 40 tokens must exceed (5 + 2 x random blocks) x block size, or the model turns to full
    # attention, for good.
    "big_bird": {**_DECODER, "block_size": 4, "num_random_blocks": 1},
    "bigbird_pegasus": {"block_size": 4, "num_random_blocks": 1},
    # Bytes are grouped into patches where a small model of its own is uncertain; its threshold is
    # set to cut the random one's entropies into patches of different lengths.
    "blt": {
        "local_attention_window_len": 8,
        "encoder_hash_byte_group_size": [3, 4],
        "encoder_hash_byte_group_vocab": 50,
        "patch_size": 4,
        "patching_threshold": 4.32,
        "encoder_config": _BLT_LOCAL,
        "decoder_config": _BLT_LOCAL,
        "patcher_config": {"num_hidden_layers": 2},
    },
    "electra": {**_DECODER, "embedding_size": 32},
    "prophetnet": {"num_buckets": 8, "relative_max_distance": 32},
    # Local and hashed layers; the two axes of positions have to multiply to a training length.
    "reformer": {
        **_DECODER,
        "attn_layers": ["local", "lsh", "local", "lsh"],
        "num_hidden_layers": ...,
        "attention_head_size": 16,
        "axial_pos_shape": [10, 16],
        "axial_pos_embds_dim": [24, 40],
        "local_attn_chunk_length": 8,
        "lsh_attn_chunk_length": 8,
        "num_hashes": 2,
        "num_buckets": 4,
        "hash_seed": 0,
    },
    "rembert": {**_DECODER, "input_embedding_size": 32, "output_embedding_size": 48},
    "roc_bert": {
        **_DECODER,
        "pronunciation_embed_dim": 16,
        "pronunciation_vocab_size": 120,
        "shape_embed_dim": 24,
        "shape_vocab_size": 120,
    },
    "roformer": {**_DECODER, "embedding_size": 32},
    "xlm": {"causal": True},
    # The embedding of languages must know the one to use.
    "xmod": {**_DECODER, "languages": ["en_XX", "de_DE"], "default_language": "en_XX"},
}
