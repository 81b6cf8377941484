"""The weights of residual streams as gates: how a block's parts read, write and mix them.

- stream.read: the product with the streams whose sum or mean over them is what the part reads;
- stream.write: the product with what the part gave that is added to the streams;
- stream.mix: the product of the streams among each other that it is added to; none where they are
  passed on as they are.

Each is proven on the probe by what it makes: the vector that is read, the streams behind the part.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from trilens.caches.gate_spec import GateKind, GateSpec
from trilens.models.anatomy import Anatomy
from trilens.models.gates.block import BlockView
from trilens.models.gates.events import FunctionCall
from trilens.models.gates.site import GateSite, Layout
from trilens.models.gates.stream_correction import Correction, find_correction
from trilens.models.gates.stream_products import Product, products_of
from trilens.models.stream_steps import StreamStep, base_of, rounding, steps_of

__all__ = ["BESIDE_ITSELF", "find_stream_gates"]

BESIDE_ITSELF = "x, beside the stream itself"
"""The formula of a mix that is added to the streams, as a prediction is."""

_SMALL = 1e-4
"""A share of the range that counts as the model's own ε: it keeps a weight off 0."""


@dataclass(frozen=True, slots=True, eq=False)
class _Weight:
    """Weights of streams: one operand of a product."""

    product: Product
    index: int

    @property
    def values(self) -> Tensor:
        """[seq, streams, …]."""
        return self.product.operands[self.index]

    @property
    def other(self) -> Tensor:
        """What they weigh."""
        return self.product.operands[1 - self.index]


def find_stream_gates(view: BlockView, anatomy: Anatomy, layer: int) -> list[GateSite]:
    """The gates of one block's streams; none for a model with a single stream."""
    if anatomy.n_streams == 1:
        return []
    out = anatomy.blocks[layer].output
    base = base_of(view.block, out)
    if base is None:
        return []
    products = products_of(view, anatomy.n_streams, anatomy.d_model)
    correction = find_correction(view, anatomy, layer)
    steps: list[StreamStep] | str = ""
    # A block that corrects may look like one with a single part, too: the correction says more.
    if correction is None:
        steps = steps_of(view.block, view.calls[1:], anatomy.form, view.seq, base, out)
    found: list[GateSite] = [] if correction is None else _of_correction(correction)
    if isinstance(steps, list):
        reads = [_read(step, products, view) for step in steps]
        writes = [_written(step, products) for step in steps]
        mixes = [None if write is None else write[1] for write in writes]
        for name, weights in (
            ("stream.read", reads),
            ("stream.write", [None if write is None else write[0] for write in writes]),
            ("stream.mix", mixes),
        ):
            found += _gate(name, weights, view)
    found += _own_gate(products, found, view)
    return found


def _of_correction(correction: Correction) -> list[GateSite]:
    """The gates of a block that predicts and corrects its streams: it has one part."""
    mix, write = correction.mix, correction.write
    n = mix.operands[1].shape[-1]
    spec = GateSpec(
        name="stream.mix",
        kind="mix",
        formula=BESIDE_ITSELF,
        function="identity",
        range=(-math.inf, math.inf),
        shape=(1, n, n),
        where=mix.path,
    )
    written = replace(spec, name="stream.write", formula="x", shape=(1, n), where=write.path)
    axis = Layout("streams_first", axis=2) if write.is_leading else Layout("batched")
    return [
        GateSite(spec, mix.source(1), Layout("batched"), _to_from),
        GateSite(written, write.source(correction.weights), axis),
    ]


def _to_from(calls: Mapping[str, Any]) -> Tensor:
    """Weights [batch, seq, from, to] as the stream written and the one read."""
    weights: Tensor = calls["tensors"][1]
    return weights.mT.contiguous()


def _read(step: StreamStep, products: Sequence[Product], view: BlockView) -> _Weight | None:
    """The weights whose product with the streams gives, summed or averaged, the vector read."""
    if step.reader is None:
        return None
    call, index = step.reader
    wanted = call.made[index].reshape(view.seq, -1)
    for product in products:
        if product.function != "mul" or not call.start < product.tick < call.end:
            continue
        left, right = (each.double() for each in product.operands)
        made = (left * right).sum(1)
        for share in (1.0, 1.0 / step.before.shape[1]):
            if float((made * share - wanted).abs().max()) <= rounding(wanted):
                which = _which(product, view)
                return None if which is None else _Weight(product, which)
    return None


def _which(product: Product, view: BlockView) -> int | None:
    """Which operand is the weights: the one per stream, or the one that a gating call gave."""
    widths = [operand.shape[-1] for operand in product.operands]
    if sorted(widths)[0] == 1 != sorted(widths)[1]:
        return widths.index(1)
    given = [_sigmoid_of(operand, view) is not None for operand in product.operands]
    return given.index(True) if sum(given) == 1 else None


