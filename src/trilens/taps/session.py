"""One capture's hooks: residual streams, attention calls and gates of a single forward pass.

Everything is undone when the block ends, also after an exception. Only the thread that opened the
session is recorded: another thread may run the same model beside it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from trilens.models.anatomy import Anatomy
from trilens.models.gates.kernels import DECODE_KERNELS, KERNEL_GATES
from trilens.taps.edits import Compiled
from trilens.taps.gate_check import watch_gates
from trilens.taps.hooks import hooked
from trilens.taps.inline.tap import InlineTap, inline_modules
from trilens.taps.kernel_edits import KernelEdits
from trilens.taps.kernels import KERNELS, kernel_places
from trilens.taps.passing import Session
from trilens.taps.recording import CaptureRequest, Recording
from trilens.taps.recurrent_taps import RecurrentTaps
from trilens.taps.registry import REGISTRY, attention_keys
from trilens.taps.stream_taps import StreamTaps

__all__ = ["recording_of", "session_of"]


@contextmanager
def recording_of(
    model: nn.Module,
    anatomy: Anatomy,
    request: CaptureRequest,
    edits: Compiled | None = None,
) -> Iterator[Recording]:
    """Record one forward pass that runs inside the block.

    Args:
        model: the model.
        anatomy: its parts.
        request: what the pass is to leave behind.
        edits: made ready for these prompts; what is kept is what they gave.

    Yields:
        The recording, complete when the block ends.

    Raises:
        SilentSiteError: a requested site did not fire.
        CaptureError: as `session_of`.
        UnclaimedGateError: a gate is not what it was on the probe.
    """
    with session_of(model, anatomy, request, edits) as session:
        yield session.recording
    session.finish()


@contextmanager
def session_of(
    model: nn.Module,
    anatomy: Anatomy,
    request: CaptureRequest,
    edits: Compiled | None = None,
) -> Iterator[Session]:
    """Hooks for the passes that run inside the block, one after the other.

    Args:
        model: the model.
        anatomy: its parts.
        request: what the first pass is to leave behind.
        edits: made ready for these prompts.

    Yields:
        The session: `begin` is called before each pass but the first, `finish` after each.

    Raises:
        CaptureError: the blocks did not run in the proven order, or this is a capture inside
            another of the same model.
    """
    with hooked(model) as hooks:
        given = edits or Compiled()
        session = Session(hooks, anatomy, request, given)
        blocks = {id(block.module): block.module for block in anatomy.blocks}.values()
        for module in blocks:
            hooks.before(module, session.enter_block)
        edited = session.calls.modules(model, anatomy)
        paths = {path for layer in request.attention for path in anatomy.attends(layer)}
        attending = edited | {model.get_submodule(path) for path in paths}
        editor = session.calls if edited else None
        own = {m: n for m, n in inline_modules(model, anatomy).items() if m in attending}
        session.sites.place_inputs(hooks)
        session.sums.place(hooks)
        # After the sums: of two that watch functions, the one that begins later has to end first.
        InlineTap(session, own, session.attend, editor).place(hooks)
        crossing = {c.module: c.product for c in request.cross.values() if c.product is not None}
        InlineTap(session, crossing, session.attend_across, None).place(hooks)
        session.sites.place_outputs(hooks)
        for module in blocks:
            hooks.after(module, session.leave_block)
        session.check_gates = watch_gates(hooks, request.gates)
        kernels = {key[2] for key in session.taps if key[0] == "kernel"}
        observed = {*request.kernels, *request.states.layers}
        kernels |= set(KERNEL_GATES) if observed - set(request.boundaries) else set()
        # Before the hooks that record a boundary: they note what was really used.
        writes = RecurrentTaps(session, given)
        writes.place(hooks)
        for edge in {edge for b in request.boundaries.values() for edge in (b.enter, b.leave)}:
            hook = session.boundary_hook(edge)
            if edge.event == "input":
                hooks.before(edge.module, hook, with_kwargs=True)
            else:
                hooks.after(edge.module, hook)
        for key in session.taps:
            tapped, hook = key[1], session.module_hook(key)
            if tapped is not None and key[0] == "input":
                hooks.before(tapped, hook, with_kwargs=True)
            elif tapped is not None and key[0] == "output":
                hooks.after(tapped, hook)
        StreamTaps(session, anatomy).place(hooks)
        edited_kernels = KernelEdits(session.sites, writes)
        kernels |= edited_kernels.names
        if kernels:
            watcher = edited_kernels.watcher(_nothing, session.leave_kernel)
            kernels |= {DECODE_KERNELS[name] for name in kernels & DECODE_KERNELS.keys()}
            hooks.enter(KERNELS.watch(kernel_places(model, sorted(kernels)), watcher))
        if attending - own.keys():
            keys = attention_keys(model, attending - own.keys())
            hooks.enter(REGISTRY.watch(keys, session.attend, editor))
        across = [each.module for each in request.cross.values() if each.product is None]
        if across:
            watched = attention_keys(model, across)
            hooks.enter(REGISTRY.watch(watched, session.attend_across))
        yield session


def _nothing(*_: Any) -> None:
    """Before a kernel there is nothing to do."""
