"""Other weights in a loaded model for the length of a block, and its own back afterwards.

Nothing else of the model is touched: a parameter stays the same object, at the same address.
"""

from __future__ import annotations

import hashlib
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
    they held before: their checksums are taken before and compared afterwards.

    Args:
        model: the model.
        weights: parameter name → values of its shape; rounded to its dtype.

    Raises:
        UsageError: a name that is no parameter, or a parameter without values in memory.
        ShapeError: values of another shape.
        RestoreError: the weights did not come back.

    Memory: a copy of the parameters that are replaced.
    """
    before: dict[str, Tensor] = {}
    sums: dict[str, str] = {}
    parameters = {name: _parameter(model, name, values) for name, values in weights.items()}
    for name, parameter in parameters.items():
        before[name] = parameter.detach().clone()
        sums[name] = checksum({name: parameter})

    def put_back() -> None:
        with torch.no_grad():
            for name, values in before.items():
                parameters[name].copy_(values)
        for name, parameter in parameters.items():
            if checksum({name: parameter}) != sums[name]:
                raise RestoreError(
                    f"parameter {name} did not get its own bits back: load the model again"
                )

    with undone(put_back):
        with torch.no_grad():
            for name, values in weights.items():
                parameters[name].copy_(values)
        yield


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
