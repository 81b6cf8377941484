"""What each of many experts gets whose matrices are one tensor.

No module stands for such a matrix: its inputs are seen in the products that the block computes. A
product belongs to an expert where its second operand lies in the expert's part of the tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

__all__ = ["computing_one_by_one", "expert_inputs", "expert_of"]

_PRODUCTS = frozenset(
    {functional.linear, torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, Tensor.__matmul__}
)


def expert_inputs(
    block: nn.Module, parameters: Sequence[str], run: Callable[[], Tensor]
) -> list[tuple[str, int, Tensor]]:
    """Run a block once and see what its experts multiply.

    Shapes: inputs [tokens, cols]

    Args:
        block: the block, computing one expert after the other.
        parameters: its tensors of [experts, …, …].
        run: runs it.

    Returns:
        Parameter, expert and inputs of each product, in order.
    """
    watch = _Watch({name: block.get_parameter(name) for name in parameters})
    with torch.no_grad(), watch:
        run()
    return watch.seen


def expert_of(part: Tensor, held: Tensor) -> int:
    """Which expert's matrix a view of their tensor lies in.

    Shapes: held [experts, …, …]
    """
    return int((part.storage_offset() - held.storage_offset()) // held[0].numel())


def computing_one_by_one(block: nn.Module) -> nn.Module:
    """Let a copy of a block run its experts in a loop of plain products, not in grouped ones.

    Its modules' configurations are its own, as a deep copy's are.
    """
    for module in block.modules():
        config = getattr(module, "config", None)
        if config is not None and hasattr(config, "_experts_implementation"):
            config._experts_implementation = "eager"
    return block


class _Watch(TorchFunctionMode):
    def __init__(self, held: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.seen: list[tuple[str, int, Tensor]] = []
        self._held = {
            held.untyped_storage().data_ptr(): (name, held) for name, held in held.items()
        }

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in _PRODUCTS and len(args) >= 2 and isinstance(args[1], Tensor):
            self._note(args[0], args[1])
        return func(*args, **(kwargs or {}))

    def _note(self, inputs: Tensor, weights: Tensor) -> None:
        name, held = self._held.get(weights.untyped_storage().data_ptr(), ("", weights))
        if name and weights.ndim == 2 and weights.numel() == held[0].numel():
            rows = inputs.detach().reshape(-1, inputs.shape[-1])
            self.seen.append((name, expert_of(weights, held), rows))
