"""Record one short probe of a model: every module call, attention call and stray softmax."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from trilens.models.trace import (
    AttentionSite,
    ModuleCall,
    SoftmaxSite,
    Trace,
    same,
    tensors_in,
)
from trilens.taps.registry import REGISTRY, AttentionCall, attention_keys

__all__ = ["record"]

_SOFTMAX = {"softmax", "_softmax", "scaled_dot_product_attention"}


class _SoftmaxWatch(TorchFunctionMode):
    """Notes every softmax over [.., seq, seq] and every fused attention over seq tokens."""

    def __init__(self, seq: int, note: Callable[[str], None]) -> None:
        super().__init__()
        self._seq = seq
        self._note = note

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        name = getattr(func, "__name__", "")
        if name in _SOFTMAX:
            first = args[0] if args else None
            shape = tuple(first.shape) if isinstance(first, Tensor) else ()
            fused = name == "scaled_dot_product_attention"
            if len(shape) >= 2 and shape[-2] == self._seq and (fused or shape[-1] == self._seq):
                self._note(name)
        return func(*args, **(kwargs or {}))


class _Recorder:
    def __init__(self, model: nn.Module, seq: int) -> None:
        self.tick = 0
        self.seq = seq
        self.paths = {module: path for path, module in model.named_modules()}
        self.open: list[tuple[nn.Module, int, tuple[Tensor, ...]]] = []
        self.calls: list[ModuleCall] = []
        self.attention: list[AttentionSite] = []
        self.softmax: list[SoftmaxSite] = []

    def clock(self) -> int:
        self.tick += 1
        return self.tick

    def before(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        inputs = (*tensors_in(args), *tensors_in(kwargs))
        self.open.append((module, self.clock(), inputs))

    def after(self, module: nn.Module, _args: Any, output: Any) -> None:
        _, start, inputs = self.open.pop()
        outputs = tuple(tensors_in(output))
        path = self.paths[module]
        self.calls.append(ModuleCall(path, module, start, self.clock(), inputs, outputs))

    def attended(self, call: AttentionCall) -> None:
        # The function ran just now: the softmaxes inside it are the registry's own.
        path = self.paths[call.module]
        self.softmax = [site for site in self.softmax if site.path != path]
        site = AttentionSite(
            path, self.clock(), call.implementation, call.query.shape[-2], call.key.shape[-2]
        )
        self.attention.append(site)

    def softmaxed(self, function: str) -> None:
        path = self.paths[self.open[-1][0]] if self.open else ""
        self.softmax.append(SoftmaxSite(path, self.clock(), function))


def record(model: nn.Module, seq: int, run: Callable[[], Any]) -> Trace:
    """Run the model once under hooks on every module and say what happened.

    Args:
        model: any transformers model in eval mode.
        seq: tokens in the probe, to recognise attention-shaped softmaxes.
        run: calls the model on the probe and returns its output.

    Returns:
        The trace; hooks and registry are restored, also after an exception.
    """
    recorder = _Recorder(model, seq)
    with ExitStack() as stack:
        for module in recorder.paths:
            for handle in (
                module.register_forward_pre_hook(recorder.before, with_kwargs=True),
                module.register_forward_hook(recorder.after),
            ):
                stack.callback(handle.remove)
        stack.enter_context(REGISTRY.watch(attention_keys(model), recorder.attended))
        stack.enter_context(_SoftmaxWatch(seq, recorder.softmaxed))
        stack.enter_context(torch.no_grad())
        output = run()
    logits = getattr(output, "logits", None)
    hidden = _last_hidden(recorder.calls, output, logits)
    calls = tuple(sorted(recorder.calls, key=lambda call: call.start))
    return Trace(
        seq=seq,
        calls=calls,
        attention=tuple(recorder.attention),
        softmax=tuple(recorder.softmax),
        logits=logits if isinstance(logits, Tensor) else None,
        last_hidden=hidden,
    )


def _last_hidden(calls: list[ModuleCall], output: Any, logits: Any) -> tuple[Tensor, ...]:
    """First outputs of the models in the model, outermost first, without the logits themselves."""
    own = getattr(output, "last_hidden_state", None)
    found = [own] if isinstance(own, Tensor) else []
    for call in sorted(calls, key=lambda call: call.start):
        if isinstance(call.module, PreTrainedModel) and call.outputs:
            found.append(call.outputs[0])
    if isinstance(logits, Tensor):
        found = [tensor for tensor in found if not same(tensor, logits)]
    return tuple(found)
