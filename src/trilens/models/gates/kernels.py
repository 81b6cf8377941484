"""Gates at the kernel boundary: what the arguments of a recurrence's function are.

Five functions, called by module-global name, carry the recurrent inner values of some twenty model
files; RWKV-7 has one more. Each is described once, whoever calls it.

Source: Mamba arXiv 2312.00752, Mamba-2 2405.21060, gated delta rule 2412.06464, KDA 2510.26692,
RWKV-4 2305.13048, RWKV-7 2503.14456.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from trilens.caches.gates import GateKind

__all__ = [
    "CONVOLUTIONS",
    "DECODE_KERNELS",
    "KERNEL_GATES",
    "Arguments",
    "KernelGate",
    "KernelRecord",
    "chunk_step",
    "is_recorded",
    "scan_step",
]

CONVOLUTIONS = ("causal_conv1d_fn", "causal_conv1d_update")
"""Functions that apply a convolution's activation, which is no gate."""

DECODE_KERNELS: Mapping[str, str] = {
    "mamba_selective_scan": "mamba_selective_state_update",
    "mamba2_chunk_scan": "mamba2_selective_state_update",
    "torch_chunk_gated_delta_rule": "torch_recurrent_gated_delta_rule",
    "chunk_kimi_delta_attention": "recurrent_kimi_delta_attention",
}
"""Kernel function of prefill → the one of decoding; the RWKV functions do both."""

Arguments = Mapping[str, Any]
Recorded = Mapping[str, list[Tensor]]
"""Gating function → its outputs in this block."""

_TOLERANCE = 1e-6
_RWKV7_STEEPEST = -math.exp(-0.5)


@dataclass(frozen=True, slots=True, eq=False)
class KernelRecord:
    """One call of a kernel function.

    Attributes:
        function: its name.
        arguments: what it was called with, by parameter name, defaults included: references to the
            model's own tensors.
        result: what it gave back.
    """

    function: str
    arguments: Arguments
    result: Any


@dataclass(frozen=True, slots=True)
class KernelGate:
    """One gate among the arguments of one kernel function.

    Attributes:
        read: arguments → the stored tensor, still with the kernel's axes.
        axis: its axis of tokens; axis 0 is the batch. None for a parameter.
        function: arguments and recorded outputs → the function that the probe proves, or "" where
            none reproduces a value that the model computed.
    """

    name: str
    kind: GateKind
    formula: str
    read: Callable[[Arguments], Tensor]
    axis: int | None
    function: Callable[[Arguments, Recorded], str]
    range: tuple[float, float]
    rate: str = ""


def is_recorded(values: Tensor, outputs: Iterable[Tensor], tolerance: float = _TOLERANCE) -> bool:
    """Whether every value is, within the tolerance, among the numbers that functions gave."""
    outputs = [output for output in outputs if output.is_floating_point()]
    if not outputs or not values.numel():
        return False
    for output in outputs:
        # Nearly always the very same computation: sorting millions of decays is for the rest.
        alike = output.shape == values.shape and output.dtype == values.dtype
        if alike and torch.equal(output, values):
            return True
    held = [output.detach().double().flatten().cpu() for output in outputs]
    table = torch.cat(held).sort().values
    wanted = values.detach().double().flatten().cpu()
    after = torch.searchsorted(table, wanted).clamp(0, table.numel() - 1)
    nearest = torch.minimum(
        (table[after] - wanted).abs(), (table[(after - 1).clamp(0)] - wanted).abs()
    )
    return bool((nearest <= tolerance * wanted.abs().clamp(min=1.0)).all())


def _softplus_step(args: Arguments, bias_name: str, flag: str, *, channels_first: bool) -> Tensor:
    dt: Tensor = args["dt"]
    bias = args.get(bias_name)
    if bias is not None:
        bias = bias.to(dt.dtype)
        dt = dt + (bias[..., None] if channels_first else bias)
    return F.softplus(dt) if args.get(flag) else dt


def scan_step(args: Arguments) -> Tensor:
    """dt of a selective scan as it uses it: [batch, channels, seq]."""
    return _softplus_step(args, "delta_bias", "delta_softplus", channels_first=True)


def chunk_step(args: Arguments) -> Tensor:
    """dt of a chunked scan as it uses it: [batch, seq, heads]."""
    dt = _softplus_step(args, "dt_bias", "dt_softplus", channels_first=False)
    low, high = args["dt_limit"]
    return torch.clamp(dt, min=low, max=high)


def _rate(args: Arguments) -> Tensor:
    rate: Tensor = args["A"]
    return rate


def _log_decay(args: Arguments) -> Tensor:
    decay: Tensor = args["g"]
    return decay


