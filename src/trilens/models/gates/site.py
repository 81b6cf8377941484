"""Where a gate is read in a running model, and how what is read becomes [batch, seq, units].

A probe measures both: the columns of a module's tensor that went into a gating function are found
bit for bit, so that halves, interleaved channels and per-head splits need no table per family.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from trilens.caches.gates import GateSpec
from trilens.errors import SilentSiteError
from trilens.models.stream_form import StreamForm

__all__ = [
    "GateSite",
    "GateSource",
    "GluCheck",
    "Layout",
    "UpSource",
    "find_columns",
    "is_numbered",
    "layout_of",
    "layout_of_streams",
    "rows_of",
]

Part = Literal["whole", "first", "second", "even", "odd"]
Form = Literal["batched", "flat", "seq_first", "static", "streams_first"]


@dataclass(frozen=True, slots=True)
class GateSource:
    """One tensor that passes by while a block runs.

    Attributes:
        event: a module's input or output, a kernel function's arguments, or a product of residual
            streams in a module's own code ("function").
        module: the module; for a kernel any module of the block (unused).
        index: which tensor of the module's arguments or outputs, or which operand.
        kernel: name of the kernel function or of the product, "" for a module.
        order: which of the block's calls of that module; which of the products of streams that its
            own code makes in the block's run.
    """

    event: Literal["input", "output", "kernel", "function"]
    module: nn.Module | None = None
    index: int = 0
    kernel: str = ""
    order: int = 0


@dataclass(frozen=True, slots=True)
class Layout:
    """How a tensor's axes become [batch, seq, units].

    Attributes:
        form: "batched": axis 0 is the batch, `axis` the tokens; "flat": rows are batch · seq, in
            this order; "seq_first": axes 0 and 1 are seq and batch; "static": no tokens at all;
            "streams_first": axis 0 is the residual streams, `axis` (1 or 2) the tokens.
        axis: the axis of the tokens.
        columns: which columns are the gate's, None for all.
        dtype: the dtype in which the model computes the gate.
    """

    form: Form
    axis: int = 1
    columns: tuple[int, ...] | slice | None = None
    dtype: torch.dtype | None = None


@dataclass(frozen=True, slots=True)
class UpSource:
    """The other factor of a GLU: a module's output, or the half of a fused one."""

    module: nn.Module
    index: int
    part: Part

    def read(self, output: Tensor) -> Tensor:
        """The factor in that output, by reference."""
        if self.part in ("first", "second"):
            return output.chunk(2, dim=-1)[self.part == "second"]
        if self.part in ("even", "odd"):
            return output[..., int(self.part == "odd") :: 2]
        return output


@dataclass(frozen=True, slots=True)
class GluCheck:
    """What proves a GLU's gate anew in each pass: gate times `up` is what `down` is given.

    Attributes:
        gate: the activation module.
        function: its name in `GATE_FUNCTIONS`.
        up: the other factor.
        down: the projection that takes the product.
    """

    gate: nn.Module
    function: str
    up: UpSource
    down: nn.Module


def is_numbered(block: nn.Module, path: str) -> bool:
    """Whether a module of a block is one of several of a kind, or inside one: a routed expert.

    Args:
        block: the block.
        path: the module's, within the block.
    """
    holder = block
    for part in path.split("."):
        several = isinstance(holder, nn.ModuleList) and len(holder) > 1
        if several and len({type(each) for each in holder.children()}) == 1:
            return True
        holder = getattr(holder, part, holder)
    return False


Reader = Callable[[Mapping[str, Any]], Tensor]


@dataclass(frozen=True, slots=True)
class GateSite:
    """A proven gate: what it is, where it is read, and how.

    Attributes:
        read: for kernels, from the arguments of one call to the tensor; for a module's input that
            is not itself the pre-activation, from {"x": tensor}; None keeps the tensor.
        check: how a pass proves it again; None where its own record is the proof.
    """

    spec: GateSpec
    source: GateSource
    layout: Layout
    read: Reader | None = None
    check: GluCheck | None = None
    more: tuple[GateSource, ...] = ()


