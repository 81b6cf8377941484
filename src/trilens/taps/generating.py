"""The passes of one generation: prefill, then one token at a time, each edited and recorded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from trilens.errors import GenerationError
from trilens.models.anatomy import Anatomy
from trilens.models.forward_call import takes
from trilens.taps.edits import Compiled
from trilens.taps.hooks import Hooks
from trilens.taps.joined import (
    OVER_PAIRS,
    PassRecord,
    attention_of_pass,
    cross_of_pass,
    join_recordings,
)
from trilens.taps.mode import evaluating, forgetting
from trilens.taps.passes import source_positions
from trilens.taps.recording import CaptureRequest, Recording, StateRequest
from trilens.taps.session import session_of
from trilens.taps.span import Span

__all__ = ["LogitsKept", "Passes", "Session", "generating"]

LogitsKept = Literal["all", "last"] | None


class Session(Protocol):
    """What the passes need to know of the hooks on the model."""

    hooks: Hooks
    request: CaptureRequest
    recording: Recording
    span: Span

    def mine(self) -> bool:
        """Whether this thread's pass is running."""

    def begin(self, request: CaptureRequest, start: int) -> None:
        """Begin a pass over the tokens of a text from `start` on."""

    def finish(self) -> None:
        """Raise if a requested site did not fire."""


class Passes:
    """What the passes of one generation left behind so far.

    Args:
        wanted: what is kept of each pass; None to edit alone.
        prompt: tokens of the prompt.
        logits: of which positions, as in `Lens.capture`.
        indexed: the model takes `logits_to_keep`.
    """

    def __init__(
        self,
        wanted: CaptureRequest | None,
        prompt: int,
        logits: LogitsKept,
        *,
        indexed: bool,
    ) -> None:
        self.wanted = wanted
        self.prompt = prompt
        self.logits = logits
        self.indexed = indexed
        self.length = prompt
        self.final = False
        self.done: list[PassRecord] = []
        self.read = 0
        self.versions: list[tuple[Tensor, int]] = []

    def begin(self, session: Session, module: nn.Module, args: Any, kwargs: Any) -> Any:
        """A pass begins: which tokens it holds, and what is kept of them."""
        if not session.mine():
            return None
        seq = _tokens_of(args, kwargs)
        if seq == self.length:
            # A model without a cache reads the whole text again: the pass stands for all before.
            self.done.clear()
            self.versions.clear()
            self.read = 0
        elif self.read + seq != self.length:
            raise GenerationError(
                f"{type(module).__name__} reads {seq} tokens where "
                f"{self.length - self.read} are new: its decoding steps can't be told apart; "
                "generate with model.generate and capture the text afterwards"
            )
        session.begin(self._request(session, seq), self.read)
        if self.wanted is None or not self.indexed:
            return None
        # As a number it lets a model drop all other positions from its last layers as well.
        keep = 0 if self.logits == "all" else torch.tensor([seq - 1], device=_device_of(module))
        return args, {**kwargs, "logits_to_keep": keep}

    def end(self, session: Session, _module: nn.Module, _args: Any, output: Any) -> None:
        """A pass ends: what it left behind is kept, without the cache's own tensors."""
        if not session.mine():
            return
        session.finish()
        seq, start = session.span.seq, session.span.start
        self.read = start + seq
        if self.wanted is None:
            return
        recording = session.recording
        if self.logits is not None:
            logits = getattr(output, "logits", None)
            recording.logits = logits.detach() if isinstance(logits, Tensor) else None
        first = self.done[0].attention if self.done else {}
        attention = {
            layer: attention_of_pass(call, seq, first.get(layer))
            for layer, call in recording.attention.items()
        }
        crossed = self.done[0].cross if self.done else {}
        cross = {
            layer: cross_of_pass(call, crossed.get(layer), layer)
            for layer, call in recording.cross.items()
        }
        recording.source = source_positions(output, recording.cross)
        if self.logits == "last" and self.done:
            self.done[-1].recording.logits = None
        # A pattern holds all keys so far: what its attention keeps is enough.
        sites = {key: x for key, x in recording.sites.items() if key[0] not in OVER_PAIRS}
        rest = replace(recording, attention={}, cross={}, sites=sites)
        record = PassRecord(start, seq, rest, attention, cross)
        self.done.append(record)
        self.versions += [(tensor, tensor._version) for tensor in record.tensors()]

    def grew(self, length: int, final: bool) -> None:
        """The text has so many tokens now; whether the next pass is the last one."""
        self.length, self.final = length, final

    def overwritten(self) -> bool:
        """Whether the model wrote into a tensor that is kept, in its pass or in a later one."""
        early = any(each.recording.overwritten for each in self.done)
        return early or any(tensor._version != version for tensor, version in self.versions)

    def joined(self, request: CaptureRequest) -> Recording:
        """The recording of the whole text: as `join_recordings`."""
        return join_recordings(self.done, request)

    def _request(self, session: Session, seq: int) -> CaptureRequest:
        wanted = session.request if self.wanted is None else self.wanted
        last_only = wanted.residual == "last" and not self.final
        return replace(
            wanted,
            lengths=(seq,),
            prompts=(self.prompt,),
            numbers=(0,),
            residual=None if last_only else wanted.residual,
            # A state is computed from all that its layer was given: when the text is whole.
            kernels=tuple(sorted({*wanted.kernels, *wanted.states.layers})),
            states=StateRequest(),
        )


@contextmanager
def generating(
    model: nn.Module,
    anatomy: Anatomy,
    wanted: CaptureRequest | None,
    edits: Compiled | None,
    *,
    prompt: int,
    logits: LogitsKept = None,
) -> Iterator[Passes]:
    """Edit and record each forward pass that `model.generate` runs inside the block.

    Args:
        model: the model.
        anatomy: its parts.
        wanted: what is kept, as of one pass; None to keep nothing.
        edits: made ready for this prompt.
        prompt: tokens of the prompt.
        logits: of which positions logits are kept.

    Yields:
        The passes. Where there is nothing to edit or keep, no hook is placed.

    Raises:
        CaptureError: as `session_of`.
    """
    with evaluating(model), forgetting(model), torch.inference_mode(False), torch.no_grad():
        passes = Passes(wanted, prompt, logits, indexed=takes(model, "logits_to_keep"))
        if wanted is None and edits is None:
            yield passes
            return
        request = wanted or CaptureRequest((), None, (prompt,), (), {})
        several = [layer for layer in request.attention if layer in anatomy.attention_parts]
        if several:
            raise GenerationError(
                f"layer {several[0]} attends in {len(anatomy.attends(several[0]))} modules: "
                "capture the whole text again with attention=True, and generate without"
            )
        over_pairs = {layer for name, layer in request.sites if name in OVER_PAIRS}
        attended = {*request.attention, *(layer for layer in over_pairs if layer is not None)}
        request = replace(request, attention=tuple(sorted(attended)))
        if wanted is not None:
            passes.wanted = request
        with session_of(model, anatomy, request, edits) as session:
            session.hooks.before(model, partial(passes.begin, session), with_kwargs=True)
            session.hooks.after(model, partial(passes.end, session))
            yield passes


def _tokens_of(args: Sequence[Any], kwargs: Any) -> int:
    # What a decoder reads comes before what its encoder read.
    for name in ("decoder_input_ids", "input_ids", "inputs_embeds"):
        if kwargs.get(name) is not None:
            return int(kwargs[name].shape[1])
    return int(args[0].shape[1])


def _device_of(module: nn.Module) -> torch.device:
    return next(module.parameters()).device
