"""Settings of architectures with one MLP in each block; see `families`."""

from __future__ import annotations

from typing import Any

from gguf import GGUFWriter

from trilens.checkpoint.gguf.settings import (
    Extra,
    head_dim,
    positions,
    require,
    require_causal,
    rotary,
    sizes,
    unlike,
)

__all__ = [
    "arcee",
    "bloom",
    "cohere",
    "cohere2",
    "ernie4_5",
    "exaone4",
    "falcon",
    "gemma",
    "gemma2",
    "gemma3",
    "glm4",
    "gpt2",
    "gpt_bigcode",
    "gpt_neox",
    "granite",
    "hunyuan",
    "llama",
    "mpt",
    "multipliers",
    "nemotron",
    "olmo",
    "olmo2",
    "olmo3",
    "phi",
    "phi3",
    "qwen2",
    "qwen3",
    "seed_oss",
    "sliding",
    "smollm3",
    "stablelm",
    "starcoder2",
]

_TANH = ("gelu_pytorch_tanh", "gelu_new", "gelu_fast")
_GELU = (*_TANH, "gelu")  # the engine has the form by tanh alone: at most 5e-4 from the other


def llama(writer: GGUFWriter, config: Any) -> Extra:
    """Llama and Mistral."""
    require(config, hidden_act="silu")
    return rotary(writer, config, frequencies=True)


def arcee(writer: GGUFWriter, config: Any) -> Extra:
    """Llama's blocks with a squared ReLU and no gate."""
    require(config, hidden_act="relu2", mlp_bias=False)
    return rotary(writer, config)


def qwen2(writer: GGUFWriter, config: Any) -> Extra:
    """Qwen 2 and 2.5."""
    if head_dim(config) * config.num_attention_heads != config.hidden_size:
        raise unlike(
            config, "head_dim", head_dim(config), config.hidden_size // config.num_attention_heads
        )
    return qwen3(writer, config)


def qwen3(writer: GGUFWriter, config: Any) -> Extra:
    """Qwen 3."""
    require(config, hidden_act="silu")
    return rotary(writer, config)


def seed_oss(writer: GGUFWriter, config: Any) -> Extra:
    """Seed-OSS: biases of queries, keys and values are always there."""
    require(config, hidden_act="silu", attention_bias=True, attention_out_bias=False)
    require(config, mlp_bias=False)
    return rotary(writer, config)


def hunyuan(writer: GGUFWriter, config: Any) -> Extra:
    """Hunyuan's dense models."""
    require(config, hidden_act="silu", attention_bias=False)
    return rotary(writer, config)


def ernie4_5(writer: GGUFWriter, config: Any) -> Extra:
    """Ernie 4.5."""
    require(config, hidden_act="silu", use_bias=False)
    return rotary(writer, config)


def exaone4(writer: GGUFWriter, config: Any) -> Extra:
    """Exaone 4 without sliding windows: the engine knows those of one size by its depth."""
    require(config, hidden_act="silu", sliding_window=None)
    if "sliding_attention" in config.layer_types or config.num_hidden_layers == 64:
        raise unlike(config, "layer_types", config.layer_types, "full_attention in all layers")
    return rotary(writer, config)


def smollm3(writer: GGUFWriter, config: Any) -> Extra:
    """SmolLM 3: every fourth layer has no positions."""
    require(config, hidden_act="silu", attention_bias=False, mlp_bias=False)
    wanted = [int((layer + 1) % 4 != 0) for layer in range(config.num_hidden_layers)]
    require(config, use_sliding_window=False)
    if list(config.no_rope_layers) != wanted:
        raise unlike(config, "no_rope_layers", config.no_rope_layers, wanted)
    return rotary(writer, config)


def granite(writer: GGUFWriter, config: Any) -> Extra:
    """Granite: Llama's blocks with four multipliers."""
    require(config, hidden_act="silu")
    multipliers(writer, config)
    return rotary(writer, config)


def multipliers(writer: GGUFWriter, config: Any) -> None:
    """Granite's multipliers of scores, embeddings, residual and logits."""
    writer.add_attention_scale(config.attention_multiplier)
    writer.add_embedding_scale(config.embedding_multiplier)
    writer.add_residual_scale(config.residual_multiplier)
    writer.add_logit_scale(config.logits_scaling)


def olmo(writer: GGUFWriter, config: Any) -> Extra:
    """OLMo: layer norms without weights."""
    require(config, hidden_act="silu", attention_bias=False)
    found = _rotary_with_eps(writer, config, 1e-5)
    if config.clip_qkv is not None:
        writer.add_clamp_kqv(config.clip_qkv)
    return found


