"""The residual stream of one block, and what its parts add to it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from trilens.io.messages import listed
from trilens.models.gates.site import Layout, layout_of
from trilens.models.sites.found import Found
from trilens.models.sites.site import Tap
from trilens.models.sites.streams import BlockStreams
from trilens.models.sites.way import Piece, Step, pieces_of, way_of
from trilens.models.trace import ModuleCall

__all__ = ["Kind", "Part", "Parts", "find_parts", "find_stream_sites"]

Kind = Literal["attn", "cross", "mixer", "mlp", "extra"]
"""What a part is; "extra" is what no rule takes for one of the others, as per-layer embeddings."""

KindOf = Callable[[ModuleCall], Kind]


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """What one summand of a block is.

    Attributes:
        step: number of the step that added it.
        kinds: the kinds of the modules that gave it, one of each.
    """

    step: int
    piece: Piece
    kinds: tuple[Kind, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Parts:
    """A block's way from its input to its output, and what was added on it."""

    steps: tuple[Step, ...]
    parts: tuple[Part, ...]

    def of(self, kind: Kind) -> list[Part]:
        """The summands that are of one kind alone."""
        return [part for part in self.parts if part.kinds == (kind,)]

    def cores(self, kind: Kind) -> list[tuple[ModuleCall, int]]:
        """The modules of one kind that gave something."""
        return [core for part in self.of(kind) for core in part.piece.cores]


def find_parts(streams: BlockStreams, base: Tensor, output: Tensor, kind_of: KindOf) -> Parts | str:
    """The block's steps and summands, or why they are not known, in a sentence."""
    block = streams.block
    steps = way_of(streams, output, base, block.end)
    if steps is None:
        return f"{block.path}'s output is not its input plus what its modules give"
    parts: list[Part] = []
    for number, step in enumerate(steps):
        pieces = pieces_of(streams, step)
        if pieces is None:
            return f"{block.path} adds to its input what no module of it gives"
        for piece in pieces:
            kinds = tuple(dict.fromkeys(kind_of(call) for call, _ in piece.cores))
            parts.append(Part(number, piece, kinds))
    return Parts(steps, tuple(parts))


def find_stream_sites(
    streams: BlockStreams, parts: Parts, kinds: Sequence[Kind], found: Found
) -> None:
    """Claim resid_mid and what each kind of part adds.

    Args:
        streams: the block's.
        parts: its steps and summands.
        kinds: the kinds that the block has, attention and mixers among them.
        found: where claims go.
    """
    for kind in (kind for kind in kinds if kind != "extra"):
        _claim_add(kind, streams, parts, found)
    _claim_mid(streams, parts, found)


def _claim_add(kind: Kind, streams: BlockStreams, parts: Parts, found: Found) -> None:
    name = f"{kind}.add"
    own = parts.of(kind)
    mixed = [part for part in parts.parts if kind in part.kinds and len(part.kinds) > 1]
    if mixed or not own:
        found.refuse((name,), "the block adds it together with other parts, times one factor")
        return
    if len(own) == 1:
        piece = own[0].piece
        tap, written = _tap_of(streams, piece.tensor, piece)
        found.claim(name, tap, _layout(piece.tensor, streams), (streams.d_model,),
                    overwritten=written)  # fmt: skip
        return
    step = parts.steps[own[0].step]
    others = [part for part in parts.parts if part.step == own[0].step and part not in own]
    if others or any(part.step != own[0].step for part in own) or step.part is None:
        found.refuse((name,), f"the block adds {len(own)} such parts apart: {_names(own)}")
        return
    assert step.side
    tap, written = streams.sum_tap(step.call, step.side)  # type: ignore[arg-type]
    found.claim(name, tap, _layout(step.part, streams), (streams.d_model,), overwritten=written)


def _names(parts: Sequence[Part]) -> str:
    return listed(call.path for part in parts for call, _ in part.piece.cores)


def _tap_of(streams: BlockStreams, tensor: Tensor, piece: Piece) -> tuple[Tap, bool]:
    """A module that gives the summand, or the sum's operand where none does."""
    shown = streams.shown(tensor, piece.tick)
    if shown is not None:
        return streams.output_tap(*shown)
    return streams.sum_tap(piece.sum, piece.side)


def _layout(tensor: Tensor, streams: BlockStreams) -> Layout:
    layout = layout_of(tensor, streams.seq)
    assert layout is not None
    return layout


def _claim_mid(streams: BlockStreams, parts: Parts, found: Found) -> None:
    """The stream before the MLP's sum, where the MLP ran after all else had been added."""
    last = [part for part in parts.parts if "mlp" in part.kinds]
    first = [p for p in parts.parts if p not in last and {"attn", "cross", "mixer"} & set(p.kinds)]
    if not first or not last:
        what = "MLP" if first else "attention and no mixer"
        found.refuse(
            ("resid_mid",),
            f"the block has no {what} of its own: nothing lies between its parts",
            absent=True,
        )
        return
    end = max(part.step for part in first)
    start = min(part.step for part in last)
    mixed = any(len(part.kinds) > 1 for part in last)
    added = max(part.piece.tick for part in first)
    ran = min(call.start for part in last for call, _ in part.piece.cores)
    if mixed or end == start or (end < start and ran < parts.steps[end].tick):
        found.refuse(
            ("resid_mid",),
            "the block is parallel: its MLP does not read what its other part added to the stream",
            absent=True,
        )
        return
    if start < end or ran < added:
        found.refuse(("resid_mid",), "the block's MLP is not the last of its parts")
        return
    step = parts.steps[end]
    for later in parts.steps[end + 1 : start]:
        if later.kind == "norm":
            step = later
    layout = _layout(step.result, streams)
    shape = (streams.d_model,)
    if isinstance(step.call, ModuleCall):
        tap, written = streams.output_tap(step.call)
        found.claim("resid_mid", tap, layout, shape, overwritten=written)
        return
    write, _ = streams.sum_tap(step.call)  # type: ignore[arg-type]
    reads = [
        (call, index)
        for call in streams.calls
        if call.start > step.tick
        for index, tensor in enumerate(call.read)
        if streams.is_stream(tensor) and streams.equal(tensor, step.result)
    ]
    if not reads:
        found.claim("resid_mid", write, layout, shape, overwritten=True)
        return
    call, index = min(reads, key=lambda item: item[0].start)
    tap, written = streams.input_tap(call, index)
    layout = _layout(call.read[index], streams)
    found.claim("resid_mid", tap, layout, shape, write=write, overwritten=written)
