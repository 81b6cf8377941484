"""Attention that modules compute in their own code, followed through the torch functions they call.

Of every product of two stacks of matrices it is noted what becomes of it. One that goes into a
softmax, whose result is multiplied with a third stack, is an attention call: queries and keys are
the first product's operands, values the second's. `F.scaled_dot_product_attention`, called by the
module itself, is all of that at once.

The probe and captures use the same follower, so that what is captured is what was proven. A call is
told in the words of transformers' registry, and whoever reads or edits calls need not know which.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from trilens.errors import AttentionPathError
from trilens.taps.inline.products import PRODUCTS, Product, by_head, product_of
from trilens.taps.inline.scores import (
    PassTerms,
    Scores,
    Weights,
    keeps_values,
    softmax_of,
    stepped,
)
from trilens.taps.registry import AttentionArguments, AttentionCall

__all__ = ["FUSED", "INLINE", "Follower", "InlineEditor", "inline_attention"]

FUSED = "scaled_dot_product_attention"
INLINE = "inline"
"""What stands in the place of an implementation's name."""
_FUSED_NAMES = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale",
                "enable_gqa")  # fmt: skip
_SEES = 5e3
"""A score that is less than its row's largest by this much gets no weight in any dtype."""


def inline_attention(*_: Any, **__: Any) -> Any:
    """Stands for a module's own code, where a registry's function would be named."""
    raise AttentionPathError("attention inside a module's own code cannot be called by itself")


class InlineEditor(Protocol):
    """What may change attention calls, one part after the other, as a module computes them."""

    def query(self, tensor: Tensor) -> Tensor:
        """The queries that are used instead."""

    def key(self, tensor: Tensor) -> Tensor:
        """The keys that are used instead."""

    def value(self, tensor: Tensor) -> Tensor:
        """The values that are used instead."""

    def mask(self, given: AttentionArguments) -> Any:
        """The mask that is used instead."""

    def before(self, given: AttentionArguments) -> AttentionArguments:
        """What a fused function is called with instead."""

    def after(self, call: AttentionCall) -> AttentionCall:
        """The call with another output."""


@dataclass(slots=True)
class _Open:
    """A module that is running, and the products that were computed before it began."""

    module: nn.Module
    products: int


Finished = Callable[[AttentionCall, int], None]