def _rotary_with_eps(writer: GGUFWriter, config: Any, eps: float) -> Extra:
    """`rotary` for a model whose layer norms have an eps that no configuration states."""
    config.layer_norm_eps = eps
    try:
        return rotary(writer, config, layer_norm=True)
    finally:
        del config.layer_norm_eps


def olmo2(writer: GGUFWriter, config: Any) -> Extra:
    """OLMo 2."""
    require(config, hidden_act="silu", attention_bias=False)
    return rotary(writer, config)


def olmo3(writer: GGUFWriter, config: Any) -> Extra:
    """OLMo 3: OLMo 2 with sliding windows, and positions of one base in all layers."""
    require(config, hidden_act="silu", attention_bias=False)
    sizes(writer, config, windows=True)
    writer.add_rope_dimension_count(head_dim(config))
    sliding(writer, config)
    return positions(writer, config, config.rope_parameters["full_attention"])


def sliding(writer: GGUFWriter, config: Any) -> None:
    """Which layers look back only so far, whose positions are of the same base and not scaled."""
    kinds = [kind == "sliding_attention" for kind in config.layer_types]
    writer.add_sliding_window(config.sliding_window)
    writer.add_sliding_window_pattern(kinds)
    rope = config.rope_parameters
    local, theta = rope["sliding_attention"], rope["full_attention"]["rope_theta"]
    if local.get("rope_type", "default") != "default":
        raise unlike(config, "rope_type of sliding layers", local["rope_type"], "default")
    if local["rope_theta"] != theta:
        raise unlike(config, "rope_theta of sliding layers", local["rope_theta"], theta)


def cohere(writer: GGUFWriter, config: Any) -> Extra:
    """Command R."""
    require(config, hidden_act="silu", attention_bias=False, use_qk_norm=False)
    writer.add_logit_scale(config.logit_scale)
    return rotary(writer, config, layer_norm=True)


def cohere2(writer: GGUFWriter, config: Any) -> Extra:
    """Command R 7B: every fourth layer looks back to the start and has no positions."""
    require(config, hidden_act="silu", attention_bias=False)
    wanted = [
        "sliding_attention" if (layer + 1) % 4 else "full_attention"
        for layer in range(config.num_hidden_layers)
    ]
    if list(config.layer_types) != wanted:
        raise unlike(config, "layer_types", config.layer_types, wanted)
    writer.add_logit_scale(config.logit_scale)
    writer.add_sliding_window(config.sliding_window)
    return rotary(writer, config, layer_norm=True, windows=True)


def glm4(writer: GGUFWriter, config: Any) -> Extra:
    """GLM 4, with norms after attention and MLP."""
    require(config, hidden_act="silu")
    return rotary(writer, config, partial=True)


def stablelm(writer: GGUFWriter, config: Any) -> Extra:
    """StableLM."""
    require(config, hidden_act="silu", qk_layernorm=False)
    writer.add_parallel_residual(config.use_parallel_residual)
    return rotary(writer, config, layer_norm=True, partial=True)


def starcoder2(writer: GGUFWriter, config: Any) -> Extra:
    """StarCoder 2."""
    require(config, hidden_act=_GELU)
    return rotary(writer, config, layer_norm=True)


def nemotron(writer: GGUFWriter, config: Any) -> Extra:
    """Nemotron 3 and 4: a squared ReLU without a gate."""
    require(config, hidden_act="relu2", attention_bias=False, mlp_bias=False)
    return rotary(writer, config, layer_norm=True, partial=True)


def phi(writer: GGUFWriter, config: Any) -> Extra:
    """Phi 1 and 2."""
    require(config, hidden_act=_GELU, qk_layernorm=False)
    return rotary(writer, config, layer_norm=True, partial=True)


def phi3(writer: GGUFWriter, config: Any) -> Extra:
    """Phi 3 and 4 without scaled positions; the engine has no sliding windows for them."""
    require(config, hidden_act="silu")
    writer.add_sliding_window(0)
    writer.add_rope_scaling_orig_ctx_len(config.max_position_embeddings)
    return rotary(writer, config, partial=True)


def gpt_neox(writer: GGUFWriter, config: Any) -> Extra:
    """GPT-NeoX and Pythia."""
    require(config, hidden_act=_GELU, attention_bias=True)
    writer.add_parallel_residual(config.use_parallel_residual)
    return rotary(writer, config, layer_norm=True, partial=True)


def falcon(writer: GGUFWriter, config: Any) -> Extra:
    """Falcon with rotary positions and parallel attention."""
    require(config, activation=_GELU, alibi=False, parallel_attn=True, bias=False)
    if config.new_decoder_architecture and config.num_ln_in_parallel_attn == 1:
        raise unlike(config, "num_ln_in_parallel_attn", 1, 2)
    kv = config.num_kv_heads if config.new_decoder_architecture else 1
    kv = kv if config.new_decoder_architecture or config.multi_query else config.num_attention_heads
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.ffn_hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(kv)
    writer.add_layer_norm_eps(config.layer_norm_epsilon)
    writer.add_vocab_size(config.vocab_size)
    return positions(writer, config, config.rope_parameters)


