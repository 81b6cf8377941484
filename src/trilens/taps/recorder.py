"""Record one short probe of a model: modules, attention, kernels and gating functions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from trilens.caches.patterns.softmax.pattern import SoftmaxPattern
from trilens.caches.storage import address_of
from trilens.io.short_memory import is_short_of_memory
from trilens.models.gates.events import (
    GATING_FUNCTIONS,
    STREAM_FUNCTIONS,
    FunctionCall,
    GateEvents,
    KernelCall,
    ProductCall,
    StreamProduct,
    TopkCall,
    WeightedCall,
)
from trilens.models.gates.kernels import CONVOLUTIONS, KERNEL_GATES
from trilens.models.trace import (
    AttentionSite,
    ModuleCall,
    SoftmaxSite,
    Trace,
    same,
    tensors_in,
    version_of,
    wide_points,
)
from trilens.taps.attention import is_readable, pattern_of
from trilens.taps.attention_evidence import value_error
from trilens.taps.functions import FunctionCalls
from trilens.taps.hooks import hooked
from trilens.taps.inline.follower import Follower
from trilens.taps.kernels import KERNELS, KernelWatcher, kernel_places
from trilens.taps.overwritten import Overwritten, Seen
from trilens.taps.recorded_sums import RecordedSums
from trilens.taps.registry import REGISTRY, AttentionCall, attention_keys

__all__ = ["record"]

_SOFTMAX = {"softmax", "_softmax", "scaled_dot_product_attention"}
_PRODUCTS = {"mul", "mul_", "multiply", "__mul__", "__rmul__", "__imul__"}
_IN_PLACE = {"mul_", "__imul__"}
_SUMS = {"add", "__add__", "__radd__"}
_COPIES = {"to", "float", "double", "half", "bfloat16", "type", "type_as", "contiguous", "clone",
           "reshape", "flatten", "_to_copy"}  # fmt: skip
"""Functions that may give the same values in a new storage."""
_LARGEST = 1 << 22
"""Values of one call inside a kernel that are worth keeping: a [token, token, channel] mask of a
large model is not, and nothing is proven by it that its cumulative sums do not prove."""


@dataclass(frozen=True, slots=True)
class _Factor:
    """A gating call's output, and how often it had been written into when it was one."""

    number: int
    version: int


