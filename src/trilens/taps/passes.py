"""One forward pass, run for what a capture asks of it."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from trilens.models.anatomy import Anatomy
from trilens.taps.edits import Compiled
from trilens.taps.mode import evaluating, frozen
from trilens.taps.recording import CaptureRequest, Recording
from trilens.taps.registry import AttentionCall
from trilens.taps.session import recording_of

__all__ = ["run_pass", "source_positions"]


def run_pass(
    model: nn.Module,
    anatomy: Anatomy,
    wanted: CaptureRequest,
    arguments: Mapping[str, Any],
    edits: Compiled | None = None,
) -> Recording:
    """Run a model once and give what the pass left behind.

    A model that writes into tensors it has handed on is run again, and what it hands on is copied:
    `request.copy` of the recording says so.

    Args:
        model: the model.
        anatomy: its parts.
        wanted: what the pass is to leave behind.
        arguments: of the model's forward.
        edits: made ready for these prompts.

    Raises:
        SilentSiteError, CaptureError: as `recording_of`.
    """
    with (
        evaluating(model),
        frozen(model) if wanted.gradients else nullcontext(),
        torch.inference_mode(False),
        torch.set_grad_enabled(wanted.gradients),
        recording_of(model, anatomy, wanted, edits) as recording,
    ):
        output = model(**arguments)
    if recording.overwritten:
        return run_pass(model, anatomy, replace(wanted, copy=True), arguments, edits)
    logits = getattr(output, "logits", None)
    recording.logits = logits if isinstance(logits, Tensor) else None
    recording.source = source_positions(output, recording.cross)
    return recording


def source_positions(output: Any, cross: Mapping[int, AttentionCall]) -> int | None:
    """How many positions a source has, by what a pass gave; None where there is no source.

    Args:
        output: of the model's forward.
        cross: the calls of cross attention in it.
    """
    encoded = getattr(output, "encoder_last_hidden_state", None)
    if isinstance(encoded, Tensor):
        return encoded.shape[1]
    # What text attends to beside itself need not come out of the model.
    return next((call.key.shape[-2] for call in cross.values()), None)
