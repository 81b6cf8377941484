"""Whether attention in a model's own code is what was followed: weights times values."""

from __future__ import annotations

from torch import finfo

from trilens.models.trace import AttentionSite

__all__ = ["why_not_inline"]

_EPS = 64
"""Roundings of the largest term that products of weights and values may differ by."""


def why_not_inline(site: AttentionSite) -> str:
    """Why a model's own attention is not proven; "" where it is."""
    z = site.output
    if site.error is None or z is None:
        return f"{site.path} computes attention in a form that shows no output by head"
    if not site.error <= _EPS * finfo(z.dtype).eps:
        return (
            f"{site.path} computes attention in its own code, and weights times values is not "
            f"what it goes on with: they differ by {site.error:.1g} of its largest terms"
        )
    return ""
