"""Which architectures the engine knows, and what it needs to know about each.

This is one of the two places that name model families (the other is `models.gates`): a GGUF file
states its architecture by name, and the engine's code for that name fixes everything that the file
does not say. So each entry refuses every setting of a configuration that this code would ignore.

Source: llama.cpp, `src/models/*.cpp` (what is read) and `conversion/*.py` (what is written).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
from gguf import MODEL_ARCH, GGUFWriter, RopeScalingType
from numpy.typing import NDArray

from trilens.errors import UsageError

__all__ = ["FAMILIES", "Family", "find_family"]

Extra = Mapping[str, NDArray[np.float32]]
"""Tensors that no checkpoint stores: name → values."""


@dataclass(frozen=True, slots=True)
class Family:
    """What the engine expects of one architecture.

    Attributes:
        arch: Its name in the gguf package.
        describe: Adds the architecture's settings to a writer; gives tensors that are to be
            written beside those of the checkpoint.
        interleaved: The engine rotates neighbouring coordinates of a head where transformers
            rotates the two halves: rows of queries and keys change places.
        norm_offset: What the model adds to its norm weights when it runs; the engine does not.
    """

    arch: MODEL_ARCH
    describe: Callable[[GGUFWriter, Any], Extra]
    interleaved: bool = False
    norm_offset: float = 0.0

    def row_order(self, tensor: str, rows: int, config: Any) -> NDArray[np.int64] | None:
        """Which row of the checkpoint each row of a tensor in the file is; None where none moved.

        Shapes: → [rows]
        """
        if not self.interleaved or not any(f".attn_{part}." in tensor for part in "qk"):
            return None
        heads = config.num_attention_heads if ".attn_q." in tensor else _kv_heads(config)
        # A head's rows are (half, place): the engine wants (place, half).
        numbers = np.arange(rows, dtype=np.int64).reshape(heads, 2, rows // heads // 2)
        return numbers.swapaxes(1, 2).reshape(rows)


def find_family(config: Any) -> Family:
    """The entry of a configuration.

    Raises:
        UsageError: the engine's mapping does not know the architecture.
    """
    name = str(getattr(config, "model_type", None))
    if name not in FAMILIES:
        raise UsageError(
            f"architecture {name!r} is not mapped to GGUF: there are {', '.join(FAMILIES)}; "
            "write a checkpoint for transformers instead (without a gguf format)"
        )
    return FAMILIES[name]


def _rotary(writer: GGUFWriter, config: Any, *, windows: bool = False) -> None:
    """Settings that every family with rotary positions and RMS norms shares.

    Args:
        writer: takes the settings.
        config: the model's.
        windows: the engine knows sliding windows for this architecture. Where it does not, no more
            positions are promised than one window has: within it the outputs are the same.
    """
    dim, positions, window = _head_dim(config), config.max_position_embeddings, _window(config)
    writer.add_context_length(positions if windows or window is None else min(positions, window))
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(_kv_heads(config))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_key_length(dim)
    writer.add_value_length(dim)
    writer.add_rope_dimension_count(dim)
    writer.add_vocab_size(config.vocab_size)


def _llama(writer: GGUFWriter, config: Any) -> Extra:
    _require(config, hidden_act="silu")
    _rotary(writer, config)
    return _positions(writer, config, config.rope_parameters, frequencies=True)


def _qwen2(writer: GGUFWriter, config: Any) -> Extra:
    if _head_dim(config) * config.num_attention_heads != config.hidden_size:
        raise _unlike(
            config, "head_dim", _head_dim(config), config.hidden_size // config.num_attention_heads
        )
    return _qwen3(writer, config)


def _qwen3(writer: GGUFWriter, config: Any) -> Extra:
    _require(config, hidden_act="silu")
    _rotary(writer, config)
    return _positions(writer, config, config.rope_parameters)


def _gemma(writer: GGUFWriter, config: Any) -> Extra:
    _require(config, hidden_act="gelu_pytorch_tanh", attention_bias=False)
    _require_causal(config)
    _rotary(writer, config)
    return _positions(writer, config, config.rope_parameters)


def _gemma2(writer: GGUFWriter, config: Any) -> Extra:
    _gemma2_like(writer, config, layers_of_27b=46)
    # Without these keys the engine would take its own defaults, not "none".
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        if getattr(config, name) is None:
            raise _unlike(config, name, None, "a number")
    writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
    writer.add_final_logit_softcapping(config.final_logit_softcapping)
    return _positions(writer, config, config.rope_parameters)


def _gemma3(writer: GGUFWriter, config: Any) -> Extra:
    _require(config, attn_logit_softcapping=None)
    _gemma2_like(writer, config, layers_of_27b=62)
    if config.final_logit_softcapping is not None:
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    rope = config.rope_parameters
    local = rope["sliding_attention"]
    _plain(config, local)
    writer.add_rope_freq_base_swa(local["rope_theta"])
    return _positions(writer, config, rope["full_attention"])


def _gemma2_like(writer: GGUFWriter, config: Any, *, layers_of_27b: int) -> None:
    _require(config, hidden_activation="gelu_pytorch_tanh", attention_bias=False)
    _require_causal(config)
    width = _head_dim(config)
    if config.num_hidden_layers == layers_of_27b:  # the engine knows that size by its depth
        width = config.hidden_size // config.num_attention_heads
    _require(config, query_pre_attn_scalar=width)
    _rotary(writer, config, windows=True)
    writer.add_sliding_window(config.sliding_window)
    kinds = [kind == "sliding_attention" for kind in config.layer_types]
    writer.add_sliding_window_pattern(kinds)


def _gpt2(writer: GGUFWriter, config: Any) -> Extra:
    _require(
        config,
        activation_function="gelu_new",
        scale_attn_weights=True,
        scale_attn_by_inverse_layer_idx=False,
        add_cross_attention=False,
    )
    writer.add_context_length(config.n_positions)
    writer.add_embedding_length(config.n_embd)
    writer.add_block_count(config.n_layer)
    writer.add_feed_forward_length(config.n_inner or 4 * config.n_embd)
    writer.add_head_count(config.n_head)
    writer.add_layer_norm_eps(config.layer_norm_epsilon)
    writer.add_vocab_size(config.vocab_size)
    return {}


def _positions(
    writer: GGUFWriter, config: Any, rope: Mapping[str, Any], *, frequencies: bool = False
) -> Extra:
    """Rotary positions: base, scaling, and for "llama3" a factor for each frequency."""
    kind = rope.get("rope_type", "default")
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise _unlike(config, "partial_rotary_factor", rope["partial_rotary_factor"], 1.0)
    if kind == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    elif kind == "llama3" and frequencies:
        return {"rope_freqs.weight": _frequency_factors(rope, _head_dim(config))}
    elif kind != "default":
        kinds = "default, linear or llama3" if frequencies else "default or linear"
        raise _unlike(config, "rope_type", kind, kinds)
    return {}


def _plain(config: Any, rope: Mapping[str, Any]) -> None:
    if rope.get("rope_type", "default") != "default":
        raise _unlike(config, "rope_type of sliding layers", rope["rope_type"], "default")


def _frequency_factors(rope: Mapping[str, Any], dim: int) -> NDArray[np.float32]:
    """What each rotary frequency is divided by.

    Shapes: → [dim / 2]

    Source: transformers, `_compute_llama3_parameters`.
    """
    places = np.arange(0, dim, 2, dtype=np.float64)
    wavelengths = 2 * math.pi * rope["rope_theta"] ** (places / dim)
    factor, low, high = rope["factor"], rope["low_freq_factor"], rope["high_freq_factor"]
    trained = rope["original_max_position_embeddings"]
    smooth = (trained / wavelengths - low) / (high - low)
    between = 1 / ((1 - smooth) / factor + smooth)
    long = np.where(wavelengths > trained / low, factor, between)
    return np.where(wavelengths < trained / high, 1.0, long).astype(np.float32)


def _window(config: Any) -> int | None:
    """How far back some layer looks; None where all look back to the start."""
    kinds = getattr(config, "layer_types", None)
    slides = kinds is None or "sliding_attention" in kinds
    window = getattr(config, "sliding_window", None)
    return int(window) if window and slides else None


def _kv_heads(config: Any) -> int:
    return int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)


def _head_dim(config: Any) -> int:
    dim = getattr(config, "head_dim", None)
    return int(dim or config.hidden_size // config.num_attention_heads)


def _require(config: Any, **wanted: Any) -> None:
    for name, value in wanted.items():
        found = getattr(config, name, value)
        if found != value:
            raise _unlike(config, name, found, value)


def _require_causal(config: Any) -> None:
    if getattr(config, "use_bidirectional_attention", None):
        raise _unlike(config, "use_bidirectional_attention", True, False)


def _unlike(config: Any, name: str, found: Any, wanted: Any) -> UsageError:
    return UsageError(
        f"configuration of type {config.model_type!r} has {name} {found!r}: the engine's code for "
        f"this architecture computes with {wanted!r}; a GGUF file of it would give other outputs"
    )


FAMILIES: MappingProxyType[str, Family] = MappingProxyType(
    {
        "llama": Family(MODEL_ARCH.LLAMA, _llama, interleaved=True),
        "mistral": Family(MODEL_ARCH.LLAMA, _llama, interleaved=True),
        "qwen2": Family(MODEL_ARCH.QWEN2, _qwen2),
        "qwen3": Family(MODEL_ARCH.QWEN3, _qwen3),
        "gemma": Family(MODEL_ARCH.GEMMA, _gemma, norm_offset=1.0),
        "gemma2": Family(MODEL_ARCH.GEMMA2, _gemma2, norm_offset=1.0),
        "gemma3_text": Family(MODEL_ARCH.GEMMA3, _gemma3, norm_offset=1.0),
        "gpt2": Family(MODEL_ARCH.GPT2, _gpt2),
    }
)
"""Every mapped architecture by transformers' name of its configuration."""
