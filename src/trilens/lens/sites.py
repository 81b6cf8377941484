"""The sites that a caller names, read: which of them a model has in which layers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from trilens.axes import GATE_SITES, NOT_READ, SITE_ORDER, SITES, site_name
from trilens.caches.indices import check_index
from trilens.caches.storage import spell_layers
from trilens.errors import SiteError, UsageError
from trilens.models.sites.claims import SiteClaims
from trilens.models.sites.site import Site, SiteKey, title_of

__all__ = ["layers_of", "read_sites", "why_no_site"]


def layers_of(claims: SiteClaims) -> dict[str, tuple[int, ...]]:
    """Per site name the layers where it is proven; none for a site that the model has once."""
    proven = {name for name, _ in claims.sites if name not in NOT_READ}
    return {name: claims.layers(name) for name in sorted(proven, key=SITE_ORDER.__getitem__)}


def why_no_site(claims: SiteClaims, name: str, layer: int | None) -> str:
    """The sentence that says why a layer has not a site; "" where it has it."""
    if (name, layer) in claims.sites:
        return claims.sites[name, layer].unread
    if name in GATE_SITES and name not in SITES:
        return "it is read and not edited: capture with gates=True"
    return claims.reasons.get((name, layer), "the rules found no such place in this model")


def read_sites(
    names: Iterable[str],
    layers: Sequence[int],
    claims: SiteClaims,
    model: str,
    *,
    chosen: bool,
    n_layers: int,
) -> dict[SiteKey, Site]:
    """The sites of some names, by name and layer.

    Args:
        names: of `axes.SITES`, or other tools' names, which may name a layer.
        layers: layers asked for.
        claims: what is proven.
        model: the model's class, for messages.
        chosen: whether the caller named the layers: each of them then must have the site.
        n_layers: the model's layers.

    Raises:
        UsageError: no list of names, or a name that is unknown.
        SiteError: a site that is not proven in a layer asked for, or in none.
    """
    if isinstance(names, str) or not isinstance(names, Iterable):
        raise UsageError(f"sites {names!r} is not a list: give names, such as ['resid_mid']")
    found: dict[SiteKey, Site] = {}
    for text in names:
        name, own = site_name(text)
        if own is not None:
            check_index(own, n_layers, "layer", "this model")
        at: Sequence[int | None] = layers if own is None else [own]
        if name in SITES and not SITES[name].per_layer:
            at = [None]
        have = {(name, layer): claims.sites.get((name, layer)) for layer in at}
        have = {key: None if site is None or site.unread else site for key, site in have.items()}
        missing = [key for key, site in have.items() if site is None]
        if missing and (chosen or own is not None or len(missing) == len(have)):
            raise SiteError(_refusal(missing[0], claims, model))
        found.update({key: site for key, site in have.items() if site is not None})
    return found


def _refusal(key: SiteKey, claims: SiteClaims, model: str) -> str:
    name, layer = key
    proven = layers_of(claims).get(name)
    where = f"; it is proven in {spell_layers(proven)}" if proven else ""
    return (
        f"{title_of(key)} of {model} is not there: {why_no_site(claims, name, layer)}{where}; "
        "lens.site_layers lists what is proven"
    )
