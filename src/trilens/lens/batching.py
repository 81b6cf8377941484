"""Whether a model lets padding change its rows."""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers import PreTrainedModel

from trilens.lens.capture import Capture
from trilens.models.forward_call import probe_ids
from trilens.models.tokens import Prompt

__all__ = ["BatchSafety", "agree"]

_PROBE_KINDS = 7


class BatchSafety:
    """Whether a model's padded rows equal single prompts; measured once per doubling of length.

    Args:
        run: all residuals and logits of some prompts in one padded pass.
    """

    def __init__(self, run: Callable[[list[Prompt]], list[Capture]]) -> None:
        self._run = run
        self._safe = True
        self._checked = 0

    def up_to(self, tokens: int, model: PreTrainedModel, vocab: int, most: int | None) -> bool:
        """Whether it holds up to so many tokens of a model that takes `most` at most."""
        if self._safe and tokens > self._checked:
            longest = 1 << max(3, (tokens - 1).bit_length())
            longest = min(longest, most or longest)
            lengths = sorted({longest, longest // 2 + 1, 3}, reverse=True)
            # Few kinds of tokens: a sparse attention that breaks ties by place shows only there.
            rows = [probe_ids(model, vocab, n, seed=n, kinds=_PROBE_KINDS) for n in lengths]
            probes = [Prompt(row[0].cpu(), tuple(map(str, row[0].tolist()))) for row in rows]
            alone = [self._run([probe])[0] for probe in probes]
            pairs = zip(self._run(probes), alone, strict=True)
            self._safe = all(agree(a, b, model.dtype) for a, b in pairs)
            self._checked = longest
        return self._safe


def agree(a: Capture, b: Capture, dtype: torch.dtype) -> bool:
    """Whether logits and residuals are equal within 1e-5, or the rounding of the model's dtype."""
    pairs = [(a.logits, b.logits)]
    if a.has("residual") and b.has("residual"):
        pairs += [(a.residual[i], b.residual[i]) for i in a.residual]
    for ours, theirs in pairs:
        if ours is None or theirs is None:
            continue
        # PROMOTE: half-precision rows differ by their own rounding from batch to batch; a residual
        # that is kept in float32 holds what was computed in the model's dtype.
        eps = max(torch.finfo(dtype).eps, torch.finfo(ours.dtype).eps)
        tolerance = 1e-5 if eps == torch.finfo(torch.float32).eps else 8 * eps
        left, right = ours.double(), theirs.double()
        if float((left - right).abs().max()) > tolerance * max(1.0, float(right.abs().max())):
            return False
    return True
