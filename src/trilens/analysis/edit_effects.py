"""What edits do to a prompt's predictions: divergence, a logit difference, the tokens that move."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, SupportsIndex

import numpy as np
from numpy.typing import NDArray

from trilens.analysis.metrics import logit_diff
from trilens.analysis.sweeping import measure, prompt_again
from trilens.analysis.tokens import Token, token_id
from trilens.caches.indices import check_index
from trilens.edits import Edit
from trilens.errors import UsageError
from trilens.lens.capture import Capture
from trilens.lens.lens import Lens
from trilens.models.token_strings import token_strings
from trilens.models.tokens import PromptLike
from trilens.numbers import at_least
from trilens.results import Tabular
from trilens.statistics.divergence import kl_nats
from trilens.statistics.probabilities import probabilities

__all__ = ["EditEffect", "MovedToken", "edit_effect", "effect_between"]


@dataclass(frozen=True, slots=True, kw_only=True)
class MovedToken:
    """A next token whose probability the edits change.

    Attributes:
        token_id: which one.
        token: as text.
        before: its probability without the edits, in [0, 1].
        after: with them.
    """

    token_id: int
    token: str
    before: float
    after: float


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class EditEffect(Tabular):
    """A prompt's predictions with edits beside those without.

    Attributes:
        tokens: of the prompt.
        edits: in their text form.
        kl_nats: [seq], KL(without ‖ with) of the next token after each position.
        position: the one that what follows is about.
        target: a token id, and `against` another; None where not asked.
        before: logit of `target` less that of `against` without the edits; None where not asked.
        after: the same with the edits.
        moved: the tokens whose probability changes most after `position`, the most first.
    """

    tokens: tuple[str, ...]
    edits: tuple[str, ...]
    kl_nats: NDArray[np.float64]
    position: int
    target: int | None
    against: int | None
    before: float | None
    after: float | None
    moved: tuple[MovedToken, ...]

    def table(self) -> list[dict[str, Any]]:
        """One row per position: token and divergence."""
        return [
            {"position": i, "token": token, "kl_nats": float(kl)}
            for i, (token, kl) in enumerate(zip(self.tokens, self.kl_nats, strict=True))
        ]

    def to_dict(self) -> dict[str, Any]:
        """The whole result as JSON can hold it."""
        return {
            "edits": list(self.edits),
            "positions": self.table(),
            "position": self.position,
            "target": self.target,
            "against": self.against,
            "before": self.before,
            "after": self.after,
            "moved": [
                {
                    "token_id": each.token_id,
                    "token": each.token,
                    "before": each.before,
                    "after": each.after,
                }
                for each in self.moved
            ],
        }

    def __repr__(self) -> str:
        return (
            f"EditEffect({len(self.edits)} edits: KL {float(self.kl_nats[self.position]):.4g} nats "
            f"at position {self.position})"
        )


def edit_effect(
    lens: Lens,
    prompt: PromptLike,
    edits: Iterable[Edit] | Edit,
    *,
    target: Token | None = None,
    against: Token | None = None,
    position: SupportsIndex = -1,
    k: SupportsIndex = 10,
) -> EditEffect:
    """Run a prompt with edits and without.

    Args:
        lens: the model.
        prompt: as `Lens.capture` takes it.
        edits: as `Lens.capture` takes them; at least one.
        target: a token id, or a text that is one token; with `against`.
        against: the token that it is compared with.
        position: whose next token is looked at; negative from the end.
        k: tokens in `moved`.

    Raises:
        EditError: an edit that does not fit, or touched nothing.
        UsageError: no edits, or one of target and against alone.
        TokenIdError: a token that the model has not.
        OutOfRangeError: a position that the prompt has not.
        NonFiniteError: logits that give no probabilities.
        MetricError: a model without logits.
    """
    given = (edits,) if isinstance(edits, Edit) else tuple(edits)
    if not given:
        raise UsageError("edits are empty: there is nothing to compare")
    if (target is None) != (against is None):
        raise UsageError("target and against go together: give both or none")
    n = at_least(1, k, "k")
    ids = None
    if target is not None and against is not None:
        ids = token_id(lens, target), token_id(lens, against)
    plain = lens.capture(prompt, residual=None)
    at = check_index(position, len(plain.tokens), "position", "this prompt", negative=True)
    edited = lens.capture(prompt_again(lens, prompt, plain), residual=None, edits=given)
    return effect_between(lens, plain, edited, given, ids=ids, position=at, k=n)


def effect_between(
    lens: Lens,
    plain: Capture,
    edited: Capture,
    edits: Sequence[Edit],
    *,
    ids: tuple[int, int] | None = None,
    position: int = -1,
    k: int = 10,
) -> EditEffect:
    """What edits do, of captures without and with them; both hold all logits.

    Args:
        lens: the model of both.
        plain: without edits.
        edited: with them, of the same tokens.
        edits: what was done.
        ids: target and against, as `edit_effect` takes them.
        position: as there.
        k: likewise.
    """
    at = check_index(position, len(plain.tokens), "position", "this prompt", negative=True)
    diffs: tuple[float | None, float | None] = None, None
    if ids is not None:
        metric = logit_diff(*ids, position=at)
        diffs = measure(metric, plain), measure(metric, edited)
    if plain.logits is None or edited.logits is None:
        raise UsageError("the model gives no logits: nothing to compare")
    before, after = (
        probabilities(each[at], f"of position {at}").double().cpu()
        for each in (plain.logits, edited.logits)
    )
    top = (after - before).abs().topk(min(k, len(before))).indices.tolist()
    return EditEffect(
        tokens=tuple(plain.tokens),
        edits=tuple(map(str, edits)),
        kl_nats=kl_nats(plain.logits, edited.logits),
        position=at,
        target=None if ids is None else ids[0],
        against=None if ids is None else ids[1],
        before=diffs[0],
        after=diffs[1],
        moved=tuple(
            MovedToken(token_id=i, token=text, before=float(before[i]), after=float(after[i]))
            for i, text in zip(top, token_strings(top, lens.tokenizer), strict=True)
        ),
    )
