"""The residual stream before the final norm as a sum: where it starts, and what each layer adds."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from trilens.caches.activation import ActivationCache
from trilens.errors import CaptureError, NotStoredError
from trilens.lens.capture import Capture
from trilens.lens.lens import Lens

__all__ = ["ADDS", "StreamParts", "last_residual", "stream_parts"]

ADDS = ("attn.add", "cross.add", "mlp.add", "mixer.add")
"""The sites of what a layer adds."""


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class StreamParts:
    """residual = start + everything that is added + rounding, at one position.

    Attributes:
        residual: [d_model], the last layer's, in the model's dtype.
        start: float64 [d_model].
        adds: (site, layer, [d_model] in the model's dtype), in the model's order.
        rounding: float64 [d_model], what the model's dtype loses between its layers.
        notes: what to know, in words.
    """

    residual: Tensor
    start: Tensor
    adds: list[tuple[str, int, Tensor]]
    rounding: Tensor
    notes: list[str]


def stream_parts(cap: Capture, lens: Lens, position: int) -> StreamParts:
    """The parts of the last layer's residual stream.

    Args:
        cap: with resid_pre of layer 0, every proven site of `ADDS`, and the residual stream.
        lens: the model that it is of.
        position: from 0.

    Raises:
        NotStoredError: no residual stream after the last layer at this position.
        CaptureError: the parts do not sum to it.
    """
    x = last_residual(cap, lens, position)
    adds = [
        (name, layer, cap.sites[name, layer][position])
        for layer in range(lens.n_layers)
        for name in ADDS
        if (name, layer) in lens.sites.sites
    ]
    start, notes = _start(cap, lens, x, adds, position)
    lost = _rounding(x, [start, *(add.to(x.device).double() for *_, add in adds)])
    return StreamParts(residual=x, start=start, adds=adds, rounding=lost, notes=notes)


def _start(
    cap: Capture, lens: Lens, x: Tensor, adds: list[tuple[str, int, Tensor]], at: int
) -> tuple[Tensor, list[str]]:
    """What the first layer adds to: its input, or what a norm of its own makes of it (RWKV)."""
    start = cap.sites["resid_pre", 0][at].to(x.device).double()
    after = _residual(cap, 0, at)
    if after is None or lens.n_layers == 1:
        return start, []
    own = [add.to(x.device).double() for _, layer, add in adds if layer == 0]
    after = after.to(x.device)
    if _lost(after, [start, *own])[1]:
        return start, []
    made = after.double() - torch.stack(own).sum(0)
    return made, ["layer 0 changes its input before it adds to it: embed is what it makes of it"]


def _residual(cap: Capture, layer: int, at: int) -> Tensor | None:
    if cap.has("residual") and layer in cap.residual.layers:
        value = cap.residual[layer]
        if not isinstance(cap.residual, ActivationCache):
            return value[at]
        if at == len(cap.token_ids) - 1:
            return value
    if cap.has("sites") and "resid_post" in cap.sites.names:
        return cap.sites["resid_post", layer][at] if ("resid_post", layer) in cap.sites else None
    return None


def last_residual(cap: Capture, lens: Lens, at: int) -> Tensor:
    """The residual behind the last block at one position: [d_model], or [streams, d_model].

    Raises:
        NotStoredError: it was not captured.
    """
    last = lens.n_layers - 1
    found = _residual(cap, last, at)
    if found is None:
        raise NotStoredError(
            f"the residual stream after layer {last} at position {at} was not captured: capture "
            "with residual='all', or 'last' for the last position"
        )
    return found


def _lost(x: Tensor, parts: list[Tensor]) -> tuple[Tensor, bool, float]:
    """What the parts' sum lacks, whether their dtype's rounding explains it, and what that is."""
    stacked = torch.stack(parts)
    lost = x.double() - stacked.sum(0)
    bound = len(parts) * torch.finfo(x.dtype).eps * float(stacked.cumsum(0).abs().amax())
    return lost, float(lost.abs().max()) <= bound, bound


def _rounding(x: Tensor, parts: list[Tensor]) -> Tensor:
    lost, explained, bound = _lost(x, parts)
    if not explained:
        raise CaptureError(
            f"the parts do not sum to the last residual stream: off by "
            f"{float(lost.abs().max()):.3g} of {float(x.abs().max()):.3g}, rounding explains "
            f"{bound:.2g}; norms or factors stand on the stream itself, as in models with norms "
            "after each sum (BERT), so that no part has a logit of its own"
        )
    return lost
