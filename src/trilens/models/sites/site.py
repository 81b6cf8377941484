"""Where a named place of the forward pass is read and written in a running model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import nn

from trilens.models.gates.site import Layout

__all__ = ["Site", "SiteKey", "Tap", "title_of"]

SiteKey = tuple[str, int | None]
"""Name of a site and its layer; None for the sites that the model has once."""


@dataclass(frozen=True, slots=True)
class Tap:
    """One tensor that passes by while the model runs.

    Attributes:
        event: a module's input or output, an attention call's, a sum of two tensors, a product
            with a weight, an argument of a recurrence's kernel function, or the state it carries.
        module: the module; of an attention call the one that calls; of a sum or product the one
            whose own code makes it (no module inside it is running), mostly the block or a router.
        index: which tensor of the module's arguments or outputs, in the order of `tensors_in`.
        order: which of the block's calls of that module, or which of the sums of streams that its
            code makes in the block's run, or of the products in its call, counted as
            `models/sites/sums.py` says.
        part: of an attention call: "query", "key", "value", "output", "scores" or "pattern"; of a
            sum: "" for its result, "left" or "right" for an operand; of a kernel: the argument.
    """

    event: Literal["input", "output", "attention", "sum", "linear", "kernel", "state"]
    module: nn.Module
    index: int = 0
    order: int = 0
    part: str = ""


@dataclass(frozen=True, slots=True)
class Site:
    """One proven site.

    Its value is [batch, seq, *shape]; of attn.scores and attn.pattern
    [batch, heads, seq_q, seq_k].

    Attributes:
        name: a key of `axes.SITES`.
        layer: the model's layer, or None.
        tap: where it is read.
        layout: how the tensor's axes become [batch, seq, units].
        shape: the axes of one token.
        write: where a new value is put in, where that is another tap than the one it is read at.
        projection: of attn.head_out: the output projection, whose input `tap` reads.
        overwritten: whether the model writes into the tensor later: what is read must be copied.
        fixed: why it can be read and not edited, in a sentence; "" where it can.
        unread: why it can be edited and not read, in a sentence; "" where it can.
        closed: what zero ablation puts there: 0, but what a gate's function gives 0 for.
    """

    name: str
    layer: int | None
    tap: Tap
    layout: Layout
    shape: tuple[int, ...]
    write: Tap | None = None
    projection: nn.Module | None = None
    overwritten: bool = False
    fixed: str = ""
    closed: float = 0.0
    unread: str = ""

    @property
    def key(self) -> SiteKey:
        """Name and layer."""
        return self.name, self.layer

    @property
    def write_tap(self) -> Tap:
        """Where a new value is put in."""
        return self.tap if self.write is None else self.write


def title_of(key: SiteKey) -> str:
    """A site in words: "attn.z of layer 3"."""
    name, layer = key
    return name if layer is None else f"{name} of layer {layer}"
