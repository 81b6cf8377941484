"""What a calibration costs, told before it starts: tokens × weights, and an estimate of the time.

Counted are the operations of every pass over the text, of the moments and of coding; the rate is
that of a float32 product measured at once, and of a bfloat16 one where trits move on a machine that
gains by it. Text is written token by token, which costs each layer a time of its own beside them.
It is an estimate: other work on the machine is not foreseen, nor a model whose gradients bfloat16
changes, which stays in float32.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch

from trilens.checkpoint.calibration.chain import runs_in_one_graph
from trilens.checkpoint.calibration.device import find_device, multiplies_bfloat16
from trilens.checkpoint.calibration.effort import find_effort
from trilens.checkpoint.calibration.options import Calibration, block_length
from trilens.checkpoint.calibration.own_text import ROWS_AT_ONCE, check_writes
from trilens.checkpoint.evaluate import NEW_TOKENS
from trilens.checkpoint.job import Job
from trilens.models.forward_call import text_config
from trilens.models.positions import configured_positions
from trilens.results import Tabular
from trilens.ternary.calibrated.rules import CALIBRATED_RULES

__all__ = ["CalibrationCost", "cost_of"]

_CODING = 24  # operations for each row · cols² of `gptq`: twelve products of float32
_DESCENT = 96  # likewise, of the alternating minimisation of scales and trits
_REACHED = 0.4  # of the measured rate, in a model's passes
_STEP_SECONDS = 3e-3  # of each layer, for each token that is written: small products, and calls
_PROBE = 768  # rows of the product that is timed


@dataclass(frozen=True, slots=True)
class CalibrationCost(Tabular):
    """What a calibration is going to take.

    Attributes:
        effort: Its word.
        tokens: To calibrate on, at most.
        written_tokens: Tokens that the model writes itself, some of them to measure on.
        evaluation_tokens: To measure on, at most.
        weights: Of the model.
        operations: For each part of the work, multiplications and additions.
        seconds: All of them at the rates of this machine now, and the steps of writing text.
    """

    effort: str
    tokens: int
    written_tokens: int
    evaluation_tokens: int
    weights: int
    operations: dict[str, float]
    seconds: float

    @property
    def sentence(self) -> str:
        """The cost in words."""
        own = (
            f", {self.written_tokens:,} of them written by the model itself"
            if self.written_tokens
            else ""
        )
        return (
            f"calibration, effort {self.effort}: {self.tokens + self.evaluation_tokens:,} tokens"
            f"{own} × {self.weights:,} weights, {sum(self.operations.values()):.1e} operations: "
            f"about {_duration(self.seconds)} on this machine"
        )

    def table(self) -> list[dict[str, Any]]:
        """A row for each part of the work."""
        return [{"part": part, "operations": n} for part, n in self.operations.items()]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "effort": self.effort,
            "tokens": self.tokens,
            "written_tokens": self.written_tokens,
            "evaluation_tokens": self.evaluation_tokens,
            "weights": self.weights,
            "operations": self.operations,
            "seconds": self.seconds,
        }


def cost_of(job: Job, calibration: Calibration, *, rate: float | None = None) -> CalibrationCost:
    """What a calibration of a checkpoint is going to take.

    Args:
        job: the checkpoint, and the plan.
        calibration: the text and the effort.
        rate: operations in a second, of every part; None: products are timed.

    Raises:
        GenerationError: the model is to write its own text, and writes none.
    """
    if calibration.own_text is not None:
        check_writes(job.model)
    weights = sum(math.prod(header.shape) for header in job.headers.values())
    fit = find_effort(calibration.effort).fit
    length = block_length(calibration, configured_positions(job.source.config))
    rows, apart = calibration.own_rows(length)
    tokens = calibration.budget
    named = len(calibration.samples) + bool(calibration.documents and not calibration.samples)
    measured = apart * length + named * calibration.evaluation_tokens
    coding = moments = 0.0
    matrices = [
        (rule, header)
        for choice, header in job.pairs
        if choice.storage != "kept" and len(header.shape) >= 2
        if (rule := CALIBRATED_RULES.get(job.plan.of(choice.name).rule)) is not None
    ]
    rules = {rule for rule, _ in matrices}
    first = tokens  # what blocks are coded on
    if any(rule.fits_whole for rule in rules) and fit.block_tokens is not None:
        first = min(tokens, fit.block_tokens)
    once = 2.0 * weights * tokens
    coded = 2.0 * weights * first
    parts = {
        "writing the text": 2.0 * weights * (rows + apart) * length,
        "dense and ternary passes": once + coded + 4.0 * weights * measured,
    }
    for rule, header in matrices:
        cols = header.shape[-1]
        # Half of H is computed, and matrices that read one input share it.
        moments += 1.0 * (first + measured) * cols**2
        coding += math.prod(header.shape) * cols * (_CODING + _DESCENT * rule.refined)
    if rules:
        # What the dense model gives is seen in passes of its own, and multiplied by the inputs.
        parts |= {"moments": moments + coded * 3 * any(rule.corrected for rule in rules)}
    parts |= {"coding": coding}
    if any(rule.fits_block for rule in rules):
        parts["fit of each block"] = 3 * fit.passes * coded
    moving = 0.0  # while trits do
    if any(rule.fits_whole for rule in rules):
        # Backward is two passes; where blocks run one by one, each runs forward twice.
        step = (3 if runs_in_one_graph(_block_weights(job.model)) else 4) * once
        moving = fit.trit_passes * step
        parts["fit of all blocks"] = fit.whole_passes * step + moving
    parts = {name: operations for name, operations in parts.items() if operations}
    total = sum(parts.values())
    seconds = total / rate if rate else _seconds(total, moving, find_device(calibration.device))
    steps = math.ceil((rows + apart) / ROWS_AT_ONCE) * length
    steps += 2 * NEW_TOKENS * (named + bool(apart))
    seconds += _STEP_SECONDS * steps * text_config(job.model).num_hidden_layers
    return CalibrationCost(
        calibration.effort,
        tokens,
        (rows + apart) * length,
        measured,
        weights,
        parts,
        seconds,
    )


def _block_weights(model: Any) -> int:
    """Parameters but those of the embeddings and of the head."""
    outside = {
        id(parameter)
        for module in (model.get_input_embeddings(), model.get_output_embeddings())
        if module is not None
        for parameter in module.parameters()
    }
    return sum(p.numel() for p in model.parameters() if id(p) not in outside)


def _seconds(operations: float, moving: float, device: torch.device) -> float:
    """Of operations, those while trits move among them: they may be rounded."""
    rate = _measured_rate(torch.float32, device)
    seconds = operations / (_REACHED * rate)
    if moving and multiplies_bfloat16(device):
        # Products alone are faster, not what stands between them.
        seconds += moving * (1 / _measured_rate(torch.bfloat16, device) - 1 / rate)
    return seconds


def _measured_rate(dtype: torch.dtype, device: torch.device) -> float:
    """Operations in a second of a product."""
    one = torch.ones(_PROBE, _PROBE, dtype=dtype, device=device)
    best = math.inf
    for _ in range(4):  # the first is slow
        began = perf_counter()
        float((one @ one)[0, 0])  # a device is waited for
        best = min(best, perf_counter() - began)
    return 2 * _PROBE**3 / max(best, 1e-9)


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    if seconds < 5400:
        return f"{round(seconds / 60)} min"
    return f"{seconds / 3600:.1f} h"
