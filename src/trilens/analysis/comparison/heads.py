"""What heads do, before and after: previous-token, duplicate-token and induction scores.

They are measured on a probe of random tokens that comes twice, where nothing but position and
repetition can guide a head: the mean weight to the token before, to the same token's first
appearance, and to the token after that.

Source: induction heads and prefix matching on repeated random tokens, arXiv 2209.11895.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from trilens.analysis.comparison.rows import Place, Row
from trilens.caches.patterns.protocol import Pattern
from trilens.models.forward_call import probe_ids, text_config
from trilens.models.positions import configured_positions
from trilens.models.tokens import vocab_size_of

__all__ = ["ROLES", "RoleAccumulator", "RoleChange", "repeated_probe"]

ROLES = ("previous_token", "duplicate_token", "induction")
_HALF = 32
_SEQUENCES = 4
_FEWEST = 4
_BLOCK_BYTES = 32 << 20


@dataclass(frozen=True, slots=True)
class RoleChange:
    """A head with a score that crosses the threshold.

    Attributes:
        layer: the model's own number.
        module: which attention, as in the table.
        head: from 0.
        role: one of `ROLES`.
        before: its score before, in [0, 1].
        after: its score after.
    """

    layer: int
    module: str
    head: int
    role: str
    before: float
    after: float

    @property
    def lost(self) -> bool:
        """Whether the head had the role before and has it no more."""
        return self.before > self.after


def repeated_probe(model: PreTrainedModel) -> tuple[list[Tensor], int]:
    """Sequences of ordinary random tokens that come twice, after the model's first token if any.

    Returns:
        The sequences [seq], equally long, and the length of one half; no sequences where a model
        has no room for 4 different tokens twice.
    """
    start = getattr(text_config(model), "bos_token_id", None)
    vocab = vocab_size_of(model)
    lead = [start] if isinstance(start, int) and 0 <= start < vocab else []
    longest = configured_positions(model)
    half = _HALF if longest is None else min(_HALF, (longest - len(lead)) // 2)
    found = []
    for seed in range(_SEQUENCES):
        piece = probe_ids(model, vocab, max(half, 1), seed=seed)[0].tolist()
        half = min(half, len(set(piece)))
        found.append(torch.tensor([*lead, *piece[:half], *piece[:half]]))
    return (found, half) if half >= _FEWEST else ([], 0)


class RoleAccumulator:
    """Takes both patterns of the probe's sequences.

    Args:
        half: length of the part that comes twice.
    """

    __slots__ = ("_half", "_modules", "_scores")

    def __init__(self, half: int) -> None:
        self._half = half
        self._scores: dict[int, list[Tensor]] = {}
        self._modules: dict[int, str] = {}

    def add(self, layer: int, module: str, before: Pattern, after: Pattern) -> None:
        """One sequence's patterns of one layer."""
        both = torch.stack([_scores(pattern, self._half) for pattern in (before, after)])
        self._scores.setdefault(layer, []).append(both)
        self._modules[layer] = module

    def _means(self, layer: int) -> list[list[list[float]]]:
        means: list[list[list[float]]] = torch.stack(self._scores[layer]).mean(0).tolist()
        return means

    def _spreads(self, layer: int) -> list[list[list[float]]]:
        """Standard deviations over the sequences."""
        scores = torch.stack(self._scores[layer])
        found: list[list[list[float]]] = scores.std(0, correction=0).tolist()
        return found

    def rows(self) -> list[Row]:
        """Scores per layer and head, and their spread over the sequences."""
        found = []
        for layer, module in sorted(self._modules.items()):
            for suffix, values in (("", self._means(layer)), ("_sd", self._spreads(layer))):
                before, after = values
                for i, role in enumerate(ROLES):
                    for head in range(len(before[i])):
                        pair = before[i][head], after[i][head]
                        at = Place(module, layer, head)
                        found.append(at.change(f"{role}_score{suffix}", *pair))
        return found

    def changes(self, threshold: float) -> list[RoleChange]:
        """Heads with a score that was at the threshold or above on one side only."""
        return [
            RoleChange(row.layer or 0, row.module, row.head or 0, role, row.before, row.after)
            for row in self.rows()
            for role in ROLES
            if row.metric == f"{role}_score"
            and (row.before >= threshold) != (row.after >= threshold)
        ]


def _scores(pattern: Pattern, half: int) -> Tensor:
    """Float64 [3, heads], in the order of `ROLES`."""
    n = pattern.seq_q
    scores = torch.empty(len(ROLES), pattern.heads, dtype=torch.float64)
    # The probe is short, so that mostly all heads fit a block.
    whole = 4 * pattern.heads * n * n <= _BLOCK_BYTES
    for head in [None] if whole else range(pattern.heads):
        weights = pattern.rows(range(n), head).cpu()
        own = slice(None) if head is None else slice(head, head + 1)
        previous = weights.diagonal(-1, 1, 2)
        duplicate = weights.diagonal(-half, 1, 2)[:, -half:]
        induction = weights.diagonal(1 - half, 1, 2)[:, -half:]
        for i, line in enumerate((previous, duplicate, induction)):
            scores[i, own] = line.mean(-1, dtype=torch.float64)
    return scores
