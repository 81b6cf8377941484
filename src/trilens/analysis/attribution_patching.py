"""Patching estimated by gradients: a whole sweep for two passes forward and one back.

The effect of putting a donor's value x' in the place of x is, to first order, (x' − x) · ∂m/∂x.
Integrated gradients follow the way from x to x' in steps, layer by layer, and say by how much the
sum of their effects misses what patching the whole layer does.

Source: attribution patching, Nanda 2023 and Syed et al. 2023 (arXiv 2310.10348); integrated
gradients, Sundararajan et al. 2017 (1703.01365).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import SupportsIndex

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trilens.analysis.patch_result import By, Direction, PatchSweep
from trilens.analysis.patching import Runs, read_runs
from trilens.analysis.sweeping import measure
from trilens.edits import Replace
from trilens.lens.capture import Capture
from trilens.lens.gradients import Metric
from trilens.lens.lens import Lens
from trilens.models.tokens import PromptLike
from trilens.numbers import at_least
from trilens.progress import Progress, Step

__all__ = ["attribution_patch", "integrated_gradients"]


def attribution_patch(
    lens: Lens,
    clean: PromptLike,
    corrupted: PromptLike,
    metric: Metric,
    *,
    site: str = "resid_pre",
    layers: Iterable[SupportsIndex] | None = None,
    by: By = "position",
    direction: Direction = "denoise",
) -> PatchSweep:
    """What `patch_sweep` would give, to first order in the difference of the two runs.

    Args and errors are those of `patch_sweep`. How well it ranks the points can be asked with
    `trilens.rank_correlation(estimate.values.ravel(), exact.values.ravel())`.

    Memory
        As `Lens.gradients`.
    """
    runs = read_runs(
        lens, clean, corrupted, metric, site=site, layers=layers, direction=direction, by=by
    )
    source = runs.aligned()
    found = lens.gradients(runs.prompt, metric, sites=[runs.site], layers=runs.layers).gradients
    effects = [
        _effects(_delta(runs, source, layer), found[runs.site, layer], by) for layer in runs.layers
    ]
    return _sweep(runs, np.stack(effects), by, direction, "gradient", None)


def integrated_gradients(
    lens: Lens,
    clean: PromptLike,
    corrupted: PromptLike,
    metric: Metric,
    *,
    site: str = "resid_pre",
    layers: Iterable[SupportsIndex] | None = None,
    by: By = "position",
    direction: Direction = "denoise",
    steps: SupportsIndex = 16,
    progress: Progress | None = None,
) -> PatchSweep:
    """As `attribution_patch`, with the mean gradient on the way from one run to the other.

    `error` of the result says, per layer, by how much the effects miss in sum what putting in the
    whole layer does.

    Args:
        steps: gradients per layer, at the midpoints of as many equal steps.
        progress: called after each gradient.
    """
    n = at_least(1, steps, "steps")
    runs = read_runs(
        lens, clean, corrupted, metric, site=site, layers=layers, direction=direction, by=by
    )
    source = runs.aligned()
    effects, errors, done = [], [], 0
    for layer in runs.layers:
        start, delta = runs.receiver.sites[runs.site, layer], _delta(runs, source, layer)
        mean = torch.zeros_like(delta, dtype=torch.promote_types(delta.dtype, torch.float32))
        for step in range(n):
            at = start + (step + 0.5) / n * delta
            edit = Replace(runs.site, at, layers=layer)
            there = lens.gradients(
                runs.prompt, metric, sites=[runs.site], layers=[layer], edits=edit
            )
            mean += there.gradients[runs.site, layer] / n
            done += 1
            if progress is not None:
                progress(Step(done, n * len(runs.layers), f"gradients of layer {layer}"))
        whole = Replace(runs.site, start + delta, layers=layer)
        reached = measure(metric, lens.capture(runs.prompt, residual=None, edits=whole))
        effects.append(_effects(delta, mean, by))
        errors.append(float(abs(effects[-1].sum() - (reached - runs.base))))
    return _sweep(runs, np.stack(effects), by, direction, f"integrated, {n} steps", tuple(errors))


def _delta(runs: Runs, source: Capture, layer: int) -> Tensor:
    """What a patch of the whole layer changes, [seq, …]; 0 where a token has no partner."""
    return source.sites[runs.site, layer] - runs.receiver.sites[runs.site, layer]


def _effects(delta: Tensor, gradient: Tensor, by: By) -> NDArray[np.float64]:
    # PROMOTE: terms of both signs cancel.
    product = delta.double() * gradient.double()
    over = tuple(range(1, product.dim())) if by == "position" else (0, 2)
    return np.asarray(product.sum(over).cpu())


def _sweep(
    runs: Runs,
    effects: NDArray[np.float64],
    by: By,
    direction: Direction,
    method: str,
    error: tuple[float, ...] | None,
) -> PatchSweep:
    values = runs.base + effects
    if by == "position":
        paired = [here for here, _ in runs.pairs]
        alone = np.setdiff1d(np.arange(values.shape[1]), paired)
        values[:, alone] = math.nan
    return PatchSweep(
        site=runs.site,
        by=by,
        direction=direction,
        method=method,
        tokens=tuple(runs.receiver.tokens),
        layers=runs.layers,
        places=tuple(range(values.shape[1])),
        values=values,
        base=runs.base,
        target=runs.target,
        error=error,
    )
