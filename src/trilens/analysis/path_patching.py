"""Path patching: what one place of the forward pass tells another directly, and what that does.

The sender gets its values of the other run. What it changes is carried to the receivers by the
residual stream alone, since all attention between them, and the MLPs where that is asked, keep the
values that they had. What the receivers then read is put into a last run, in which everything
after them moves freely.

Source: Wang et al. 2022 (arXiv 2211.00593), Goldowsky-Dill et al. 2023 (2304.05969).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, SupportsIndex

from trilens.analysis.patch_result import Direction
from trilens.analysis.patching import Runs
from trilens.analysis.sweeping import measure, prompt_again
from trilens.axes import SITE_ORDER, SITES, site_name
from trilens.caches.indices import check_index
from trilens.caches.sites import SiteCache
from trilens.edits import Edit, Patch
from trilens.errors import MetricError, SiteError, UsageError, ValueRangeError
from trilens.io.messages import clip
from trilens.lens.capture import Capture
from trilens.lens.gradients import Metric
from trilens.lens.lens import Lens
from trilens.lens.parts import Parts
from trilens.models.tokens import PromptLike
from trilens.results import Tabular

__all__ = ["Node", "PathPatch", "path_patch"]

Node = tuple[str, SupportsIndex | None] | tuple[str, SupportsIndex | None, SupportsIndex | None]
"""A place: (site, layer) or (site, layer, head)."""

_Place = tuple[str, int | None, int | None]

_BESIDE = {
    "mixer.read": "attn.read",
    "mixer.in": "attn.q",
    "mixer.out": "attn.out",
    "mixer.add": "attn.add",
    "router": "mlp.in",
}
_ORDER = {name: SITE_ORDER[_BESIDE.get(name, name)] for name in SITES}
_ATTENTION = (
    ("attn.z", "attn.out", "attn.add"),
    ("cross.out", "cross.add"),
    ("mixer.out", "mixer.add"),
)
_MLPS = (("mlp.out", "mlp.add"),)
"""What a block adds to the stream: of each kind, the first that is proven keeps its values."""
_BOUNDARIES = ("resid_pre", "resid_mid", "resid_post", "embed", "final_norm")


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class PathPatch(Tabular):
    """What one path carries.

    Attributes:
        sender: (site, layer, head); None for what it has not.
        receivers: likewise.
        direction: which way.
        freeze_mlps: whether the MLPs between kept their values.
        value: the metric with the path patched.
        base: the metric of the run that is patched.
        target: the metric of the run whose values the sender got.
        moved: per receiver, the relative change of what it reads: ‖new − old‖ / ‖old‖.
    """

    sender: _Place
    receivers: tuple[_Place, ...]
    direction: Direction
    freeze_mlps: bool
    value: float
    base: float
    target: float
    moved: tuple[float, ...]

    @property
    def effect(self) -> float:
        """How far the path takes the metric from `base` (0) to `target` (1)."""
        return (self.value - self.base) / (self.target - self.base)

    def table(self) -> list[dict[str, Any]]:
        """One row per receiver: what it is and how far it moved."""
        return [
            {"site": site, "layer": layer, "head": head, "moved": moved}
            for (site, layer, head), moved in zip(self.receivers, self.moved, strict=True)
        ]

    def to_dict(self) -> dict[str, Any]:
        """The whole result as JSON can hold it."""
        return {
            "sender": list(self.sender),
            "direction": self.direction,
            "freeze_mlps": self.freeze_mlps,
            "base": self.base,
            "target": self.target,
            "value": self.value,
            "effect": self.effect,
            "receivers": self.table(),
        }

    def __repr__(self) -> str:
        return (
            f"PathPatch({self.sender} → {len(self.receivers)} receivers, {self.direction}: "
            f"effect {self.effect:.4g})"
        )


def path_patch(
    lens: Lens,
    clean: PromptLike,
    corrupted: PromptLike,
    sender: Node,
    receivers: Iterable[Node],
    *,
    metric: Metric,
    freeze_mlps: bool = True,
    direction: Direction = "denoise",
) -> PathPatch:
    """Patch the direct paths from a sender to receivers.

    One run for each layer and site of the receivers, and a last one with all of them.

    Args:
        lens: the model.
        clean: prompt, as `Lens.capture` takes it.
        corrupted: the other prompt; tokens without a partner keep their own values.
        sender: (site, layer) or (site, layer, head), such as ("attn.z", 2, 5).
        receivers: likewise, each behind the sender: ("attn.q", 4, 1), ("resid_post", 5) …
        metric: of the logits [seq, vocab]; a scalar.
        freeze_mlps: keep the MLPs between too, so that only the residual stream carries; else
            what they make of the change arrives as well.
        direction: "denoise" runs the corrupted prompt, "noise" the clean one.

    Raises:
        MetricError: no finite scalar, or the same one in both runs.
        SiteError: a site that is not proven, or a layer between whose attention or MLP has none.
        UsageError: a receiver that is not behind the sender, one named twice, or no place at all.
        OutOfRangeError: a layer or head that is not there.
    """
    start = _place(lens, sender)
    ends = [_place(lens, each) for each in receivers]
    if not ends:
        raise ValueRangeError("receivers is empty: name at least one")
    if len(set(ends)) < len(ends):
        raise UsageError(f"receivers {clip(ends)} name a place twice")
    for end in ends:
        if _rank(end) <= _rank(start):
            raise UsageError(f"receiver {_title(end)} is not behind the sender {_title(start)}")
    frozen = {(end[:2]): _between(lens, start, end, freeze_mlps) for end in ends}
    keys = {start[:2], *frozen, *(key for each in frozen.values() for key in each)}
    runs = _runs(lens, clean, corrupted, metric, start, list(keys), direction)
    own = runs.receiver
    send = Patch(start[0], layers=start[1], heads=start[2], source=runs.aligned())
    read: dict[tuple[str, int | None], Any] = {}
    for (site, layer), still in frozen.items():
        keep = [Patch(name, layers=at, source=own) for name, at in still]
        found = lens.capture(
            runs.prompt,
            residual=None,
            logits=None,
            sites=[site],
            layers=None if layer is None else [layer],
            edits=(send, *keep),
        )
        read[site, layer] = found.sites[site, layer]
    source = replace(own, parts=Parts(sites=SiteCache.from_values(read)))
    last: list[Edit] = [
        Patch(site, layers=layer, heads=head, source=source) for site, layer, head in ends
    ]
    value = measure(metric, lens.capture(runs.prompt, residual=None, edits=last))
    return PathPatch(
        sender=start,
        receivers=tuple(ends),
        direction=direction,
        freeze_mlps=freeze_mlps,
        value=value,
        base=runs.base,
        target=runs.target,
        moved=tuple(_moved(source, own, end) for end in ends),
    )


def _place(lens: Lens, node: Node) -> _Place:
    """A place, read: its site is proven, its head is there."""
    if not isinstance(node, tuple | list) or not 2 <= len(node) <= 3:
        raise UsageError(
            f"place {clip(node)} cannot be read: give (site, layer) or (site, layer, head)"
        )
    name, own = site_name(node[0])
    layer = node[1] if own is None else own
    if name in ("attn.scores", "attn.pattern"):
        raise SiteError(f"{name} is no end of a path: use attn.q, attn.k, attn.v or attn.z")
    if layer is not None:
        layer = check_index(layer, lens.n_layers, "layer", "this model")
    site = lens.sites.sites.get((name, layer))
    if site is None:
        why = lens.why_no_site(name, layer)
        raise SiteError(f"{_title((name, layer, None))} is not there: {why}")
    head = node[2] if len(node) == 3 else None
    if head is None:
        return name, layer, None
    if len(site.shape) < 2:
        raise SiteError(f"{name} has no heads: leave the head out, or use attn.z")
    return name, layer, check_index(head, site.shape[0], "head", _title((name, layer, None)))


def _rank(place: _Place) -> tuple[int, int]:
    """Where in the pass: the layer, and the order within it."""
    name, layer, _ = place
    return {"embed": -1, "final_norm": 1 << 30}.get(name, layer or 0), _ORDER[name]


def _between(
    lens: Lens, start: _Place, end: _Place, freeze_mlps: bool
) -> list[tuple[str, int | None]]:
    """The places that keep their values in the run that says what a receiver reads."""
    first, last = _rank(start), _rank(end)
    found: list[tuple[str, int | None]] = []
    for layer in range(lens.n_layers):
        for group in (*_ATTENTION, *_MLPS) if freeze_mlps else _ATTENTION:
            keys = [(name, layer) for name in group]
            key = next((each for each in keys if each in lens.sites.sites), keys[0])
            between = first < (layer, _ORDER[key[0]]) < last
            if not between or _inside(start, end, *key) or key in lens.sites.absent:
                continue
            if key not in lens.sites.sites:
                why = lens.why_no_site(*key)
                raise SiteError(f"{key[0]} of layer {layer} cannot keep its values: {why}")
            found.append(key)
    return found


def _inside(start: _Place, end: _Place, name: str, layer: int) -> bool:
    """Whether an end lies within the part whose output that is: what it computes must move."""
    part = name.partition(".")[0]
    ends = [each for each in (start, end) if each[1] == layer and each[0] not in _BOUNDARIES]
    return any(each[0].partition(".")[0] == part for each in ends)


def _runs(
    lens: Lens,
    clean: PromptLike,
    corrupted: PromptLike,
    metric: Metric,
    start: _Place,
    keys: Sequence[tuple[str, int | None]],
    direction: Direction,
) -> Runs:
    """Both prompts run once, with every place that a path touches."""
    if direction not in ("denoise", "noise"):
        raise UsageError(f"direction {direction!r} is not an option: 'denoise' or 'noise'")
    captures = [_captured(lens, prompt, keys) for prompt in (clean, corrupted)]
    donor, receiver = captures if direction == "denoise" else reversed(captures)
    prompt = prompt_again(lens, corrupted if direction == "denoise" else clean, receiver)
    pairs = receiver.align(donor).pairs
    if not pairs:
        raise UsageError("no token of one prompt stands for one of the other: nothing to patch")
    base, target = (measure(metric, each) for each in (receiver, donor))
    if base == target:
        raise MetricError(
            f"the metric is {base:g} in both runs: no effect can be told; take prompts or a metric "
            "in which they differ"
        )
    return Runs(start[0], (start[1],), prompt, receiver, donor, pairs, base, target)  # type: ignore[arg-type]


def _captured(lens: Lens, prompt: PromptLike, keys: Sequence[tuple[str, int | None]]) -> Capture:
    """The places of one run, each in its own layer."""
    sites = [name if layer is None else f"{name}[{layer}]" for name, layer in keys]
    return lens.capture(prompt, residual=None, sites=sites)


def _title(place: _Place) -> str:
    name, layer, head = place
    return (
        name
        + ("" if layer is None else f" of layer {layer}")
        + ("" if head is None else f", head {head}")
    )


def _moved(new: Capture, old: Capture, place: _Place) -> float:
    site, layer, head = place
    a, b = (each.sites[site, layer].double() for each in (new, old))
    if head is not None:
        a, b = a[:, head], b[:, head]
    size = float(b.norm())
    return float((a - b).norm()) / size if size else 0.0
