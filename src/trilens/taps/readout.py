"""The readout of several residual streams: the one vector that the final norm would read.

Modules make it, or the model's own code between the last block and the final norm. That code is
run as it is: the blocks are passed over, the last of them hands on the streams that are read out,
and the model is stopped where the final norm begins.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from trilens.errors import AnatomyError, SeveralStreamsError
from trilens.io.messages import reason
from trilens.io.short_memory import is_short_of_memory
from trilens.models.anatomy import Anatomy
from trilens.models.forward_call import forward_arguments, probe_ids
from trilens.models.trace import Trace, tensors_in
from trilens.taps.override import CountedOverrides, Functions

__all__ = ["check_readout", "read_out", "run_readout"]

_PASSED = CountedOverrides()
_EPS = 64
"""Roundings of one that the readout of a single token may be away from that of a whole text."""


class _StopError(Exception):
    """The final norm was reached."""


@torch.no_grad()
def read_out(model: PreTrainedModel, anatomy: Anatomy, streams: Tensor, vocab: int) -> Tensor:
    """What the final norm would read, [batch, seq, d_model], of streams that a block hands on.

    The model is in eval mode and locked by the caller.

    Args:
        model: the model.
        anatomy: its parts.
        streams: [batch, seq, streams, d_model]; of a single stream they are the readout.
        vocab: rows of the input embedding.
    """
    return streams if anatomy.n_streams == 1 else run_readout(model, anatomy, streams, vocab)


def run_readout(model: PreTrainedModel, anatomy: Anatomy, streams: Tensor, vocab: int) -> Tensor:
    """As `read_out` of several streams, in the graph where gradients are on."""
    held = anatomy.form.write(streams)
    if anatomy.readout is None:
        return _by_own_code(model, anatomy, held, vocab)
    modules = dict(model.named_modules(remove_duplicate=False))
    for path in anatomy.readout:
        held = next(tensors_in(modules[path](held)))
    return held if anatomy.form.batch_first else held.transpose(0, 1)


def _by_own_code(model: PreTrainedModel, anatomy: Anatomy, held: Tensor, vocab: int) -> Tensor:
    thread, last = threading.get_ident(), anatomy.blocks[-1].module
    passed: list[bool] = []
    found: list[Tensor] = []

    def forward_of(module: nn.Module, own: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() != thread:
                return own(*args, **kwargs)
            if module is last:
                passed.append(True)
            return held

        return forward

    def stop(_module: nn.Module, args: Any, kwargs: Any) -> None:
        if passed and threading.get_ident() == thread:
            found.append(next(tensors_in((args, kwargs))))
            raise _StopError

    # One plain token will do: nothing of it reaches the streams that are read out, and what the
    # model makes of its input before the blocks costs nothing so.
    arguments = forward_arguments(model, probe_ids(model, vocab, 1, seed=1), None)
    norm = model.get_submodule(anatomy.final_norm[0])
    handle = norm.register_forward_pre_hook(stop, with_kwargs=True)
    blocks = {id(block.module): block.module for block in anatomy.blocks}.values()
    try:
        with _passed_over(list(blocks), forward_of):
            model(**arguments)
    except _StopError:
        return found[0]
    finally:
        handle.remove()
    raise AnatomyError(f"{anatomy.final_norm[0]} is not called after the blocks")


def _passed_over(
    blocks: list[nn.Module], forward_of: Callable[[nn.Module, Callable[..., Any]], Any]
) -> AbstractContextManager[None]:
    """Blocks whose `forward` is another one for the length of the block."""
    made = iter([forward_of(module, module.forward) for module in blocks])
    places: list[tuple[Functions, str]] = [(vars(module), "forward") for module in blocks]
    return _PASSED.override(places, lambda _name, _own: next(made))


def check_readout(model: PreTrainedModel, anatomy: Anatomy, trace: Trace, vocab: int) -> None:
    """Hold the readout of the last block's streams against what the final norm read on the probe.

    Raises:
        SeveralStreamsError: it is another one, or that of one token depends on others.
    """
    if anatomy.n_streams == 1:
        return
    block = anatomy.blocks[-1]
    calls = [call for call in trace.calls if call.path == block.path]
    streams, theirs = anatomy.form.read(calls[-1].made[block.output]), _on_probe(anatomy, trace)
    try:
        ours = read_out(model, anatomy, streams, vocab)
        alone = read_out(model, anatomy, streams[:, -1:], vocab)
    # What stands between the blocks and the final norm may need more than the streams.
    except Exception as error:
        if is_short_of_memory(error):
            raise
        raise SeveralStreamsError(
            f"the residual has several streams, and they cannot be read out: {reason(error)}"
        ) from error
    size = float(theirs.abs().max())
    allowed = _EPS * torch.finfo(theirs.dtype).eps * size
    for name, gap in (
        ("of the last block's streams is not what the final norm read", ours - theirs),
        ("of one token is another one beside other tokens", alone - ours[:, -1:]),
    ):
        if not float(gap.abs().max()) <= allowed:
            raise SeveralStreamsError(
                f"the residual has several streams, and the readout {name}: it is off by "
                f"{float(gap.abs().max()) / size:.1g} of its largest entry"
            )


def _on_probe(anatomy: Anatomy, trace: Trace) -> Tensor:
    """The vector that the model itself read the streams out to."""
    if anatomy.readout:
        call = [call for call in trace.calls if call.path == anatomy.readout[-1]][-1]
        found = call.made[0]
    else:
        call = [call for call in trace.calls if call.path == anatomy.final_norm[0]][-1]
        found = next(t for t in call.read if t.is_floating_point())
    return found if found.shape[0] == 1 else found.transpose(0, 1)
