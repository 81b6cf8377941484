"""What an edit reaches in a model: layers, heads, units and tokens, checked before the run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trilens.axes import RESIDUALS, SITES
from trilens.caches.indices import check_index
from trilens.edits.edit import Edit, Patch, SiteEdit
from trilens.edits.positions import (
    PerPrompt,
    Places,
    Positions,
    check_positions_within,
    positions_of,
    read_positions,
    selected,
    text_of,
)
from trilens.edits.values import numbers_of
from trilens.errors import EditError, EditRangeError, OutOfRangeError
from trilens.io.messages import listed
from trilens.models.sites.claims import SiteClaims
from trilens.models.sites.site import Site
from trilens.taps.span import Span

__all__ = [
    "BY_QUERY",
    "Chosen",
    "ModelFacts",
    "Target",
    "Texts",
    "check_layers",
    "check_numbers",
    "places_of",
    "sites_of",
    "target_of",
]

BY_QUERY = ("attn.scores", "attn.pattern")
"""Sites whose value is [batch, heads, seq_q, seq_k]; their tokens are the queries."""


class ModelFacts(Protocol):
    """Which model it is; `lens.capture.ModelInfo` has these."""

    @property
    def name(self) -> str:
        """Path or hub id."""

    @property
    def model_class(self) -> str:
        """Name of its class."""

    @property
    def n_layers(self) -> int:
        """Its layers."""

    @property
    def d_model(self) -> int:
        """Width of its residual stream."""


@dataclass(frozen=True, slots=True)
class Texts:
    """The texts of a run.

    Attributes:
        prompts: tokens of each prompt.
        new_tokens: the most tokens that are generated after each, 0 where none are.
    """

    prompts: tuple[int, ...]
    new_tokens: int = 0

    def owner(self, number: int) -> str:
        """A prompt, for messages."""
        which = f"prompt {number}" if len(self.prompts) > 1 else "the prompt"
        return f"{which} of {self.prompts[number]} tokens"


@dataclass(frozen=True, slots=True)
class Chosen:
    """The tokens of one pass that an edit names.

    Shapes:
        rows, columns: [n] int64, row by row
        positions: [n], in the text
        numbers: [n], of the prompts
    """

    rows: Tensor
    columns: Tensor
    positions: NDArray[np.int64]
    numbers: NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Target:
    """One edit at one site.

    Attributes:
        number: of the edit, from 0.
        site: where.
        heads: which heads (of several residual streams: which streams), None for all or where the
            site has none.
        units: which entries of the last axis, None for all.
        places: per prompt, which tokens.
        texts: the texts of the run.
    """

    number: int
    site: Site
    heads: tuple[int, ...] | None
    units: tuple[int, ...] | None
    places: tuple[Places, ...]
    texts: Texts

    @property
    def shape(self) -> tuple[int, ...]:
        """The axes of one token's values that are named."""
        shape = list(self.site.shape)
        if self.heads is not None:
            shape[0] = len(self.heads)
        if self.units is not None:
            shape[-1] = len(self.units)
        return tuple(shape)

    def pick(self, values: Tensor) -> Tensor:
        """Of values [n, *site.shape], the heads and units that are named: [n, *shape]."""
        if self.heads is not None:
            values = values[:, list(self.heads)]
        return values if self.units is None else values[..., list(self.units)]

    def put(self, values: Tensor, new: Tensor) -> Tensor:
        """Values [n, *site.shape] with others at the heads and units named; a new tensor."""
        if self.heads is None and self.units is None:
            return new
        made = values.clone()
        if self.units is None:
            made[:, list(self.heads or ())] = new
        elif self.heads is None:
            made[..., list(self.units)] = new
        else:
            made[:, torch.tensor(self.heads)[:, None], torch.tensor(self.units)] = new
        return made

    def chosen(self, span: Span) -> Chosen | None:
        """The tokens of a pass that are named, or None."""
        rows, columns, numbers = [], [], []
        prompts = span.prompt_numbers
        for row, (length, prompt) in enumerate(zip(span.lengths, span.prompts, strict=True)):
            places = self.places[prompts[row]]
            if places == ():
                continue
            named = selected(places, prompt, span.start, span.start + length)
            found = np.flatnonzero(named)
            if found.size:
                rows.append(np.full(found.size, row))
                columns.append(found)
                numbers.append(np.full(found.size, prompts[row]))
        if not rows:
            return None
        at = np.concatenate(columns)
        return Chosen(
            torch.from_numpy(np.concatenate(rows)),
            torch.from_numpy(at),
            at + span.start,
            np.concatenate(numbers),
        )

    def tokens(self) -> NDArray[np.bool_]:
        """[prompts, positions]: which tokens of the texts are named."""
        longest = max(self.texts.prompts) + self.texts.new_tokens
        named = np.zeros((len(self.places), longest), bool)
        for row, (places, prompt) in enumerate(zip(self.places, self.texts.prompts, strict=True)):
            if places == ():
                continue
            total = prompt + self.texts.new_tokens
            named[row, :total] = selected(places, prompt, 0, total)
        return named


