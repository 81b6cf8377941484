"""What each part of a model adds to a logit, directly: through the final norm and unembedding."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, SupportsIndex, get_args

import torch
from torch import Tensor

from trilens.analysis.lenses.logit_lens import same_model
from trilens.analysis.several_streams import STREAM_SITES, streams_read
from trilens.analysis.stream_parts import ADDS, last_residual, stream_parts
from trilens.analysis.tokens import Token, token_id
from trilens.caches.indices import check_index
from trilens.errors import CaptureError, NotStoredError, UsageError
from trilens.io.messages import listed
from trilens.lens.capture import Capture
from trilens.lens.lens import Lens
from trilens.models.sites.head_out import projection_weight
from trilens.models.sites.site import title_of
from trilens.models.token_strings import token_strings
from trilens.numbers import at_least
from trilens.results import Tabular

__all__ = ["Attribution", "By", "Part", "attribute", "attribution_sites"]

By = Literal["component", "head", "neuron"]
_FINER = {
    "head": ("attn.add", "attn.out", "attn.head_out"),
    "neuron": ("mlp.add", "mlp.out", "mlp.post"),
}
_FORMAT = "trilens.attribution"
_VERSION = 1


@dataclass(frozen=True, slots=True)
class Part:
    """One part of the sum.

    Attributes:
        component: "embed", a site ("attn.add", "cross.add", "mlp.add", "attn.head", "mlp.neuron"),
            "attn.rest" and "mlp.rest" (projection bias, neurons that are not listed), "block.add"
            (of several streams: what a block adds beside its parts), "rounding" (what the model's
            dtype loses between its layers) or "bias" (of final norm and unembedding).
        layer: the model's own number, or None.
        index: head or neuron, or None.
        value: what it adds to the logit, or to the difference.
    """

    component: str
    layer: int | None
    index: int | None
    value: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Attribution(Tabular):
    """Direct logit attribution of one position.

    Attributes:
        target: the token, and its text.
        against: the other token of the difference, or None.
        position: from 0.
        by: what was told apart.
        parts: in the order of the model.
        total: their sum.
        logit_difference: the model's own, before a cap; of the target alone without `against`.
        notes: what was measured and what to know, in words.
    """

    target: int
    target_text: str
    against: int | None
    against_text: str | None
    position: int
    by: By
    parts: tuple[Part, ...]
    total: float
    logit_difference: float
    notes: tuple[str, ...]

    def table(self) -> list[dict[str, Any]]:
        """One row per part, and the sum last."""
        rows = [*self.parts, Part("sum", None, None, self.total)]
        return [
            {"component": r.component, "layer": r.layer, "index": r.index, "value": r.value}
            for r in rows
        ]

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able dict with format and version."""
        return {
            "format": _FORMAT,
            "version": _VERSION,
            "target": self.target,
            "target_text": self.target_text,
            "against": self.against,
            "against_text": self.against_text,
            "position": self.position,
            "by": self.by,
            "total": self.total,
            "logit_difference": self.logit_difference,
            "notes": list(self.notes),
            "parts": self.table()[:-1],
        }


def attribution_sites(lens: Lens, by: By = "component") -> tuple[str, ...]:
    """The sites that a capture needs for `attribute`: what of them this model has.

    A model with several residual streams needs gates=True as well.

    Raises:
        UsageError: `by` is unknown.
    """
    if by not in get_args(By):
        raise UsageError(f"by {by!r} is unknown: it is one of {', '.join(get_args(By))}")
    parts = STREAM_SITES if lens.n_streams > 1 else ("resid_pre", *ADDS)
    wanted = dict.fromkeys((*parts, *_FINER.get(by, ())))
    return tuple(name for name in wanted if lens.site_layers.get(name))


