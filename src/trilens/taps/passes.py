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
from trilens.taps.session import recording_of

__all__ = ["run_pass"]


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
    encoded = getattr(output, "encoder_last_hidden_state", None)
    recording.source = encoded.shape[1] if isinstance(encoded, Tensor) else None
    if recording.cross and recording.source is None:
        # What text attends to beside itself need not come out of the model.
        recording.source = next(iter(recording.cross.values())).key.shape[-2]
    return recording
