"""Sites inside an MLP, and what a mixer reads and gives."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from trilens.io.messages import listed
from trilens.models.gates.block import BlockView
from trilens.models.gates.site import GateSite, Layout, UpSource, is_numbered, layout_of
from trilens.models.sites.block import Kind, Parts
from trilens.models.sites.found import Found
from trilens.models.sites.gates import closed_at
from trilens.models.sites.head_out import is_projection
from trilens.models.sites.site import Tap
from trilens.models.sites.streams import BlockStreams
from trilens.models.sites.way import cores_of
from trilens.models.trace import ModuleCall, same

__all__ = ["INSIDE", "find_ends", "find_mlp_sites", "is_whole"]

Cores = list[tuple[ModuleCall, int]]

INSIDE = ("mlp.in", "mlp.gate", "mlp.up", "mlp.post", "mlp.out")
_HIDDEN = ("mlp.gate", "mlp.up", "mlp.post")


def find_ends(kind: Kind, streams: BlockStreams, parts: Parts, found: Found) -> ModuleCall | None:
    """Claim what the one module of a kind reads and gives: `mixer.in` and `.out`, or an MLP's.

    Returns:
        The module's call, None where there is not just one.
    """
    cores = parts.cores(kind)
    names = (f"{kind}.in", f"{kind}.out")
    if len(cores) != 1:
        where = listed(call.path for call, _ in cores)
        joined = [s for s in streams.sums if cores and _are(cores_of(streams, s), cores)]
        if joined:
            tap, written = streams.sum_tap(joined[0])
            layout = layout_of(joined[0].result, streams.seq)
            assert layout is not None
            found.claim(names[1], tap, layout, (streams.d_model,), overwritten=written)
            found.refuse(names[:1], f"several modules read the stream, each for itself: {where}")
        found.refuse(
            names,
            f"the block adds what {len(cores)} modules give: {where}"
            if cores
            else "the block adds it together with other parts, times one factor",
        )
        return None
    call, index = cores[0]
    _claim_output(f"{kind}.out", call, index, streams, found)
    reader = call
    if kind == "mlp" and is_projection(call.module):
        reader = _first_of(call, streams) or call
    ends = [i for i, tensor in enumerate(reader.read) if streams.is_stream(tensor)]
    if reader is call and is_projection(call.module):
        found.refuse(names[:1], f"no module reads it before {call.path}")
    elif ends:
        tap, written = streams.input_tap(reader, ends[0])
        layout = layout_of(reader.read[ends[0]], streams.seq)
        assert layout is not None
        found.claim(names[0], tap, layout, (streams.d_model,), overwritten=written)
    else:
        found.refuse(names[:1], f"{reader.path} reads no stream of the model's width")
    return call


def is_whole(call: ModuleCall, streams: BlockStreams) -> bool:
    """Whether a module may be an MLP: it has parts, or another projection stands before it."""
    if is_projection(call.module):
        return _first_of(call, streams) is not None
    return not _is_linear(call, streams)


def _is_linear(call: ModuleCall, streams: BlockStreams) -> bool:
    """Whether a module is projections in a row with nothing between them: a matrix of low rank."""
    inner = [c for c in streams.calls if call.encloses(c) and is_projection(c.module)]
    pairs = list(pairwise(inner))
    return bool(pairs) and all(
        len(a.made) == len(b.read) == 1 and same(a.made[0], b.read[0]) for a, b in pairs
    )


def _are(some: Cores, others: Cores) -> bool:
    return {(id(call), i) for call, i in some} == {(id(call), i) for call, i in others}


def _claim_output(
    name: str, call: ModuleCall, index: int, streams: BlockStreams, found: Found
) -> None:
    layout = layout_of(call.made[index], streams.seq)
    assert layout is not None
    tap, written = streams.output_tap(call, index)
    found.claim(name, tap, layout, (streams.d_model,), overwritten=written)


def _first_of(down: ModuleCall, streams: BlockStreams) -> ModuleCall | None:
    """The projection whose output, through an activation or dropout, a lone projection reads."""
    wanted = down.read[0]
    for _ in range(4):
        for call in sorted(streams.calls, key=lambda c: -c.end):
            if call.end >= down.start or len(call.made) != 1 or not call.read:
                continue
            y = call.made[0]
            if y.shape != wanted.shape or y.dtype != wanted.dtype or not torch.equal(y, wanted):
                continue
            if is_projection(call.module):
                return call
            if call.read[0].shape == y.shape and not torch.equal(call.read[0], y):
                wanted = call.read[0]
                break
        else:
            return None
    return None


def find_mlp_sites(
    view: BlockView,
    streams: BlockStreams,
    mlp: ModuleCall | None,
    gate: GateSite | None,
    without: str,
    found: Found,
) -> None:
    """Claim the hidden units: of a proven GLU, or of what the last projection of a plain MLP reads.

    Args:
        view: the block.
        streams: its streams.
        mlp: the MLP's module, or its last projection; None where there is not just one.
        gate: the block's proven GLU gate.
        without: why there is none, in words.
        found: where claims go.
    """
    if gate is not None and gate.check is not None:
        _claim_glu(view, gate, found)
    else:
        found.refuse(("mlp.gate", "mlp.up"), without or "the MLP has no GLU gate")
    if mlp is None:
        found.refuse(("mlp.post",), "what the block adds here comes from several modules")
        return
    down = _down(view, mlp)
    if down is None:
        found.refuse(("mlp.post",), without or f"no projection in {mlp.path} gives its output")
        return
    if gate is not None and gate.check is not None and gate.check.down is not down.module:
        found.refuse(("mlp.post",), f"{down.path} does not read the product of the GLU")
        return
    x = down.read[0]
    layout = layout_of(x, view.seq)
    if layout is None or x.numel() != view.seq * x.shape[-1]:
        found.refuse(("mlp.post",), f"{down.path} reads no row for each token")
        return
    tap, written = streams.input_tap(down)
    found.claim("mlp.post", tap, layout, (x.shape[-1],), overwritten=written)


def _down(view: BlockView, mlp: ModuleCall) -> ModuleCall | None:
    """The projection of the MLP whose output is the MLP's, bit for bit."""
    wanted = view.rows(mlp.made[0])
    inside = [mlp, *(c for c in view.calls if mlp.encloses(c))]
    for call in reversed(inside):
        path = call.path.removeprefix(f"{view.block.path}.")
        if not is_projection(call.module) or is_numbered(view.block.module, path):
            continue
        y = call.made[0]
        if y.numel() == wanted.numel() and torch.equal(view.rows(y), wanted):
            return call
    return None


def _claim_glu(view: BlockView, gate: GateSite, found: Found) -> None:
    check, source = gate.check, gate.source
    assert check is not None and source.module is not None
    assert source.event != "kernel"
    assert source.event != "function"
    tap = Tap(source.event, source.module, source.index, source.order)
    closed = closed_at(gate.spec)
    found.claim("mlp.gate", tap, gate.layout, gate.spec.shape, closed=closed)
    call = next((c for c in view.calls if c.module is check.up.module), None)
    if call is None:
        found.refuse(("mlp.up",), "what the gate multiplies is shown by no module of the block")
        return
    output = call.made[check.up.index]
    layout = layout_of(output, view.seq)
    if layout is None:
        return
    columns = _columns(check.up, output)
    read = Layout(layout.form, layout.axis, columns)
    found.claim("mlp.up", Tap("output", call.module, check.up.index), read, gate.spec.shape)


def _columns(up: UpSource, output: Tensor) -> slice | None:
    width = output.shape[-1]
    halves = {
        "first": slice(0, width // 2),
        "second": slice(width // 2, width),
        "even": slice(0, width, 2),
        "odd": slice(1, width, 2),
    }
    return halves.get(up.part)
