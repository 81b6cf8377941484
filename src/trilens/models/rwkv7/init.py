"""The published initialisation of RWKV-7, so that a model trains from scratch.

Every function goes through `transformers.initialization`, which leaves loaded tensors alone.

Source: arXiv 2503.14456 and the training code published with it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from transformers import initialization as init

from trilens.models.rwkv7.layers import LowRank, RWKV7ChannelMix, RWKV7TimeMix

__all__ = [
    "init_channel_mix",
    "init_embedding",
    "init_norm",
    "init_time_mix",
    "init_unembedding",
]

_EMBEDDING_BOUND = 1e-4
_LOW_RANK_GAIN = 0.1
_KEY_GAIN = 0.1
_UNEMBEDDING_GAIN = 0.5
# Exponents of the token-shift ramps: the higher, the more of the previous token.
_SHIFT_POWERS = {"x_r": 0.2, "x_w": 0.9, "x_k": 0.7, "x_v": 0.7, "x_a": 0.9, "x_g": 0.2}


def init_time_mix(mix: RWKV7TimeMix) -> None:
    """Set every tensor of one time mix, in the way of its block's depth."""
    layer, n_layers = mix.layer_idx, mix.n_layers
    width = mix.x_r.shape[-1]
    depth = layer / max(1, n_layers - 1)
    remaining = 1 - layer / n_layers
    channel = torch.arange(width, dtype=torch.float32)
    linear = channel / max(1, width - 1) - 0.5
    zigzag = _zigzag(channel, mix.head_size)

    for name, power in _SHIFT_POWERS.items():
        init.copy_(getattr(mix, name), 1 - (channel / width) ** (power * remaining))
    init.copy_(mix.k_k, 0.71 - 0.1 * linear)
    init.constant_(mix.k_a, 1.02)
    init.constant_(mix.r_k, -0.04)

    # Decays from fast to slow over the channels, more of them fast in deeper blocks.
    ramp = -6 + 6 * (channel / max(1, width - 1)) ** (1 + depth**0.3)
    _init_low_rank(mix.w_lora, ramp + 0.5 + 2.5 * zigzag)
    _init_low_rank(mix.a_lora, -0.19 + 0.3 * zigzag + 0.4 * linear)
    if mix.v_lora is not None:
        _init_low_rank(mix.v_lora, 0.73 - 0.4 * linear)
    _init_low_rank(mix.g_lora, None)

    init.orthogonal_(mix.r_proj.weight)
    init.orthogonal_(mix.k_proj.weight, gain=_KEY_GAIN)
    init.orthogonal_(mix.v_proj.weight)
    init.zeros_(mix.o_proj.weight)
    init.constant_(mix.g_norm.weight, ((layer + 1) / n_layers) ** 0.7)
    init.zeros_(mix.g_norm.bias)


def init_channel_mix(mix: RWKV7ChannelMix) -> None:
    """Set every tensor of one channel mix, in the way of its block's depth."""
    width = mix.x_k.shape[-1]
    channel = torch.arange(width, dtype=torch.float32)
    init.copy_(mix.x_k, 1 - (channel / width) ** ((1 - mix.layer_idx / mix.n_layers) ** 4))
    init.orthogonal_(mix.key.weight)
    init.zeros_(mix.value.weight)


def init_embedding(embedding: nn.Embedding, tied_std: float | None) -> None:
    """Set the embedding: tiny, since a norm follows, unless it is the unembedding too.

    Args:
        embedding: the embedding.
        tied_std: standard deviation of an embedding that is also the unembedding, else None.
    """
    if tied_std is None:
        init.uniform_(embedding.weight, -_EMBEDDING_BOUND, _EMBEDDING_BOUND)
    else:
        init.normal_(embedding.weight, std=tied_std)


def init_unembedding(head: nn.Linear) -> None:
    """Set the unembedding: orthogonal, so that the first logits have a spread near 0.5."""
    vocab, width = head.weight.shape
    init.orthogonal_(head.weight, gain=_UNEMBEDDING_GAIN * math.sqrt(max(1.0, vocab / width)))


def init_norm(norm: nn.LayerNorm) -> None:
    """Set a layer norm to the identity."""
    init.ones_(norm.weight)
    init.zeros_(norm.bias)


def _init_low_rank(projection: LowRank, bias: Tensor | None) -> None:
    """Start at the bias alone: the down projection is zero, the up projection small."""
    init.zeros_(projection.down.weight)
    init.orthogonal_(projection.up.weight, gain=_LOW_RANK_GAIN)
    if bias is not None:
        init.copy_(projection.up.bias, bias)


def _zigzag(channel: Tensor, head_size: int) -> Tensor:
    """A signed square ramp over the channels of every head, from −1 to 1."""
    half = max(1.0, (head_size - 1) / 2)
    ramp = (channel % head_size - (head_size - 1) / 2) / half
    return ramp * ramp.abs()
