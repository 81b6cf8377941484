"""Sites that a model has once: the token embedding and the final norm."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from trilens.models.anatomy import Anatomy
from trilens.models.gates.site import layout_of
from trilens.models.logit_relation import relate
from trilens.models.sites.found import Found
from trilens.models.sites.site import Tap
from trilens.models.trace import ModuleCall, Trace

__all__ = ["find_model_sites"]


def find_model_sites(trace: Trace, anatomy: Anatomy, first: int) -> Found:
    """Claim embed and final_norm.

    Args:
        trace: the probe.
        anatomy: the model's parts.
        first: tick at which the first block began.
    """
    found = Found(None)
    _claim_embedding(trace, anatomy, first, found)
    _claim_norm(trace, anatomy, found)
    return found


def _claim_embedding(trace: Trace, anatomy: Anatomy, first: int, found: Found) -> None:
    ids = next((t for call in trace.calls[:1] for t in call.read if _is_ids(t, trace.seq)), None)
    if ids is None:
        found.refuse(("embed",), "the model is given no token ids")
        return
    for call in trace.calls:
        if call.start > first or any(True for _ in call.module.children()):
            continue
        if not any(_is_ids(t, trace.seq) and torch.equal(t.flatten(), ids.flatten())
                   for t in call.read):  # fmt: skip
            continue
        if not _gives_rows(call, ids):
            continue
        y = call.made[0]
        if y.shape[-1] != anatomy.d_model:
            found.refuse(
                ("embed",),
                f"{call.path} embeds tokens in width {y.shape[-1]}, the residual stream has "
                f"{anatomy.d_model}",
            )
            return
        layout = layout_of(y, trace.seq)
        if layout is not None:
            written = y is not call.outputs[0]
            found.claim("embed", Tap("output", call.module), layout, (anatomy.d_model,),
                        overwritten=written)  # fmt: skip
            return
    found.refuse(("embed",), "no module gives a row of its weight for each token before the blocks")


def _is_ids(tensor: Tensor, seq: int) -> bool:
    return not tensor.is_floating_point() and tensor.numel() == seq and tensor.shape[-1] == seq


def _gives_rows(call: ModuleCall, ids: Tensor) -> bool:
    """Whether a module gives its weight's rows of the tokens, up to one factor."""
    weight = getattr(call.module, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 2 or not call.made:
        return False
    y = call.made[0]
    if not y.is_floating_point() or y.numel() != ids.numel() * weight.shape[1]:
        return False
    if int(ids.max()) >= len(weight):
        return False
    if weight.is_meta:
        # Brought into memory for the call alone.
        return isinstance(call.module, nn.Embedding)
    rows = weight.detach()[ids.flatten().to(weight.device)]
    return relate(rows.to(y.device), y.reshape(rows.shape)) is not None


def _claim_norm(trace: Trace, anatomy: Anatomy, found: Found) -> None:
    if not anatomy.final_norm:
        found.refuse(("final_norm",), "the last block's output is the last hidden state")
        return
    path = anatomy.final_norm[-1]
    call = [call for call in trace.calls if call.path == path][-1]
    layout = layout_of(call.made[0], trace.seq)
    if layout is None or call.made[0].shape[-1] != anatomy.d_model:
        found.refuse(("final_norm",), f"{path} gives a tensor {list(call.made[0].shape)}")
        return
    # A model that runs its blocks in rounds normalises after each.
    order = sum(each.path == path and each.start < call.start for each in trace.calls)
    found.claim("final_norm", Tap("output", call.module, order=order), layout, (anatomy.d_model,))