def bloom(writer: GGUFWriter, config: Any) -> Extra:
    """BLOOM: positions by ALiBi, which has no end."""
    require(config, apply_residual_connection_post_layernorm=False, slow_but_exact=False)
    writer.add_context_length(getattr(config, "seq_length", None) or config.hidden_size)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(4 * config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_attention_heads)
    writer.add_layer_norm_eps(config.layer_norm_epsilon)
    writer.add_vocab_size(config.vocab_size)
    return {}


def mpt(writer: GGUFWriter, config: Any) -> Extra:
    """MPT: positions by ALiBi."""
    attention = config.attn_config
    require(attention, alibi=True, qk_ln=False, prefix_lm=False, softmax_scale=None)
    writer.add_context_length(config.max_seq_len)
    writer.add_embedding_length(config.d_model)
    writer.add_block_count(config.n_layers)
    writer.add_feed_forward_length(config.expansion_ratio * config.d_model)
    writer.add_head_count(config.n_heads)
    writer.add_layer_norm_eps(config.layer_norm_epsilon)
    if attention.clip_qkv is not None:
        writer.add_clamp_kqv(attention.clip_qkv)
    writer.add_max_alibi_bias(float(attention.alibi_bias_max))
    writer.add_vocab_size(config.vocab_size)
    return {}


def gemma(writer: GGUFWriter, config: Any) -> Extra:
    """Gemma."""
    require(config, hidden_act="gelu_pytorch_tanh", attention_bias=False)
    require_causal(config)
    return rotary(writer, config)


def gemma2(writer: GGUFWriter, config: Any) -> Extra:
    """Gemma 2."""
    _gemma2_like(writer, config, layers_of_27b=46)
    # Without these keys the engine would take its own defaults, not "none".
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        if getattr(config, name) is None:
            raise unlike(config, name, None, "a number")
    writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
    writer.add_final_logit_softcapping(config.final_logit_softcapping)
    return positions(writer, config, config.rope_parameters)


def gemma3(writer: GGUFWriter, config: Any) -> Extra:
    """Gemma 3."""
    require(config, attn_logit_softcapping=None)
    _gemma2_like(writer, config, layers_of_27b=62)
    if config.final_logit_softcapping is not None:
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    rope = config.rope_parameters
    local = rope["sliding_attention"]
    if local.get("rope_type", "default") != "default":
        raise unlike(config, "rope_type of sliding layers", local["rope_type"], "default")
    writer.add_rope_freq_base_swa(local["rope_theta"])
    return positions(writer, config, rope["full_attention"])


def _gemma2_like(writer: GGUFWriter, config: Any, *, layers_of_27b: int) -> None:
    require(config, hidden_activation="gelu_pytorch_tanh", attention_bias=False)
    require_causal(config)
    width = head_dim(config)
    if config.num_hidden_layers == layers_of_27b:  # the engine knows that size by its depth
        width = config.hidden_size // config.num_attention_heads
    require(config, query_pre_attn_scalar=width)
    sizes(writer, config, windows=True)
    writer.add_rope_dimension_count(head_dim(config))
    writer.add_sliding_window(config.sliding_window)
    kinds = [kind == "sliding_attention" for kind in config.layer_types]
    writer.add_sliding_window_pattern(kinds)


def gpt2(writer: GGUFWriter, config: Any) -> Extra:
    """GPT-2."""
    require(
        config,
        activation_function="gelu_new",
        scale_attn_weights=True,
        scale_attn_by_inverse_layer_idx=False,
        add_cross_attention=False,
    )
    return _learned_positions(writer, config)


def gpt_bigcode(writer: GGUFWriter, config: Any) -> Extra:
    """StarCoder: GPT-2's blocks with one key and value for all heads."""
    require(
        config,
        activation_function=_GELU,
        scale_attn_weights=True,
        multi_query=True,
        add_cross_attention=False,
    )
    writer.add_head_count_kv(1)
    return _learned_positions(writer, config)


def _learned_positions(writer: GGUFWriter, config: Any) -> Extra:
    writer.add_context_length(config.n_positions)
    writer.add_embedding_length(config.n_embd)
    writer.add_block_count(config.n_layer)
    writer.add_feed_forward_length(config.n_inner or 4 * config.n_embd)
    writer.add_head_count(config.n_head)
    writer.add_layer_norm_eps(config.layer_norm_epsilon)
    writer.add_vocab_size(config.vocab_size)
    return {}
