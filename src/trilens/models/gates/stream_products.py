"""Which products of a block weigh residual streams, and how they are counted.

A product counts where it gives the streams of every token: [batch, seq, streams, d_model], with
the streams before the batch, or with the last two axes exchanged. The k-th such product that a
module's own code makes in a block's run is the k-th in every pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from trilens.models.gates.block import BlockView
from trilens.models.gates.site import GateSource

__all__ = ["Product", "holds_streams", "products_of"]


def holds_streams(shape: Sequence[int], batch: int, seq: int, streams: int, d_model: int) -> bool:
    """Whether a tensor of this shape holds the streams of every token of a batch."""
    return tuple(shape) in (
        (batch, seq, streams, d_model),
        (streams, batch, seq, d_model),
        (batch, seq, d_model, streams),
    )


@dataclass(frozen=True, slots=True, eq=False)
class Product:
    """One counted product of a block.

    Attributes:
        function: "mul" or "matmul".
        order: which of those of its module and function.
        operands: as [seq, streams, …] (of exchanged axes: transposed), left and right.
        raw: as the model's code has them.
    """

    path: str
    module: nn.Module
    tick: int
    function: str
    order: int
    operands: tuple[Tensor, Tensor]
    raw: tuple[Tensor, Tensor]
    is_leading: bool

    def source(self, index: int) -> GateSource:
        """Where an operand is read."""
        return GateSource("function", self.module, index, kernel=self.function, order=self.order)


def products_of(view: BlockView, streams: int, d_model: int) -> list[Product]:
    """The counted products of one block, in their order."""
    found: list[Product] = []
    counts: dict[tuple[str, str], int] = {}
    for call in view.streams:
        if not holds_streams(call.shape, 1, view.seq, streams, d_model):
            continue
        key = call.path, call.function
        order = counts.get(key, 0)
        counts[key] = order + 1
        around = [c for c in view.calls if c.path == call.path and c.start < call.tick < c.end]
        if not around:
            continue
        leading = call.shape[:2] != (1, view.seq)
        operands = tuple(_by_token(each, leading) for each in (call.left, call.right))
        if any(each is None for each in operands):
            continue
        found.append(
            Product(
                call.path,
                around[-1].module,
                call.tick,
                call.function,
                order,
                operands,  # type: ignore[arg-type]
                (call.left, call.right),
                leading,
            )
        )
    return found


def _by_token(tensor: Tensor, leading: bool) -> Tensor | None:
    """An operand as [seq, …], its streams behind the tokens; None where it has no such axes."""
    if tensor.dim() != 4:
        return None
    return tensor.movedim(0, 2)[0] if leading else tensor[0]
