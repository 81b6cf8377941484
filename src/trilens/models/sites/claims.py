"""All sites of a model: what the rules proved on one probe, and why the others are not there."""

from __future__ import annotations

from dataclasses import dataclass, field

from trilens.models.anatomy import Anatomy
from trilens.models.gates.claims import GateClaims
from trilens.models.gates.events import GateEvents
from trilens.models.gates.site import Layout
from trilens.models.sites.site import Site, SiteKey, Tap
from trilens.models.trace import Trace

__all__ = ["SiteClaims", "find_sites"]


@dataclass(frozen=True, slots=True)
class SiteClaims:
    """The sites of a model.

    Attributes:
        sites: what is proven, by name and layer.
        reasons: for what is not, why, in a sentence.
    """

    sites: dict[SiteKey, Site] = field(default_factory=dict)
    reasons: dict[SiteKey, str] = field(default_factory=dict)


def find_sites(trace: Trace, events: GateEvents, anatomy: Anatomy, gates: GateClaims) -> SiteClaims:
    """Apply all rules to one probe."""
    sites: dict[SiteKey, Site] = {}
    layout = Layout("batched", axis=1) if anatomy.batch_first else Layout("seq_first", axis=0)
    for layer, block in enumerate(anatomy.blocks):
        tap = Tap("output", block.module, index=block.output)
        site = Site("resid_post", layer, tap, layout, (anatomy.d_model,))
        sites[site.key] = site
    return SiteClaims(sites)