class _Recorder:
    def __init__(self, model: nn.Module, seq: int) -> None:
        self.tick = 0
        self.seq = seq
        self.paths: dict[nn.Module, str] = {m: path for path, m in model.named_modules()}
        self.weights = {address_of(tensor) for tensor in (*model.parameters(), *model.buffers())}
        self.open: list[tuple[nn.Module, int, list[Seen]]] = []
        self.calls: list[ModuleCall] = []
        self.seen: list[tuple[list[Seen], list[Seen]]] = []
        self.overwritten = Overwritten()
        self.sums = RecordedSums(seq, self.weights, self.overwritten)
        self.attention: list[AttentionSite] = []
        self.softmax: list[SoftmaxSite] = []
        self.inline: list[tuple[int, AttentionCall, int]] = []
        self.follower = Follower(self.attended_inline)
        self.follower.begin(1, seq)
        self.events = GateEvents()
        self.kernels: list[tuple[str, int]] = []
        # Storage of a gating call's output, and of its copies → the call's number. The tensors
        # are kept, so that no later tensor can stand at the same address.
        self.factors: dict[int, _Factor] = {}
        self.kept: list[Tensor] = []

    def clock(self) -> int:
        self.tick += 1
        return self.tick

    def before(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        inputs = [self.overwritten.see(t) for t in (*tensors_in(args), *tensors_in(kwargs))]
        self.open.append((module, self.clock(), inputs))
        self.follower.enter(module)

    def after(self, module: nn.Module, _args: Any, output: Any) -> None:
        _, start, inputs = self.open.pop()
        self.follower.leave()
        outputs = [self.overwritten.see(tensor) for tensor in tensors_in(output)]
        call = ModuleCall(
            self.paths[module],
            module,
            start,
            self.clock(),
            tuple(tensor for tensor, _ in inputs),
            tuple(tensor for tensor, _ in outputs),
            tuple(version for _, version in outputs),
        )
        self.calls.append(call)
        self.seen.append((inputs, outputs))

    def finished_calls(self) -> list[ModuleCall]:
        """The calls, with what their tensors held where they were written into later."""
        return [
            self._as_seen(call, *seen) for call, seen in zip(self.calls, self.seen, strict=True)
        ]

    def _as_seen(self, call: ModuleCall, inputs: list[Seen], outputs: list[Seen]) -> ModuleCall:
        given = tuple(map(self.overwritten.as_seen, inputs))
        gave = tuple(map(self.overwritten.as_seen, outputs))
        pairs = zip((*given, *gave), (*call.inputs, *call.outputs), strict=True)
        if all(then is now for then, now in pairs):
            return call
        return replace(call, given=given, gave=gave)

    def attended(self, call: AttentionCall) -> None:
        # The function ran just now: the softmaxes inside it are the registry's own.
        path = self.paths[call.module]
        self.softmax = [site for site in self.softmax if site.path != path]
        self.inline = [each for each in self.inline if each[1].module is not call.module]
        self.attention.append(self._site(call, self.clock(), None))

    def attended_inline(self, call: AttentionCall, product: int) -> None:
        """A module computed attention in its own code, or a function of the registry did."""
        self.inline.append((self.clock(), call, product))

    def finished_attention(self) -> tuple[AttentionSite, ...]:
        """All attention calls, in order."""
        own = [self._site(call, tick, product) for tick, call, product in self.inline]
        return tuple(sorted((*self.attention, *own), key=lambda site: site.tick))

    def _site(self, call: AttentionCall, tick: int, product: int | None) -> AttentionSite:
        error, has_scores = _pattern_error(call)
        return AttentionSite(
            self.paths[call.module],
            tick,
            call.implementation,
            call.query.shape[-2],
            call.key.shape[-2],
            is_readable(call),
            call.query,
            call.key,
            call.value,
            call.output,
            error,
            has_scores,
            product,
        )

    def before_function(
        self, name: str, args: tuple[Any, ...], options: dict[str, Any]
    ) -> tuple[Any, ...]:
        """Keeps what a recorded tensor holds before it is written into."""
        self.sums.before(name, args)
        return self.follower.before(name, args, options)

    def after_function(
        self, name: str, args: tuple[Any, ...], options: dict[str, Any], result: Any
    ) -> Any:
        """Notes a call; what it gave goes on as it is."""
        self.function(name, args, options, result)
        self.follower.after(name, args, options, result)
        return result

    def function(
        self, name: str, args: tuple[Any, ...], options: dict[str, Any], result: Any
    ) -> None:
        """Notes softmaxes over [.., seq, seq], gating calls, products with them, and top-k."""
        if name in _SOFTMAX:
            self._softmaxed(name, args)
        if not self.open or not args:
            return
        x = args[0]
        begun = self.open[-1][1]
        self.sums.after(name, args, options, result, self._path(), self.clock(), begun)
        if name in STREAM_FUNCTIONS and len(args) > 1:
            self._streamed(STREAM_FUNCTIONS[name], args[0], args[1], result)
        if name in GATING_FUNCTIONS:
            self._gating(GATING_FUNCTIONS[name], x, options, result)
        elif name in _PRODUCTS and len(args) > 1:
            self._multiplied(x, args[1], result, in_place=name in _IN_PLACE)
        elif name in _SUMS and len(args) > 1:
            self._weighted(torch.add, x, args[1], result)
        elif name in _COPIES and isinstance(x, Tensor) and isinstance(result, Tensor):
            number = self._number(x)
            if address_of(result) == address_of(x):
                return
            if number is not None:
                self._factor(result, number)
            if not self.kernels:
                self.events.copies[address_of(result)] = address_of(x)
                self.kept += (x, result)
        elif name == "topk" and isinstance(x, Tensor):
            self.events.topk.append(TopkCall(self._path(), self.clock(), x, result[0]))

    def _softmaxed(self, name: str, args: tuple[Any, ...]) -> None:
        first = args[0] if args else None
        shape = tuple(first.shape) if isinstance(first, Tensor) else ()
        fused = name == "scaled_dot_product_attention"
        if len(shape) >= 2 and shape[-2] == self.seq and (fused or shape[-1] == self.seq):
            path = self.paths[self.open[-1][0]] if self.open else ""
            self.softmax.append(SoftmaxSite(path, self.clock(), name))

    def _gating(self, function: str, x: Any, options: dict[str, Any], y: Any) -> None:
        if not isinstance(x, Tensor) or not isinstance(y, Tensor) or not x.is_floating_point():
            return
        if x.numel() <= 1 or x.is_meta or (self.kernels and y.numel() > _LARGEST):
            return
        plain = {k: v for k, v in options.items() if isinstance(v, str | int | float)}
        module = self.open[-1][0]
        kernel = self.kernels[-1][0] if self.kernels else ""
        call = FunctionCall(
            function, plain, self._path(), type(module).__name__, self.clock(), x, y, kernel
        )
        self._factor(y, len(self.events.functions))
        self.events.functions.append(call)

    def _multiplied(self, a: Any, b: Any, result: Any, *, in_place: bool) -> None:
        if not isinstance(a, Tensor) or not isinstance(b, Tensor) or min(a.dim(), b.dim()) < 1:
            return
        if self._weighted(torch.mul, a, b, result):
            return
        left, right = self._number(a, int(in_place)), self._number(b)
        # Operands are needed outside kernels only, where linear gates are looked for.
        keep = not self.kernels and a.dim() > 1 and a.shape == b.shape
        if keep or left is not None or right is not None:
            product = ProductCall(
                self._path(), self.clock(), left, right, a if keep else None, b if keep else None
            )
            self.events.products.append(product)

    def _streamed(self, function: str, a: Any, b: Any, result: Any) -> None:
        """Notes a product whose result may be residual streams: rank 4, with a row per token."""
        if not isinstance(a, Tensor) or not isinstance(b, Tensor) or self.kernels:
            return
        shape = tuple(result.shape)
        if len(shape) == 4 and (1, self.seq) in (shape[:2], shape[1:3]):
            product = StreamProduct(self._path(), self.clock(), function, a, b, shape)
            self.events.streams.append(product)

    def _weighted(self, operation: Callable[..., Tensor], a: Any, b: Any, result: Any) -> bool:
        """Notes a sum or product with a weight of the model; says whether it was one."""
        if not isinstance(a, Tensor) or not isinstance(b, Tensor):
            return False
        if address_of(a) not in self.weights and address_of(b) not in self.weights:
            return False
        x, weight = (b, a) if address_of(a) in self.weights else (a, b)
        if not self.kernels and x.dim() > 1:
            call = WeightedCall(self._path(), self.clock(), operation, x, weight, result)
            self.events.weighted.append(call)
        return True

    def _factor(self, tensor: Tensor, number: int) -> None:
        self.factors[address_of(tensor)] = _Factor(number, version_of(tensor))
        self.kept.append(tensor)

    def _number(self, tensor: Tensor, written: int = 0) -> int | None:
        """The gating call that a tensor is the output of, unless it was written into since then."""
        found = self.factors.get(address_of(tensor))
        if found is None or version_of(tensor) != found.version + written:
            return None
        return found.number

    def _path(self) -> str:
        return self.paths[self.open[-1][0]]

    def enter_kernel(self, name: str) -> None:
        self.kernels.append((name, self.clock()))

    def leave_kernel(self, name: str, arguments: Mapping[str, Any], result: Any) -> None:
        _, start = self.kernels.pop()
        path = self._path() if self.open else ""
        call = KernelCall(name, path, start, self.clock(), arguments, result)
        self.events.kernels.append(call)


def record(model: nn.Module, seq: int, run: Callable[[], Any]) -> tuple[Trace, GateEvents]:
    """Run the model once under hooks on every module and say what happened.

    Args:
        model: any transformers model in eval mode.
        seq: tokens in the probe, to recognise attention-shaped softmaxes.
        run: calls the model on the probe and returns its output.

    Returns:
        The trace and its gating events; hooks, registry and kernels are restored, also after an
        exception.
    """
    recorder = _Recorder(model, seq)
    with hooked(model) as hooks:
        for module in recorder.paths:
            hooks.before(module, recorder.before, with_kwargs=True)
            hooks.after(module, recorder.after)
        hooks.enter(REGISTRY.watch(attention_keys(model), recorder.attended))
        places = kernel_places(model, (*KERNEL_GATES, *CONVOLUTIONS))
        watcher = KernelWatcher(recorder.enter_kernel, recorder.leave_kernel)
        hooks.enter(KERNELS.watch(places, watcher))
        functions = FunctionCalls(recorder.before_function, recorder.after_function)
        hooks.enter(functions.watching())
        with torch.no_grad():
            output = run()
    logits = getattr(output, "logits", None)
    hidden = _last_hidden(recorder.calls, output, logits)
    calls = tuple(sorted(recorder.finished_calls(), key=lambda call: call.start))
    responses = _responses(recorder.calls)
    trace = Trace(
        seq=seq,
        calls=calls,
        attention=recorder.finished_attention(),
        softmax=tuple(recorder.softmax),
        logits=logits if isinstance(logits, Tensor) else None,
        last_hidden=hidden,
        responses=responses,
        sums=recorder.sums.sums(),
        scaled=recorder.sums.scaled(),
        linears=recorder.sums.linears(),
    )
    return trace, recorder.events


def _pattern_error(call: AttentionCall) -> tuple[float | None, bool]:
    """How far pattern · value is from the output, and whether the pattern is made of scores."""
    if not is_readable(call):
        return None, False
    pattern = pattern_of(call)
    return value_error(pattern, call), isinstance(pattern, SoftmaxPattern)


def _responses(calls: list[ModuleCall]) -> dict[nn.Module, Tensor]:
    """What each module without parts or parameters, such as an activation, gives on a wide grid."""
    found: dict[nn.Module, Tensor] = {}
    for call in calls:
        module = call.module
        if module in found or not call.keeps_shape or any(True for _ in module.parameters()):
            continue
        try:
            with torch.no_grad():
                answer = module(wide_points(call.inputs[0]))
        # A module that wants more than numbers is no activation.
        except Exception as error:
            if is_short_of_memory(error):
                raise
            continue
        if isinstance(answer, Tensor):
            found[module] = answer
    return found


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