def attribute(
    cap: Capture,
    lens: Lens,
    target: Token,
    against: Token | None = None,
    *,
    by: By = "component",
    position: SupportsIndex = -1,
    k: SupportsIndex = 20,
) -> Attribution:
    """Split a logit, or the difference of two, into what each part of the model adds directly.

    The residual stream before the final norm is the sum of the embedding and of what every layer
    adds. The norm, at the scale that it has there, and the unembedding are folded into one
    direction; a part's value is its product with it. The values sum to the model's own logit
    difference within 1e-4 in float32, within the rounding of a narrower dtype there. Logits with a
    tanh cap are attributed before the cap.

    Of several residual streams the direction is followed from their readout back through the
    blocks, with the weights that the pass computed held at what they were, as the norm's scale is:
    those of the readout, those that write a part into each stream, and those that mix the streams
    of every later block. The sum over all streams is exact so; how a part moves these weights is
    no part of it. "block.add" is what a block adds beside its parts, as Gemma 3n's per-layer
    inputs and its rescaled stream.

    Args:
        cap: of `lens.capture(prompt, sites=attribution_sites(lens, by))`; of several residual
            streams with gates=True.
        lens: the model that it is of.
        target: a token id, or a text that is one token.
        against: the token whose logit is subtracted.
        by: whole attentions, MLPs and mixers; attention by head; or MLPs by hidden neuron.
        position: after which the token comes; other than the last needs residual="all".
        k: of neurons the largest by size that have parts of their own.

    Raises:
        NotStoredError: the capture lacks a site, gates or the residual; says what to capture.
        CaptureError: the parts do not sum to the residual stream (norms on the stream itself, as
            in BERT), or the norm, unembedding or readout cannot be folded; of several streams a
            layer whose weights are not proven.
        IncomparableError: the capture is of another model.
        TokenIdError: a token that is not one.
        OutOfRangeError: no such position.
    """
    same_model(cap.model, lens, "the capture")
    names = attribution_sites(lens, by)
    count = at_least(1, k, "k")
    at = check_index(position, len(cap.token_ids), "position", "the prompt", negative=True)
    tokens = [token_id(lens, each) for each in (target, against) if each is not None]
    _need_sites(cap, lens, by, names)
    stream = stream_parts(cap, lens, at) if lens.n_streams == 1 else None
    x = _readout(cap, lens, at) if stream is None else stream.residual
    folded = lens.fold(x, tokens)
    signs = torch.tensor([1.0, -1.0][: len(tokens)], dtype=torch.float64, device=x.device)
    direction = signs @ folded.directions
    if stream is None:
        read = streams_read(cap, lens, at, x, direction)
        start, rounding, notes = read.start, read.rounding, read.notes
        wholes = [(Part(p.name, p.layer, None, p.value), p.way) for p in read.parts]
    else:
        start, rounding = float(stream.start @ direction), float(stream.rounding @ direction)
        notes = stream.notes
        wholes = [
            (Part(name, layer, None, float(add.to(x.device).double() @ direction)), direction)
            for name, layer, add in stream.adds
        ]
    parts = [Part("embed", None, None, start)]
    for whole, way in wholes:
        parts += [whole] if way is None else _split(cap, lens, by, whole, at, way, count)
    parts.append(Part("rounding", None, None, rounding))
    parts.append(Part("bias", None, None, float(signs @ folded.biases)))
    texts = token_strings(tokens, lens.tokenizer)
    return Attribution(
        target=tokens[0],
        target_text=texts[0],
        against=tokens[1] if len(tokens) > 1 else None,
        against_text=texts[1] if len(tokens) > 1 else None,
        position=at,
        by=by,
        parts=tuple(parts),
        total=math.fsum(part.value for part in parts),
        logit_difference=_own_difference(cap, lens, x, at, tokens),
        notes=(*folded.facts, *notes, *_notes(lens, by)),
    )


def _readout(cap: Capture, lens: Lens, at: int) -> Tensor:
    """What the final norm reads of several streams at one position: [d_model]."""
    last_residual(cap, lens, at)
    last = lens.n_layers - 1
    found = cap.residual.readout(last)
    if found.dim() == 2:
        return found[at]
    if at != len(cap.token_ids) - 1:
        raise NotStoredError(
            f"the readout of layer {last} at position {at} was not captured: capture with "
            "residual='all', or ask for the last position"
        )
    return found


def _notes(lens: Lens, by: By) -> list[str]:
    cap = lens.anatomy.logit_softcap
    notes = [] if cap is None else [f"logits before the cap {cap:g}·tanh(x/{cap:g})"]
    if by == "component":
        return notes
    add, out, fine = _FINER[by]
    sites = lens.sites.sites
    inner = f"{add.partition('.')[0]}.read"  # of several streams, where nothing is `add`
    for layer in range(lens.n_layers):
        has = (add, layer) in sites or (inner, layer) in sites
        if has and not {(out, layer), (fine, layer)} <= sites.keys():
            notes.append(
                f"layer {layer} is not told apart by {by}: {lens.why_no_site(fine, layer)}"
            )
    return notes