class Follower:
    """Follows what the running modules compute.

    Args:
        finished: called with each attention call, as an editor left it, and which of its module's
            products gave the scores (-1 where one function did it all).
        editor: may change calls.
        expected: which product gives the scores, by module: what an editor has to know before.
    """

    def __init__(
        self,
        finished: Finished,
        editor: InlineEditor | None = None,
        expected: dict[nn.Module, int] | None = None,
    ) -> None:
        self.finished = finished
        self.editor = editor
        self.expected = expected or {}
        self.batch, self.seq = 1, 0
        self.begin(1, 0)

    def begin(self, batch: int, seq: int) -> None:
        """A pass begins, of so many prompts and tokens."""
        self.batch, self.seq = batch, seq
        self.open: list[_Open] = []
        self.terms = PassTerms()
        self._forget()

    def _forget(self) -> None:
        self.products = 0
        # The tensors are kept, so that no later one gets the same identity.
        self.held: dict[int, tuple[Tensor, Scores | Weights]] = {}
        self.product: tuple[Product, Weights | None] | None = None
        self.fused: AttentionArguments | None = None

    def enter(self, module: nn.Module) -> None:
        """A module begins to run."""
        self.open.append(_Open(module, self.products))

    def leave(self) -> None:
        """The innermost module ends."""
        if self.open:
            self.open.pop()
        if not self.open:
            self._forget()

    def before(self, name: str, args: tuple[Any, ...], options: dict[str, Any]) -> tuple[Any, ...]:
        """A function is about to run: the arguments that it is called with."""
        self.product = self.fused = None
        if not self.open:
            return args
        if name in PRODUCTS:
            return self._before_product(name, args, options)
        if name == FUSED:
            return self._before_fused(args, options)
        if self.editor is not None and softmax_of(name, args, options):
            return self._before_softmax(args)
        return args

    def after(self, name: str, args: tuple[Any, ...], options: dict[str, Any], result: Any) -> Any:
        """A function ran: what the model goes on with."""
        if not self.open or not isinstance(result, Tensor):
            return result
        if self.product is not None:
            return self._after_product(*self.product, result)
        if self.fused is not None:
            return self._after_fused(self.fused, result)
        if self.held:
            self._step(name, args, options, result)
        return result

    def _before_product(
        self, name: str, args: tuple[Any, ...], options: dict[str, Any]
    ) -> tuple[Any, ...]:
        product = product_of(name, args, options, self.batch)
        if product is None:
            return args
        state = self._of(product.given)
        weights = state if isinstance(state, Weights) else None
        editor, left, right = self.editor, product.left, product.right
        if weights is None:
            self.products += 1
            running = self.open[-1]
            number = self.products - 1 - running.products
            if editor is not None and self.expected.get(running.module) == number:
                left, right = editor.query(left), _swapped(editor.key, right)
        elif editor is not None:
            right = editor.value(right)
        if left is not product.left or right is not product.right:
            args = product.replaced(args, options, left, right)
            product = replace(product, left=left, right=right)
        self.product = product, weights
        return args

    def _after_product(self, product: Product, weights: Weights | None, result: Tensor) -> Tensor:
        if weights is not None:
            return self._finish(product, weights, result)
        if product.left.shape[-2] == self.seq:
            depth = tuple(self.open)
            key = product.right.transpose(-1, -2)
            number, opaque = self.products - 1, product.alpha == 0
            scores = Scores(product.left, key, number, depth, product.alpha, opaque=opaque)
            if isinstance(product.base, Tensor) and product.beta:
                plus = (product.base, result)
                scores = stepped(scores, 1, "add", plus, {}, self.batch)
                if product.beta != 1 and scores.terms:
                    scores = replace(scores, terms=((scores.terms[0][0], product.beta),))
            self.held[id(result)] = result, scores
        return result

    def _step(self, name: str, args: tuple[Any, ...], options: dict[str, Any], y: Tensor) -> None:
        found = next(
            ((i, x) for i, x in enumerate(args[:3]) if isinstance(x, Tensor) and self._of(x)), None
        )
        if found is None:
            return
        place, x = found
        state = self._of(x)
        if y.shape[-2:] != x.shape[-2:] or y.numel() != x.numel():
            return
        if isinstance(state, Scores):
            if softmax_of(name, args, options):
                self.held[id(y)] = y, Weights(state)
            else:
                self.held[id(y)] = y, stepped(state, place, name, args, options, self.batch)
        elif isinstance(state, Weights):
            same = keeps_values(name, options, args)
            self.held[id(y)] = y, state if same else replace(state, changed=True)

    def _of(self, tensor: Tensor) -> Scores | Weights | None:
        held = self.held.get(id(tensor))
        return None if held is None else held[1]

    def _before_softmax(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Scores with a knockout's edges hidden."""
        x = args[0]
        state, own = self._of(x), by_head(x, self.batch)
        if not isinstance(state, Scores) or own is None or self.editor is None:
            return args
        seen = own > own.amax(-1, keepdim=True) - _SEES
        module = self._owner(state).module
        given = AttentionArguments(
            module, INLINE, inline_attention, state.query, state.key, state.key, seen, {}
        )
        mask = self.editor.mask(given)
        if mask is seen:
            return args
        hidden = seen & ~mask
        new = own.masked_fill(hidden, torch.finfo(own.dtype).min).reshape(x.shape)
        cut = replace(state, masks=(*state.masks, (hidden, False)))
        self.held[id(new)] = new, cut
        return (new, *args[1:])

    def _owner(self, scores: Scores) -> _Open:
        """The innermost module that was running when the scores were made, and still is."""
        return [one for one in self.open if any(one is other for other in scores.depth)][-1]

    def _finish(self, product: Product, weights: Weights, result: Tensor) -> Tensor:
        scores = weights.scores
        made, own = product.result(result), product.left
        if made is None or own.shape[-2:] != scores.shape:
            return result
        owner = self._owner(scores)
        options: dict[str, Any] = {"opaque": True}
        mask = None
        if not scores.opaque and not weights.changed:
            given = self.terms.given(scores)
            mask = given.mask
            options = {"scaling": given.scaling, "is_causal": given.causal}
            if given.bias is not None:
                options["position_bias"] = given.bias
        call = AttentionCall(
            owner.module, INLINE, inline_attention, scores.query, scores.key, mask, options, own,
            product.right, made.transpose(1, 2),
        )  # fmt: skip
        number = scores.number - owner.products
        return self._edited(call, number, result, lambda new: product.as_result(new, result))

    def _edited(
        self, call: AttentionCall, number: int, result: Tensor, back: Callable[[Tensor], Tensor]
    ) -> Tensor:
        expected = self.expected.get(call.module)
        if expected is not None and expected != number:
            raise AttentionPathError(
                f"{type(call.module).__name__} computes attention in another way than when the "
                "lens was opened: the model was changed since; open it again, or capture without "
                "attention=True"
            )
        edited = call if self.editor is None else self.editor.after(call)
        self.finished(edited, number)
        if edited.output is call.output or edited.output is None:
            return result
        return back(edited.output.transpose(1, 2))

    def _before_fused(self, args: tuple[Any, ...], options: dict[str, Any]) -> tuple[Any, ...]:
        named = {**dict(zip(_FUSED_NAMES, args, strict=False)), **options}
        query, key, value = (named.get(name) for name in _FUSED_NAMES[:3])
        tensors = [by_head(x, self.batch) if isinstance(x, Tensor) else None for x in
                   (query, key, value)]  # fmt: skip
        if any(each is None for each in tensors) or tensors[0].shape[-2] != self.seq:  # type: ignore[union-attr]
            return args
        own = {"is_causal": bool(named.get("is_causal", False))}
        if named.get("scale") is not None:
            own["scaling"] = named["scale"]
        q, k, v = (each for each in tensors if each is not None)
        mask = named.get("attn_mask")
        if isinstance(mask, Tensor) and mask.dim() < 4:
            mask = mask[(None,) * (4 - mask.dim())]
        given = AttentionArguments(
            self.open[-1].module, "sdpa", sdpa_attention_forward, q, k, v, mask, own
        )
        edited = given if self.editor is None else self.editor.before(given)
        self.fused = edited
        if edited is given:
            return args
        named |= {
            name: getattr(edited, name).reshape(old.shape)
            for name, old in zip(("query", "key", "value"), (query, key, value), strict=True)
            if isinstance(old, Tensor)
        }
        if edited.mask is not mask:
            named |= {"attn_mask": edited.mask, "is_causal": False}
            self.fused = replace(edited, options={**own, "is_causal": False})
        options.clear()
        options.update(named)
        return ()

    def _after_fused(self, given: AttentionArguments, result: Tensor) -> Tensor:
        made = by_head(result, self.batch)
        if made is None:
            return result
        call = AttentionCall(
            given.module, given.implementation, given.function, given.query, given.key, given.mask,
            given.options, None, given.value, made.transpose(1, 2),
        )  # fmt: skip
        return self._edited(call, -1, result, lambda new: new.reshape(result.shape))


def _swapped(change: Callable[[Tensor], Tensor], right: Tensor) -> Tensor:
    """A change of keys [.., seq_k, d], of an operand that has them as columns."""
    key = right.transpose(-1, -2)
    new = change(key)
    return right if new is key else new.transpose(-1, -2)
