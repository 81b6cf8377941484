"""A tensor that is computed anew at each access, and refuses to be written into."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from trilens.errors import UsageError

__all__ = ["ReadOnlyWeight"]

_ALLOWED = frozenset({"requires_grad_", "retain_grad"})


class ReadOnlyWeight(Tensor):
    """The dense form of a packed weight. What is computed from it is an ordinary tensor.

    A value written into it would be gone with it: the layer goes on with its trits. So merging an
    adapter into `layer.weight`, which PEFT does in place, is an error and no loss in silence.
    """

    # What transformers goes by when a parent draws the weights of its layers (ModernBERT).
    _is_hf_initialized = True

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run `func` on ordinary tensors, if it writes into none of ours.

        Raises:
            UsageError: it does.
        """
        options = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        written = args[0] if args else options.get("input")
        if (isinstance(written, cls) and _writes(name)) or isinstance(options.get("out"), cls):
            raise UsageError(
                "the weight of a TernaryLinear cannot be written into: it is made from trits at "
                "each access. To train or merge LoRA adapters, register the layer first with "
                "trilens.enable_lora(config); to edit weights, load the model and call "
                "model.dequantize()"
            )
        with torch._C.DisableTorchFunctionSubclass():
            found = func(*args, **options)
        if func == Tensor.data.__get__:  # type: ignore[attr-defined]
            return found.as_subclass(cls)
        return found.as_subclass(Tensor) if isinstance(found, cls) else found


_ASSIGNED = frozenset({"__set__", "__setitem__"})
_OPERATORS = "add sub mul matmul truediv floordiv mod pow lshift rshift and or xor"
_IN_PLACE = frozenset(f"__i{name}__" for name in _OPERATORS.split())


def _writes(name: str) -> bool:
    if name.startswith("__"):
        return name in _ASSIGNED or name in _IN_PLACE
    return name.endswith("_") and name not in _ALLOWED
