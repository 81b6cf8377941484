"""The way from the last block to the last hidden state: the final norm, and a readout before it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from trilens.errors import SeveralStreamsError
from trilens.models.follow import way
from trilens.models.logit_relation import relate
from trilens.models.stream_form import StreamForm, holds_one
from trilens.models.trace import ModuleCall, Trace, same

__all__ = ["Norm", "carried", "final_norm", "norm_behind_code", "read_out_by"]


def carried(tensor: Tensor, call: ModuleCall) -> float | None:
    """The constant times which a call takes the tensor, or None.

    RWKV-4 halves its residual stream every few blocks in inference; the blocks' weights make up
    for it. The stream is still one chain.
    """
    if call.takes(tensor):
        return 1.0
    return next((c.scale for item in call.inputs if (c := relate(tensor, item)) is not None), None)


@dataclass(frozen=True, slots=True)
class Norm:
    """last hidden state = modules(scale · last block's output).

    Attributes:
        is_own_code: whether the model's own code stands between the last block and the modules.
    """

    end: int
    path: tuple[str, ...] = ()
    scale: float = 1.0
    is_own_code: bool = False


def final_norm(trace: Trace, last: Tensor, after: int, hidden: Tensor) -> Norm | None:
    """The way from the last block's output to the last hidden state; None where there is none."""
    # Streams [seq, batch, d_model] are turned round before they are handed out.
    if same(last, hidden) or _same_flat(last, hidden):
        return Norm(after)
    first = next((c for c in trace.calls if c.start > after and carried(last, c)), None)
    if first is None:
        return None
    scale = carried(last, first)
    start = last if scale in (None, 1.0) else first.inputs[0]
    for path, output, end in way(trace, start, after):
        if same(output, hidden) or _same_flat(output, hidden):
            return Norm(end, path, scale or 1.0)
    return None


def norm_behind_code(trace: Trace, last: Tensor, after: int, hidden: Tensor) -> Norm | None:
    """The module that gives the last hidden state, reading one stream that no block gave.

    What lies between is the model's own code: that it reads the last block's output alone is
    proven by running it (`taps/readout.py`).
    """
    for call in trace.calls:
        if call.start < after or not any(same(hidden, output) for output in call.outputs[:1]):
            continue
        read = [t for t in call.inputs if t.is_floating_point()]
        width = last.shape[-1]
        if len(read) == 1 and holds_one(read[0], trace.seq) and read[0].shape[-1] == width:
            return Norm(call.end, (call.path,), is_own_code=True)
    return None


def _same_flat(a: Tensor, b: Tensor) -> bool:
    if a.numel() != b.numel() or a.shape[-1:] != b.shape[-1:]:
        return False
    return same(a.reshape(-1), b.reshape(-1))


def read_out_by(
    trace: Trace, form: StreamForm, norm: Norm, block: ModuleCall, last: Tensor
) -> tuple[tuple[str, ...] | None, tuple[str, ...]]:
    """The modules that make one vector of several streams, and the final norm behind them."""
    if form.n_streams == 1:
        return (), norm.path
    if norm.is_own_code:
        return None, norm.path
    made = [output for _, output, _ in way(trace, last, block.end)]
    for number, output in enumerate(made[: len(norm.path)], 1):
        if holds_one(output, trace.seq) and output.shape[-1] == form.d_model:
            return norm.path[:number], norm.path[number:]
    raise SeveralStreamsError(
        f"the residual has several streams: {block.path} passes on "
        f"{list(last.shape)}, and no module makes one vector of width {form.d_model} of it"
    )
