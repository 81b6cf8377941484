"""The parts of an RWKV-7 block: time mix, channel mix, and the modules whose outputs are gates.

Where the gates are (inputs and outputs of these modules are what a hook sees)

    gate                        module                     input               output
    decay                       layers.{i}.attn.w_act      pre-activation      log w in (−e^−½, 0)
    in-context learning rate    layers.{i}.attn.a_act      pre-activation      a in (0, 1)
    value residual mix, i ≥ 1   layers.{i}.attn.v_act      pre-activation      σ in (0, 1)
    output gate                 layers.{i}.attn.g_lora     shifted tokens      g, unbounded
    receptance                  layers.{i}.attn.r_proj     shifted tokens      r, linear

Where the recurrence is: the name `rwkv7_attention` in this file, called once per block and pass
with r, log w, k, v, a = −κ and b = κ ⊙ a, as S_t = (diag(w_t) + b_t a_tᵀ) S_{t−1} + k_t v_tᵀ.

The residual stream: block 0 begins with the norm `pre_norm`, as published, so the stream starts at
that norm's output and not at the embedding.

Source: arXiv 2503.14456.
"""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer

from trilens.errors import UsageError
from trilens.models.rwkv7.config import RWKV7Config
from trilens.models.rwkv7.kernels import rwkv7_attention
from trilens.models.rwkv7.state import Padding, RWKV7LayerState, RWKV7State, shift_tokens

__all__ = ["LogDecay", "LowRank", "RWKV7Block", "RWKV7ChannelMix", "RWKV7TimeMix"]

_STEEPEST = -math.exp(-0.5)


class LogDecay(nn.Module):
    """The decay gate: log w = −e^−½ · σ(pre-activation), so that w lies in (0.545, 1).

    Shapes
        [batch, seq, d_model] in and out; out is float32 at least.
    """

    def forward(self, pre: Tensor) -> Tensor:
        """Turn the pre-activation into the log of the decay."""
        # PROMOTE: half precision rounds decays near 1, and with them the length of the memory.
        wide = pre.to(torch.promote_types(pre.dtype, torch.float32))
        return _STEEPEST * torch.sigmoid(wide)


class LowRank(nn.Module):
    """A projection through a few channels: up(activation(down(x))) + bias.

    Shapes
        [batch, seq, d_model] in and out.
    """

    def __init__(self, width: int, rank: int, activation: nn.Module, *, bias: bool) -> None:
        super().__init__()
        self.lora = nn.Sequential(
            nn.Linear(width, rank, bias=False), activation, nn.Linear(rank, width, bias=bias)
        )

    @property
    def down(self) -> nn.Linear:
        """The projection into the few channels."""
        return cast(nn.Linear, self.lora[0])

    @property
    def up(self) -> nn.Linear:
        """The projection out of them, with the bias."""
        return cast(nn.Linear, self.lora[2])

    def forward(self, x: Tensor) -> Tensor:
        """Project."""
        return cast(Tensor, self.lora(x))


