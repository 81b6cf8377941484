"""What parts write into several residual streams, followed to the readout.

A block's parts are written into each stream times a weight, and its streams are passed on to each
other by weights: the gates stream.write and stream.mix. With these held at what the pass used, the
streams behind the last block are a sum over all that was written, and so is their readout.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from trilens.analysis.stream_parts import ADDS, last_residual
from trilens.errors import CaptureError, NotStoredError
from trilens.lens.capture import Capture
from trilens.lens.lens import Lens
from trilens.models.gates.stream_gates import BESIDE_ITSELF

__all__ = ["STREAM_SITES", "StreamsRead", "Written", "streams_read"]

STREAM_SITES = (
    "resid_pre", "resid_mid", "resid_post", *ADDS, "attn.out", "mixer.out", "mlp.out",
)  # fmt: skip
"""The sites that say what was written."""
_ROUNDINGS = 16
_KINDS = ("attn", "mixer")


@dataclass(frozen=True, slots=True, eq=False)
class Written:
    """One part of a block, in the logits.

    Attributes:
        name: "attn.add", "mixer.add", "mlp.add", or "block.add" for all else that a block adds.
        layer: the model's own number.
        value: what it adds.
        way: float64 [d_model]: the product with what the part gave is `value`; None for all else.
    """

    name: str
    layer: int
    value: float
    way: Tensor | None = None


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class StreamsRead:
    """A direction of the readout, split: start + the parts + rounding.

    Attributes:
        start: of the streams before the first block.
        parts: in the model's order.
        rounding: what the readout's dtype loses.
        notes: what to know, in words.
    """

    start: float
    parts: list[Written]
    rounding: float
    notes: list[str]


@dataclass(frozen=True, slots=True, eq=False)
class _Step:
    """From one state of the streams to the next: after = mix · before + write ⊗ part + else.

    Attributes:
        kind: "attn", "mixer", "mlp"; "" where all parts of a block are written as one.
        before, after: float64 [streams, d_model].
        mix: float64 [to, from].
        write: float64 [streams].
        allowed: how far rounding alone may be off.
    """

    kind: str
    before: Tensor
    after: Tensor
    mix: Tensor
    write: Tensor
    allowed: float


def streams_read(
    cap: Capture, lens: Lens, position: int, readout: Tensor, direction: Tensor
) -> StreamsRead:
    """Split a direction of the readout at one position.

    Args:
        cap: with the proven sites of `STREAM_SITES`, gates, and the residual stream.
        lens: the model that it is of.
        position: from 0.
        readout: [d_model], of the last layer there.
        direction: float64 [d_model].

    Raises:
        NotStoredError: no residual stream or gates.
        CaptureError: the readout is not linear with its weights held, or how a block writes into
            its streams is not proven; names the layer.
    """
    if not cap.has("gates"):
        raise NotStoredError(
            f"gates were not captured: {lens.n_streams} residual streams are written and mixed by "
            "weights, which are gates; capture with gates=True"
        )
    last = last_residual(cap, lens, position)
    ways = lens.fold_readout(last, direction).cpu()
    rounding = float(readout.double() @ direction) - float((ways * last.double().cpu()).sum())
    parts: list[Written] = []
    notes: list[str] = []
    for layer in reversed(range(lens.n_layers)):
        own: list[Written] = []
        for step in reversed(_steps(cap, lens, layer, position)):
            own = [*_written(cap, lens, step, layer, position, ways, notes), *own]
            ways = step.mix.T @ ways
        parts = [*own, *parts]
        if layer:
            between = _state(cap, "resid_pre", layer, position)
            between = between - _state(cap, "resid_post", layer - 1, position)
            if float(between.abs().max()) > 0:
                parts.insert(0, Written("block.add", layer, float((ways * between).sum())))
                notes.append(f"layer {layer} is given more than layer {layer - 1} gave: block.add")
    start = float((ways * _state(cap, "resid_pre", 0, position)).sum())
    notes += [
        f"{lens.n_streams} residual streams: the weights that read them out, write into them and "
        "mix them are held at what the pass used"
    ]
    return StreamsRead(start=start, parts=parts, rounding=rounding, notes=notes)


def _state(cap: Capture, name: str, layer: int, at: int) -> Tensor:
    """float64, on the processor: layers of one model may lie on several devices."""
    return cap.sites[name, layer][at].double().cpu()


def _steps(cap: Capture, lens: Lens, layer: int, at: int) -> list[_Step]:
    """The steps of one block, by what the pass used.

    Raises:
        CaptureError: they are not proven.
    """
    held = set(cap.gates)
    if ("stream.write", layer) not in held:
        raise CaptureError(
            f"how layer {layer} writes into its residual streams is not proven (no gate "
            "stream.write): a logit cannot be split there"
        )
    n = lens.n_streams
    write = cap.gates["stream.write", layer][at].double().cpu().reshape(-1, n)
    mix = torch.eye(n, dtype=torch.float64, device=write.device).expand(len(write), n, n)
    if ("stream.mix", layer) in held:
        found = cap.gates["stream.mix", layer][at].double().cpu().reshape(-1, n, n)
        beside = cap.gates.spec("stream.mix", layer).formula == BESIDE_ITSELF
        mix = mix + found if beside else found
    names = (
        ["resid_pre", "resid_mid", "resid_post"] if len(write) == 2 else ["resid_pre", "resid_post"]
    )
    sites = lens.sites.sites
    absent = next((name for name in names if (name, layer) not in sites), None)
    if absent or len(write) > 2 or len(mix) != len(write):
        why = (
            f"{absent}: {lens.why_no_site(absent, layer)}"
            if absent
            else f"it has {len(write)} parts and {len(mix)} mixes"
        )
        raise CaptureError(
            f"the residual streams inside layer {layer} are not proven ({why}): a logit cannot be "
            "split there"
        )
    first = next((kind for kind in _KINDS if (f"{kind}.read", layer) in sites), "attn")
    kinds = [first, "mlp"] if len(write) == 2 else [""]
    eps = torch.finfo(cap.sites[names[0], layer].dtype).eps
    states = [_state(cap, name, layer, at) for name in names]
    return [
        _Step(
            kind, before, after, mix[i], write[i],
            _ROUNDINGS * eps * float(torch.stack([before, after]).abs().max()),
        )
        for i, (kind, before, after) in enumerate(zip(kinds, states, states[1:], strict=False))
    ]  # fmt: skip


def _written(
    cap: Capture,
    lens: Lens,
    step: _Step,
    layer: int,
    at: int,
    ways: Tensor,
    notes: list[str],
) -> Iterator[Written]:
    """What one step adds, part by part, and what it adds besides."""
    added = step.after - step.mix @ step.before
    way = step.write @ ways
    whole = float((ways * added).sum())
    if not step.kind:
        names = [name for name in ADDS if (name, layer) in lens.sites.sites]
        found = [
            Written(name, layer, float(_state(cap, name, layer, at) @ way), way) for name in names
        ]
        yield from found
        yield Written("block.add", layer, whole - sum(part.value for part in found))
        return
    name, out = f"{step.kind}.add", f"{step.kind}.out"
    square = float(step.write @ step.write)
    given = (
        _state(cap, out, layer, at)
        if (out, layer) in cap.sites
        else step.write @ added / max(square, torch.finfo(added.dtype).tiny)
    )
    rest = added - step.write[:, None] * given
    if float(rest.abs().max()) <= step.allowed:
        yield Written(name, layer, whole, way)
        return
    if (out, layer) not in cap.sites or _is_mix(rest, step):
        raise CaptureError(
            f"layer {layer} passes its residual streams on by weights that are not proven (gate "
            f"stream.mix): what is left beside {name} is {float(rest.abs().max()):.2g}, rounding "
            f"explains {step.allowed:.2g}; a logit cannot be split there"
        )
    notes.append(f"layer {layer} adds to its streams beside its parts: block.add")
    value = float(given @ way)
    yield Written("block.add", layer, whole - value)
    yield Written(name, layer, value, way)


def _is_mix(rest: Tensor, step: _Step) -> bool:
    """Whether what is left is the streams themselves, by other weights."""
    inverse = torch.linalg.pinv(step.before, rtol=1e-6)
    return float((rest @ inverse @ step.before - rest).abs().max()) <= step.allowed
