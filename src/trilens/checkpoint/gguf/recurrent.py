"""Settings of recurrent architectures, and their tensors as the engine wants them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from gguf import GGUFWriter
from torch import Tensor

from trilens.checkpoint.gguf.settings import Extra, require, unlike

__all__ = [
    "RWKV7_NAMES",
    "Change",
    "falcon_mamba",
    "mamba",
    "mamba2",
    "mamba2_values",
    "mamba_values",
    "rwkv7",
    "rwkv7_place",
    "rwkv7_values",
]

Change = Callable[[Tensor], Tensor]
"""What becomes of a tensor that is not quantized."""

_CONTEXT = 1 << 20  # a recurrence has no end; engines want a number


def mamba(writer: GGUFWriter, config: Any) -> Extra:
    """Mamba."""
    return _mamba(writer, config, norms=False)


def falcon_mamba(writer: GGUFWriter, config: Any) -> Extra:
    """Mamba with norms, without weights, on what it reads from a token."""
    return _mamba(writer, config, norms=True)


def _mamba(writer: GGUFWriter, config: Any, *, norms: bool) -> Extra:
    require(config, hidden_act="silu", use_bias=False, use_conv_bias=True)
    if norms:
        require(config, mixer_rms_eps=config.layer_norm_epsilon)
    _shared(writer, config, config.intermediate_size)
    writer.add_ssm_time_step_rank(int(config.time_step_rank))
    writer.add_ssm_dt_b_c_rms(norms)
    return {}


def mamba2(writer: GGUFWriter, config: Any) -> Extra:
    """Mamba-2."""
    require(config, hidden_act="silu", use_bias=False, use_conv_bias=True)
    require(config, time_step_limit=((0.0, float("inf")), [0.0, float("inf")]))
    inner = int(config.expand * config.hidden_size)
    if config.num_heads * config.head_dim != inner:
        raise unlike(config, "num_heads", config.num_heads, inner // config.head_dim)
    _shared(writer, config, inner)
    writer.add_ssm_time_step_rank(config.num_heads)
    writer.add_ssm_group_count(config.n_groups)
    return {}


def _shared(writer: GGUFWriter, config: Any, inner: int) -> None:
    if inner != 2 * config.hidden_size:
        raise unlike(config, "expand", inner / config.hidden_size, 2)
    writer.add_context_length(_CONTEXT)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(0)  # the engine asks, and does not use it
    writer.add_head_count(0)  # likewise
    writer.add_block_count(config.num_hidden_layers)
    writer.add_ssm_conv_kernel(config.conv_kernel)
    writer.add_ssm_inner_size(inner)
    writer.add_ssm_state_size(config.state_size)
    writer.add_layer_norm_rms_eps(config.layer_norm_epsilon)
    writer.add_vocab_size(config.vocab_size)


def rwkv7(writer: GGUFWriter, config: Any) -> Extra:
    """RWKV-7."""
    width, rank = config.hidden_size, config.a_low_rank_dim
    require(config, group_norm_eps=64e-5 * 1.0)
    writer.add_context_length(_CONTEXT)
    writer.add_embedding_length(width)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_layer_norm_eps(config.norm_eps)
    writer.add_wkv_head_size(config.head_size)
    writer.add_decay_lora_rank(config.decay_low_rank_dim)
    writer.add_iclr_lora_rank(rank)
    writer.add_value_residual_mix_lora_rank(config.v_low_rank_dim)
    writer.add_gate_lora_rank(config.gate_low_rank_dim)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(0)  # the engine asks, and does not use it
    writer.add_vocab_size(config.vocab_size)
    # Block 0 mixes in no earlier value: the engine reads these, and does not use them.
    shapes = {"v0": (width,), "v1": (rank, width), "v2": (width, rank)}
    return {
        f"blk.0.time_mix_{part}.weight": np.zeros(shape, dtype=np.float32)
        for part, shape in shapes.items()
    }


RWKV7_NAMES = {
    r"^model\.layers\.(\d+)\.attn\.x_[rwkvag]$": r"blk.\1.time_mix_lerp_fused.weight",
    r"\.ffn_norm\.": ".ln2.",
    r"\.attn_norm\.": ".ln1.",
    r"\.g_norm\.": ".ln_x.",
    r"\.attn\.": ".attention.",
    r"\.ffn\.": ".feed_forward.",
    r"_lora\.lora\.0\.weight$": "1.weight",
    r"_lora\.lora\.2\.weight$": "2.weight",
    r"_lora\.lora\.2\.bias$": "0.weight",
    r"(\.[kr]_[ka]|\.feed_forward\.x_k)$": r"\1.weight",
}
"""From the names of RWKV-7's tensors to those that the gguf package knows."""


def rwkv7_place(name: str) -> int | None:
    """The place of a shift among the six that the engine holds in one tensor."""
    stem, _, letter = name.rpartition(".attn.x_")
    return "rwkvag".index(letter) if stem else None


def rwkv7_values(tensor: str, config: Any) -> Change | None:
    """Heads side by side in the vector of bonuses."""
    del config
    return _flat if ".time_mix_r_k." in tensor else None


def _flat(values: Tensor) -> Tensor:
    return values.reshape(-1)


def mamba_values(tensor: str, config: Any) -> Change | None:
    """−exp(A_log), and a convolution without its middle dimension of 1."""
    del config
    if tensor.endswith("ssm_a"):
        return _negative_exp
    return _squeezed if ".ssm_conv1d.weight" in tensor else None


def mamba2_values(tensor: str, config: Any) -> Change | None:
    """The same; A and D as columns, the norm by groups."""
    if tensor.endswith("ssm_a"):
        return lambda values: _negative_exp(values)[:, None]
    if tensor.endswith("ssm_d"):
        return lambda values: values[:, None]
    if ".ssm_norm." in tensor:
        return lambda values: values.reshape(config.n_groups, -1)
    return _squeezed if ".ssm_conv1d.weight" in tensor else None


def _negative_exp(values: Tensor) -> Tensor:
    return -torch.exp(values.float())


def _squeezed(values: Tensor) -> Tensor:
    return values.squeeze(1)
