"""A token's write to a recurrent state, taken away: what a recurrence is given instead.

The state after the token is then exactly the decayed state before it. What a token reads of its own
write goes with it; a skip around the recurrence (Mamba's D) and a convolution before it stay.

Source: as `trilens.models.gates.effective`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trilens.errors import EditError
from trilens.models.gates.rglru import rglru_terms

__all__ = ["WRITES", "Write", "unit_writes", "without_writes"]

# Above what an empty state of RWKV-4 has as its maximum (−1e38, or −1e30 in a cache): a text whose
# first token writes nothing is read as that token alone, not as 0 / 0.
_NOTHING = -1e30


@dataclass(frozen=True, slots=True)
class Write:
    """How the write of a token is taken away.

    Attributes:
        arguments: those that are replaced at the token → their axis of tokens; None where the
            function is called with one token and has no such axis. Axis 0 is the batch.
        fill: what stands there instead.
        why: why nothing else of the token goes with it.
        change: of a recurrence whose arguments have another form: the argument with the tokens'
            writes taken away, of what is given and the tokens [batch, seq].
    """

    arguments: Mapping[str, int | None]
    why: str
    fill: float = 0.0
    change: Callable[[Mapping[str, Any], Tensor], dict[str, Tensor]] | None = None


def _lightning(given: Mapping[str, Any], cut: Tensor) -> dict[str, Tensor]:
    mixer: nn.Module = given["module"]
    whole: Tensor = given["output"]
    batch, seq, width = whole.shape
    heads = mixer.get_buffer("slope_rate").numel()
    # The mixer's own layout: queries, keys and values stand together head by head.
    parts = whole.view(batch, seq, heads, 3, width // heads // 3)
    keys = torch.zeros_like(cut)[..., None, None, None].repeat(1, 1, 1, 3, 1)
    keys[..., 1, :] = cut[..., None, None]
    return {"output": parts.masked_fill(keys, 0).view(batch, seq, width)}


_DELTA = Write({"beta": 1}, "β scales the write and the removal, not the decay exp(g)")

WRITES: Mapping[str, Write] = {
    "mamba_selective_scan": Write({"B": 2}, "dt also decays, and x also passes by the skip D"),
    "mamba_selective_state_update": Write({"B": None}, "as in the scan"),
    "mamba2_chunk_scan": Write({"B": 1}, "dt also decays, and x also passes by the skip D"),
    "mamba2_selective_state_update": Write({"B": None}, "as in the scan"),
    "torch_chunk_gated_delta_rule": _DELTA,
    "torch_recurrent_gated_delta_rule": _DELTA,
    "chunk_kimi_delta_attention": _DELTA,
    "recurrent_kimi_delta_attention": _DELTA,
    "rwkv7_attention": Write({"k": 1, "b": 1}, "k vᵀ writes and b aᵀ removes; w alone decays"),
    "rwkv_linear_attention": Write(
        {"key": 1}, "exp(k) weighs the write; at k = −1e30 that is 0", fill=_NOTHING
    ),
    "mlstm": Write({"key": 2}, "the gates also scale the state: they stay"),
    "lightning_attention": Write({}, "k vᵀ is the write", change=_lightning),
}
"""Kernel function of prefill or decoding, or recurrence with a boundary → its write.

RG-LRU is not among them: what it writes also makes its decay, so that no argument can be replaced;
`unit_writes` says by how much its output has to change.
"""


def without_writes(function: str, arguments: Mapping[str, Any], cut: Tensor) -> dict[str, Any]:
    """Arguments with which the recurrence gets no write of the given tokens; new tensors only.

    Args:
        function: a key of `WRITES`.
        arguments: what the recurrence is called with, by parameter name.
        cut: the tokens that write nothing, on any device.

    Shapes
        cut [batch, seq]

    Raises:
        EditError: a function that is not known, or arguments of another number of tokens.
    """
    write = WRITES.get(function)
    if write is None:
        raise EditError(
            f"what a token writes into the state of {function} is not known; known are "
            f"{', '.join(WRITES)}"
        )
    made = dict(arguments)
    if write.change is not None:
        made |= write.change(arguments, cut.to(arguments["output"].device))
    for name, axis in write.arguments.items():
        tensor: Tensor = arguments[name]
        seq = 1 if axis is None else tensor.shape[axis]
        if (tensor.shape[0], seq) != tuple(cut.shape):
            raise EditError(
                f"{function} was called with {name} of {tensor.shape[0]} × {seq} tokens in a pass "
                f"of {cut.shape[0]} × {cut.shape[1]}: its writes cannot be edited there"
            )
        shape = [1] * tensor.dim()
        shape[0] = cut.shape[0]
        if axis is not None:
            shape[axis] = seq
        fill = max(write.fill, torch.finfo(tensor.dtype).min)
        made[name] = tensor.masked_fill(cut.to(tensor.device).view(shape), fill)
    return made


def unit_writes(unit: nn.Module, x: Tensor, position_ids: Tensor, cut: Tensor) -> Tensor:
    """What the given tokens wrote into an RG-LRU's state, as it stands after each token.

    The unit is linear in what it writes: its output without these writes is what it gave minus
    this, and so is the state after the last token.

    Shapes
        x and the result [batch, seq, width]; position_ids [1 or batch, seq]; cut [batch, seq]
    """
    log_w, strength = rglru_terms(unit, x, position_ids)
    writes = strength * x.float() * cut.to(x.device)[..., None]
    held, found = torch.zeros_like(writes[:, 0]), []
    for decay, write in zip(log_w.exp().unbind(1), writes.unbind(1), strict=True):
        held = decay * held + write
        found.append(held)
    return torch.stack(found, dim=1)
