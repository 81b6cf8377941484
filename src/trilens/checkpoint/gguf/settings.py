"""What an engine is told of a configuration, by rule, and what its code would ignore: refused.

transformers gives most settings one name in all configurations (`hidden_size`, …), and the gguf
package one key in all architectures. So one function states what they share; an architecture adds
its own keys, and requires what the engine's code for it takes for granted.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from gguf import GGUFWriter, RopeScalingType
from numpy.typing import NDArray

from trilens.errors import UsageError

__all__ = [
    "Extra",
    "experts",
    "head_dim",
    "kv_heads",
    "positions",
    "require",
    "require_causal",
    "rotary",
    "sizes",
    "unlike",
    "window",
]

Extra = Mapping[str, NDArray[np.float32]]
"""Tensors that no checkpoint stores: name → values."""

_LAYER_NORM_EPS = ("layer_norm_epsilon", "layer_norm_eps", "norm_epsilon", "norm_eps")


def sizes(
    writer: GGUFWriter,
    config: Any,
    *,
    windows: bool = False,
    layer_norm: bool = False,
    feed_forward: int | None = None,
) -> None:
    """The settings that every architecture with attention shares.

    Args:
        writer: takes the settings.
        config: the model's.
        windows: the engine knows sliding windows for this architecture. Where it does not, no more
            positions are promised than one window has: within it the outputs are the same.
        layer_norm: the norms are layer norms, not RMS norms.
        feed_forward: width of the MLP, where the configuration has it under another name.
    """
    n_positions, width = config.max_position_embeddings, window(config)
    writer.add_context_length(n_positions if windows or width is None else min(n_positions, width))
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(feed_forward or config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(kv_heads(config))
    writer.add_key_length(head_dim(config))
    writer.add_value_length(head_dim(config))
    writer.add_vocab_size(config.vocab_size)
    if layer_norm:
        names = [name for name in _LAYER_NORM_EPS if getattr(config, name, None) is not None]
        writer.add_layer_norm_eps(getattr(config, names[0]))
    else:
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)


def rotary(
    writer: GGUFWriter,
    config: Any,
    *,
    windows: bool = False,
    layer_norm: bool = False,
    frequencies: bool = False,
    partial: bool = False,
) -> Extra:
    """`sizes`, and rotary positions by one base for all layers.

    Args:
        writer: as for `sizes`, like the two that follow.
        config: likewise.
        windows: likewise.
        layer_norm: likewise.
        frequencies: the engine takes a factor for each frequency.
        partial: the engine can leave the last coordinates of a head alone.
    """
    sizes(writer, config, windows=windows, layer_norm=layer_norm)
    rope = config.rope_parameters
    share = rope.get("partial_rotary_factor", 1.0)
    if share != 1.0 and not partial:
        raise unlike(config, "partial_rotary_factor", share, 1.0)
    writer.add_rope_dimension_count(int(head_dim(config) * share))
    return positions(writer, config, rope, frequencies=frequencies)


def positions(
    writer: GGUFWriter, config: Any, rope: Mapping[str, Any], *, frequencies: bool = False
) -> Extra:
    """Rotary positions: base, scaling, and for "llama3" a factor for each frequency."""
    kind = rope.get("rope_type", "default")
    writer.add_rope_freq_base(rope["rope_theta"])
    if kind == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    elif kind == "llama3" and frequencies:
        return {"rope_freqs.weight": _frequency_factors(rope, head_dim(config))}
    elif kind != "default":
        kinds = "default, linear or llama3" if frequencies else "default or linear"
        raise unlike(config, "rope_type", kind, kinds)
    return {}


def experts(
    writer: GGUFWriter, config: Any, *, width: int | None = None, normalized: bool | None = None
) -> None:
    """How many experts there are, how many a token gets, and their width.

    Args:
        writer: takes the settings.
        config: the model's.
        width: of an expert's MLP, where it is not that of the blocks.
        normalized: what the engine's code does: the chosen weights add up to 1, or not.
    """
    count = next(
        int(getattr(config, name))
        for name in ("num_experts", "num_local_experts", "n_routed_experts")
        if getattr(config, name, None)
    )
    writer.add_expert_count(count)
    writer.add_expert_used_count(config.num_experts_per_tok)
    if width is not None:
        writer.add_expert_feed_forward_length(width)
    if normalized is not None:
        require(config, norm_topk_prob=normalized)


def window(config: Any) -> int | None:
    """How far back some layer looks; None where all look back to the start."""
    kinds = getattr(config, "layer_types", None)
    slides = kinds is None or "sliding_attention" in kinds
    width = getattr(config, "sliding_window", None)
    return int(width) if width and slides else None


def kv_heads(config: Any) -> int:
    """Heads of keys and values."""
    return int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)


def head_dim(config: Any) -> int:
    """Coordinates of a head."""
    dim = getattr(config, "head_dim", None)
    return int(dim or config.hidden_size // config.num_attention_heads)


def require(config: Any, **wanted: Any) -> None:
    """Refuse settings that have another value; those that are absent have the wanted one.

    Raises:
        UsageError: names the setting, its value and the wanted one.
    """
    for name, value in wanted.items():
        found = getattr(config, name, value)
        allowed = value if isinstance(value, tuple) else (value,)
        if found not in allowed:
            raise unlike(config, name, found, value if len(allowed) > 1 else allowed[0])


def require_causal(config: Any) -> None:
    """Refuse attention in both directions."""
    if getattr(config, "use_bidirectional_attention", None):
        raise unlike(config, "use_bidirectional_attention", True, False)


def unlike(config: Any, name: str, found: Any, wanted: Any) -> UsageError:
    """The error for a setting that the engine's code computes otherwise."""
    return UsageError(
        f"configuration of type {config.model_type!r} has {name} {found!r}: the engine's code for "
        f"this architecture computes with {wanted!r}; a GGUF file of it would give other outputs"
    )


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