class RWKV7TimeMix(nn.Module):
    """The recurrent mixer of one block."""

    def __init__(self, config: RWKV7Config, layer_idx: int) -> None:
        super().__init__()
        width = config.hidden_size
        self.layer_idx = layer_idx
        self.n_layers = config.num_hidden_layers
        self.head_size = config.head_size
        self.chunk_size = config.chunk_size
        self.x_r = nn.Parameter(torch.empty(1, 1, width))
        self.x_w = nn.Parameter(torch.empty(1, 1, width))
        self.x_k = nn.Parameter(torch.empty(1, 1, width))
        self.x_v = nn.Parameter(torch.empty(1, 1, width))
        self.x_a = nn.Parameter(torch.empty(1, 1, width))
        self.x_g = nn.Parameter(torch.empty(1, 1, width))
        self.k_k = nn.Parameter(torch.empty(width))
        self.k_a = nn.Parameter(torch.empty(width))
        self.r_k = nn.Parameter(torch.empty(config.num_attention_heads, config.head_size))

        self.r_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)

        self.w_lora = LowRank(width, config.decay_low_rank_dim, nn.Tanh(), bias=True)
        self.w_act = LogDecay()
        self.a_lora = LowRank(width, config.a_low_rank_dim, nn.Identity(), bias=True)
        self.a_act = nn.Sigmoid()
        self.v_lora: LowRank | None = None
        self.v_act: nn.Sigmoid | None = None
        if layer_idx > 0:
            self.v_lora = LowRank(width, config.v_low_rank_dim, nn.Identity(), bias=True)
            self.v_act = nn.Sigmoid()
        self.g_lora = LowRank(width, config.gate_low_rank_dim, nn.Sigmoid(), bias=False)
        self.g_norm = nn.GroupNorm(config.num_attention_heads, width, eps=config.group_norm_eps)

    def forward(
        self,
        hidden_states: Tensor,
        v_first: Tensor | None = None,
        *,
        state: RWKV7LayerState | None = None,
        padding: Padding | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Mix over time.

        Shapes
            hidden_states [batch, seq, d_model], after the block's norm; v_first likewise, the
            values of block 0; both outputs likewise.

        Args:
            hidden_states: the normed residual stream.
            v_first: what block 0 returned; only block 0 goes without it.
            state: what this block remembers; changed in place where given.
            padding: which tokens are real; all unless given.

        Returns:
            What is added to the residual stream, and v_first for the blocks that follow.

        Raises:
            UsageError: v_first is missing in a block that mixes it in.
        """
        before = None if state is None else state.attn_shift
        previous, last = shift_tokens(hidden_states, before, padding)
        delta = previous - hidden_states
        r = self.r_proj(hidden_states + delta * self.x_r)
        log_w = self.w_act(self.w_lora(hidden_states + delta * self.x_w))
        k = self.k_proj(hidden_states + delta * self.x_k)
        x_v = hidden_states + delta * self.x_v
        v = self.v_proj(x_v)
        rate = self.a_act(self.a_lora(hidden_states + delta * self.x_a))
        g = self.g_lora(hidden_states + delta * self.x_g)
        if self.v_lora is None or self.v_act is None:
            v_first = v
        elif v_first is None:
            raise UsageError(
                f"v_first is missing: block {self.layer_idx} mixes in the values of block 0"
            )
        else:
            v = v + (v_first - v) * self.v_act(self.v_lora(x_v))

        # PROMOTE: κ must have length 1, or the state is not shrunk along it but over- or undershot.
        kappa = normalize(self._heads(k * self.k_k).to(log_w.dtype), dim=-1)
        k = k * (1 + (rate - 1) * self.k_a)
        r, log_w, k, v_heads, rate = (self._heads(x) for x in (r, log_w, k, v, rate))
        b = kappa * rate
        if padding is not None:
            # A token that is not real neither decays the state nor writes to it.
            absent = ~padding.keep.unsqueeze(-1)
            log_w, k, b = (x.masked_fill(absent, 0) for x in (log_w, k, b))
        start = None if state is None else state.recurrent
        y, end = rwkv7_attention(r, log_w, k, v_heads, -kappa, b, start, self.chunk_size)
        if state is not None:
            # A copy, since a view would keep the whole sequence in memory.
            state.attn_shift, state.recurrent = last.clone(), end

        batch, seq, width = hidden_states.shape
        y = self.g_norm(y.reshape(batch * seq, width)).view(batch, seq, width)
        bonus = (r * k * self.r_k).sum(dim=-1, keepdim=True) * v_heads
        return self.o_proj((y + bonus.flatten(-2)) * g), v_first

    def _heads(self, x: Tensor) -> Tensor:
        return x.reshape(*x.shape[:-1], -1, self.head_size)


class RWKV7ChannelMix(nn.Module):
    """The feed-forward part of one block: relu² over shifted tokens, without a gate."""

    def __init__(self, config: RWKV7Config, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.n_layers = config.num_hidden_layers
        self.x_k = nn.Parameter(torch.empty(config.hidden_size))
        self.key = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.value = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.act_fn = ACT2FN["relu2"]

    def forward(
        self,
        hidden_states: Tensor,
        *,
        state: RWKV7LayerState | None = None,
        padding: Padding | None = None,
    ) -> Tensor:
        """Mix over channels.

        Shapes
            [batch, seq, d_model] in and out.
        """
        before = None if state is None else state.ffn_shift
        previous, last = shift_tokens(hidden_states, before, padding)
        if state is not None:
            state.ffn_shift = last.clone()
        mixed = hidden_states + (previous - hidden_states) * self.x_k
        return cast(Tensor, self.value(self.act_fn(self.key(mixed))))


class RWKV7Block(GradientCheckpointingLayer):  # type: ignore[misc]
    """One block: time mix and channel mix, each added to the residual stream."""

    def __init__(self, config: RWKV7Config, layer_idx: int) -> None:
        super().__init__()
        width, eps = config.hidden_size, config.norm_eps
        self.layer_idx = layer_idx
        if layer_idx == 0:
            self.pre_norm = nn.LayerNorm(width, eps=eps)
        self.attn_norm = nn.LayerNorm(width, eps=eps)
        self.attn = RWKV7TimeMix(config, layer_idx)
        self.ffn_norm = nn.LayerNorm(width, eps=eps)
        self.ffn = RWKV7ChannelMix(config, layer_idx)

    def forward(
        self,
        hidden_states: Tensor,
        v_first: Tensor | None = None,
        *,
        past_key_values: RWKV7State | None = None,
        padding: Padding | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Run the block.

        Shapes
            hidden_states [batch, seq, d_model], the residual stream (for block 0 the embedding);
            v_first likewise, from block 0.

        Returns:
            The residual stream after this block, and v_first for the next.
        """
        state = None if past_key_values is None else past_key_values.layers[self.layer_idx]
        stream = self.pre_norm(hidden_states) if self.layer_idx == 0 else hidden_states
        mixed, v_first = self.attn(self.attn_norm(stream), v_first, state=state, padding=padding)
        stream = stream + mixed
        return stream + self.ffn(self.ffn_norm(stream), state=state, padding=padding), v_first
