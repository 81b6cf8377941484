"""Sweeps of edits over layers and heads: ablations, knockouts, steering by dose.

Source: ablation by means, Wang et al. 2022 (arXiv 2211.00593); knockouts of attention edges, Geva
et al. 2023 (2304.14767); steering vectors, Turner et al. 2023 (2308.10248).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal, SupportsIndex

from torch import Tensor

from trilens.analysis.effect_sweep import EffectSweep, SweepPoint, swept
from trilens.axes import SITES, site_name
from trilens.caches.indices import check_index
from trilens.edits import Ablate, Edit, Knockout, PerPrompt, Steer
from trilens.edits.positions import Positions
from trilens.edits.values import SiteSource, TensorLike, read_number
from trilens.errors import SiteError, UsageError, ValueRangeError
from trilens.lens.gradients import Metric
from trilens.lens.lens import Lens
from trilens.models.encoded import each_prompt
from trilens.models.tokens import PromptLike
from trilens.progress import Progress

__all__ = ["ablation_sweep", "dose_response", "knockout_sweep"]


def ablation_sweep(
    lens: Lens,
    prompts: Iterable[PromptLike],
    metric: Metric,
    *,
    site: str = "attn.z",
    layers: Iterable[SupportsIndex] | None = None,
    by: Literal["head", "layer"] = "head",
    method: Literal["mean", "zero"] = "mean",
    reference: TensorLike | SiteSource | Sequence[SiteSource] | None = None,
    batch_size: SupportsIndex = 16,
    progress: Progress | None = None,
) -> EffectSweep:
    """Ablate each head, or each layer, by itself, at all tokens.

    Ctrl-C ends the sweep: the mean is over the prompts that were run with every point, and
    `complete` is False.

    Args:
        lens: the model.
        prompts: as `Lens.capture_many` takes them.
        metric: of the logits [seq, vocab] of one prompt; a scalar.
        site: attn.z for heads; mlp.out, attn.out, mixer.out … for layers.
        layers: layer numbers; all that have the site where not given.
        by: one head of a layer at a time, or the whole layer.
        method: put in the mean over a reference's tokens, or zeros.
        reference: of "mean": captures that hold the site, or a tensor [tokens, …] for one layer;
            the prompts themselves where not given.
        batch_size: points in one forward pass.
        progress: called after each pass with the points done.

    Raises:
        MetricError: no finite scalar.
        SiteError: a site that is not proven in the layers, or has no heads where they are asked.
        UsageError: an option that is none, or no prompts.
        EditError: a reference that does not fit.
    """
    name, chosen = _chosen(lens, site, layers)
    if by not in ("head", "layer"):
        raise UsageError(f"by {by!r} is not an option: 'head' or 'layer'")
    if method not in ("mean", "zero"):
        raise UsageError(f"method {method!r} is not an option: 'mean' or 'zero'")
    if isinstance(prompts, str):
        raise UsageError("prompts is one text: give a list of prompts")
    given = list(each_prompt(prompts))
    if not given:
        raise ValueRangeError("prompts is empty: give at least one")
    means: dict[int, Any] = dict.fromkeys(chosen, reference)
    if method == "mean" and reference is None:
        means = _means(lens, given, name, chosen)

    def edits_of(batch: Sequence[SweepPoint]) -> list[Edit]:
        return [
            Ablate(
                name,
                layers=layer,
                heads=head,
                method=method,
                reference=means[layer],
                positions=where,
            )
            for (layer, head), where in _rows(batch, None)
        ]

    points = _by_head(lens, name, chosen) if by == "head" else [(each, None) for each in chosen]
    return swept(
        lens, given, metric, points, edits_of,
        title=f"{method} ablation of {name}", over=by, batch_size=batch_size, progress=progress,
    )  # fmt: skip


def knockout_sweep(
    lens: Lens,
    prompt: PromptLike,
    metric: Metric,
    *,
    queries: Positions = None,
    keys: Positions = None,
    layers: Iterable[SupportsIndex] | None = None,
    by: Literal["head", "layer"] = "head",
    batch_size: SupportsIndex = 16,
    progress: Progress | None = None,
) -> EffectSweep:
    """Cut the edges from queries to keys in each head, or each layer, by itself.

    Args:
        lens: the model.
        prompt: as `Lens.capture` takes it.
        metric: of the logits [seq, vocab]; a scalar.
        queries: tokens that no longer see the keys, as `Knockout` takes them.
        keys: tokens that are no longer seen; in a recurrent layer, those that write nothing.
        layers: layer numbers; where not given, those with attention, and by layer and without
            queries the recurrent ones too.
        by: one head of a layer at a time, or the whole layer.
        batch_size: points in one forward pass.
        progress: called after each pass with the points done.

    Raises:
        MetricError: no finite scalar.
        EditError: no queries and no keys, positions that are not there, or a layer without edges.
        UsageError: an option that is none, or heads of a model without attention.
    """
    if by not in ("head", "layer"):
        raise UsageError(f"by {by!r} is not an option: 'head' or 'layer'")
    own = Knockout(queries=queries, keys=keys)  # refuses what cannot be read
    having = set(lens.attention_layers)
    if by == "layer" and queries is None:
        having |= set(lens.state_layers)
    chosen = _layers(lens, layers) if layers is not None else tuple(sorted(having))
    if not chosen:
        raise UsageError("no layer of this model has attention whose edges can be cut")

    def edits_of(batch: Sequence[SweepPoint]) -> list[Edit]:
        made: list[Edit] = []
        for (layer, head), rows in _grouped(batch).items():
            ends = [
                None
                if where is None
                else PerPrompt([where if i in rows else [] for i in range(len(batch))])
                for where in (own.queries, own.keys)
            ]
            made.append(Knockout(layers=layer, heads=head, queries=ends[0], keys=ends[1]))
        return made

    points = _by_head(lens, "attn.z", chosen) if by == "head" else [(i, None) for i in chosen]
    return swept(
        lens, [prompt], metric, points, edits_of,
        title="knockout of attention edges", over=by, batch_size=batch_size, progress=progress,
    )  # fmt: skip


def dose_response(
    lens: Lens,
    prompt: PromptLike,
    vector: TensorLike,
    metric: Metric,
    *,
    scales: Iterable[float],
    site: str = "resid_post",
    layers: Iterable[SupportsIndex] | None = None,
    positions: Positions = None,
    batch_size: SupportsIndex = 16,
    progress: Progress | None = None,
) -> EffectSweep:
    """Steer with a vector at each layer and scale by itself.

    Args:
        lens: the model.
        prompt: as `Lens.capture` takes it.
        vector: as `Steer` takes it: [width], or [heads, width].
        metric: of the logits [seq, vocab]; a scalar.
        scales: factors on the vector, distinct; 0 is the run without edits.
        site: where the vector is added.
        layers: layer numbers; all that have the site where not given.
        positions: as `Steer` takes them; all tokens where not given.
        batch_size: points in one forward pass.
        progress: called after each pass with the points done.

    Raises:
        MetricError: no finite scalar.
        SiteError: a site that is not proven in the layers.
        ValueRangeError: no scales, or one twice.
        EditError: a vector that does not fit, a scale that is no finite number, or positions that
            are not there.
    """
    name, chosen = _chosen(lens, site, layers)
    doses = tuple(read_number(each, "scale") for each in scales)
    if not doses or len(set(doses)) < len(doses):
        raise ValueRangeError(f"scales {list(doses)} are empty or not distinct: name each once")
    points = [(layer, dose) for layer in chosen for dose in doses]

    def edits_of(batch: Sequence[SweepPoint]) -> list[Edit]:
        return [
            Steer(name, layers=layer, vector=vector, scale=scale, positions=where)
            for (layer, scale), where in _rows(batch, positions)
        ]

    return swept(
        lens, [prompt], metric, points, edits_of,
        title=f"steering at {name}", over="scale", batch_size=batch_size, progress=progress,
    )  # fmt: skip


def _chosen(
    lens: Lens, site: str, layers: Iterable[SupportsIndex] | None
) -> tuple[str, tuple[int, ...]]:
    """A site's own name, and the layers that have it."""
    name, own = site_name(site)
    if name in SITES and not SITES[name].per_layer:
        raise SiteError(f"{name} is not swept over layers: the model has it once")
    having = lens.site_layers.get(name, ())
    asked = [own] if own is not None else layers
    chosen = having if asked is None else _layers(lens, asked)
    for layer in chosen or (0,):
        if layer not in having:
            raise SiteError(
                f"{name} of layer {layer} is not there: {lens.why_no_site(name, layer)}; "
                "lens.site_layers lists what is proven"
            )
    return name, chosen


