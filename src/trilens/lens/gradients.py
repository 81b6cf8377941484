"""Gradients of a metric at sites: one pass forward and one back, parameters frozen."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from trilens.caches.derived import Derived, HeadOut
from trilens.caches.sites import SiteCache
from trilens.errors import MetricError
from trilens.models.sites.claims import SiteClaims
from trilens.models.sites.head_out import projection_weight
from trilens.models.sites.site import Site, SiteKey
from trilens.models.tokens import Prompt
from trilens.taps.recording import CaptureRequest, Recording
from trilens.taps.step_reads import reading_steps

__all__ = ["Gradients", "Metric", "gradients_of", "scalar_of"]

Metric = Callable[[Tensor], Tensor]
"""Logits [seq, vocab] of one prompt → a scalar, differentiable."""


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Gradients:
    """A metric's gradients at sites of one prompt, with the sites' values.

    Attributes:
        tokens: the tokens as text.
        token_ids: [seq], on the CPU.
        metric: its value.
        values: the sites' values, as `Capture.sites` has them.
        gradients: d metric / d value, of the same axes; 0 where the metric does not depend on a
            site.
    """

    tokens: list[str]
    token_ids: Tensor
    metric: float
    values: SiteCache
    gradients: SiteCache

    def __repr__(self) -> str:
        return f"Gradients(metric {self.metric:.6g}, {self.values!r})"


def scalar_of(metric: Metric, logits: Tensor) -> Tensor:
    """What a metric makes of logits [seq, vocab], given in float32 at least.

    Raises:
        MetricError: no scalar tensor, one that is not finite, or one that does not depend on them.
    """
    # PROMOTE: a difference of half-precision logits has three digits.
    value = metric(logits.to(torch.promote_types(logits.dtype, torch.float32)))
    name = getattr(metric, "__name__", type(metric).__name__)
    if not isinstance(value, Tensor):
        raise MetricError(f"metric {name} gave a {type(value).__name__}: a scalar tensor is needed")
    if value.numel() != 1 or not value.is_floating_point():
        raise MetricError(
            f"metric {name} gave {str(value.dtype).removeprefix('torch.')} {list(value.shape)}: "
            "one floating-point number is needed"
        )
    if not bool(value.isfinite()):
        raise MetricError(f"metric {name} is {float(value)}: a finite number is needed")
    if logits.requires_grad and not value.requires_grad:
        raise MetricError(f"metric {name} does not depend on the logits: it has no gradient")
    return value.reshape(())


def gradients_of(
    run: Callable[[CaptureRequest], Recording],
    prompt: Prompt,
    wanted: CaptureRequest,
    claims: SiteClaims,
    metric: Metric,
) -> Gradients:
    """Run a pass forward and back.

    Args:
        run: a pass that keeps what it is asked for, in the graph.
        prompt: its one prompt.
        wanted: its request, with the sites.
        claims: the model's sites.
        metric: of the logits.

    Raises:
        MetricError: as `scalar_of`.
    """
    asked = replace(wanted, sites={**wanted.sites, **_outputs(wanted, claims)})
    recording = reading_steps(lambda: run(asked))
    if recording.logits is None:
        raise MetricError("the model gives no logits: a metric of them has no value")
    held = {key: each for key, each in recording.sites.items() if isinstance(each, Tensor)}
    value = scalar_of(metric, recording.logits[0])
    found = torch.autograd.grad(value, list(held.values()), allow_unused=True)
    gradients = {
        key: (torch.zeros_like(held[key]) if grad is None else grad)[0]
        for key, grad in zip(held, found, strict=True)
    }
    values = {key: _value(held[key].detach()[0], site) for key, site in wanted.sites.items()}
    return Gradients(
        tokens=list(prompt.strings),
        token_ids=prompt.ids,
        metric=float(value.detach()),
        values=SiteCache.from_values(values),
        gradients=SiteCache.from_values(
            {key: _gradient(key, site, gradients) for key, site in wanted.sites.items()}
        ),
    )


def _outputs(wanted: CaptureRequest, claims: SiteClaims) -> dict[SiteKey, Site]:
    """attn.out of the layers whose attn.head_out is asked: each head's gradient is its sum's."""
    keys = [("attn.out", site.layer) for site in wanted.sites.values() if site.projection]
    return {key: claims.sites[key] for key in keys}


def _gradient(key: SiteKey, site: Site, gradients: dict[SiteKey, Tensor]) -> Tensor:
    if site.projection is None:
        return gradients[key]
    whole = gradients["attn.out", site.layer]
    return whole[:, None].expand(-1, site.shape[0], -1)


def _value(value: Tensor, site: Site) -> Tensor | Derived:
    if site.projection is None:
        return value
    return HeadOut(value, projection_weight(site.projection, value.shape[1] * value.shape[2]))
