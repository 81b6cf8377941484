"""One tensor per layer, built by hand or by a capture: what caches of residuals have in common."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Self, SupportsIndex

import numpy as np
import torch
from numpy.typing import DTypeLike, NDArray
from torch import Tensor

from trilens.caches.storage import ByLayer, absent_layer, distinct_bytes, moved, spell_layers
from trilens.errors import (
    DtypeError,
    NotStoredError,
    OutOfRangeError,
    ShapeError,
    TooLargeError,
    UsageError,
    ValueRangeError,
)
from trilens.io.messages import listed
from trilens.numbers import whole_number

__all__ = ["LayerCache"]


class LayerCache(ByLayer):
    """One tensor per layer, all of one shape and dtype; the shape's letters differ per subclass."""

    __slots__ = ("_buffer", "_capacity", "_layers", "_readouts", "_tensors")

    _AXES: ClassVar[tuple[str, ...]]

    def __init__(self, activations: Iterable[Tensor] = ()) -> None:
        self._tensors: list[Tensor] = []
        self._layers: tuple[int, ...] | None = None  # None: built by hand, numbered by pushes
        self._capacity: int | None = None
        self._buffer: Tensor | None = None
        self._readouts: dict[int, Tensor] | None = None  # of several streams alone
        for tensor in activations:
            self.push(tensor)

    @classmethod
    def with_capacity(cls, n_layers: SupportsIndex) -> Self:
        """An empty cache whose first push allocates room for `n_layers` in ONE contiguous tensor.

        Pushes then copy into that tensor, and `stack()` is a view of it. Its dtype, device and
        sizes are those of the first push.

        Args:
            n_layers: How many layers the cache can take; a further push is an error.

        Raises:
            ValueRangeError: `n_layers` is negative.
            OutOfRangeError: `n_layers` is not a whole number.
        """
        capacity = whole_number(n_layers, "capacity")
        if capacity < 0:
            raise ValueRangeError(
                f"capacity {capacity} is out of range: pass the number of layers, 0 or more"
            )
        cache = cls()
        cache._capacity = capacity
        return cache

    @classmethod
    def from_layers(
        cls, layers: Mapping[int, Tensor], *, readouts: Mapping[int, Tensor] | None = None
    ) -> Self:
        """A sealed cache keyed by the model's own layer numbers, in ascending order.

        The tensors are kept detached and by reference. They may lie on different devices, as the
        layers of a model do that is spread over several.

        Args:
            layers: Layer number → tensor.
            readouts: of several residual streams, layer number → the readout of the same layer;
                the tensors have an axis of streams before d_model then.

        Raises:
            UsageError: layers and readouts are not those of the same layers.
            ShapeError: a tensor of the wrong rank, or sizes that differ between layers.
            DtypeError: something else than a floating-point tensor, or dtypes that differ.
            ValueRangeError: a negative layer number.
            OutOfRangeError: a layer number that is not a whole number.
        """
        cache = cls()
        if readouts is not None:
            single = cls.from_layers(readouts)
            cache._readouts = dict(zip(single.layers, single.activations, strict=True))
            if set(cache._readouts) != set(layers):
                raise UsageError(
                    f"readouts of layers {listed(readouts, 8)} do not fit the streams of layers "
                    f"{listed(layers, 8)}: each layer has one"
                )
        keyed = {whole_number(layer, "layer"): tensor for layer, tensor in layers.items()}
        for layer in sorted(keyed):
            if layer < 0:
                raise ValueRangeError(
                    f"layer {layer} is out of range: the model's layers count from 0"
                )
            cache._check(keyed[layer], f"the tensor of layer {layer}", same_device=False)
            if cache._readouts is not None:
                cache._check_readout(layer, keyed[layer])
            cache._tensors.append(keyed[layer].detach())
        cache._layers = tuple(sorted(keyed))
        return cache

    def push(self, tensor: Tensor) -> None:
        """Append the next layer's tensor.

        A cache made `with_capacity` copies it; any other keeps a detached reference, so that
        a later change of the tensor in place shows in the cache.

        Raises:
            UsageError: the cache came out of a capture and is sealed.
            OutOfRangeError: the cache holds as many layers as its capacity.
            ShapeError: the wrong rank, or sizes that differ from the layers before.
            DtypeError: no floating-point tensor, or a dtype that differs from the layers before.
            TooLargeError: the memory for the whole capacity cannot be allocated.
        """
        if self._layers is not None:
            raise UsageError(
                f"this {type(self).__name__} is sealed: it holds {spell_layers(self._layers)} "
                "of a capture; push is for caches built by hand"
            )
        if self._capacity is not None and len(self._tensors) >= self._capacity:
            raise OutOfRangeError(
                f"layer {len(self._tensors)} is out of range: this {type(self).__name__} was made "
                f"with_capacity({self._capacity}) and is full; ask for more capacity"
            )
        self._check(tensor, f"the tensor pushed as layer {len(self._tensors)}", same_device=True)
        if self._capacity is None:
            self._tensors.append(tensor.detach())
            return
        if self._buffer is None:
            self._buffer = self._allocate(self._capacity, tensor)
        slot = self._buffer[len(self._tensors)]
        slot.copy_(tensor.detach())
        self._tensors.append(slot)

    @property
    def layers(self) -> tuple[int, ...]:
        """The stored layer numbers, ascending: the model's own in a capture, else 0, 1, 2 …"""
        return tuple(range(len(self._tensors))) if self._layers is None else self._layers

    @property
    def n_streams(self) -> int:
        """Residual streams per layer: 1 but for captures of models that keep several."""
        if self._readouts is None or self.is_empty:
            return 1
        return int(self._tensors[0].shape[-2])

    @property
    def axes(self) -> tuple[str, ...]:
        """The letters of a stored tensor's shape; several streams stand before d_model."""
        single = self._AXES
        return single if self._readouts is None else (*single[:-1], "streams", single[-1])

    @property
    def activations(self) -> tuple[Tensor, ...]:
        """The stored tensors, in the order of `layers`."""
        return tuple(self._tensors)

    @property
    def nbytes(self) -> int:
        """Bytes of the distinct storages that this cache keeps alive."""
        buffer = () if self._buffer is None else (self._buffer,)
        return distinct_bytes((*self._tensors, *(self._readouts or {}).values(), *buffer))

    def get_layer(self, i: SupportsIndex) -> Tensor | None:
        """The tensor of layer `i`, or None where nothing is stored.

        Layer numbers are the model's own and do not count from the end: a negative one is not
        stored, and so gives None.

        Raises:
            OutOfRangeError: `i` is not a whole number.
        """
        index = self._index_of(whole_number(i, "layer"))
        return None if index is None else self._tensors[index]

    def __getitem__(self, layer: SupportsIndex) -> Tensor:
        index = self._index_of(whole_number(layer, "layer"))
        if index is None:
            raise absent_layer(layer, self, self.layers)
        return self._tensors[index]

    def readout(self, layer: SupportsIndex) -> Tensor:
        """The vector that the final norm would read after a block, one for each token held.

        Of a single residual stream it is the stream itself; of several it is what the model makes
        of them behind its last block.

        Shapes:
            returns what is stored, without an axis of streams.

        Raises:
            AbsentLayerError: a layer that is not stored.
            OutOfRangeError: a layer that is not a whole number.
        """
        stored = self[layer]
        return stored if self._readouts is None else self._readouts[whole_number(layer, "layer")]

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> NDArray[Any]:
        if copy is False:
            raise ValueRangeError("copy=False is not possible: the layers are put into one array")
        if self.is_empty:
            raise NotStoredError("an empty cache is no array: capture or push some layers")
        return np.stack(self.to_f32_vecs()).astype(dtype or np.float32, copy=False)

    def stack(self) -> Tensor:
        """All layers in one tensor, in the order of `layers`, with the layers as first axis.

        For a cache made `with_capacity` it is a view of the cache's memory; else a new tensor.

        Raises:
            NotStoredError: the cache is empty.
            UsageError: the layers lie on different devices.
        """
        if self.is_empty:
            raise NotStoredError("an empty cache has no layers to stack: capture or push some")
        if self._buffer is not None:
            return self._buffer[: len(self._tensors)]
        devices = sorted({str(tensor.device) for tensor in self._tensors})
        if len(devices) > 1:
            raise UsageError(
                f"layers on different devices cannot be stacked: they lie on {', '.join(devices)}; "
                "bring them together with .to('cpu')"
            )
        return torch.stack(self._tensors)

    def to_f32_vecs(self) -> list[NDArray[np.float32]]:
        """Every layer as a float32 NumPy array of its own, in the order of `layers`."""
        # NumPy knows no bfloat16: the change of dtype comes before the change of library.
        return [
            tensor.to(device="cpu", dtype=torch.float32, copy=True).numpy()
            for tensor in self._tensors
        ]

    def to(self, device: torch.device | str | int) -> Self:
        """A new cache on `device`; tensors that are there already are shared, not copied.

        Raises:
            UsageError: torch does not know the device or cannot use it here.
        """
        cache = type(self)()
        cache._layers = self._layers
        cache._capacity = self._capacity
        if self._readouts is not None:
            cache._readouts = {i: moved(each, device) for i, each in self._readouts.items()}
        if self._buffer is None:
            cache._tensors = [moved(tensor, device) for tensor in self._tensors]
            return cache
        cache._buffer = moved(self._buffer, device)
        if cache._buffer is self._buffer and len(self._tensors) < (self._capacity or 0):
            # Two caches that both grow into one buffer would overwrite each other's layers.
            cache._buffer = self._buffer.clone()
        cache._tensors = list(cache._buffer[: len(self._tensors)].unbind(0))
        return cache

    def __repr__(self) -> str:
        name = type(self).__name__
        if self.is_empty:
            room = "" if self._capacity is None else f", capacity {self._capacity}"
            return f"{name}(empty{room})"
        first = self._tensors[0]
        sizes = ", ".join(
            f"{axis} {size}" for axis, size in zip(self.axes, first.shape, strict=True)
        )
        dtype = str(first.dtype).removeprefix("torch.")
        devices = ", ".join(sorted({str(tensor.device) for tensor in self._tensors}))
        return f"{name}({spell_layers(self.layers)}, {sizes}, {dtype}, {devices})"

    def _index_of(self, layer: int) -> int | None:
        if self._layers is None:
            return layer if 0 <= layer < len(self._tensors) else None
        return self._layers.index(layer) if layer in self._layers else None

    def _check(self, tensor: object, what: str, *, same_device: bool) -> None:
        """Refuse what is no floating-point tensor of the same kind as the layers before."""
        wanted = f"[{', '.join(self.axes)}]"
        if not isinstance(tensor, Tensor):
            raise DtypeError(
                f"{what} is a {type(tensor).__name__}, not a torch.Tensor: pass a tensor {wanted}"
            )
        shape = list(tensor.shape)
        if not tensor.is_floating_point():
            raise DtypeError(f"{what} is {tensor.dtype}: activations are floating-point")
        if len(shape) != len(self.axes):
            raise ShapeError(f"{what} has shape {shape}: a {type(self).__name__} holds {wanted}")
        if 0 in shape:
            raise ShapeError(f"{what} has shape {shape}: no axis of {wanted} may be empty")
        if not self._tensors:
            return
        first = self._tensors[0]
        if shape != list(first.shape):
            raise ShapeError(
                f"{what} has shape {shape}, the first stored layer {list(first.shape)}: "
                f"all layers have the same {wanted}"
            )
        if tensor.dtype != first.dtype:
            raise DtypeError(
                f"{what} is {tensor.dtype}, the first stored layer {first.dtype}: "
                "all layers have one dtype; convert before"
            )
        if same_device and tensor.device != first.device:
            raise UsageError(
                f"{what} is on {tensor.device}, the first stored layer on {first.device}: "
                "all pushed layers share one device; move it before"
            )

    def _check_readout(self, layer: int, tensor: Tensor) -> None:
        """Refuse streams whose readout is of other tokens or another width."""
        made = (self._readouts or {})[layer]
        wanted = (*tensor.shape[:-2], tensor.shape[-1])
        if tuple(made.shape) != wanted or made.dtype != tensor.dtype:
            raise ShapeError(
                f"the readout of layer {layer} is {made.dtype} of shape {list(made.shape)}, its "
                f"streams are {tensor.dtype} of shape {list(tensor.shape)}: one vector "
                f"{list(wanted)} is read out of them"
            )

    def _allocate(self, capacity: int, like: Tensor) -> Tensor:
        # Made in inference mode, the buffer could not be written to outside of it.
        with torch.inference_mode(False):
            try:
                return torch.empty((capacity, *like.shape), dtype=like.dtype, device=like.device)
            except RuntimeError as error:
                size_bytes = capacity * like.numel() * like.element_size()
                raise TooLargeError(
                    f"capacity {capacity} is too large: {list(like.shape)} in {like.dtype} for "
                    f"every layer needs {size_bytes} bytes on {like.device}, which it does not have"
                ) from error
