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
from trilens.analysis.heads import ROLES as SCORES
from trilens.analysis.heads import repeated_ids, role_scores
from trilens.caches.patterns.protocol import Pattern
from trilens.models.forward_call import probe_ids
from trilens.models.positions import configured_positions
from trilens.models.tokens import vocab_size_of

__all__ = ["ROLES", "RoleAccumulator", "RoleChange", "repeated_probe"]

ROLES = SCORES[:3]
_HALF = 32
_SEQUENCES = 4
_FEWEST = 4


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


def repeated_probe(model: PreTrainedModel) -> list[Tensor]:
    """Sequences of ordinary random tokens that come twice, after the model's first token if any.

    Returns:
        The sequences [seq], equally long; none where a model has no room for 4 different tokens
        twice.
    """
    longest = configured_positions(model)
    half = _HALF if longest is None else min(_HALF, (longest - 1) // 2)
    plain = probe_ids(model, vocab_size_of(model), max(half, 1))[0].tolist()
    half = min(half, len(set(plain)))
    if half < _FEWEST:
        return []
    found = (repeated_ids(model, half, seed=seed, repeats=2) for seed in range(_SEQUENCES))
    return [torch.tensor(ids) for ids in found if ids is not None]


class RoleAccumulator:
    """Takes both patterns of the probe's sequences."""

    __slots__ = ("_modules", "_scores")

    def __init__(self) -> None:
        self._scores: dict[int, list[Tensor]] = {}
        self._modules: dict[int, str] = {}

    def add(self, layer: int, module: str, ids: Tensor, before: Pattern, after: Pattern) -> None:
        """One sequence's patterns of one layer; ids [seq] are its tokens."""
        both = torch.stack([role_scores(each, ids)[: len(ROLES)] for each in (before, after)])
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
