"""Knockouts made ready for a run: which edges of a layer are cut in one pass, which writes."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trilens.edits.edit import Edit, Knockout
from trilens.edits.positions import Places, selected
from trilens.edits.values import numbers_of
from trilens.errors import EditError
from trilens.io.messages import listed
from trilens.models.anatomy import Anatomy
from trilens.models.sites.claims import SiteClaims
from trilens.taps.edit_targets import ModelFacts, Texts, check_layers, check_numbers, places_of
from trilens.taps.span import Span

__all__ = ["EdgeCut", "check_heads", "cuts_of"]


@dataclass(frozen=True, slots=True, eq=False)
class EdgeCut:
    """One knockout in one layer.

    Attributes:
        number: of the edit, from 0.
        layer: the model's layer.
        heads: which heads, None for all.
        queries: per prompt, the tokens that no longer see the keys.
        keys: per prompt, the tokens that are no longer seen.
        own: whether a token's edge to itself is cut where both name it.
        of_tokens: whether it names tokens alone, so that their writes to a state are cut too.
    """

    number: int
    layer: int
    heads: tuple[int, ...] | None
    queries: tuple[Places, ...]
    keys: tuple[Places, ...]
    own: bool
    of_tokens: bool = False

    def edges(self, span: Span, seq_k: int | None = None) -> NDArray[np.bool_] | None:
        """Which edges are cut in a pass; None where none is.

        Args:
            span: the pass's tokens, which are the queries.
            seq_k: keys, from text position 0; None for all up to the pass's last column.

        Shapes:
            returns: [batch, seq_q, seq_k]
        """
        n_keys = span.start + span.seq if seq_k is None else seq_k
        cut = np.zeros((len(span.lengths), span.seq, n_keys), bool)
        numbers = span.prompt_numbers
        for row, (length, prompt) in enumerate(zip(span.lengths, span.prompts, strict=True)):
            queries, keys = self.queries[numbers[row]], self.keys[numbers[row]]
            named = selected(queries, prompt, span.start, span.start + length)
            seen = selected(keys, prompt, 0, n_keys)
            edges = named[:, None] & seen[None]
            if not self.own:
                at = np.arange(length)
                edges[at, at + span.start] = False
            cut[row, :length] = edges
        return cut if cut.any() else None

    def writes(self, span: Span) -> NDArray[np.bool_] | None:
        """Which tokens of a pass write nothing into a recurrent state; None where all write.

        Shapes:
            returns: [batch, seq]
        """
        cut = np.zeros((len(span.lengths), span.seq), bool)
        numbers = span.prompt_numbers
        for row, (length, prompt) in enumerate(zip(span.lengths, span.prompts, strict=True)):
            keys = self.keys[numbers[row]]
            cut[row, :length] = selected(keys, prompt, span.start, span.start + length)
        return cut if cut.any() else None


def cuts_of(
    number: int,
    edit: Knockout,
    claims: SiteClaims,
    model: ModelFacts,
    texts: Texts,
    attention: Collection[int],
    recurrent: Collection[int],
) -> list[EdgeCut]:
    """One knockout in each of its layers.

    Raises:
        EditError: a layer without edges, queries of a recurrent layer, a query left without keys.
        EditRangeError: a layer, head or position that is not there.
    """
    asked = check_layers(edit, model)
    # A layer that has both has edges; without queries and heads, recurrent layers join.
    of_tokens = edit.queries is None and edit.heads is None
    having = sorted({*attention, *(recurrent if of_tokens else ())})
    layers = having if asked is None else list(asked)
    if not layers:
        raise EditError("no layer of this model has attention that can be edited")
    queries = places_of(edit.queries, texts)
    keys = places_of(edit.keys, texts)
    own = edit.queries is not None and edit.keys is not None
    if own:
        _check_rest(queries, keys, texts)
    cuts = []
    for layer in layers:
        if layer not in attention and layer not in recurrent:
            raise EditError(
                f"layer {layer} has no attention that can be edited; layers that have: "
                f"{listed(sorted({*attention, *recurrent}), 12)}"
            )
        if layer not in attention and not of_tokens:
            raise EditError(
                f"layer {layer} is recurrent and has no edges: name keys alone, the tokens that "
                "write nothing into its state"
            )
        site = claims.sites.get(("attn.z", layer))
        heads = numbers_of(edit.heads)
        if site is not None:
            heads = check_numbers(heads, site.shape[0], "head", f"layer {layer}")
        cuts.append(EdgeCut(number, layer, heads, queries, keys, own, of_tokens))
    return cuts


def check_heads(edits: Sequence[Edit], anatomy: Anatomy) -> None:
    """Refuse heads of a layer in which several modules attend, each with heads of its own.

    Raises:
        EditError: names the layer.
    """
    for number, edit in enumerate(edits):
        if not isinstance(edit, Knockout) or edit.heads is None:
            continue
        layers = numbers_of(edit.layers)
        for layer, paths in anatomy.attention_parts.items():
            if layers is None or layer in layers:
                raise EditError(
                    f"edit {number} ({edit}): heads cannot be named: {len(paths)} modules attend "
                    f"in layer {layer}; leave heads out to cut the edges in all of them"
                )


def _check_rest(queries: tuple[Places, ...], keys: tuple[Places, ...], texts: Texts) -> None:
    """Refuse a knockout that leaves a query nothing to see: a softmax over nothing."""
    for number, prompt in enumerate(texts.prompts):
        total = prompt + texts.new_tokens
        named = selected(queries[number], prompt, 0, total)
        blind = named & np.logical_and.accumulate(selected(keys[number], prompt, 0, total))
        if blind.any():
            raise EditError(
                f"position {int(blind.argmax())} of {texts.owner(number)} would see no key at all: "
                "its knockout names every token up to itself; leave one"
            )
