"""Activation patching: values of one run put into another, point by point, and what it does.

Two prompts that differ in little, a clean and a corrupted one. Denoising runs the corrupted prompt
and puts clean values into it: what restores the metric suffices. Noising runs the clean prompt and
puts corrupted values into it: what destroys it is needed.

Source: Vig et al. 2020 (arXiv 2004.12265), Meng et al. 2022 (2202.05262), Heimersheim and Nanda
2024 (2404.15255).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import SupportsIndex

import numpy as np
from torch import Tensor

from trilens.analysis.patch_result import By, Direction, PatchSweep
from trilens.analysis.sweeping import measure, measure_points, prompt_again
from trilens.axes import SITES, site_name
from trilens.caches.derived import Derived
from trilens.caches.indices import check_positions
from trilens.caches.sites import SiteCache
from trilens.edits import Edit, Patch, PerPrompt
from trilens.errors import MetricError, SiteError, UsageError
from trilens.lens.capture import Capture
from trilens.lens.gradients import Metric
from trilens.lens.lens import Lens
from trilens.lens.parts import Parts
from trilens.models.tokens import PromptLike
from trilens.numbers import at_least
from trilens.progress import Progress

__all__ = ["Runs", "patch_sweep", "read_runs"]


@dataclass(frozen=True, slots=True, eq=False)
class Runs:
    """The two runs of a sweep, with the values of one site.

    Attributes:
        receiver: the run that is patched; `prompt` gives it again.
        donor: the run whose values are put in.
        pairs: (position in the receiver, in the donor) of tokens that stand for each other.
        base: the metric of the receiver; `target` that of the donor.
    """

    site: str
    layers: tuple[int, ...]
    prompt: PromptLike
    receiver: Capture
    donor: Capture
    pairs: tuple[tuple[int, int], ...]
    base: float
    target: float

    def aligned(self) -> Capture:
        """The donor's values at the receiver's tokens; its own where a token has no partner."""
        here, there = (list(each) for each in zip(*self.pairs, strict=True))
        values: dict[tuple[str, int | None], Tensor | Derived] = {}
        for layer in self.layers:
            made = self.receiver.sites[self.site, layer].clone()
            made[here] = self.donor.sites[self.site, layer][there]
            values[self.site, layer] = made
        return replace(self.receiver, parts=Parts(sites=SiteCache.from_values(values)))


def read_runs(
    lens: Lens,
    clean: PromptLike,
    corrupted: PromptLike,
    metric: Metric,
    *,
    site: str,
    layers: Iterable[SupportsIndex] | None,
    direction: Direction,
    by: By = "position",
) -> Runs:
    """Run both prompts once, keeping the site.

    Raises:
        UsageError: an option that is none, or prompts without a token in common.
        SiteError: a site without layers, without heads where they are asked, or not proven.
        MetricError: no scalar, or the same value in both runs.
    """
    name, own = site_name(site)
    if direction not in ("denoise", "noise"):
        raise UsageError(f"direction {direction!r} is not an option: 'denoise' or 'noise'")
    if by not in ("position", "head"):
        raise UsageError(f"by {by!r} is not an option: 'position' or 'head'")
    if name in SITES and (not SITES[name].per_layer or name in ("attn.scores", "attn.pattern")):
        raise SiteError(
            f"{name} is not swept over layers and tokens: patch a site such as resid_pre"
        )
    chosen = layers if own is None else [own]
    captures = [
        lens.capture(prompt, residual=None, sites=[name], layers=chosen)
        for prompt in (clean, corrupted)
    ]
    donor, receiver = captures if direction == "denoise" else reversed(captures)
    prompt = prompt_again(lens, corrupted if direction == "denoise" else clean, receiver)
    pairs = receiver.align(donor).pairs
    if not pairs:
        raise UsageError("no token of one prompt stands for one of the other: nothing to patch")
    held = receiver.sites.layers(name)
    if by == "head" and receiver.sites[name, held[0]].ndim != 3:
        raise SiteError(f"{name} has no heads: sweep by head over attn.z")
    base, target = (measure(metric, each) for each in (receiver, donor))
    if base == target:
        raise MetricError(
            f"the metric is {base:g} in both runs: no effect can be told; take prompts or a metric "
            "in which they differ"
        )
    return Runs(name, held, prompt, receiver, donor, pairs, base, target)


def patch_sweep(
    lens: Lens,
    clean: PromptLike,
    corrupted: PromptLike,
    metric: Metric,
    *,
    site: str = "resid_pre",
    layers: Iterable[SupportsIndex] | None = None,
    positions: Iterable[SupportsIndex] | None = None,
    by: By = "position",
    direction: Direction = "denoise",
    batch_size: SupportsIndex = 16,
    progress: Progress | None = None,
) -> PatchSweep:
    """Patch each layer and token, or each layer and head, by itself.

    Prompts of different lengths are aligned; tokens without a partner are left out. Ctrl-C ends
    the sweep: what was run until then is returned, `complete` is False.

    Args:
        lens: the model.
        clean: prompt, as `Lens.capture` takes it.
        corrupted: the other prompt.
        metric: of the logits [seq, vocab] of the prompt that is run; a scalar.
        site: any that has one value per token and layer; attn.z for heads.
        layers: layer numbers; all that have the site where not given.
        positions: of the prompt that is run; all where not given.
        by: one token of a layer at a time, or one head with all its tokens.
        direction: "denoise" runs the corrupted prompt, "noise" the clean one.
        batch_size: points in one forward pass.
        progress: called after each pass with the points done.

    Raises:
        MetricError: no finite scalar, or the same one in both runs.
        SiteError: a site that is not proven, has no layers, or no heads where they are asked.
        UsageError: an option that is none, or prompts without a token in common.
    """
    size = at_least(1, batch_size, "batch_size")
    runs = read_runs(
        lens, clean, corrupted, metric, site=site, layers=layers, direction=direction, by=by
    )
    places = _places(runs, positions, by)
    paired = {here for here, _ in runs.pairs}
    values = np.full((len(runs.layers), len(places)), math.nan)
    points = [
        (i, j)
        for i in range(len(runs.layers))
        for j, place in enumerate(places)
        if by == "head" or place in paired
    ]
    source = runs.aligned()
    found = measure_points(
        lens, runs.prompt, metric, points,
        lambda batch: _edits(runs, source, batch, places, by),
        batch_size=size, what=f"patches of {runs.site}", progress=progress,
    )  # fmt: skip
    for (i, j), value in zip(points, found, strict=False):
        values[i, j] = value
    return PatchSweep(
        site=runs.site,
        by=by,
        direction=direction,
        method="exact",
        tokens=tuple(runs.receiver.tokens),
        layers=runs.layers,
        places=places,
        values=values,
        base=runs.base,
        target=runs.target,
        complete=len(found) == len(points),
    )


def _places(runs: Runs, positions: Iterable[SupportsIndex] | None, by: By) -> tuple[int, ...]:
    if by == "head":
        if positions is not None:
            raise UsageError("positions are of a sweep by position: a head is patched as a whole")
        return tuple(range(runs.receiver.sites[runs.site, runs.layers[0]].shape[1]))
    n = len(runs.receiver.tokens)
    if positions is None:
        return tuple(range(n))
    return tuple(check_positions(positions, n, "position", f"a prompt of {n} tokens"))


def _edits(
    runs: Runs,
    source: Capture,
    batch: Sequence[tuple[int, int]],
    places: Sequence[int],
    by: By,
) -> list[Edit]:
    """The patches of a batch, each row its own: one edit per layer, or per head of a layer."""
    grouped: dict[tuple[int, int | None], list[list[int]]] = {}
    for row, (i, j) in enumerate(batch):
        key = runs.layers[i], places[j] if by == "head" else None
        rows = grouped.setdefault(key, [[] for _ in batch])
        rows[row] = [here for here, _ in runs.pairs] if by == "head" else [places[j]]
    return [
        Patch(runs.site, layers=layer, heads=head, source=source, positions=PerPrompt(rows))
        for (layer, head), rows in grouped.items()
    ]
