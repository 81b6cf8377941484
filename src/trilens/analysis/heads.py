"""What heads do, as scores: where they look in a text that repeats itself, and what they copy.

Source: induction heads and prefix matching on repeated random tokens, arXiv 2209.11895.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, SupportsIndex

import torch
from torch import Tensor
from transformers import PreTrainedModel

from trilens.analysis.copying import copying_scores
from trilens.analysis.lenses.logit_lens import same_model
from trilens.caches.attention import AttentionCache
from trilens.caches.patterns.protocol import BLOCK_BYTES, Pattern
from trilens.errors import (
    EmptyPromptError,
    IncomparableError,
    NotStoredError,
    UsageError,
    ValueRangeError,
)
from trilens.lens.capture import Capture
from trilens.lens.lens import Lens
from trilens.lens.parts import ModelInfo
from trilens.models.forward_call import probe_ids, text_config
from trilens.models.tokens import vocab_size_of
from trilens.numbers import at_least, whole_number
from trilens.results import Tabular

__all__ = [
    "ROLES",
    "HeadScore",
    "HeadScores",
    "head_scores",
    "repeated_ids",
    "repeated_tokens",
    "role_scores",
]

ROLES = ("previous_token", "duplicate_token", "induction", "first_position", "sink_mass")
"""Mean weight of a head's queries to: the token before; earlier tokens that are the same; the
tokens that came after those; position 0; and what a learned sink takes, which no token gets."""

_COPYING = "copying"
_SUCCESSOR = "successor"


@dataclass(frozen=True, slots=True)
class HeadScore:
    """One head's score in one role: its mean over captures and the standard deviation."""

    layer: int
    head: int
    role: str
    score: float
    spread: float


@dataclass(frozen=True, slots=True, eq=False)
class HeadScores(Tabular):
    """Scores of every head of the layers that a capture holds.

    Attributes:
        roles: names of the scores.
        means: per layer float64 [roles, heads], over captures; NaN where nothing could be asked.
        spreads: their standard deviations over captures, likewise; 0 of one capture.
        n_captures: how many there were.
        notes: what could not be asked, in words.
    """

    roles: tuple[str, ...]
    means: Mapping[int, Tensor]
    spreads: Mapping[int, Tensor]
    n_captures: int
    notes: tuple[str, ...] = ()

    @property
    def layers(self) -> tuple[int, ...]:
        """The model's own layer numbers, ascending."""
        return tuple(self.means)

    def best(self, role: str, k: SupportsIndex = 5) -> tuple[HeadScore, ...]:
        """The k heads with the largest scores, descending.

        Raises:
            UsageError: a role that is not among `roles`.
            ValueRangeError: k below 1.
        """
        if role not in self.roles:
            raise UsageError(f"role {role!r} is not here: the roles are {', '.join(self.roles)}")
        i = self.roles.index(role)
        found = [
            HeadScore(layer, head, role, score, float(self.spreads[layer][i, head]))
            for layer, means in self.means.items()
            for head, score in enumerate(means[i].tolist())
            if not math.isnan(score)
        ]
        found.sort(key=lambda each: (-each.score, each.layer, each.head))
        return tuple(found[: at_least(1, k, "k")])

    def table(self) -> list[dict[str, Any]]:
        """One row for each head, with all its scores; None where nothing could be asked."""
        rows: list[dict[str, Any]] = []
        for layer, means in self.means.items():
            for head, scores in enumerate(means.T.tolist()):
                row = {role: _number(x) for role, x in zip(self.roles, scores, strict=True)}
                rows.append({"layer": layer, "head": head, **row})
        return rows

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON: the table's rows, each with the standard deviations."""
        rows = self.table()
        spreads = [each for layer in self.layers for each in self.spreads[layer].T.tolist()]
        for row, found in zip(rows, spreads, strict=True):
            row["sd"] = {role: _number(x) for role, x in zip(self.roles, found, strict=True)}
        return {
            "roles": list(self.roles),
            "n_captures": self.n_captures,
            "notes": list(self.notes),
            "rows": rows,
        }


