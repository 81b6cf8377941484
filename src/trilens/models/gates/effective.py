"""Kernel arguments → effective attention: one entry per kernel function, whoever calls it.

A recurrence without a kernel function has an entry too: what passes its boundary is its call.

Source: Mamba arXiv 2312.00752 and 2403.01590, Mamba-2 2405.21060, gated delta rule 2412.06464, KDA
2510.26692, RWKV-4 2305.13048, RWKV-7 2503.14456, Griffin 2402.19427, xLSTM 2405.04517, lightning
attention 2401.04658.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trilens.caches.patterns.channel.pattern import ChannelPattern, DecayedSoftmaxPattern
from trilens.caches.patterns.recurrent.pattern import RecurrentPattern
from trilens.errors import AttentionPathError
from trilens.models.gates.effective_terms import Effective
from trilens.models.gates.kernels import Arguments, chunk_step, scan_step
from trilens.models.gates.rglru import rglru_terms
from trilens.models.trace import tensors_in

__all__ = ["EFFECTIVE_KERNELS", "effective_of"]


_STATES = ("initial_state", "initial_states", "state", "c_initial", "n_initial")
_L2_EPS = 1e-6


def effective_of(function: str, arguments: Arguments, result: Any) -> Effective:
    """The effective attention of one kernel call.

    Args:
        function: the kernel function, a key of `EFFECTIVE_KERNELS`.
        arguments: what it was called with, by parameter name.
        result: what it gave: the output, or a tuple that begins with it.

    Raises:
        AttentionPathError: no such kernel is known, or it started from a state that is not empty.
        UsageError: arguments that its pattern refuses, such as a decay that grows.
    """
    if function not in EFFECTIVE_KERNELS:
        raise AttentionPathError(
            f"the kernel {function} has no known effective attention; known are "
            f"{', '.join(EFFECTIVE_KERNELS)}"
        )
    for name in _STATES:
        if any(bool(tensor.any()) for tensor in tensors_in(arguments.get(name))):
            raise AttentionPathError(
                f"{function} was called with a {name} that is not empty: weights on tokens before "
                "the prompt are not known; capture the whole text as one prompt"
            )
    output = next(tensors_in(result)).detach()
    return EFFECTIVE_KERNELS[function](arguments, output)


def _chunk_scan(args: Arguments, output: Tensor) -> Effective:
    dt = chunk_step(args).float()
    pattern = RecurrentPattern(
        args["C"].transpose(1, 2),
        args["B"].transpose(1, 2),
        log_w=(dt * args["A"].float()).transpose(1, 2)[..., None],
        k_scale=dt.transpose(1, 2),
    )
    values = args["hidden_states"].transpose(1, 2)
    return Effective(pattern, values, output.transpose(1, 2), skip=args["D"])


def _delta_rule(args: Arguments, output: Tensor) -> Effective:
    q, k = args["query"], args["key"]
    if args["use_qk_l2norm_in_kernel"]:
        q, k = _unit(q), _unit(k)
    g = args["g"].float().transpose(1, 2)
    pattern = RecurrentPattern.gated_delta(
        q.transpose(1, 2),
        k.transpose(1, 2),
        log_w=g[..., None] if g.dim() == 3 else g,
        beta=args["beta"].float().transpose(1, 2),
        scaling=q.shape[-1] ** -0.5,
    )
    return Effective(pattern, args["value"].transpose(1, 2), output.transpose(1, 2))


def _unit(tensor: Tensor) -> Tensor:
    # PROMOTE: the kernels themselves normalise in float32, whatever the model's dtype.
    tensor = tensor.float()
    return tensor * torch.rsqrt((tensor * tensor).sum(-1, keepdim=True) + _L2_EPS)


def _matrix_state(args: Arguments, output: Tensor) -> Effective:
    r, log_w, k, v, a, b = (
        args[name].transpose(1, 2) for name in ("r", "log_w", "k", "v", "a", "b")
    )
    pattern = RecurrentPattern(r, k, log_w=log_w, a=a, b=b)
    return Effective(pattern, v, output.transpose(1, 2))


def _selective_scan(args: Arguments, output: Tensor) -> Effective:
    pattern = ChannelPattern(
        step=scan_step(args).transpose(1, 2),
        rate=args["A"],
        q=args["C"].transpose(1, 2),
        k=args["B"].transpose(1, 2),
    )
    z = args["z"]
    return Effective(
        pattern,
        args["hidden_states"][..., None],
        output[..., None],
        skip=args["D"],
        gate=None if z is None else F.silu(z)[..., None],
        channel=lambda number: pattern.channels(number, number + 1),
    )


def _decayed_softmax(args: Arguments, output: Tensor) -> Effective:
    key: Tensor = args["key"]
    # PROMOTE: the double exponential of a half-precision parameter shifts every distant weight.
    log_w, bonus = -torch.exp(args["time_decay"].float()), args["time_first"].float()
    pattern = DecayedSoftmaxPattern(key, log_w=log_w, bonus=bonus)
    return Effective(
        pattern,
        args["value"].transpose(1, 2)[..., None],
        output.transpose(1, 2)[..., None],
        channel=partial(_softmax_channel, key, log_w, bonus),
    )


def _softmax_channel(
    key: Tensor, log_w: Tensor, bonus: Tensor, number: int
) -> DecayedSoftmaxPattern:
    part = slice(number, number + 1)
    return DecayedSoftmaxPattern(key[..., part], log_w=log_w[part], bonus=bonus[part])


def _rglru(args: Arguments, output: Tensor) -> Effective:
    x: Tensor = args["activations"]
    log_w, write = rglru_terms(args["module"], x, args["position_ids"])
    pattern = ChannelPattern.gated(log_w, write)
    return Effective(
        pattern,
        x.transpose(1, 2)[..., None],
        output.transpose(1, 2)[..., None],
        channel=lambda number: pattern.channels(number, number + 1),
    )


def _mlstm(args: Arguments, output: Tensor) -> Effective:
    q = args["query"]
    pattern = RecurrentPattern.exponential_gating(
        q,
        args["key"],
        input_gate=args["igate"],
        forget_gate=args["fgate"],
        scaling=q.shape[-1] ** -0.5,
        eps=args["module"].config.eps,
    )
    return Effective(pattern, args["value"], output)


def _lightning(args: Arguments, output: Tensor) -> Effective:
    mixer: nn.Module = args["module"]
    slope = mixer.get_buffer("slope_rate").float().reshape(-1, 1)
    batch, seq, width = args["output"].shape
    heads = slope.shape[0]
    # The mixer's own layout: queries, keys and values stand together head by head.
    parts = args["output"].view(batch, seq, heads, 3, width // heads // 3).unbind(3)
    q, k, v = (part.transpose(1, 2) for part in parts)
    pattern = RecurrentPattern(q, k, log_w=-slope)
    return Effective(pattern, v, output.reshape(batch, seq, heads, -1).transpose(1, 2))


EFFECTIVE_KERNELS: Mapping[str, Callable[[Arguments, Tensor], Effective]] = {
    "mamba_selective_scan": _selective_scan,
    "mamba2_chunk_scan": _chunk_scan,
    "torch_chunk_gated_delta_rule": _delta_rule,
    "chunk_kimi_delta_attention": _delta_rule,
    "rwkv_linear_attention": _decayed_softmax,
    "rwkv7_attention": _matrix_state,
    "rg_lru": _rglru,
    "mlstm": _mlstm,
    "lightning_attention": _lightning,
}
"""Kernel function, or recurrence with a boundary → its effective attention."""