def places_of(positions: Positions, texts: Texts) -> tuple[Places, ...]:
    """Positions per prompt, each inside its text.

    Raises:
        EditRangeError: outside.
        EditError: entries for another number of prompts.
    """
    read = read_positions(positions)
    if isinstance(read, PerPrompt):
        entries = tuple(read.entries)
        if len(entries) != len(texts.prompts):
            raise EditError(
                f"PerPrompt has {len(entries)} entries: the run has {len(texts.prompts)} prompts, "
                "give one for each, [] for a prompt that is left as it is"
            )
    else:
        entries = (read,) * len(texts.prompts)
    for number, places in enumerate(entries):
        check_positions_within(places, texts.prompts[number], texts.new_tokens, texts.owner(number))
    return entries


def check_numbers(
    numbers: Sequence[int] | None, n: int, what: str, owner: str
) -> tuple[int, ...] | None:
    """Heads, units or layers, each below n.

    Raises:
        EditRangeError: one is not.
    """
    if numbers is None:
        return None
    try:
        return tuple(check_index(each, n, what, owner) for each in numbers)
    except OutOfRangeError as error:
        raise EditRangeError(str(error)) from None


def check_layers(edit: Edit, model: ModelFacts) -> tuple[int, ...] | None:
    """The layers an edit names.

    Raises:
        EditRangeError: one is not there.
    """
    return check_numbers(numbers_of(edit.layers), model.n_layers, "layer", "this model")


def sites_of(edit: SiteEdit, claims: SiteClaims, model: ModelFacts) -> list[Site]:
    """The sites that an edit names, one for each layer.

    Raises:
        EditRangeError: a layer that is not there.
        EditError: a layer without that site, with the reason; or no layer has it.
    """
    name, layers = edit.site, check_layers(edit, model)
    found = {layer: site for (at, layer), site in claims.sites.items() if at == name}
    if None in found or (name in SITES and not SITES[name].per_layer):
        if layers is not None:
            raise EditError(f"{name} is not in a layer: the model has it once; leave layers out")
        if None not in found:
            raise EditError(f"this model has no {name}: {_reason(claims, name, None)}")
        return [found[None]]
    if not found:
        raise EditError(f"no layer of this model has {name}: {_first_reason(claims, name)}")
    have = sorted(layer for layer in found if layer is not None)
    for layer in layers or ():
        if layer not in found:
            raise EditError(
                f"layer {layer} has no {name}: {_reason(claims, name, layer)}; layers that have "
                f"it: {listed(have, 12)}"
            )
    named = [found[layer] for layer in (have if layers is None else layers)]
    for site in named:
        if site.fixed:
            raise EditError(f"{name} of layer {site.layer} cannot be edited: {site.fixed}")
    return named


def _reason(claims: SiteClaims, name: str, layer: int | None) -> str:
    return claims.reasons.get((name, layer), "the probe did not show it")


def _first_reason(claims: SiteClaims, name: str) -> str:
    reasons = [why for (at, _), why in claims.reasons.items() if at == name]
    return reasons[0] if reasons else "the probe did not show it"


def target_of(number: int, edit: SiteEdit, site: Site, texts: Texts) -> Target:
    """One edit at one of its sites.

    Raises:
        EditRangeError: a head, unit or position that is not there.
        EditError: heads of a site without heads, units of one without a fixed width.
    """
    title = site.name if site.layer is None else f"{site.name} of layer {site.layer}"
    heads, units = numbers_of(edit.heads), numbers_of(edit.units)
    streams, noun = numbers_of(edit.streams), "head"
    several = site.name in RESIDUALS and len(site.shape) > 1
    if streams is not None and not several:
        raise EditError(f"streams cannot be named: {title} has one stream")
    if several:
        if heads is not None:
            raise EditError(f"heads cannot be named: {title} has streams; name streams")
        heads, noun = streams, "stream"
    by_query = site.name in BY_QUERY
    if heads is not None and len(site.shape) < 2 and not by_query:
        raise EditError(f"heads cannot be named: {title} has no heads; use attn.z, or units")
    if units is not None and by_query:
        raise EditError(f"units cannot be named: the last axis of {title} is the keys")
    places = places_of(edit.positions, texts)
    if isinstance(edit, Patch):
        # A source has a known number of tokens: words and slices end with the prompt.
        places = tuple(
            each if isinstance(each, tuple) else tuple(positions_of(each, prompt, prompt))
            for each, prompt in zip(places, texts.prompts, strict=True)
        )
        if not any(places):
            raise EditRangeError(
                f"positions {text_of(read_positions(edit.positions))} name no token of a prompt"
            )
    return Target(
        number,
        site,
        check_numbers(heads, site.shape[0], noun, title),
        check_numbers(units, site.shape[-1], "unit", title),
        places,
        texts,
    )
