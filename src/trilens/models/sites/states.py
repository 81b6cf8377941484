"""The recurrent state as a site: changed after a token, before the next one reads it."""

from __future__ import annotations

from trilens.models.gates.block import BlockView
from trilens.models.gates.claims import GateClaims
from trilens.models.gates.site import Layout
from trilens.models.gates.split import state_shape
from trilens.models.sites.found import Found
from trilens.models.sites.site import Tap

__all__ = ["find_state_site"]

_UNREAD = "a state is captured with states= (--states), and read in cap.states"


def find_state_site(view: BlockView, gates: GateClaims, layer: int, found: Found) -> None:
    """Claim the state of a layer whose recurrence is one call that can go on from a state."""
    recurrence = gates.recurrences.get(layer)
    if recurrence is None:
        found.refuse(("state",), "the layer is not recurrent", absent=True)
    elif recurrence.refusal:
        found.refuse(("state",), recurrence.refusal)
    elif recurrence.boundary is not None:
        why = f"{recurrence.mixer} keeps its state inside, and takes none to go on from"
        found.refuse(("state",), why)
    elif len(view.kernels) != 1:
        why = f"the mixer calls {view.kernels[0].function} {len(view.kernels)} times, once per head"
        found.refuse(("state",), why)
    else:
        kernel = view.kernels[0]
        shape = state_shape(kernel.function, kernel.arguments)
        if shape is None:
            found.refuse(("state",), f"the state of {kernel.function} has several parts")
            return
        tap = Tap("state", view.block.module)
        found.claim("state", tap, Layout("batched"), shape, unread=_UNREAD)
