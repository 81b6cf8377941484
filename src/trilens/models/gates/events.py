"""What a probe saw of a model's gating: the functions called, what they multiply, the kernels.

Plain data, written by `trilens.taps.recorder` and read by the rules that find gates.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

__all__ = [
    "GATING_FUNCTIONS",
    "STREAM_FUNCTIONS",
    "FunctionCall",
    "GateEvents",
    "KernelCall",
    "ProductCall",
    "StreamProduct",
    "TopkCall",
    "WeightedCall",
]

GATING_FUNCTIONS: Mapping[str, str] = {
    "sigmoid": "sigmoid",
    "sigmoid_": "sigmoid",
    "logsigmoid": "logsigmoid",
    "log_sigmoid": "logsigmoid",
    "silu": "silu",
    "gelu": "gelu",
    "softplus": "softplus",
    "exp": "exp",
    "exp_": "exp",
    "softmax": "softmax",
}
"""Name of a torch function → the gating function that it is."""
STREAM_FUNCTIONS: Mapping[str, str] = {
    "mul": "mul",
    "multiply": "mul",
    "__mul__": "mul",
    "__rmul__": "mul",
    "matmul": "matmul",
    "__matmul__": "matmul",
}
"""Name of a torch function that may weigh residual streams → the product that it is."""


@dataclass(frozen=True, slots=True, eq=False)
class FunctionCall:
    """One call of a gating function: y = function(x).

    Attributes:
        function: a value of `GATING_FUNCTIONS`.
        options: keyword arguments that are plain values (`approximate`, `dim`).
        path: the innermost module that was running.
        class_name: that module's class.
        tick: when, on the clock of the trace.
        x: what went in; `y`: what came out.
        kernel: the kernel function inside which it ran, innermost, or "".
    """

    function: str
    options: Mapping[str, Any]
    path: str
    class_name: str
    tick: int
    x: Tensor
    y: Tensor
    kernel: str


@dataclass(frozen=True, slots=True, eq=False)
class ProductCall:
    """One product of two tensors, neither of them a weight or buffer of the model.

    Attributes:
        factor: index of the gating call whose output is one operand, or None.
        other: index of the gating call whose output is the other operand, or None.
        left: the operands, kept outside kernels only; `right` likewise.
    """

    path: str
    tick: int
    factor: int | None
    other: int | None
    left: Tensor | None
    right: Tensor | None


@dataclass(frozen=True, slots=True, eq=False)
class StreamProduct:
    """One product that gives a tensor of rank 4 with tokens, as residual streams are.

    Attributes:
        path: the innermost module that was running.
        function: a value of `STREAM_FUNCTIONS`.
        left: the operands; `right` likewise.
        shape: of what it gave.
    """

    path: str
    tick: int
    function: str
    left: Tensor
    right: Tensor
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True, eq=False)
class WeightedCall:
    """One sum or product of a tensor with a weight or buffer of the model.

    Attributes:
        operation: torch.add or torch.mul: result = operation(x, weight).
    """

    path: str
    tick: int
    operation: Callable[[Tensor, Tensor], Tensor]
    x: Tensor
    weight: Tensor
    result: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class TopkCall:
    """One top-k choice over the last axis of x, with the values it gave."""

    path: str
    tick: int
    x: Tensor
    values: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class KernelCall:
    """One call of a kernel function by its module-global name.

    Attributes:
        path: the module that called it.
        arguments: what it was called with, by parameter name.
        result: what it gave back: a tensor, or a tuple that begins with the output.
    """

    function: str
    path: str
    start: int
    end: int
    arguments: Mapping[str, Any]
    result: Any = None


@dataclass(slots=True)
class GateEvents:
    """All gating events of one probe, in the order in which they happened.

    Attributes:
        copies: address of a tensor that is another's values in a new storage, and the other's.
    """

    functions: list[FunctionCall] = field(default_factory=list)
    products: list[ProductCall] = field(default_factory=list)
    streams: list[StreamProduct] = field(default_factory=list)
    weighted: list[WeightedCall] = field(default_factory=list)
    topk: list[TopkCall] = field(default_factory=list)
    kernels: list[KernelCall] = field(default_factory=list)
    copies: dict[int, int] = field(default_factory=dict)