def _layers(lens: Lens, layers: Iterable[SupportsIndex]) -> tuple[int, ...]:
    found = sorted({check_index(each, lens.n_layers, "layer", "this model") for each in layers})
    if not found:
        raise ValueRangeError("layers is empty: name at least one, or leave it out")
    return tuple(found)


def _means(
    lens: Lens, prompts: Sequence[PromptLike], name: str, layers: Sequence[int]
) -> dict[int, Tensor]:
    """Per layer a site's mean over all tokens of some prompts, float64."""
    sums: dict[int, Any] = dict.fromkeys(layers, 0)
    tokens = 0
    for found in lens.capture_many(
        prompts, residual=None, logits=None, sites=[name], layers=layers
    ):
        tokens += len(found.tokens)
        for layer in layers:
            sums[layer] = sums[layer] + found.sites[name, layer].double().sum(0)
    return {layer: total / tokens for layer, total in sums.items()}


def _by_head(lens: Lens, name: str, layers: Sequence[int]) -> list[SweepPoint]:
    """Each head of a site in each layer."""
    points: list[SweepPoint] = []
    for layer in layers:
        site = lens.sites.sites.get((name, layer))
        if site is None or len(site.shape) < 2:
            raise SiteError(f"{name} of layer {layer} has no heads: sweep by='layer'")
        points += [(layer, head) for head in range(site.shape[0])]
    return points


def _grouped(batch: Sequence[SweepPoint]) -> dict[SweepPoint, set[int]]:
    groups: dict[SweepPoint, set[int]] = {}
    for row, point in enumerate(batch):
        groups.setdefault(point, set()).add(row)
    return groups


def _rows(batch: Sequence[SweepPoint], positions: Any) -> list[tuple[SweepPoint, PerPrompt]]:
    """Each point with the positions of its row, none of the others'."""
    return [
        (point, PerPrompt([positions if i in rows else [] for i in range(len(batch))]))
        for point, rows in _grouped(batch).items()
    ]
