"""The checks that a model must pass before anything of it is shown.

One short probe is run under hooks on every module; the anatomy and the gates are read off it by
rule, with the facts that prove them. The probe must leave the model as it was.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from trilens.errors import AnatomyError, RecorderError, TrilensError, UsageError
from trilens.io.messages import reason
from trilens.io.short_memory import is_short_of_memory
from trilens.models.anatomy import Anatomy, find_anatomy
from trilens.models.cross_attention import (
    CrossAttention,
    cross_attention,
    source_in,
    without_cross_attention,
)
from trilens.models.forward_call import config_numbers, takes, text_config
from trilens.models.gates.claims import GateClaims, find_gates
from trilens.models.offload import unfilled
from trilens.models.other_lengths import check_lengths
from trilens.models.sites.claims import SiteClaims, find_sites
from trilens.models.source_target import Reading
from trilens.models.stack_probe import probe_of, probe_with
from trilens.models.stacks import Stack
from trilens.models.trace import Trace
from trilens.taps.bystanders import bystanders_of
from trilens.taps.mode import evaluating, unchanged
from trilens.taps.readout import check_readout
from trilens.taps.recorder import record

__all__ = ["Proof", "prove"]


@dataclass(frozen=True, slots=True)
class Proof:
    """What a probe proved of a model.

    Attributes:
        vocab: rows of the input embedding.
        modules: the model's modules when it was proven.
        cross: per layer, its attention to what the encoder made of the source.
        no_cross: of a stack with a source, why other layers have no such attention, in words.
        bystanders: blocks that did not run on the probe, by path.
    """

    anatomy: Anatomy
    gates: GateClaims
    sites: SiteClaims
    vocab: int
    modules: tuple[nn.Module, ...]
    cross: Mapping[int, CrossAttention] = field(default_factory=dict)
    no_cross: Mapping[int, str] = field(default_factory=dict)
    bystanders: Mapping[str, nn.Module] = field(default_factory=dict)

    def is_outdated(self, model: nn.Module, vocab: int) -> bool:
        """Whether the model has other modules than those that were proven, or other tokens.

        Raises:
            UsageError: a weight went to the meta device meanwhile.
        """
        if any(parameter.is_meta for parameter in model.parameters()):
            _check_in_memory(model)
        now = list(model.modules())
        same = len(now) == len(self.modules) and all(map(operator.is_, now, self.modules))
        return not same or vocab != self.vocab


def prove(
    model: PreTrainedModel,
    stack: Stack,
    reading: Reading | None = None,
    inputs: Mapping[str, Any] | None = None,
) -> Proof:
    """Probe a model and prove the anatomy and gates of one of its stacks.

    Args:
        model: what a pass of the stack calls.
        stack: the stack.
        reading: the tokens that it reads; looked up where not given.
        inputs: what it is proven on; made up where not given.

    Raises:
        UsageError: a weight is not in memory, and nothing brings it there.
        AnatomyError: what could not be proven, with the facts that failed.
    """
    _check_in_memory(model)
    reading = reading or Reading.of(model, stack)
    vocab = reading.vocab
    with unchanged(model) as whole, evaluating(model):
        probe = probe_of(model, stack, reading) if inputs is None else probe_with(model, inputs)
        seq, arguments = probe.seq, probe.arguments
        try:
            trace, events = record(model, seq, lambda: model(**arguments))
        except TrilensError:
            raise
        except Exception as error:
            if is_short_of_memory(error):
                raise
            raise _not_run(model, seq, arguments, error) from error
        if not whole():
            raise AnatomyError(
                f"{type(model).__name__} rebuilds its own modules for a short prompt, so that two "
                "prompts need not run the same model; load it with one fixed kind of attention"
            )
    _check_numbers(trace)
    _check_head(model, trace, vocab)
    width = getattr(text_config(model), "hidden_size", None)
    source = probe.source if inputs is None else source_in(trace)
    trace, crossing = without_cross_attention(trace, source)
    anatomy = find_anatomy(trace, constants=config_numbers(model), width=width)
    with evaluating(model):
        check_readout(model, anatomy, trace, vocab)
    if stack.run == "alone":
        check_lengths(trace, anatomy)
    cross, no_cross = cross_attention(trace, crossing, anatomy, source)
    # A layer whose only attention looks at target and source together has none of either.
    other = {layer: why for layer, why in no_cross.items() if layer not in anatomy.attention}
    anatomy = replace(anatomy, other_attention={**other, **anatomy.other_attention})
    with torch.no_grad():
        gates = find_gates(trace, events, anatomy)
        sites = find_sites(trace, events, anatomy, gates)
    unseen = bystanders_of(model, anatomy, trace)
    return Proof(anatomy, gates, sites, vocab, tuple(model.modules()), cross, no_cross, unseen)


def _check_in_memory(model: nn.Module) -> None:
    """Refuse a model with weights that are nowhere: torch computes with memory as it lies.

    Raises:
        UsageError: naming the first of them.
    """
    missing = unfilled(model)
    if missing is not None:
        raise UsageError(
            f"{missing} is on the meta device, and no hook brings it into memory: the model has no "
            "such weight to compute with; load it onto a device, or dispatch it with accelerate"
        )


def _not_run(
    model: PreTrainedModel, seq: int, arguments: Mapping[str, Any], error: Exception
) -> AnatomyError:
    """Whose failure it is: the model's, which then fails without the recorder too, or ours."""
    name = type(model).__name__
    try:
        with torch.no_grad():
            model(**arguments)
    # Whatever the model raises of itself is what its caller has to see.
    except Exception as own:  # noqa: BLE001
        codebooks = getattr(text_config(model), "num_codebooks", None) or 1
        if codebooks > 1:
            return AnatomyError(
                f"{name} reads {codebooks} codebooks of audio at each position, not one token: a "
                f"plain prompt is none for it ({type(own).__name__}: {_first_line(own)})"
            )
        return AnatomyError(
            f"{name} does not run on a plain prompt of {seq} tokens: {type(own).__name__}: "
            f"{_first_line(own)}{_way_out(model)}{_way_in(model)}"
        )
    return RecorderError(
        f"{name} runs, but not while trilens records it: {reason(error)}{_way_out(model)}; this is "
        "a limit of trilens, not of the model"
    )


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


def _way_in(model: PreTrainedModel) -> str:
    """What to do for a model that runs on images alone, or beside them."""
    if not any(takes(model, name) for name in ("pixel_values", "input_features", "input_values")):
        return ""
    return "; where it needs more than text, give Lens(model, probe=processor(…))"


def _way_out(model: PreTrainedModel) -> str:
    key = getattr(model.config, "_attn_implementation", None)
    known = key in (None, "sdpa", "eager")
    return "" if known else f" (attention {key!r}: load with attn_implementation='sdpa')"


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0][:200]