def _beta(args: Arguments) -> Tensor:
    beta: Tensor = args["beta"]
    return beta


def _is_step(read: Callable[[Arguments], Tensor]) -> Callable[[Arguments, Recorded], str]:
    def proven(args: Arguments, recorded: Recorded) -> str:
        given = recorded.get("softplus", [])
        low, high = args.get("dt_limit") or (0.0, math.inf)
        clamped = [torch.clamp(output, min=low, max=high) for output in given]
        return "step" if is_recorded(read(args), clamped) else ""

    return proven


def _is_scan_decay(args: Arguments, recorded: Recorded) -> str:
    exponent = scan_step(args)[:, :, :, None] * args["A"][None, :, None, :]
    return "step_decay" if is_recorded(torch.exp(exponent), recorded.get("exp", [])) else ""


def _is_chunk_decay(args: Arguments, recorded: Recorded) -> str:
    log = args["A"].float() * chunk_step(args).float()
    return "step_decay" if _spans(log, args, recorded) else ""


def _is_log_decay(args: Arguments, recorded: Recorded) -> str:
    return "log_decay" if _spans(args["g"].float(), args, recorded) else ""


def _spans(log: Tensor, args: Arguments, recorded: Recorded) -> bool:
    """Whether the products of decays over the first chunk are what the kernel computed."""
    first = log[:, : int(args["chunk_size"])]
    return is_recorded(torch.exp(first.cumsum(1)), recorded.get("exp", []))


def _is_beta(args: Arguments, recorded: Recorded) -> str:
    given = recorded.get("sigmoid", [])
    if is_recorded(args["beta"], given):
        return "unit"
    return "doubled" if is_recorded(args["beta"] / 2, given) else ""


def _is_parameter(_args: Arguments, _recorded: Recorded) -> str:
    return "identity"


def _is_time_decay(args: Arguments, recorded: Recorded) -> str:
    return "log_decay" if is_recorded(-_time_decay(args), recorded.get("exp", [])) else ""


def _time_decay(args: Arguments) -> Tensor:
    return -torch.exp(args["time_decay"])


def _rwkv7_decay(args: Arguments) -> Tensor:
    decay: Tensor = args["log_w"]
    return decay


def _is_rwkv7_decay(args: Arguments, recorded: Recorded) -> str:
    given = recorded.get("sigmoid", [])
    return "log_decay" if is_recorded(args["log_w"] / _RWKV7_STEEPEST, given) else ""


_INF = math.inf
_A = KernelGate("mixer.rate", "linear", "A = −exp(A_log)", _rate, None, _is_parameter, (-_INF, 0.0))
_DELTA = (
    KernelGate(
        "mixer.decay", "decay", "exp(g)", _log_decay, 1, _is_log_decay, (0.0, 1.0)
    ),
    KernelGate("mixer.beta", "sigmoid", "σ(b)", _beta, 1, _is_beta, (0.0, 1.0)),
)  # fmt: skip

KERNEL_GATES: Mapping[str, tuple[KernelGate, ...]] = {
    "mamba_selective_scan": (
        _A,
        KernelGate(
            "mixer.dt", "step", "softplus(dt + bias)", scan_step, 2, _is_step(scan_step),
            (0.0, _INF), rate="mixer.rate",
        ),
        KernelGate(
            "mixer.decay", "decay", "exp(dt·A)", scan_step, 2, _is_scan_decay,
            (0.0, 1.0), rate="mixer.rate",
        ),
    ),
    "mamba2_chunk_scan": (
        _A,
        KernelGate(
            "mixer.dt", "step", "clamp(softplus(dt + bias))", chunk_step, 1,
            _is_step(chunk_step), (0.0, _INF), rate="mixer.rate",
        ),
        KernelGate(
            "mixer.decay", "decay", "exp(dt·A)", chunk_step, 1, _is_chunk_decay,
            (0.0, 1.0), rate="mixer.rate",
        ),
    ),
    "torch_chunk_gated_delta_rule": _DELTA,
    "chunk_kimi_delta_attention": _DELTA,
    "rwkv_linear_attention": (
        KernelGate(
            "mixer.decay", "decay", "exp(−exp(w))", _time_decay, None, _is_time_decay, (0.0, 1.0)
        ),
    ),
    "rwkv7_attention": (
        KernelGate(
            "mixer.decay", "decay", "exp(−e^−½·σ(w))", _rwkv7_decay, 1, _is_rwkv7_decay,
            (math.exp(_RWKV7_STEEPEST), 1.0),
        ),
    ),
}  # fmt: skip
"""Kernel function → the gates among its arguments."""
