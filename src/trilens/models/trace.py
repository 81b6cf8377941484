"""What one short probe saw: every module call in order, with the tensors that went in and came out.

A `Trace` is plain data. It is recorded by `trilens.taps.recorder` and read by the rules that find
blocks, final norm, unembedding and gates; the rules never touch a running model.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from trilens.caches.storage import address_of

__all__ = [
    "WIDE",
    "AttentionSite",
    "LinearCall",
    "ModuleCall",
    "ScaledCall",
    "SoftmaxSite",
    "SumCall",
    "Trace",
    "parent_path",
    "same",
    "tensors_in",
    "version_of",
    "wide_points",
]

_DEEP = 3
WIDE = (-50.0, 50.0, 2001)
"""First, last and number of the points at which activations are tried out: a probe of a few tokens
does not reach where they saturate or are limited."""


def tensors_in(value: object, depth: int = _DEEP) -> Iterator[Tensor]:
    """The tensors in a nest of tuples, lists and mappings (ModelOutput is one), in order."""
    if isinstance(value, Tensor):
        yield value
    elif depth and isinstance(value, dict):
        for item in value.values():
            yield from tensors_in(item, depth - 1)
    elif depth and isinstance(value, tuple | list):
        for item in value:
            yield from tensors_in(item, depth - 1)


def version_of(tensor: Tensor) -> int:
    """How often a tensor was written into; 0 where torch does not count."""
    return 0 if tensor.is_inference() else int(tensor._version)


def wide_points(like: Tensor) -> Tensor:
    """The points of `WIDE` in the dtype and on the device of a tensor: [1, points]."""
    first, last, points = WIDE
    grid = torch.linspace(first, last, points, dtype=torch.float64)
    return grid.to(like.device, like.dtype)[None]


def same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors hold the same bits: one storage, or equal values."""
    if a is b:
        return True
    if a.shape != b.shape or a.dtype != b.dtype or a.device != b.device:
        return False
    # Tensors that only wrap others (quantized ones) have no address of their own.
    stored = address_of(a) == address_of(b) > 0
    if stored and a.data_ptr() == b.data_ptr() and a.stride() == b.stride():
        return True
    return bool(torch.equal(a, b))


def parent_path(path: str) -> str:
    """`model.layers.3` → `model.layers`."""
    return path.rpartition(".")[0]


@dataclass(frozen=True, slots=True)
class ModuleCall:
    """One call of one module. `start` and `end` are ticks of one clock for the whole trace.

    Attributes:
        versions: how often each output had been written into when the call ended.
        given: the inputs as they were when the call began; empty where nobody wrote into them.
        gave: the outputs as they were when the call ended; empty likewise.
    """

    path: str
    module: nn.Module
    start: int
    end: int
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    versions: tuple[int, ...] = ()
    given: tuple[Tensor, ...] = ()
    gave: tuple[Tensor, ...] = ()

    @property
    def read(self) -> tuple[Tensor, ...]:
        """The inputs as they were when the call began."""
        return self.given or self.inputs

    @property
    def made(self) -> tuple[Tensor, ...]:
        """The outputs as they were when the call ended."""
        return self.gave or self.outputs

    @property
    def is_overwritten(self) -> bool:
        """Whether an output was written into after the call ended."""
        return bool(self.versions) and self.versions != tuple(map(version_of, self.outputs))

    @property
    def keeps_shape(self) -> bool:
        """Whether a module without children maps one tensor to one of the same shape."""
        if len(self.inputs) != 1 or len(self.outputs) != 1:
            return False
        x, y = self.inputs[0], self.outputs[0]
        fits = x.shape == y.shape and x.is_floating_point() and x.numel() > 0
        return fits and not any(True for _ in self.module.children())

    def encloses(self, other: ModuleCall) -> bool:
        """Whether the other call ran inside this one."""
        return self.start < other.start and other.end < self.end

    def takes(self, tensor: Tensor) -> bool:
        """Whether the tensor went into this call."""
        return any(same(tensor, item) for item in self.inputs)


@dataclass(frozen=True, slots=True)
class AttentionSite:
    """One call of attention: through the registry, or in a module's own code.

    Attributes:
        key: the implementation's name.
        readable: whether its pattern can be told from its arguments, or it gave its weights.
        query: [1, heads, seq_q, d]; `keys` and `value` [1, kv_heads, seq_k, d], as it was called.
        output: [1, seq_q, heads, d], as it returned it.
        error: largest |pattern · value − output| over the largest pattern · |value|, for the
            pattern that is read from the call; None where there is none to compare.
        has_scores: whether that pattern is rebuilt from scores.
        product: of attention in the module's own code, which of the module's products gives the
            scores, -1 for a fused function; None where it goes through the registry.
    """

    path: str
    tick: int
    key: str
    seq_q: int
    seq_k: int
    readable: bool = True
    query: Tensor | None = None
    keys: Tensor | None = None
    value: Tensor | None = None
    output: Tensor | None = None
    error: float | None = None
    has_scores: bool = False
    product: int | None = None


@dataclass(frozen=True, slots=True, eq=False)
class SumCall:
    """One sum of two tensors of one shape with a row per token, no weight of the model among them.

    Attributes:
        path: the innermost module that was running.
        left: the operands and the result, as they were at that moment.
        in_place: whether the result was written into the left operand.
    """

    path: str
    tick: int
    left: Tensor
    right: Tensor
    result: Tensor
    in_place: bool


@dataclass(frozen=True, slots=True, eq=False)
class ScaledCall:
    """A tensor with a row per token, times factors that are the same for every token.

    Or with summands that are weights of the model, the same for every token, added to it.

    Attributes:
        x: what went in, and the result, as they were at that moment.
    """

    path: str
    tick: int
    x: Tensor
    result: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class LinearCall:
    """A matrix product with a row per token that a module's own code makes.

    Attributes:
        path: the innermost module that was running.
        order: which of the products that module's call makes, rows for some tokens not counted.
    """

    path: str
    tick: int
    order: int
    result: Tensor


@dataclass(frozen=True, slots=True)
class SoftmaxSite:
    """A softmax or fused attention over [seq, seq] that did not come through the registry."""

    path: str
    tick: int
    function: str


@dataclass(frozen=True, slots=True)
class Trace:
    """All that one probe of `seq` tokens saw.

    Attributes:
        responses: what activation modules gave at the points of `WIDE`, [1, points].
        cross: attention calls that look at what an encoder made of a source; not in `attention`.
    """

    seq: int
    calls: tuple[ModuleCall, ...]
    attention: tuple[AttentionSite, ...]
    softmax: tuple[SoftmaxSite, ...]
    logits: Tensor | None
    last_hidden: tuple[Tensor, ...]
    responses: Mapping[nn.Module, Tensor] = field(default_factory=dict)
    sums: tuple[SumCall, ...] = ()
    scaled: tuple[ScaledCall, ...] = ()
    linears: tuple[LinearCall, ...] = ()
    cross: tuple[AttentionSite, ...] = ()

    def inside(self, call: ModuleCall) -> list[ModuleCall]:
        """The calls that ran inside the given one, in order of their start."""
        return [other for other in self.calls if call.encloses(other)]

    def attention_in(self, call: ModuleCall) -> list[AttentionSite]:
        """The attention calls inside a module's call: a model's own code where no other is."""
        inside = [site for site in self.attention if call.start < site.tick < call.end]
        return [site for site in inside if site.product is None] or inside

    def find(self, ticks: Iterable[int], call: ModuleCall) -> list[int]:
        """The ticks that fall inside a call."""
        return [tick for tick in ticks if call.start < tick < call.end]