def _written(
    step: StreamStep, products: Sequence[Product]
) -> tuple[_Weight, _Weight | None] | None:
    """The weights of what a part gave, and those of the streams beside it."""
    call, index = step.part
    part = call.made[index].reshape(len(step.before), 1, -1).double()
    allowed = rounding(step.after.to(call.made[index].dtype))
    for product in products:
        if product.function != "mul" or product.tick < call.end:
            continue
        for which, given in enumerate(reversed(product.operands)):
            if given.shape[-1] != part.shape[-1] or product.operands[which].shape[-1] != 1:
                continue
            if given.shape[1] != 1 or float((given.double() - part).abs().max()) > 0:
                continue
            weight = _Weight(product, which)
            rest = step.after - weight.values.double() * part
            # The first block's streams are equal, so that a mix leaves them as they are.
            mix = _mix(step, rest, products, allowed)
            if mix is not None or float((rest - step.before).abs().max()) <= allowed:
                return weight, mix
    return None


def _mix(
    step: StreamStep, rest: Tensor, products: Sequence[Product], allowed: float
) -> _Weight | None:
    for product in products:
        left, right = product.operands
        square = left.shape[-2:] == (step.before.shape[1],) * 2
        if product.function != "matmul" or not square or right.shape != step.before.shape:
            continue
        if float((right.double() - step.before).abs().max()) > allowed:
            continue
        if float((left.double() @ right.double() - rest).abs().max()) <= allowed:
            return _Weight(product, 0)
    return None


def _gate(name: str, weights: Sequence[_Weight | None], view: BlockView) -> list[GateSite]:
    """One gate of all parts of a block; none where a part has no such weights."""
    known = [weight for weight in weights if weight is not None]
    if not known or len(known) != len(weights):
        return []
    shapes = {tuple(weight.values.shape[1:]) for weight in known}
    if len(shapes) != 1:
        return []
    axes = shapes.pop()
    shape = (len(known), *(axes[:-1] if axes[-1] == 1 else axes))
    kind, bounds = _range(known, view)
    spec = GateSpec(
        name=name,
        kind=kind,
        formula="x",
        function=_function(bounds),
        range=bounds,
        shape=shape,
        where=known[0].product.path,
    )
    sources = tuple(weight.product.source(weight.index) for weight in known)
    return [GateSite(spec, sources[0], Layout("batched"), more=sources[1:])]


def _function(bounds: tuple[float, float]) -> str:
    low, high = bounds
    if low < 0.0 or not math.isfinite(high):
        return "identity"
    return "unit" if high <= 1.0 + _SMALL else "doubled" if high <= 2.0 + _SMALL else "identity"


def _range(weights: Sequence[_Weight], view: BlockView) -> tuple[GateKind, tuple[float, float]]:
    """What the weights are, and between which values they lie."""
    fits = [_sigmoid_of(weight.values, view) for weight in weights]
    lines = [fit for fit in fits if fit is not None]
    if len(lines) == len(weights):
        view.explain(call for call, _, _ in lines)
        low = min(offset for _, _, offset in lines)
        high = max(factor + offset for _, factor, offset in lines)
        return "sigmoid", (low, high)
    if all(_are_shares(weight.values) for weight in weights):
        return "mix", (0.0, 1.0)
    return "mix", (-math.inf, math.inf)


def _sigmoid_of(values: Tensor, view: BlockView) -> tuple[FunctionCall, float, float] | None:
    """The sigmoid that weights are, times a factor plus an offset; None where they are none."""
    for call in view.functions:
        if call.function != "sigmoid" or call.y.numel() != values.numel():
            continue
        x = call.y.reshape(-1).double()
        y = values.reshape(-1).double()
        design = torch.stack([x, torch.ones_like(x)], dim=1)
        factor, offset = torch.linalg.lstsq(design, y[:, None]).solution[:, 0].tolist()
        factor, offset = _plain(factor), 0.0 if abs(offset) < 1e-7 else offset
        dtype = torch.promote_types(values.dtype, call.y.dtype)
        allowed = 4 * torch.finfo(dtype).eps * float(y.abs().max())
        if factor > 0 and float((x * factor + offset - y).abs().max()) <= allowed:
            return call, factor, max(offset, 0.0) if abs(offset) < _SMALL else offset
    return None


def _plain(value: float) -> float:
    """A measured factor as the round number that it is, where it is one."""
    near = round(value, 3)
    return near if abs(near - value) <= 1e-4 * abs(value) else value


def _are_shares(values: Tensor) -> bool:
    """Whether a matrix of weights per token has none below 0, and its rows or columns sum to 1."""
    if values.dim() != 3 or float(values.min()) < 0.0:
        return False
    return any(float((values.double().sum(axis) - 1).abs().max()) <= 1e-2 for axis in (-1, -2))


def _own_gate(
    products: Sequence[Product], found: Sequence[GateSite], view: BlockView
) -> Iterator[GateSite]:
    """A sigmoid per stream that scales what is added to the streams beside the parts."""
    taken = {source for site in found for source in (site.source, *site.more)}
    for product in products:
        for index, operand in enumerate(product.operands):
            source = product.source(index)
            fit = _sigmoid_of(operand, view)
            if source in taken or fit is None or operand.shape[-1] != 1 or fit[1:] != (1.0, 0.0):
                continue
            view.explain([fit[0]])
            spec = GateSpec(
                name="block.gate",
                kind="sigmoid",
                formula="x",
                function="unit",
                range=(0.0, 1.0),
                shape=(operand.shape[1],),
                where=product.path,
            )
            yield GateSite(spec, source, Layout("batched"))
            return
