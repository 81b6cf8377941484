"""What a pass changes in calls of a recurrence's kernel function: gates, then writes, then states.

In prefill and in decoding: a step's argument without an axis of tokens is given one first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from trilens.errors import EditError
from trilens.models.gates.decoding import step_argument, with_step_argument
from trilens.models.gates.kernels import DECODE_KERNELS, KERNEL_GATES
from trilens.models.gates.split import SPLIT_KERNELS, run_split
from trilens.taps.kernels import KernelWatcher
from trilens.taps.recurrent_taps import WRITING_KERNELS, RecurrentTaps
from trilens.taps.site_taps import SiteTaps, Spot

__all__ = ["KernelEdits"]


class KernelEdits:
    """The spots of a pass among the arguments of kernel calls, and the knockouts of writes.

    Args:
        taps: the sites of the pass.
        writes: its knockouts in recurrences.

    Attributes:
        names: the functions to be watched, of prefill and decoding.
        states: layers whose state is edited.
    """

    def __init__(self, taps: SiteTaps, writes: RecurrentTaps) -> None:
        self.taps = taps
        self.writes = writes
        self.spots: dict[int | None, list[Spot]] = {}
        for spot in taps.spots:
            if spot.tap.event == "kernel":
                self.spots.setdefault(spot.site.layer, []).append(spot)
        keys = [key for key in taps.edits.actions if key[0] == "state"]
        self.states = frozenset(layer for _, layer in keys)
        request = taps.run.request
        asked = {*request.kernels, *request.states.layers} & self.states
        if asked:
            raise EditError(
                f"the state of layer {min(asked)} is edited, so that its recurrence is none from "
                "end to end: capture it without states and effective attention, or without that "
                "layer"
            )
        names: set[str] = set(SPLIT_KERNELS) if self.states else set()
        if writes.layers - set(writes.boundaries):
            names |= set(WRITING_KERNELS)
        if self.spots:
            names |= {*KERNEL_GATES, *DECODE_KERNELS.values()}
        self.names = frozenset(names)

    def watcher(
        self,
        enter: Callable[[str], None],
        leave: Callable[[str, Mapping[str, Any], Any], None],
    ) -> KernelWatcher:
        """What watches the kernels of the pass, and edits those that are edited."""
        edit = self.edit if self.names else None
        return KernelWatcher(enter, leave, edit, self.run if self.states else None)

    def edit(self, name: str, arguments: Mapping[str, Any]) -> Mapping[str, Any]:
        """What a kernel function is called with; the same object where nothing changes."""
        return self.writes.edit(name, self._gated(name, arguments))

    def run(
        self, name: str, original: Callable[..., Any], arguments: Mapping[str, Any]
    ) -> tuple[Any] | None:
        """The recurrence in parts, where the running layer's state is edited between them."""
        run, key = self.taps.run, ("state", self.taps.run.layer)
        if not run.mine() or run.layer not in self.states or name not in SPLIT_KERNELS:
            return None
        span = run.span
        found = [action.target.chosen(span) for action in self.taps.edits.actions[key]]
        columns = sorted({int(at) for chosen in found if chosen for at in chosen.columns})
        if not columns:
            return None

        def change(column: int, state: Tensor) -> Tensor:
            real = tuple(int(length > column) for length in span.lengths)
            token = replace(span, start=span.start + column, seq=1, lengths=real)
            made = self.taps.edits.apply(key, state[:, None], token)
            return state if made is None else made[:, 0].to(state.dtype)

        return (run_split(name, original, arguments, columns, change),)

    def _gated(self, name: str, arguments: Mapping[str, Any]) -> Mapping[str, Any]:
        run, given = self.taps.run, arguments
        if not run.mine():
            return arguments
        for spot in self.spots.get(run.layer, ()):
            argument = spot.tap.part
            held = step_argument(name, argument, given)
            made = self.taps.at(spot, held)
            if made is not held:
                given = {**given, argument: with_step_argument(name, argument, given, made)}
        return given
