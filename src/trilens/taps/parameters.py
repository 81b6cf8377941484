"""Other weights in a loaded model for the length of a block, and its own back afterwards.

Nothing else of the model is touched: a parameter stays the same object, and gets its own memory
back.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from trilens.errors import RestoreError, ShapeError, UsageError
from trilens.taps.undo import undone

__all__ = ["checksum", "swapped"]


@contextmanager
def swapped(model: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Put other values into some of a model's parameters, and the model's own back at the end.

    Whatever happens inside the block, also an exception, the parameters then hold the bits that
    they held before, at the address where they lay: their checksums are taken before and compared
    afterwards.

    Args:
        model: the model.
        weights: parameter name → values of its shape; rounded to its dtype. Not written to
            meanwhile.

    Raises:
        UsageError: a name that is no parameter, or a parameter without values in memory.
        ShapeError: values of another shape.
        RestoreError: the weights did not come back.

    Memory: nothing for values of the parameter's dtype, device and layout, which are used where
    they lie, nor for its own: weights that are mapped from a file stay there. A copy of a parameter
    that shares its memory with another one.
    """
    parameters = {name: _parameter(model, name, values) for name, values in weights.items()}
    sums = {name: checksum({name: parameter}) for name, parameter in parameters.items()}
    plain = (parameter for parameter in model.parameters() if type(parameter) is nn.Parameter)
    places = Counter(parameter.data_ptr() for parameter in plain)
    shared = {name for name, parameter in parameters.items() if places[parameter.data_ptr()] > 1}
    before = {
        name: parameter.detach().clone() if name in shared else parameter.data
        for name, parameter in parameters.items()
    }

    def put(name: str, values: Tensor) -> None:
        if name in shared:
            parameters[name].copy_(values)
        else:
            parameters[name].data = values

    def put_back() -> None:
        with torch.no_grad():
            for name, values in before.items():
                put(name, values)
        for name, parameter in parameters.items():
            if checksum({name: parameter}) != sums[name]:
                raise RestoreError(
                    f"parameter {name} did not get its own bits back: load the model again"
                )

    with undone(put_back):
        with torch.no_grad():
            for name, values in weights.items():
                put(name, _like(before[name], values))
        yield


def _like(own: Tensor, values: Tensor) -> Tensor:
    """Values as the parameter holds them; themselves where they are so already."""
    same = (values.dtype, values.device, values.stride()) == (own.dtype, own.device, own.stride())
    return values.detach() if same else torch.empty_like(own).copy_(values)


def checksum(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bits, in the order given.

    Memory: a copy of the largest tensor, where it is not contiguous on the CPU.
    """
    found = hashlib.sha256()
    for name, tensor in tensors.items():
        found.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)};".encode())
        bits = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        found.update(bits.numpy().data)
    return found.hexdigest()


def _parameter(model: nn.Module, name: str, values: Tensor) -> nn.Parameter:
    try:
        parameter = model.get_parameter(name)
    except AttributeError as cause:
        raise UsageError(f"parameter {name!r} is not in the model: {cause}") from cause
    if parameter.is_meta:
        raise UsageError(
            f"parameter {name!r} is not in memory (offloaded): load the model onto a device that "
            "holds all of it"
        )
    if parameter.shape != values.shape:
        raise ShapeError(
            f"values for {name!r} have shape {tuple(values.shape)}: the parameter has "
            f"{tuple(parameter.shape)}"
        )
    return parameter
