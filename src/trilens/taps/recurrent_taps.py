"""What a pass does in recurrences: tokens that a knockout names write nothing into the state.

A kernel function is called with other arguments, in prefill and in decoding; a recurrence without
one is given another input at its boundary. An RG-LRU, whose decay is made of what it writes, keeps
its input and loses the writes from its output and from the state that it carries on.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from trilens.models.gates.kernels import DECODE_KERNELS, KERNEL_GATES
from trilens.models.gates.mixers import Boundary
from trilens.models.gates.writes import WRITES, unit_writes, without_writes
from trilens.models.sites.values import replace_tensor
from trilens.models.trace import tensors_in
from trilens.taps.edits import Compiled
from trilens.taps.hooks import Hooks
from trilens.taps.site_taps import Pass

__all__ = ["WRITING_KERNELS", "RecurrentTaps"]

WRITING_KERNELS = tuple(
    name for name in (*KERNEL_GATES, *DECODE_KERNELS.values()) if name in WRITES
)
"""Kernel functions of prefill and decoding whose writes can be taken away."""


class RecurrentTaps:
    """The knockouts of a pass in its recurrences.

    Args:
        run: the running pass.
        edits: made ready for it.
    """

    def __init__(self, run: Pass, edits: Compiled) -> None:
        self.run = run
        self.edits = edits
        cut = [layer for layer, cuts in edits.cuts.items() if any(c.of_tokens for c in cuts)]
        self.layers = frozenset(cut)
        self.boundaries = {i: each for i, each in edits.boundaries.items() if i in self.layers}

    def edit(self, name: str, arguments: Mapping[str, Any]) -> Mapping[str, Any]:
        """What a kernel function is called with; the same object where nothing changes."""
        cut = self._cut() if name in WRITES else None
        return arguments if cut is None else without_writes(name, arguments, cut)

    def place(self, hooks: Hooks) -> None:
        """Hook the boundaries; to be called before the hooks that record them."""
        entered = {each.enter.module: each for each in self.boundaries.values()}
        for boundary in entered.values():
            module = boundary.enter.module
            if boundary.function == "rg_lru":
                hooks.after(module, self._unit(), with_kwargs=True)
            elif boundary.enter.event == "input":
                hooks.before(module, self._before(boundary), with_kwargs=True)
            else:
                hooks.after(module, self._after(boundary))

    def _cut(self) -> Tensor | None:
        """The tokens of this pass that write nothing in the running layer; None where all do."""
        run, found = self.run, None
        if not run.mine() or run.layer not in self.layers:
            return None
        for cut in self.edits.cuts[run.layer]:
            tokens = cut.writes(run.span) if cut.of_tokens else None
            if tokens is not None:
                self.edits.touched.add(cut.number, cut.layer, int(tokens.sum()))
                found = tokens if found is None else found | tokens
        return None if found is None else torch.from_numpy(found)

    def _cut_at(self, module: nn.Module) -> Tensor | None:
        """As `_cut`, where the running layer's recurrence begins at this module."""
        layer = self.run.layer
        at = None if layer is None else self.boundaries.get(layer)
        return self._cut() if at is not None and at.enter.module is module else None

    def _before(self, boundary: Boundary) -> Callable[..., Any]:
        signature = inspect.signature(boundary.enter.module.forward)

        def before(module: nn.Module, args: Any, kwargs: Any) -> Any:
            cut = self._cut_at(module)
            if cut is None:
                return None
            bound = signature.bind(*args, **kwargs)
            bound.arguments.update(without_writes(boundary.function, bound.arguments, cut))
            return bound.args, bound.kwargs

        return before

    def _after(self, boundary: Boundary) -> Callable[..., Any]:
        def after(module: nn.Module, _args: Any, output: Tensor) -> Any:
            cut = self._cut_at(module)
            if cut is None:
                return None
            given = {"output": output, "module": boundary.module}
            return without_writes(boundary.function, given, cut)["output"]

        return after

    def _unit(self) -> Callable[..., Any]:
        def after(unit: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
            cut = self._cut_at(unit)
            if cut is None:
                return None
            bound = inspect.signature(unit.forward).bind(*args, **kwargs).arguments
            gone = unit_writes(unit, bound["activations"], bound["position_ids"], cut)
            # The unit carries its state itself; a new tensor stands in its place.
            state: Tensor = unit.recurrent_states  # type: ignore[assignment]
            unit.recurrent_states = state - gone[:, -1].to(state.dtype)
            whole: Tensor = next(tensors_in(output))
            return replace_tensor(output, 0, (whole.float() - gone).to(whole.dtype))

        return after