def layout_of(tensor: Tensor, seq: int, dtype: torch.dtype | None = None) -> Layout | None:
    """The layout of a tensor of a probe with one row of `seq` tokens; None where it has none."""
    shape = tuple(tensor.shape)
    if len(shape) >= 3 and shape[0] == 1 and seq in shape[1:]:
        return Layout("batched", axis=1 + shape[1:].index(seq), dtype=dtype)
    if len(shape) >= 3 and shape[0] == seq and shape[1] == 1:
        return Layout("seq_first", axis=0, dtype=dtype)
    if len(shape) >= 2 and shape[0] % seq == 0:
        return Layout("flat", axis=0, dtype=dtype)
    return None


def layout_of_streams(form: StreamForm) -> Layout:
    """How what a block hands on becomes [batch, seq, units], all streams side by side."""
    if form.kind == "leading":
        return Layout("streams_first", axis=2 if form.batch_first else 1)
    return Layout("batched") if form.batch_first else Layout("seq_first", axis=0)


def rows_of(tensor: Tensor, layout: Layout, batch: int, seq: int, what: str) -> Tensor:
    """The tensor as [batch, seq, units], or [1, 1, units] where it is static.

    Raises:
        SilentSiteError: its axes are not those of the batch.
    """
    shape = tuple(tensor.shape)
    if layout.form == "static":
        rows = tensor.reshape(1, 1, -1)
    elif layout.form == "batched":
        if shape[0] != batch or shape[layout.axis] != seq:
            raise _not_tokens(shape, batch, seq, what)
        rows = tensor.movedim(layout.axis, 1).reshape(batch, seq, -1)
    elif layout.form == "seq_first":
        if shape[:2] != (seq, batch):
            raise _not_tokens(shape, batch, seq, what)
        rows = tensor.transpose(0, 1).reshape(batch, seq, -1)
    elif layout.form == "streams_first":
        if len(shape) != 4 or (shape[3 - layout.axis], shape[layout.axis]) != (batch, seq):
            raise _not_tokens(shape, batch, seq, what)
        rows = tensor.permute(3 - layout.axis, layout.axis, 0, 3).reshape(batch, seq, -1)
    else:
        if shape[0] % (batch * seq):
            raise _not_tokens(shape, batch, seq, what)
        rows = tensor.reshape(batch, seq, -1)
    if isinstance(layout.columns, tuple):
        rows = rows[..., torch.tensor(layout.columns, device=rows.device)]
    elif layout.columns is not None:
        rows = rows[..., layout.columns]
    return rows if layout.dtype is None else rows.to(layout.dtype)


def _not_tokens(shape: Sequence[int], batch: int, seq: int, what: str) -> SilentSiteError:
    return SilentSiteError(
        f"{what} gave a tensor {list(shape)} for {batch} × {seq} tokens: its rows are not the "
        "tokens; capture without gates=True"
    )


def find_columns(wanted: Tensor, held: Tensor) -> tuple[int, ...] | slice | None:
    """The columns of `held` [seq, m] that are those of `wanted` [seq, n], bit for bit.

    Returns:
        A slice where they are consecutive, their numbers where not, None where one is missing.
    """
    n, m = wanted.shape[1], held.shape[1]
    if n > m or not n:
        return None
    # Both are compared in the wider dtype: a model may compute a gate in float32.
    wide = torch.promote_types(wanted.dtype, held.dtype)
    wanted, held = wanted.detach().to("cpu", wide), held.detach().to("cpu", wide)
    starts = (held[0] == wanted[0, 0]).nonzero().flatten().tolist()
    for start in starts:
        if start + n <= m and torch.equal(held[:, start : start + n], wanted):
            return slice(start, start + n)
    if not starts:
        return None
    if wide == torch.bfloat16:
        wanted, held = wanted.float(), held.float()
    # −0 and 0 are equal numbers and different bytes.
    theirs = (held + 0.0).T.contiguous().numpy()
    ours = (wanted + 0.0).T.contiguous().numpy()
    places: dict[bytes, int] = {}
    for column in range(m):
        places.setdefault(theirs[column].tobytes(), column)
    found = [places.get(ours[column].tobytes()) for column in range(n)]
    if None in found:
        return None
    return tuple(column for column in found if column is not None)