def head_scores(
    captures: Capture | Iterable[Capture],
    *,
    lens: Lens | None = None,
    successors: Mapping[int, int] | None = None,
) -> HeadScores:
    """What heads do: where they look, and, with a lens, whether they copy what they look at.

    Previous-token, duplicate-token and induction scores mean most on `repeated_tokens`, where
    nothing but position and repetition can guide a head. Effective attention of recurrent layers
    has signs: it is scored through its unsigned view, as `AttentionCache.relu_l1`.

    Args:
        captures: one, or several of one model, with attention=True or effective=True; read once.
        lens: the model; adds a role "copying" (see `copying_scores`), for which captures also need
            residual="all" and sites=["attn.head_out", "attn.out", "attn.add"].
        successors: token id → the id that follows it (as " two" follows " one"); adds a role
            "successor": as copying, of the token that follows.

    Raises:
        NotStoredError: a capture without what is needed.
        EmptyPromptError: no captures.
        IncomparableError: captures of several models or of other layers.
        UsageError: successors without a lens.

    Memory
        Blocks of 32 MB of attention rows; of copying the logits of a prompt's tokens.
    """
    if successors is not None and lens is None:
        raise UsageError("successors need the model's unembedding: give lens=…")
    extra = () if lens is None else (_COPYING, *(() if successors is None else (_SUCCESSOR,)))
    found: list[dict[int, Tensor]] = []
    notes: dict[str, None] = {}
    info: ModelInfo | None = None
    for cap in [captures] if isinstance(captures, Capture) else captures:
        cache = _attention(cap)
        one = {i: role_scores(cache.pattern(i), cap.token_ids) for i in cache.layers}
        if info is not None and (cap.model != info or list(found[0]) != list(one)):
            raise IncomparableError("captures are of several models, or of other layers")
        info = cap.model
        if lens is not None:
            same_model(cap.model, lens, "capture")
            for maps in (None, successors)[: len(extra)]:
                for layer, scores in one.items():
                    copied, why = copying_scores(cap, lens, layer, cache.pattern(layer), maps)
                    one[layer] = torch.cat([scores, copied[None]])
                    if why:
                        notes[why] = None
        found.append(one)
    if not found:
        raise EmptyPromptError("captures are empty: give at least one")
    means, spreads = {}, {}
    for layer in found[0]:
        scores = torch.stack([one[layer] for one in found])
        means[layer], spreads[layer] = scores.mean(0), scores.std(0, correction=0)
    return HeadScores(
        roles=(*ROLES, *extra),
        means=MappingProxyType(means),
        spreads=MappingProxyType(spreads),
        n_captures=len(found),
        notes=tuple(notes),
    )


def role_scores(pattern: Pattern, ids: Tensor) -> Tensor:
    """Scores of one layer's heads, a block of query positions at a time.

    Args:
        pattern: without signs, of one prompt; queries may be the last of the keys' tokens.
        ids: token ids of the keys [seq_k].

    Returns:
        Float64 [len(ROLES), heads], on the CPU; NaN in a role that no query can have.
    """
    ids, n = ids.cpu(), pattern.seq_k
    offset = n - pattern.seq_q
    if len(ids) != n or offset < 0:
        raise NotStoredError(
            f"pattern has {pattern.seq_q} queries and {n} keys, the prompt {len(ids)} tokens: each "
            "key needs its token"
        )
    sums = torch.zeros(4, pattern.heads, dtype=torch.float64)
    counts = torch.zeros(4, 1, dtype=torch.float64)
    step = max(1, BLOCK_BYTES // (4 * pattern.heads * n))
    keys = torch.arange(n)
    for start in range(0, pattern.seq_q, step):
        own = torch.arange(start, min(start + step, pattern.seq_q))
        queries = own[:, None] + offset
        weights = pattern.rows(own.tolist()).cpu()
        same = ids[queries] == ids
        after = same.roll(1, 1)
        after[:, 0] = False
        before = keys < queries
        masks = (keys == queries - 1, same & before, after & before, (keys == 0) & before)
        for i, mask in enumerate(masks):
            sums[i] += (weights * mask).sum((1, 2), dtype=torch.float64)
            counts[i] += int(mask.any(1).sum())
    sink = torch.full((1, pattern.heads), torch.nan, dtype=torch.float64)
    if not pattern.signed:
        sink[0] = pattern.sink_mass().mean(-1, dtype=torch.float64).cpu()
    # No query: 0 / 0 is NaN, which says that nothing was asked.
    return torch.cat([sums / counts, sink])


def repeated_tokens(
    lens: Lens, length: SupportsIndex = 32, *, seed: int = 0, repeats: SupportsIndex = 2
) -> Tensor:
    """Random ordinary tokens, all different, that come several times after the model's first token.

    Args:
        lens: the model.
        length: of the part that is repeated.
        seed: of the choice.
        repeats: how often the part comes.

    Returns:
        int64 [repeats · length], and one more where the model has a first token.

    Raises:
        ValueRangeError: a length or a number of repeats below 2, or more than there are tokens.
    """
    n, times = at_least(2, length, "length"), at_least(2, repeats, "repeats")
    found = repeated_ids(lens.model, n, seed=whole_number(seed, "seed"), repeats=times)
    if found is None:
        raise ValueRangeError(f"length {n} is out of range: this model has fewer different tokens")
    return torch.tensor(found)


def repeated_ids(
    model: PreTrainedModel, length: int, *, seed: int, repeats: int
) -> list[int] | None:
    """As `repeated_tokens`; None where the model has fewer different tokens."""
    vocab = vocab_size_of(model)
    piece: list[int] = probe_ids(model, vocab, length, seed=seed)[0].tolist()
    if len(set(piece)) < length:
        return None
    start = getattr(text_config(model), "bos_token_id", None)
    lead = [start] if isinstance(start, int) and 0 <= start < vocab else []
    return lead + piece * repeats


def _attention(cap: Capture) -> AttentionCache:
    cache = cap.effective if not cap.has("attention") and cap.has("effective") else cap.attention
    return cache.relu_l1()


def _number(value: float) -> float | None:
    return None if math.isnan(value) else value
