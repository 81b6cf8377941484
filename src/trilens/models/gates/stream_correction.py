"""Blocks that predict their streams, work on one of them, and correct all by how far it was off.

AltUp: the prediction adds to each stream a mix of all; the block's parts are added to one predicted
stream; what that changed is written into every stream, times a weight of that stream.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from trilens.models.anatomy import Anatomy
from trilens.models.gates.block import BlockView
from trilens.models.gates.stream_products import Product, products_of
from trilens.models.stream_steps import base_of, rounding
from trilens.models.trace import ModuleCall

__all__ = ["Correction", "find_correction"]


@dataclass(frozen=True, slots=True, eq=False)
class Correction:
    """The two products of such a block, and the stream that its parts are added to.

    Attributes:
        mix: the product whose right operand is the weights of the prediction, [seq, from, to].
        write: the product of the change with the weights of the correction.
        weights: which operand of it the weights are.
        active: the predicted stream that the parts read, [seq, d_model].
        change: what they changed it by, [seq, d_model].
        reader: the module that is given the predicted stream first, and which input it is.
    """

    mix: Product
    write: Product
    weights: int
    active: Tensor
    change: Tensor
    reader: tuple[ModuleCall, int]


def find_correction(view: BlockView, anatomy: Anatomy, layer: int) -> Correction | None:
    """The prediction and the correction of one block, proven by the streams that it hands on."""
    form, out = anatomy.form, anatomy.blocks[layer].output
    base = base_of(view.block, out)
    if form.n_streams == 1 or base is None:
        return None
    before = form.read(view.block.read[base])[0].double()
    after = form.read(view.block.made[out])[0].double()
    allowed = rounding(view.block.made[out])
    products = products_of(view, form.n_streams, form.d_model)
    for mix in products:
        left, right = mix.operands
        if mix.function != "matmul" or right.shape[-2:] != (form.n_streams,) * 2:
            continue
        if left.shape != before.mT.shape or float((left.double() - before.mT).abs().max()) > 0:
            continue
        predicted = before + (left.double() @ right.double()).mT
        for write in products:
            if write.function != "mul" or write.tick < mix.tick:
                continue
            found = _corrected(mix, write, predicted, after, allowed, view)
            if found is not None:
                return found
    return None


def _corrected(
    mix: Product, write: Product, predicted: Tensor, after: Tensor, allowed: float, view: BlockView
) -> Correction | None:
    widths = [operand.shape[-1] for operand in write.operands]
    if sorted(widths) != [1, predicted.shape[-1]]:
        return None
    weights = widths.index(1)
    change = write.operands[1 - weights].double()
    if float((change - change[:, :1]).abs().max()) > 0:
        return None
    rest = after - predicted - write.operands[weights].double() * change
    if not _is_of_module(rest, allowed, view):
        return None
    for call in view.calls[1:]:
        for index, tensor in enumerate(call.read):
            if tensor.numel() != view.seq * predicted.shape[-1] or call.end > write.tick:
                continue
            if not tensor.is_floating_point() or tensor.shape[-1] != predicted.shape[-1]:
                continue
            rows = tensor.reshape(view.seq, 1, -1).double()
            gaps = (rows - predicted).abs().amax((0, 2))
            if call.start > mix.tick and float(gaps.min()) <= allowed:
                return Correction(mix, write, weights, tensor, change[:, 0], (call, index))
    return None


def _is_of_module(rest: Tensor, allowed: float, view: BlockView) -> bool:
    """Whether what a stream gets besides is nothing, or what one module gave."""
    if float(rest.abs().max()) <= allowed:
        return True
    for call in view.calls[1:]:
        for tensor in call.made:
            if tensor.numel() != rest[:, 0].numel() or not tensor.is_floating_point():
                continue
            one = tensor.reshape(rest[:, :1].shape).double()
            off = (rest - one).abs().amax((0, 2)).minimum(rest.abs().amax((0, 2)))
            if float(off.max()) <= allowed:
                return True
    return False
