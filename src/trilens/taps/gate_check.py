"""Each pass proves its GLU gates anew: gate times up is what the down projection was given.

A probe of a few tokens can't reach every value that a gate takes. So the row with the largest
pre-activation of each layer is recomputed in every pass.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trilens.caches.gate_functions import GATE_FUNCTIONS
from trilens.errors import UnclaimedGateError
from trilens.models.gates.site import GateSite, GluCheck
from trilens.models.trace import tensors_in

__all__ = ["proving_gates"]

_ROUNDINGS = 8
"""Roundings of the model's dtype by which one product may differ from another of the same."""


@dataclass(slots=True)
class _Row:
    """What one layer's gate has shown so far in this pass."""

    gate: Tensor | None = None
    number: Tensor | None = None
    up: Tensor | None = None


@contextmanager
def proving_gates(gates: Mapping[tuple[str, int], GateSite]) -> Iterator[None]:
    """Check the gates that have a check while a pass runs inside the block.

    Raises:
        UnclaimedGateError: a product is not what the down projection was given.
    """
    checks = {id(site.check.down): (site, site.check, layer)
              for (_, layer), site in gates.items() if site.check is not None}  # fmt: skip
    outcomes: list[tuple[Tensor, GateSite, int]] = []
    thread = threading.get_ident()
    with ExitStack() as stack:
        for site, check, layer in checks.values():
            _watch(stack, check, thread, _noting(outcomes, site, layer))
        yield
    if outcomes:
        # One look at the end: each look at a device's tensor waits for the device.
        right = torch.stack([outcome.to("cpu") for outcome, _, _ in outcomes]).tolist()
        for fine, (_, site, layer) in zip(right, outcomes, strict=True):
            if not fine:
                raise UnclaimedGateError(
                    f"layer {layer}: {site.spec.where} gives {site.spec.formula}, but that times "
                    "the other projection is not what the next one was given on this prompt: the "
                    "model limits or replaces the gate's values; capture without gates=True"
                )


def _noting(
    outcomes: list[tuple[Tensor, GateSite, int]], site: GateSite, layer: int
) -> Callable[[Tensor], None]:
    return lambda outcome: outcomes.append((outcome, site, layer))


def _watch(stack: ExitStack, check: GluCheck, thread: int, note: Callable[[Tensor], None]) -> None:
    row = _Row()

    def gate(_module: nn.Module, args: Any) -> None:
        if threading.get_ident() == thread:
            x = _rows(next(tensors_in(args)).detach())
            row.number = x.abs().amax(-1).argmax().reshape(1)
            row.gate = x.index_select(0, row.number)

    def up(_module: nn.Module, _args: Any, output: Any) -> None:
        if threading.get_ident() == thread:
            row.up = check.up.read(list(tensors_in(output))[check.up.index]).detach()

    def down(_module: nn.Module, args: Any) -> None:
        if threading.get_ident() != thread or row.gate is None or row.up is None:
            return
        given = _rows(next(tensors_in(args)).detach())
        values, number, other = row.gate, row.number, _rows(row.up)
        row.gate = row.number = row.up = None
        if number is not None and len(other) == len(given) and other.shape == given.shape:
            factor = other.index_select(0, number)
            product = GATE_FUNCTIONS[check.function].value(values) * factor
            # 0.5 x (1 + tanh …) cancels for x < 0: what is left is as exact as x · up is.
            terms = product.abs().float() + (values * factor).abs().float()
            note(_agree(product, given.index_select(0, number), terms))

    for module, hook in ((check.gate, gate), (check.down, down)):
        stack.callback(module.register_forward_pre_hook(hook).remove)
    stack.callback(check.up.module.register_forward_hook(up).remove)


def _rows(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, tensor.shape[-1])


def _agree(product: Tensor, given: Tensor, terms: Tensor) -> Tensor:
    """Whether a product is what was given, within the rounding of its terms; [] bool."""
    given = given.to(product.device)
    bound = _ROUNDINGS * torch.finfo(given.dtype).eps * terms
    away = (product.float() - given.float()).abs()
    tiny = torch.finfo(given.dtype).tiny
    return ((away <= bound + tiny) | ~product.isfinite() | ~given.isfinite()).all()
