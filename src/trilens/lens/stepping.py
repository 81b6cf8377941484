"""Whether a model's decoding steps give what it gives for the whole text: measured on a probe."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from trilens.errors import GenerationError, NonFiniteError, TrilensError
from trilens.io.messages import reason
from trilens.io.short_memory import is_short_of_memory
from trilens.models.forward_call import probe_ids

__all__ = ["StepSafety", "deviation"]

_PROBE_KINDS = 7
_STEPS = 4
_ALLOWED = 1e-4
_ROUNDINGS = 16
"""Roundings of a narrower dtype by which the logits of a step may differ."""

BySteps = Callable[[Tensor, int], Tensor]
"""From ids [seq] and the tokens of their prompt to the logits [seq, vocab]."""
AtOnce = Callable[[Tensor], Tensor]
"""From ids [seq] to the logits [seq, vocab] of one pass."""


@dataclass(slots=True)
class StepSafety:
    """Whether decoding step by step equals reading the text at once.

    It is measured once for each doubling of the length: sparse attention and windows begin to
    matter only when a text is longer than they are.

    Attributes:
        checked: tokens of the longest text that was measured.
        refusal: why the model can't be generated from, "" where nothing speaks against it.
    """

    checked: int = 0
    refusal: str = ""

    def check(
        self,
        tokens: int,
        model: PreTrainedModel,
        vocab: int,
        most: int | None,
        *,
        by_steps: BySteps,
        at_once: AtOnce,
    ) -> None:
        """Measure for a text of so many tokens, of a model that takes `most` at most.

        Args:
            tokens: prompt and new ones.
            model: the model.
            vocab: ids that it reads.
            most: the most tokens that it takes, None for any number.
            by_steps: logits of the prompt's pass, then of one step for each token after it.
            at_once: logits of one pass.

        Raises:
            GenerationError: the model fails in a step, or what it gives there differs.
        """
        length = 1 << max(4, (tokens - 1).bit_length())
        length = max(length if most is None else min(length, most), 2)
        if not self.refusal and length > self.checked:
            # Few kinds of tokens: a sparse attention that breaks ties by place shows only there.
            ids = probe_ids(model, vocab, length, seed=length, kinds=_PROBE_KINDS)[0].cpu()
            self.refusal = _measure(ids, model, by_steps, at_once)
            self.checked = length
        if self.refusal:
            raise GenerationError(self.refusal)


def _measure(ids: Tensor, model: PreTrainedModel, by_steps: BySteps, at_once: AtOnce) -> str:
    """Why the model can't be generated from, "" where it can."""
    name, prompt = type(model).__name__, max(1, len(ids) - _STEPS)
    try:
        whole = at_once(ids)
        if int(ids.max()) >= whole.shape[-1]:
            # A model may read more ids than it can give: padding of its embedding.
            ids = ids % whole.shape[-1]
            whole = at_once(ids)
        steps = by_steps(ids, prompt)
    except TrilensError as error:
        return str(error)
    # The model's own code, on plain tokens: whatever it raises, it does not generate.
    except Exception as error:
        if is_short_of_memory(error):
            raise
        return (
            f"{name} does not generate: a plain prompt of {prompt} tokens fails "
            f"({reason(error)}); capture texts with lens.capture"
        )
    # −Inf is what a model may give tokens that it never chooses.
    if not bool((whole < math.inf).all()):
        raise NonFiniteError(
            f"{name} gives NaN or Inf for a token on plain tokens: it cannot choose the next one"
        )
    off, allowed = deviation(steps[prompt:], whole[prompt:]), _tolerance(model.dtype)
    # Not off > allowed: a NaN proves nothing.
    if off <= allowed:
        return ""
    return (
        f"the decoding steps of {name} do not give what it gives for the whole text: the "
        f"logits of a probe of {len(ids)} tokens differ by {off:.2g} ({allowed:.0e} is "
        "allowed), so that what a step shows is not what a capture shows; generate with "
        "model.generate, and capture the text with lens.capture"
    )


def deviation(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference of any row, relative to the largest value of all of them."""
    left, right = ours.double(), theirs.double()
    return float((left - right).abs().max() / right.abs().max().clamp(min=1e-30))


def _tolerance(dtype: torch.dtype) -> float:
    eps = torch.finfo(dtype).eps
    return max(_ALLOWED, _ROUNDINGS * eps) if eps > torch.finfo(torch.float32).eps else _ALLOWED
