"""Configurations that the engine's code would not compute as the model does are refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFWriter
from transformers import CONFIG_MAPPING
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from trilens.checkpoint.gguf.families import find_family
from trilens.errors import UsageError

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0}


def described(model_type: str, **options: Any) -> tuple[dict[str, Any], Any]:
    config = CONFIG_MAPPING[model_type](**options)
    writer = GGUFWriter(None, "x")
    extras = find_family(config).describe(writer, config)
    return {key: value.value for key, value in writer.kv_data[0].items()}, extras


@pytest.mark.parametrize(
    ("model_type", "options", "words"),
    [
        ("llama", {"hidden_act": "gelu"}, "hidden_act 'gelu'.*computes with 'silu'"),
        ("llama", {"rope_parameters": YARN}, "rope_type 'yarn'"),
        ("qwen2", {"rope_parameters": LLAMA3}, "rope_type 'llama3'"),
        ("qwen2", {"head_dim": 64}, "head_dim 64"),
        ("gemma", {"hidden_act": "silu"}, "hidden_act 'silu'"),
        ("gemma2", {"query_pre_attn_scalar": 100}, "query_pre_attn_scalar 100.*256"),
        ("gemma2", {"attn_logit_softcapping": None}, "attn_logit_softcapping None"),
        ("gemma3_text", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping 50"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ("gpt2", {"activation_function": "relu"}, "activation_function 'relu'"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "inverse_layer_idx True"),
        ("xlnet", {}, "'xlnet' is not mapped"),
        ("dbrx", {}, "'dbrx' is not mapped.*names it, but no file of it was proven"),
        ("mamba", {"use_bias": True}, "use_bias True"),
        ("mamba2", {"expand": 3, "num_heads": 192}, "expand 3.0.*with 2"),
        ("falcon", {"alibi": True}, "alibi True"),
        ("mpt", {"attn_config": {"alibi": False}}, "alibi False"),
        ("smollm3", {"no_rope_layer_interval": 3}, "no_rope_layers"),
        ("cohere", {"use_qk_norm": True}, "use_qk_norm True"),
        ("exaone4", {"sliding_window": 128}, "sliding_window 128"),
        ("olmoe", {"clip_qkv": 5.0}, "clip_qkv 5.0"),
        ("qwen3_moe", {"norm_topk_prob": False}, "norm_topk_prob False"),
        ("qwen2_moe", {"mlp_only_layers": [0]}, r"mlp_only_layers \[0\]"),
        ("starcoder2", {"hidden_act": "relu"}, "hidden_act 'relu'"),
    ],
)
def test_refused(model_type: str, options: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        described(model_type, **options)


def test_no_more_positions_than_a_window_the_engine_does_not_know() -> None:
    options = {"max_position_embeddings": 4096, "sliding_window": 1024}
    assert described("mistral", **options)[0]["x.context_length"] == 1024
    assert described("mistral", max_position_embeddings=512)[0]["x.context_length"] == 512
    assert described("qwen2", max_position_embeddings=4096)[0]["x.context_length"] == 4096
    found = described("gemma2", **options)[0]
    assert found["x.context_length"] == 4096
    assert found["x.attention.sliding_window"] == 1024
    assert found["x.attention.sliding_window_pattern"][:2] == [True, False]


def test_llama3_frequencies_are_transformers_own() -> None:
    _, extras = described("llama", rope_parameters=LLAMA3, max_position_embeddings=131072)
    config = CONFIG_MAPPING["llama"](rope_parameters=LLAMA3, max_position_embeddings=131072)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = 1 / (500000.0 ** (torch.arange(0, 128, 2).double() / 128))
    factors = (plain / scaled.double()).numpy()
    assert np.allclose(extras["rope_freqs.weight"], factors, rtol=1e-5)
    assert factors.max() == pytest.approx(8.0, rel=1e-5)
