"""Each pass proves its GLU gates anew: gate times up is what the down projection was given.

A probe of a few tokens can't reach every value that a gate takes. So the row with the largest
pre-activation of each layer is recomputed in every pass.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trilens.caches.gate_functions import GATE_FUNCTIONS
from trilens.errors import UnclaimedGateError
from trilens.models.gates.site import GateSite, GluCheck
from trilens.models.trace import tensors_in
from trilens.taps.hooks import Hooks

__all__ = ["watch_gates"]

_ROUNDINGS = 8
"""Roundings of the model's dtype by which one product may differ from another of the same."""


@dataclass(slots=True)
class _Row:
    """What one layer's gate has shown so far in this pass."""

    gate: Tensor | None = None
    number: Tensor | None = None
    up: Tensor | None = None


def watch_gates(hooks: Hooks, gates: Mapping[tuple[str, int], GateSite]) -> Callable[[], None]:
    """Observe the gates that have a check while a pass runs.

    Args:
        hooks: of the pass.
        gates: the gate sites of the pass.

    Returns:
        A function for the end of the pass. It raises UnclaimedGateError where a product was not
        what the down projection was given.
    """
    outcomes: list[tuple[Tensor, GateSite, int]] = []
    watched: set[nn.Module] = set()
    for (_, layer), site in gates.items():
        if site.check is not None and site.check.down not in watched:
            watched.add(site.check.down)
            _watch(hooks, site.check, _noting(outcomes, site, layer))

    def check() -> None:
        # One look at the end: each look at a device's tensor waits for the device.
        seen = outcomes[:]
        outcomes.clear()
        for outcome, site, layer in seen:
            if not bool(outcome):
                raise UnclaimedGateError(
                    f"layer {layer}: {site.spec.where} gives {site.spec.formula}, but that times "
                    "the other projection is not what the next one was given on this prompt: the "
                    "model limits or replaces the gate's values; capture without gates=True"
                )

    return check


def _noting(
    outcomes: list[tuple[Tensor, GateSite, int]], site: GateSite, layer: int
) -> Callable[[Tensor], None]:
    return lambda outcome: outcomes.append((outcome, site, layer))


def _watch(hooks: Hooks, check: GluCheck, note: Callable[[Tensor], None]) -> None:
    row = _Row()

    def mine() -> bool:
        return threading.get_ident() == hooks.thread

    def gate(_module: nn.Module, args: Any) -> None:
        if mine():
            x = _rows(next(tensors_in(args)).detach())
            row.number = x.abs().amax(-1).argmax().reshape(1)
            row.gate = x.index_select(0, row.number)

    def up(_module: nn.Module, _args: Any, output: Any) -> None:
        if mine():
            row.up = check.up.read(list(tensors_in(output))[check.up.index]).detach()

    def down(_module: nn.Module, args: Any) -> None:
        values, number, other = row.gate, row.number, row.up
        if not mine() or values is None or number is None or other is None:
            return
        row.gate = row.number = row.up = None
        given, other = _rows(next(tensors_in(args)).detach()), _rows(other)
        if other.shape == given.shape:
            factor = other.index_select(0, number)
            product = GATE_FUNCTIONS[check.function].value(values) * factor
            # 0.5 x (1 + tanh …) cancels for x < 0: what is left is as exact as x · up is.
            terms = product.abs().float() + (values * factor).abs().float()
            note(_agree(product, given.index_select(0, number), terms))

    hooks.before(check.gate, gate)
    hooks.before(check.down, down)
    hooks.after(check.up.module, up)


def _rows(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, tensor.shape[-1])


def _agree(product: Tensor, given: Tensor, terms: Tensor) -> Tensor:
    """Whether a product is what was given, within the rounding of its terms; [] bool."""
    given = given.to(product.device)
    bound = _ROUNDINGS * torch.finfo(given.dtype).eps * terms
    away = (product.float() - given.float()).abs()
    tiny = torch.finfo(given.dtype).tiny
    return ((away <= bound + tiny) | ~product.isfinite() | ~given.isfinite()).all()
