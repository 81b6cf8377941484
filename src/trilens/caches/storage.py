"""What every cache needs to know about its tensors: their bytes, their device, their layers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import SupportsIndex

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trilens.errors import AbsentLayerError, UsageError
from trilens.io.messages import listed
from trilens.io.short_memory import is_short_of_memory
from trilens.numbers import whole_number
from trilens.results import Shown

__all__ = [
    "ByLayer",
    "Floats",
    "absent_layer",
    "address_of",
    "distinct_bytes",
    "moved",
    "spell_layers",
]

Floats = NDArray[np.float32]
"""What answers to questions are given in."""


def address_of(tensor: Tensor) -> int:
    """Where the storage behind a tensor lies; 0 on the meta device.

    A quantized tensor that only wraps others has no storage: it gets a number of its own, which,
    as an address does, stands for it while it lives.
    """
    if tensor.is_meta:
        return 0
    try:
        return tensor.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):
        return -id(tensor)


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
    # A torch built without CUDA says so with an AssertionError.
    except (RuntimeError, AssertionError, TypeError) as error:
        if is_short_of_memory(error):
            raise
        reason = (str(error).splitlines() or ["no reason given"])[0]
        raise UsageError(
            f"device {device!r} cannot be used: {reason}; name a device of this machine, like 'cpu'"
        ) from error


def spell_layers(layers: Sequence[int]) -> str:
    """Layer numbers in words: `layers 0–31`, `layers 0, 2, 5`, `layer 3`, `no layers`."""
    if not layers:
        return "no layers"
    if len(layers) == 1:
        return f"layer {layers[0]}"
    if list(layers) == list(range(layers[0], layers[-1] + 1)):
        return f"layers {layers[0]}–{layers[-1]}"
    return f"layers {listed(layers, 8)}"


def absent_layer(
    layer: SupportsIndex, cache: object, stored: Sequence[int], *, why: str = "", of: str = ""
) -> AbsentLayerError:
    """The one error for a layer that a cache does not hold.

    Args:
        layer: what was asked for.
        cache: what was asked.
        stored: the layers that it holds.
        why: why it lacks the layer, where that is known.
        of: what else was named, such as "gate 'mlp.gate' of ".
    """
    reason = f" ({why})" if why else ""
    return AbsentLayerError(
        f"{of}layer {layer} is not stored{reason}: this {type(cache).__name__} holds "
        f"{'it for ' if of else ''}{spell_layers(stored)}"
    )


class ByLayer(Shown):
    """A cache as a mapping from layer numbers: `len`, iteration and `in` are about the numbers."""

    __slots__ = ()

    @property
    def layers(self) -> tuple[int, ...]:
        """The stored layer numbers, ascending."""
        raise NotImplementedError

    @property
    def n_layers(self) -> int:
        """How many layers are stored."""
        return len(self.layers)

    @property
    def is_empty(self) -> bool:
        """Whether nothing is stored."""
        return not self.layers

    def __len__(self) -> int:
        return self.n_layers

    def __iter__(self) -> Iterator[int]:
        return iter(self.layers)

    def __contains__(self, layer: object) -> bool:
        return whole_number(layer, "layer") in self.layers
