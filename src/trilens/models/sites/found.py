"""What the rules have claimed of one layer so far."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import nn

from trilens.models.gates.site import Layout
from trilens.models.sites.site import Site, SiteKey, Tap

__all__ = ["Found"]


@dataclass(slots=True)
class Found:
    """Sites and refusals of one layer; the first word on a site stands.

    Attributes:
        layer: the layer, or None for what the model has once.
        absent: refused ones that are no limit of the rules: the model has no such place.
    """

    layer: int | None
    sites: dict[SiteKey, Site] = field(default_factory=dict)
    reasons: dict[SiteKey, str] = field(default_factory=dict)
    absent: set[SiteKey] = field(default_factory=set)

    def claim(
        self,
        name: str,
        tap: Tap,
        layout: Layout,
        shape: tuple[int, ...],
        *,
        write: Tap | None = None,
        projection: nn.Module | None = None,
        overwritten: bool = False,
        fixed: str = "",
        closed: float = 0.0,
        unread: str = "",
    ) -> None:
        """A site is proven."""
        site = Site(
            name,
            self.layer,
            tap,
            layout,
            shape,
            write,
            projection,
            overwritten,
            fixed,
            closed,
            unread,
        )
        if site.key not in self.reasons:
            self.sites.setdefault(site.key, site)

    def refuse(self, names: Iterable[str], reason: str, *, absent: bool = False) -> None:
        """Sites are not proven, and why; `absent`: because there is no such place."""
        for name in names:
            key = name, self.layer
            if key in self.sites or key in self.reasons:
                continue
            self.reasons[key] = reason
            if absent:
                self.absent.add(key)
