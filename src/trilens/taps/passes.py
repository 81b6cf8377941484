"""One forward pass, run for what a capture asks of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from trilens.models.anatomy import Anatomy
from trilens.taps.mode import evaluating
from trilens.taps.session import CaptureRequest, Recording, recording_of

__all__ = ["run_pass"]


def run_pass(
    model: nn.Module, anatomy: Anatomy, wanted: CaptureRequest, arguments: Mapping[str, Any]
) -> Recording:
    """Run a model once and give what the pass left behind.

    A model that writes into tensors it has handed on is run again, and what it hands on is copied:
    `request.copy` of the recording says so.

    Raises:
        SilentSiteError, CaptureError: as `recording_of`.
    """
    with (
        evaluating(model),
        torch.inference_mode(False),
        torch.no_grad(),
        recording_of(model, anatomy, wanted) as recording,
    ):
        output = model(**arguments)
    if recording.overwritten:
        return run_pass(model, anatomy, replace(wanted, copy=True), arguments)
    logits = getattr(output, "logits", None)
    recording.logits = logits if isinstance(logits, Tensor) else None
    return recording
