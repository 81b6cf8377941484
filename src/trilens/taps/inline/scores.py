"""From queries times keys to what a softmax is given: each step that a model's code takes.

A step is a factor, a term (a bias, a mask), a place filled with a very small number, or a change
of form or dtype. A step that is none of these makes the scores opaque: the weights are then kept.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from trilens.caches.patterns.softmax.masks import plain_mask, tensor_identity
from trilens.taps.inline.products import term_by_head

__all__ = ["Given", "PassTerms", "Scores", "Weights", "keeps_values", "softmax_of", "stepped"]

_SAME = {
    "to", "float", "double", "half", "bfloat16", "type", "type_as", "contiguous", "clone", "view",
    "reshape", "unflatten", "dropout", "_to_copy", "expand", "alpha_dropout", "feature_dropout",
}  # fmt: skip
_TIMES = {"mul", "mul_", "multiply", "__mul__", "__rmul__", "__imul__"}
_OVER = {"div", "div_", "divide", "true_divide", "__truediv__", "__itruediv__"}
_PLUS = {"add", "add_", "__add__", "__radd__", "__iadd__"}
_MINUS = {"sub", "sub_", "subtract", "__sub__", "__isub__"}
_FLOORS = {"max", "maximum", "clamp", "clamp_", "clamp_min"}
_FILLS = {"masked_fill", "masked_fill_"}

_HIDES = -9e3
"""A score this far down gets no weight in any dtype: the oldest models write −10,000."""


@dataclass(frozen=True, slots=True, eq=False)
class Scores:
    """Scores on their way from a product to the softmax.

    Attributes:
        query: [batch, heads, seq_q, d]; `key` [batch, kv_heads, seq_k, d].
        number: which of the module's products gave them.
        depth: modules that were running then, outermost first.
        scaling: factor of the product so far.
        terms: what was added, each with the factor that came after.
        masks: bool [.., seq_q, seq_k], each with what it means: True where a query sees a key, or
            where it does not.
        opaque: a step was taken that is none of these.
    """

    query: Tensor
    key: Tensor
    number: int
    depth: tuple[Any, ...]
    scaling: float = 1.0
    terms: tuple[tuple[Tensor, float], ...] = ()
    masks: tuple[tuple[Tensor, bool], ...] = ()
    opaque: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        """Queries and keys."""
        return self.query.shape[-2], self.key.shape[-2]


@dataclass(frozen=True, slots=True, eq=False)
class Weights:
    """What a softmax made of scores, on its way to the product with the values.

    Attributes:
        changed: something but the dtype and the form was changed after the softmax.
    """

    scores: Scores
    changed: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Given:
    """The scores as the arguments of a `SoftmaxPattern` beside q and k.

    Shapes
        mask (bool) and bias [1 or batch, 1 or heads, 1 or seq_q, seq_k], or None.
    """

    scaling: float
    mask: Tensor | None
    causal: bool
    bias: Tensor | None


def keeps_values(name: str, options: dict[str, Any], args: tuple[Any, ...]) -> bool:
    """Whether a function changes form or dtype alone; a dropout is one that is switched off."""
    training = options.get("training", args[2] if len(args) > 2 else False)
    return name in _SAME and ("dropout" not in name or training is False)


def softmax_of(name: str, args: tuple[Any, ...], options: dict[str, Any]) -> bool:
    """Whether a call is a softmax over the last axis of its first argument."""
    if name not in ("softmax", "_softmax") or not args or not isinstance(args[0], Tensor):
        return False
    dim = options.get("dim", args[1] if len(args) > 1 else None)
    return dim in (-1, args[0].dim() - 1)


def stepped(
    scores: Scores,
    place: int,
    name: str,
    args: tuple[Any, ...],
    options: dict[str, Any],
    batch: int,
) -> Scores:
    """The scores after one more function was called with them.

    Args:
        scores: before it.
        place: where they stand among the arguments.
        name: of the function; `args` and `options` what it was called with.
        batch: prompts in the batch.
    """
    if keeps_values(name, options, args):
        return scores
    other = args[1 - place] if len(args) > 1 and place < 2 else None
    made: Scores | None = None
    if name in _TIMES:
        made = _times(scores, args[place], other, batch)
    elif name in _OVER and place == 0 and not options:
        factor = _number(other)
        made = None if not factor else _scaled(scores, 1 / factor)
    elif name in _PLUS:
        made = _plus(scores, args[place], other, batch, float(options.get("alpha", 1)))
    elif name in _MINUS and place == 0:
        made = _plus(scores, args[place], other, batch, -float(options.get("alpha", 1)))
    elif name in _FLOORS:
        floor = _number(options.get("min", other))
        made = scores if floor is not None and floor <= _HIDES else None
    elif name in _FILLS and place == 0:
        value = _number(options.get("value", args[2] if len(args) > 2 else None))
        made = _masked(scores, args[0], options.get("mask", other), value, batch, seen=False)
    elif name == "where" and len(args) == 3 and place > 0:
        value = _number(args[3 - place])
        made = _masked(scores, args[place], args[0], value, batch, seen=place == 1)
    return replace(scores, opaque=True) if made is None else made


def _number(value: Any) -> float | None:
    if isinstance(value, Tensor):
        return float(value) if value.numel() == 1 and value.dim() == 0 else None
    return float(value) if isinstance(value, int | float) else None


def _scaled(scores: Scores, factor: float) -> Scores:
    terms = tuple((term, own * factor) for term, own in scores.terms)
    # A filled place stays very small only under a positive factor.
    opaque = scores.opaque or (factor <= 0 and bool(scores.masks))
    return replace(scores, scaling=scores.scaling * factor, terms=terms, opaque=opaque)


def _times(scores: Scores, x: Tensor, other: Any, batch: int) -> Scores | None:
    factor = _number(other)
    if factor is not None:
        return _scaled(scores, factor)
    # Zeros where a query does not see a key: what is added there next makes the score very small.
    if not isinstance(other, Tensor) or not bool(((other == 0) | (other == 1)).all()):
        return None
    mask = term_by_head(other, x, batch, scores.shape[1])
    return None if mask is None else replace(scores, masks=(*scores.masks, (mask != 0, True)))


def _plus(scores: Scores, x: Tensor, other: Any, batch: int, sign: float) -> Scores | None:
    number = _number(other)
    if number is not None:
        return scores if number == 0 else None
    if not isinstance(other, Tensor):
        return None
    term = term_by_head(other, x, batch, scores.shape[1])
    return None if term is None else replace(scores, terms=(*scores.terms, (term, sign)))


def _masked(
    scores: Scores, x: Tensor, mask: Any, value: float | None, batch: int, *, seen: bool
) -> Scores | None:
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool or value is None or value > _HIDES:
        return None
    own = term_by_head(mask, x, batch, scores.shape[1])
    return None if own is None else replace(scores, masks=(*scores.masks, (own, seen)))


@dataclass(slots=True)
class PassTerms:
    """What the terms of scores come to; computed once for layers that share them.

    Make one per pass: it keeps the terms alive.
    """

    _held: list[object] = field(default_factory=list)
    _made: dict[object, Any] = field(default_factory=dict)

    def given(self, scores: Scores) -> Given:
        """Scaling, mask and bias of scores that are not opaque."""
        hidden = list(scores.masks)
        biases: list[tuple[Tensor, float]] = []
        for term, factor in scores.terms:
            kind = self._once(("kind", factor), [term], partial(_kind, term, factor))
            if kind == "mask":
                hidden.append((term, True))
            elif kind == "bias":
                biases.append((term, factor))
        mask, causal = self._mask(hidden, scores.shape)
        return Given(scores.scaling, mask, causal, self._bias(biases))

    def _mask(
        self, hidden: list[tuple[Tensor, bool]], shape: tuple[int, int]
    ) -> tuple[Tensor | None, bool]:
        if not hidden:
            return None, False
        key = ("mask", shape, tuple(seen for _, seen in hidden))
        found: tuple[Tensor | None, bool] = self._once(
            key, [term for term, _ in hidden], lambda: _together(hidden, shape)
        )
        return found

    def _bias(self, biases: list[tuple[Tensor, float]]) -> Tensor | None:
        if not biases:
            return None
        if len(biases) == 1 and biases[0][1] == 1:
            return biases[0][0]
        key = ("bias", tuple(factor for _, factor in biases))
        found: Tensor = self._once(key, [term for term, _ in biases], lambda: _summed(biases))
        return found

    def _once(self, key: object, tensors: list[Tensor], make: Callable[[], Any]) -> Any:
        if any(tensor.shape[1] > 1 and tensor.shape[2] > 1 for tensor in tensors):
            # As large as the weights, and one layer's own: not to be kept alive.
            return make()
        whole = (key, *map(tensor_identity, tensors))
        if whole not in self._made:
            self._made[whole] = make()
            # An address says nothing once its tensor is gone.
            self._held += tensors
        return self._made[whole]


@torch.no_grad()
def _kind(term: Tensor, factor: float) -> str:
    """Whether a term hides keys and does nothing else ("mask"), nothing (""), or is a "bias"."""
    added = term if factor == 1 else term * factor
    hides = added <= _HIDES
    if not bool((hides | (added == 0)).all()):
        return "bias"
    return "mask" if bool(hides.any()) else ""


@torch.no_grad()
def _together(
    hidden: list[tuple[Tensor, bool]], shape: tuple[int, int]
) -> tuple[Tensor | None, bool]:
    seen: Tensor | None = None
    for term, positive in hidden:
        own = term == 0 if term.dtype != torch.bool else term if positive else ~term
        seen = own if seen is None else seen & own
    assert seen is not None
    if shape[0] != shape[1]:
        return (None if bool(seen.all()) else seen), False
    mask, causal = plain_mask(seen, seq_q=shape[0], seq_k=shape[1], causal=False)
    # A view of a model's own buffer would count as all of it.
    return (mask.clone() if mask is not None else None), causal


@torch.no_grad()
def _summed(biases: list[tuple[Tensor, float]]) -> Tensor:
    whole: Tensor | None = None
    for term, factor in biases:
        own = term.to(torch.promote_types(term.dtype, torch.float32)) * factor
        whole = own if whole is None else whole + own
    assert whole is not None
    return whole
