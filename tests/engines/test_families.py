"""Every mapped architecture: a small random model in the engine, compared logit by logit."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import CONFIG_MAPPING, AutoTokenizer

import trilens
from engines.engine import (
    Engine,
    byte_level,
    compare,
    reference,
    save_model,
    sentencepiece_like,
)
from trilens.checkpoint.gguf.families import FAMILIES

PLAN = trilens.TernaryPlan(rule="exact", group_size=256, scale_dtype="float16")
TEXTS = [
    "def f(x): return x + 1\n" * 3,
    "The quick brown fox jumps over the lazy dog. " * 3,
    "naïve café ☕ 12345 don't\n\n",
]
BYTES = byte_level(TEXTS)
PIECES = sentencepiece_like(TEXTS)
COMMON = {
    "vocab_size": 600,  # more rows than the tokenizers have tokens
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
WINDOWS = {"head_dim": 64, "query_pre_attn_scalar": 64, "sliding_window": 16}
SLIDING, FULL = "sliding_attention", "full_attention"
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama with biases and llama3 frequencies": (
        "llama",
        {
            "attention_bias": True,
            "head_dim": 128,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            },
        },
    ),
    "llama with scaled positions": (
        "llama",
        {
            "rope_parameters": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 4.0},
            "tie_word_embeddings": True,
        },
    ),
    "mistral": ("mistral", {"sliding_window": 64}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"head_dim": 128}),
    "gemma": ("gemma", {"head_dim": 128}),
    "gemma2": ("gemma2", WINDOWS),
    "gemma3_text": (
        "gemma3_text",
        {
            **WINDOWS,
            "num_hidden_layers": 3,
            "layer_types": [SLIDING, FULL, SLIDING],
            "rope_parameters": {
                SLIDING: {"rope_type": "default", "rope_theta": 10000.0},
                FULL: {"rope_type": "linear", "rope_theta": 1000000.0, "factor": 8.0},
            },
        },
    ),
    "gpt2": (
        "gpt2",
        {"n_embd": 256, "n_layer": 2, "n_head": 4, "n_positions": 256, "n_inner": 768},
    ),
    "arcee": ("arcee", {"hidden_act": "relu2"}),
    "seed_oss": ("seed_oss", {"attention_bias": True, "head_dim": 64}),
    "hunyuan_v1_dense": ("hunyuan_v1_dense", {"head_dim": 64}),
    "ernie4_5": ("ernie4_5", {"head_dim": 64}),
    "exaone4": ("exaone4", {"layer_types": [FULL, FULL], "sliding_window": None}),
    "smollm3": ("smollm3", {"num_hidden_layers": 4}),
    "granite": (
        "granite",
        {
            "attention_multiplier": 0.2,
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.5,
            "logits_scaling": 2.0,
        },
    ),
    "olmo": ("olmo", {"clip_qkv": 2.0}),
    "olmo2": ("olmo2", {}),
    "olmo3": ("olmo3", {"num_hidden_layers": 4, "sliding_window": 16}),
    "cohere": ("cohere", {"logit_scale": 0.3}),
    "cohere2": ("cohere2", {"logit_scale": 0.3, "num_hidden_layers": 4, "sliding_window": 16}),
    "glm4": ("glm4", {"head_dim": 64}),
    "stablelm": ("stablelm", {"use_qkv_bias": True}),
    "stablelm with parallel blocks": ("stablelm", {"use_parallel_residual": True}),
    "starcoder2": ("starcoder2", {}),
    "nemotron": ("nemotron", {"head_dim": 64}),
    "phi": ("phi", {}),
    "phi3": ("phi3", {}),
    "gpt_neox": ("gpt_neox", {"rotary_pct": 0.5}),
    "gpt_neox in sequence": ("gpt_neox", {"use_parallel_residual": False}),
    "falcon": ("falcon", {}),
    "falcon with groups": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "bloom": ("bloom", {"n_layer": 2, "n_head": 4}),
    "mpt": ("mpt", {"d_model": 256, "n_layers": 2, "n_heads": 4, "max_seq_len": 256}),
    "gpt_bigcode": (
        "gpt_bigcode",
        {"n_embd": 256, "n_layer": 2, "n_head": 4, "n_positions": 256, "n_inner": 768},
    ),
    "mixtral": ("mixtral", {"num_local_experts": 4}),
    "qwen2_moe": (
        "qwen2_moe",
        {"num_experts": 4, "moe_intermediate_size": 256, "shared_expert_intermediate_size": 512},
    ),
    "qwen3_moe": (
        "qwen3_moe",
        {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 256,
            "head_dim": 64,
            "norm_topk_prob": True,
        },
    ),
    "olmoe": ("olmoe", {"num_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 4}),
    "granitemoe": (
        "granitemoe",
        {
            "num_local_experts": 4,
            "attention_multiplier": 0.2,
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.5,
            "logits_scaling": 2.0,
        },
    ),
    "mamba": ("mamba", {"state_size": 8}),
    "falcon_mamba": ("falcon_mamba", {"state_size": 8, "mixer_rms_eps": 1e-5}),
    "rwkv7": (
        "rwkv7",
        {
            "head_size": 64,
            "decay_low_rank_dim": 32,
            "a_low_rank_dim": 32,
            "v_low_rank_dim": 32,
            "gate_low_rank_dim": 64,
        },
    ),
    "rwkv7 with a tied head": ("rwkv7", {"head_size": 64, "tie_word_embeddings": True}),
    "mamba2": ("mamba2", {"state_size": 16, "num_heads": 8, "head_dim": 64, "n_groups": 2}),
}
OWN_NAMES = {"gpt2", "gpt_bigcode", "mpt"}
"""Types whose sizes have names of their own."""

HEADS = {"num_attention_heads", "num_key_value_heads"}
ABSENT = {
    "mamba": {"intermediate_size"},
    "falcon_mamba": {"intermediate_size"},
    "gpt_neox": {"num_key_value_heads"},
    "bloom": {"num_key_value_heads"},
    "rwkv7": HEADS,
}
PIECEWISE = {"gemma", "gemma2", "gemma3_text", "mistral"}


def make(case: str, folder: Path) -> Path:
    model_type, changes = CASES[case]
    own = {"vocab_size", "bos_token_id", "eos_token_id", "pad_token_id"}
    few = own if model_type in OWN_NAMES else {*COMMON} - ABSENT.get(model_type, set())
    common = {k: v for k, v in COMMON.items() if k in few}
    config = CONFIG_MAPPING[model_type](**{**common, **changes})
    tokenizer = PIECES if model_type in PIECEWISE else BYTES
    return save_model(config, tokenizer, folder)


def config_of(source: Path) -> dict[str, Any]:
    return dict(json.loads((source / "config.json").read_text()))


def same_plan(report: trilens.checkpoint.TernaryReport) -> trilens.TernaryPlan:
    """What rows of no whole number of blocks keep as they are is kept in the reference too."""
    return replace(PLAN, keep=tuple(f"^{re.escape(t.name)}$" for t in report.fallbacks))


def test_no_architecture_is_forgotten() -> None:
    assert {model_type for model_type, _ in CASES.values()} == set(FAMILIES)


@pytest.mark.parametrize("case", CASES)
def test_logits_and_tokens(case: str, tmp_path: Path) -> None:
    """With the engine's rounding in the reference, most positions agree to float32's rounding."""
    source = make(case, tmp_path / "src")
    # As transformers loads it: for some types it puts the type's own expression in.
    tokenizer = AutoTokenizer.from_pretrained(source)
    path = tmp_path / "model.gguf"
    report = trilens.ternarize(source, path, plan=PLAN, format="gguf-tq2_0")
    assert all("no multiple" in t.reason or "vector" in t.reason for t in report.fallbacks)
    dense = reference(source, tmp_path / "ternary", same_plan(report))
    engine = Engine(path)
    try:
        for text in (*TEXTS, "", " leading and  double  spaces ", "東京"):
            assert engine.tokenize(text, special=True) == tokenizer(text)["input_ids"], text
        ids = np.random.default_rng(0).integers(3, 590, size=60).tolist()
        short = [compare(engine, dense, "gguf-tq2_0", ids[n : n + 4]) for n in range(0, 60, 4)]
        # A number that falls the other way sends its text another way: see `test_demo`.
        assert np.median([one.beyond_rounding for one in short]) < 1e-3
        long = compare(engine, dense, "gguf-tq2_0", ids)
        assert long.rounding > 0
        # A token that rounding sends to another expert gets quite other logits.
        assert "num_experts_per_tok" in config_of(source) or long.rounding < 0.25 * long.spread
        assert long.difference < 2 * long.rounding
        # Greedy tokens are the same wherever the reference is clear about them.
        assert sum(one.wrong for one in (*short, long)) == 0
        assert sum(one.clear for one in (*short, long)) > 0
    finally:
        engine.close()


def test_a_ternary_checkpoint_keeps_its_trits(tmp_path: Path) -> None:
    """From weights at once, or through a checkpoint: the same tensors in the file."""
    source = make("qwen2", tmp_path / "src")
    trilens.ternarize(source, tmp_path / "ternary", plan=PLAN)
    at_once, through = tmp_path / "a.gguf", tmp_path / "b.gguf"
    trilens.ternarize(source, at_once, plan=PLAN, format="gguf-tq1_0")
    report = trilens.ternarize(tmp_path / "ternary", through, format="gguf-tq1_0")
    assert {tensor.outcome for tensor in report.coded} == {"already ternary"}
    ids = list(range(20, 50))
    engines = [Engine(at_once), Engine(through)]
    try:
        first, second = (engine.logits(ids) for engine in engines)
        assert np.array_equal(first, second)
    finally:
        for engine in engines:
            engine.close()
