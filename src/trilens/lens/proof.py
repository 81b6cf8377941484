"""The checks that a model must pass before anything of it is shown.

One short probe is run under hooks on every module; the anatomy and the gates are read off it by
rule, with the facts that prove them. The probe must leave the model as it was.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from trilens.errors import AnatomyError, TrilensError, UsageError
from trilens.models.anatomy import Anatomy, find_anatomy
from trilens.models.forward_call import (
    config_numbers,
    forward_arguments,
    probe_ids,
    text_config,
)
from trilens.models.gates.claims import GateClaims, find_gates
from trilens.models.offload import unfilled
from trilens.models.trace import Trace
from trilens.taps.mode import evaluating, unchanged
from trilens.taps.recorder import record

__all__ = ["PROBE_TOKENS", "Proof", "prove"]

PROBE_TOKENS = 11
"""Tokens in the probe: odd and small, so that no other axis of a model is likely to equal it."""


@dataclass(frozen=True, slots=True)
class Proof:
    """What a probe proved of a model."""

    anatomy: Anatomy
    gates: GateClaims


def prove(model: PreTrainedModel, vocab: int) -> Proof:
    """Probe a model and prove its anatomy and gates.

    Args:
        model: any transformers language model.
        vocab: rows of the input embedding.

    Raises:
        UsageError: a weight is not in memory, and nothing brings it there.
        AnatomyError: what could not be proven, with the facts that failed.
    """
    missing = unfilled(model)
    if missing is not None:
        raise UsageError(
            f"{missing} is on the meta device, and no hook brings it into memory: the model has no "
            "such weight to compute with; load it onto a device, or dispatch it with accelerate"
        )
    axes = {value for value in config_numbers(model) if value == int(value)}
    seq = next(n for n in (PROBE_TOKENS, 13, 17, 19, 23) if n not in axes or n == 23)
    ids = probe_ids(model, vocab, seq)
    with unchanged(model) as whole, evaluating(model):
        try:
            trace, events = record(model, seq, lambda: model(**forward_arguments(model, ids, None)))
        except TrilensError:
            raise
        except Exception as error:
            raise AnatomyError(
                f"{type(model).__name__} does not run on a plain prompt of {seq} tokens: "
                f"{type(error).__name__}: {_first_line(error)}{_way_out(model)}"
            ) from error
        if not whole():
            raise AnatomyError(
                f"{type(model).__name__} rebuilds its own modules for a short prompt, so that two "
                "prompts need not run the same model; load it with one fixed kind of attention"
            )
    _check_numbers(trace)
    _check_head(model, trace, vocab)
    width = getattr(text_config(model), "hidden_size", None)
    anatomy = find_anatomy(trace, constants=config_numbers(model), width=width)
    with torch.no_grad():
        return Proof(anatomy, find_gates(trace, events, anatomy))


def _check_numbers(trace: Trace) -> None:
    """Refuse a model that gives NaN on a plain prompt, and say where it begins."""
    if trace.logits is None or not bool(trace.logits.isnan().any()):
        return
    # Calls end from the inside out: the first to end with NaN is where it began.
    for call in sorted(trace.calls, key=lambda call: call.end):
        if any(bool(t.isnan().any()) for t in call.outputs if t.is_floating_point()):
            raise AnatomyError(
                f"the model gives NaN on a plain prompt, first in {call.path or 'itself'}: check "
                "its weights, or load it in another dtype"
            )


def _check_head(model: PreTrainedModel, trace: Trace, vocab: int) -> None:
    """Refuse a head that does not score the vocabulary at every token."""
    if trace.logits is None:
        return
    shape = tuple(trace.logits.shape)
    if len(shape) != 3 or shape[:2] != (1, trace.seq) or 2 * shape[2] < vocab:
        raise AnatomyError(
            f"{type(model).__name__} gives scores [{', '.join(map(str, shape))}] for {trace.seq} "
            f"tokens, not one over the vocabulary ({vocab}) for each: load it as a causal LM, a "
            "masked LM or a bare encoder"
        )


def _way_out(model: PreTrainedModel) -> str:
    key = getattr(model.config, "_attn_implementation", None)
    known = key in (None, "sdpa", "eager")
    return "" if known else f" (attention {key!r}: load with attn_implementation='sdpa')"


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0][:200]