def _need_sites(cap: Capture, lens: Lens, by: By, names: tuple[str, ...]) -> None:
    held = set(cap.sites) if cap.has("sites") else set()
    if ("resid_pre", 0) not in lens.sites.sites:
        raise CaptureError(
            f"resid_pre of layer 0 is not proven: {lens.why_no_site('resid_pre', 0)}"
        )
    several = lens.n_streams > 1
    wanted = [
        key
        for key in lens.sites.sites
        if key[0] in names and (several or key[0] != "resid_pre" or not key[1])
    ]
    absent = [key for key in wanted if key not in held]
    if absent:
        raise NotStoredError(
            f"{title_of(absent[0])} was not captured: attribution needs all layers of "
            f"sites={list(names)}"
        )
    if by != "component" and not any(lens.site_layers.get(name) for name in _FINER[by][2:]):
        fine = _FINER[by][2]
        raise CaptureError(
            f"no layer can be told apart by {by}: {lens.why_no_site(fine, 0)}; use by='component'"
        )
    for layer in range(0 if several else lens.n_layers):
        if not any((name, layer) in lens.sites.sites for name in ADDS):
            reasons = [f"{name}: {lens.why_no_site(name, layer)}" for name in ADDS]
            raise CaptureError(
                f"what layer {layer} adds to the residual stream is not proven "
                f"({listed(reasons, 3)}): a logit cannot be split there"
            )


def _split(
    cap: Capture, lens: Lens, by: By, whole: Part, at: int, direction: Tensor, k: int
) -> list[Part]:
    """A part by heads or neurons, where it is one of those; `direction` times it is its value."""
    name, layer, value = whole.component, whole.layer, whole.value
    assert layer is not None
    if by == "component" or name != _FINER[by][0]:
        return [whole]
    _, out, fine = _FINER[by]
    if (out, layer) not in cap.sites or (fine, layer) not in cap.sites:
        return [whole]
    way = direction.to(cap.sites[out, layer].device)
    # Of several streams `add` is what is written, times weights that are in the direction.
    if (name, layer) in cap.sites:
        way = way * _factor(
            cap.sites[name, layer], cap.sites[out, layer], at, f"{name} of layer {layer}"
        )
    if by == "head":
        heads = cap.sites[fine, layer][at].double() @ way.to(cap.sites[fine, layer].device)
        found = [Part("attn.head", layer, i, each) for i, each in enumerate(heads.tolist())]
        rest = value - math.fsum(part.value for part in found)
        return [*found, Part("attn.rest", layer, None, rest)]
    units = cap.sites[fine, layer][at].double()
    weight = projection_weight(lens.sites.sites[fine, layer].tap.module, len(units)).detach()
    each = units * (weight.double() @ way.to(weight.device)).to(units.device)
    top = each.abs().topk(min(k, len(each))).indices.sort().values.tolist()
    found = [Part("mlp.neuron", layer, i, float(each[i])) for i in top]
    rest = value - math.fsum(part.value for part in found)
    return [*found, Part("mlp.rest", layer, None, rest)]


def _factor(add: Tensor, out: Tensor, at: int, title: str) -> Tensor:
    """What multiplies each channel between a part's output and what it adds: 1, or a norm's.

    Raises:
        CaptureError: it is no factor per channel, up to a scale per token.
    """
    eps, add, out = torch.finfo(add.dtype).eps, add.double(), out.double()
    if torch.equal(add, out):
        return torch.ones_like(out[at])
    zero = out[at] == 0
    factor = (add[at] / out[at].masked_fill(zero, 1.0)).masked_fill(zero, 0.0)
    line = factor * out
    least = torch.finfo(line.dtype).tiny
    scale = (line * add).sum(-1, keepdim=True) / line.square().sum(-1, keepdim=True).clamp_min(
        least
    )
    off = float((scale * line - add).abs().max() / add.abs().max())
    if not off <= 64 * eps:
        raise CaptureError(
            f"{title} is no factor per channel and scale per token times the part's output: off "
            f"by {off:.2g} of its largest entry, so that it cannot be split; use by='component'"
        )
    return factor


def _own_difference(cap: Capture, lens: Lens, x: Tensor, at: int, tokens: list[int]) -> float:
    held = cap.logits
    if held is not None and len(held) == len(cap.token_ids):
        row = held[at]
    elif held is not None and at == len(cap.token_ids) - 1:
        row = held[-1]
    else:
        row = lens.unembed(x[None])[0]
    values = row[tokens].double()
    bound = lens.anatomy.logit_softcap
    if bound is not None:
        values = bound * torch.atanh(values / bound)
    return float(values[0] - values[1:].sum())
