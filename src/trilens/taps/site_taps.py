"""What a pass does at its sites: edits first, in their order, then what is kept.

An edit gives a new tensor, which goes on in the place of the model's own; no tensor of the model
is written into. A site whose edits all leave it as it is hands on the very tensor it was given.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from trilens.axes import SITE_ORDER
from trilens.caches.patterns.protocol import Pattern
from trilens.models.sites.head_out import by_head
from trilens.models.sites.site import Site, SiteKey, Tap
from trilens.models.sites.values import read_value, replace_tensor, write_value
from trilens.models.trace import tensors_in
from trilens.taps.edits import Compiled
from trilens.taps.hooks import Hooks
from trilens.taps.recording import CaptureRequest
from trilens.taps.span import Span

__all__ = ["Pass", "SiteTaps", "Spot", "spots_of"]


@dataclass(frozen=True, slots=True, eq=False)
class Spot:
    """What is done at one tap.

    Attributes:
        tap: where.
        site: whose value passes there.
        edit: whether edits of the site are applied here.
        record: whether the value is kept.
    """

    tap: Tap
    site: Site
    edit: bool
    record: bool


def spots_of(sites: Iterable[Site], edits: Compiled, *, gradients: bool = False) -> list[Spot]:
    """One spot per site, or two where a site is written at another tap than it is read at.

    Where gradients are asked, a site is read where it is written: not all that the model makes of
    a residual stream goes through the norm that it can be read at.

    They come in the order in which a block passes its sites, so that of two sites that are one
    tensor the earlier one is done first.
    """
    places: dict[SiteKey, Site] = {site.key: site for site in sites}
    recorded = set(places)
    for key, actions in edits.actions.items():
        places.setdefault(key, actions[0].site)
    found = []
    for key, site in places.items():
        edit, record = key in edits.actions, key in recorded
        if gradients or site.write_tap == site.tap:
            found.append(Spot(site.write_tap, site, edit, record))
            continue
        if edit:
            found.append(Spot(site.write_tap, site, edit=True, record=False))
        if record:
            found.append(Spot(site.tap, site, edit=False, record=True))
    return sorted(found, key=lambda spot: SITE_ORDER[spot.site.name])


class Pass(Protocol):
    """What the taps need to know of the running pass."""

    layer: int | None
    span: Span
    gradients: bool
    request: CaptureRequest

    def mine(self) -> bool:
        """Whether this thread's pass is running."""

    def keep_site(self, key: SiteKey, value: Tensor) -> None:
        """Note a site's value."""

    def keep_pattern(self, key: SiteKey, pattern: Pattern) -> None:
        """Note a layer's attention pattern as a site's value."""


class SiteTaps:
    """The hooks of a pass at the inputs and outputs of modules that sites name."""

    def __init__(self, run: Pass, sites: Iterable[Site], edits: Compiled) -> None:
        self.run = run
        self.edits = edits
        self.spots = spots_of(sites, edits, gradients=run.gradients)
        self.counts: dict[tuple[str, int | None, nn.Module], int] = {}

    def place_inputs(self, hooks: Hooks) -> None:
        """Hook what goes into modules; to be called after the hooks that begin a block."""
        for module, spots in self._by_module("input").items():
            hooks.before(module, self._before(module, spots), with_kwargs=True)

    def place_outputs(self, hooks: Hooks) -> None:
        """Hook what modules give; to be called before the hooks that end a block."""
        for module, spots in self._by_module("output").items():
            hooks.after(module, self._after(module, spots))

    def begin(self) -> None:
        """Forget what was counted: another pass begins."""
        self.counts.clear()

    def at(self, spot: Spot, tensor: Tensor, span: Span | None = None) -> Tensor:
        """Edit and keep one site's value; the tensor that the model goes on with.

        Args:
            spot: the site, and what is done there.
            tensor: what passes by.
            span: the tokens of the tensor, where they are not the pass's.
        """
        run, site, span = self.run, spot.site, span or self.run.span
        rows, columns = len(span.lengths), span.seq
        changed = self._edited(spot, read_value(tensor, site, rows, columns), span)
        if changed is not None:
            tensor = write_value(tensor, site, changed)
        if not spot.record:
            return tensor
        value = read_value(tensor, site, rows, columns)
        if not run.gradients:
            # What the model is known to write into later is copied.
            run.keep_site(site.key, value.clone() if site.overwritten else value)
            return tensor
        # Parameters are frozen: the graph begins at the first site. The model goes on with a copy,
        # since it may write into what it holds.
        value = value if value.requires_grad else value.detach().requires_grad_()
        run.keep_site(site.key, value)
        return write_value(tensor, site, value.clone())

    def _by_module(self, event: str) -> dict[nn.Module, list[Spot]]:
        found: dict[nn.Module, list[Spot]] = {}
        for spot in self.spots:
            split = spot.site.projection is not None and spot.edit
            where = "output" if split else spot.tap.event
            if where == event:
                found.setdefault(spot.tap.module, []).append(spot)
        return found

    def _live(self, event: str, module: nn.Module, spots: list[Spot]) -> list[Spot]:
        """The spots of the layer that runs now, at this call of the module."""
        layer = self.run.layer
        place = event, layer, module
        number = self.counts.get(place, 0)
        self.counts[place] = number + 1
        return [s for s in spots if s.site.layer == layer and s.tap.order == number]

    def _before(self, module: nn.Module, spots: list[Spot]) -> Callable[..., Any]:
        def before(_module: nn.Module, args: Any, kwargs: Any) -> Any:
            if not self.run.mine():
                return None
            given, split = (args, kwargs), len(list(tensors_in(args)))
            for spot in self._live("input", module, spots):
                index = spot.tap.index
                within, place = (0, index) if index < split else (1, index - split)
                tensor = list(tensors_in(given[within]))[place]
                new = self.at(spot, tensor)
                if new is not tensor:
                    made = replace_tensor(given[within], place, new)
                    given = (made, given[1]) if within == 0 else (given[0], made)
            return None if given[0] is args and given[1] is kwargs else given

        return before

    def _after(self, module: nn.Module, spots: list[Spot]) -> Callable[..., Any]:
        def after(_module: nn.Module, args: Any, output: Any) -> Any:
            if not self.run.mine():
                return None
            given = output
            for spot in self._live("output", module, spots):
                if spot.site.projection is not None:
                    given = self._heads(spot, spot.site.projection, next(tensors_in(args)), given)
                    continue
                tensor = list(tensors_in(given))[spot.tap.index]
                new = self.at(spot, tensor)
                if new is not tensor:
                    given = replace_tensor(given, spot.tap.index, new)
            return None if given is output else given

        return after

    def _heads(self, spot: Spot, projection: nn.Module, merged: Tensor, output: Tensor) -> Tensor:
        """An edit of what single heads add: the output changes by as much as their sum does."""
        run = self.run
        rows = read_value(merged, spot.site, len(run.span.lengths), run.span.seq)
        parts = by_head(rows, projection)
        changed = self._edited(spot, parts, run.span)
        if changed is not None:
            output = output + (changed - parts).sum(-2).to(output.dtype).reshape(output.shape)
        if spot.record:
            run.keep_site(spot.site.key, rows)
        return output

    def _edited(self, spot: Spot, value: Tensor, span: Span) -> Tensor | None:
        """What the edits of a spot make of a value; None where they leave it as it is."""
        return self.edits.apply(spot.site.key, value, span) if spot.edit else None
