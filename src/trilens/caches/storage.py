"""What every cache needs to know about its tensors: their bytes, their device, their layers."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trilens.errors import UsageError

__all__ = ["Floats", "distinct_bytes", "moved", "spell_layers", "whole_number"]

Floats = NDArray[np.float32]
"""What answers to questions are given in."""


def distinct_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the distinct storages behind `tensors`: what keeping them keeps alive.

    Two views of one storage count once; a view of a large storage counts the whole storage.
    """
    storages = (tensor.untyped_storage() for tensor in tensors)
    sizes = {(str(s.device), s.data_ptr()): s.nbytes() for s in storages}
    return sum(sizes.values())


def moved(tensor: Tensor, device: torch.device | str | int) -> Tensor:
    """The tensor on `device`, itself where it is there already.

    Raises:
        UsageError: torch does not know the device or cannot use it here.
    """
    try:
        return tensor.to(torch.device(device))
    except torch.OutOfMemoryError:
        raise
    # A torch built without CUDA says so with an AssertionError.
    except (RuntimeError, AssertionError, TypeError) as error:
        reason = (str(error).splitlines() or ["no reason given"])[0]
        raise UsageError(
            f"device {device!r} cannot be used: {reason}; name a device of this machine, like 'cpu'"
        ) from error


def whole_number(value: object, noun: str) -> int:
    """`value` as an int: Python, NumPy and zero-dimensional integer tensors are whole numbers.

    Raises:
        UsageError: the value is a bool or not a whole number.
    """
    if not isinstance(value, bool):
        try:
            return operator.index(value)  # type: ignore[arg-type]
        except TypeError:
            pass
    raise UsageError(f"{noun} {value!r} is not a whole number: pass an int")


def spell_layers(layers: Sequence[int]) -> str:
    """Layer numbers in words: `layers 0–31`, `layers 0, 2, 5`, `layer 3`, `no layers`."""
    if not layers:
        return "no layers"
    if len(layers) == 1:
        return f"layer {layers[0]}"
    if list(layers) == list(range(layers[0], layers[-1] + 1)):
        return f"layers {layers[0]}–{layers[-1]}"
    return "layers " + ", ".join(str(layer) for layer in layers)
