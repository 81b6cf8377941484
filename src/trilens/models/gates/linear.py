"""Gates without a function: products of projections inside a recurrent or convolving mixer.

They have moments, but no openness: nothing says where such a gate would be closed.
"""

from __future__ import annotations

import math

from torch import Tensor, nn

from trilens.caches.gates import GateSpec
from trilens.models.gates.block import BlockView
from trilens.models.gates.events import ProductCall
from trilens.models.gates.site import GateSite, GateSource, Layout
from trilens.models.trace import ModuleCall

__all__ = ["find_linear_gates"]

Place = tuple[GateSource, Layout, str]


def find_linear_gates(view: BlockView) -> list[GateSite]:
    """Linear gates of the block's mixer, if it has any."""
    for call in view.calls[1:]:
        children = list(call.module.children())
        if any(isinstance(child, nn.Conv1d) for child in children) and not view.kernels:
            return _around_convolution(call, view)
    return _after_kernel(view)


def _around_convolution(mixer: ModuleCall, view: BlockView) -> list[GateSite]:
    """C ⊙ conv(B ⊙ x), all three from one projection."""
    products = [product for product in view.products if product.path == mixer.path]
    if len(products) != 2 or any(_is_settled(product) for product in products):
        return []
    first, last = products
    before = [_place(operand, first, view) for operand in (first.left, first.right)]
    after = [_place(operand, last, view) for operand in (last.left, last.right)]
    at = 0 if after[0] is not None else 1
    enters, leaves = before[0], after[at]
    if enters is None or before[1] is None or leaves is None or None not in after:
        return []
    if not enters[0] == before[1][0] == leaves[0]:
        return []
    return [
        _site("mixer.input", first.left, enters, view),
        _site("mixer.out_gate", (last.left, last.right)[at], leaves, view),
    ]


def _after_kernel(view: BlockView) -> list[GateSite]:
    """The mixer's last product, where a projection multiplies what the recurrence gave."""
    for kernel in view.kernels:
        products = [
            product
            for product in view.products
            if product.path == kernel.path and product.tick > kernel.end
        ]
        if not products or _is_settled(products[-1]):
            continue
        last = products[-1]
        places = [_place(operand, last, view) for operand in (last.left, last.right)]
        at = 0 if places[0] is not None else 1
        place = places[at]
        if place is not None and None in places and place[2].startswith(kernel.path + "."):
            return [_site("mixer.out_gate", (last.left, last.right)[at], place, view)]
    return []


def _is_settled(product: ProductCall) -> bool:
    return product.factor is not None or product.other is not None


def _place(operand: Tensor | None, product: ProductCall, view: BlockView) -> Place | None:
    if operand is None or not view.has_tokens(operand):
        return None
    return view.locate(operand, product.tick)


def _site(name: str, operand: Tensor | None, place: Place, view: BlockView) -> GateSite:
    source, layout, path = place
    units = 0 if operand is None else view.rows(operand).shape[1]
    spec = GateSpec(
        name=name,
        kind="linear",
        formula="x",
        function="identity",
        range=(-math.inf, math.inf),
        shape=(units,),
        where=path,
    )
    return GateSite(spec, source, layout)
