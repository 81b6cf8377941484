"""StateCache: what the recurrent layers of a model remember after chosen tokens of a prompt."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self, SupportsIndex

import numpy as np
import torch
from torch import Tensor

from trilens.caches.indices import check_index
from trilens.caches.storage import (
    ByLayer,
    Floats,
    absent_layer,
    distinct_bytes,
    moved,
    spell_layers,
)
from trilens.errors import DtypeError, NotStoredError, ShapeError, UsageError
from trilens.io.messages import listed
from trilens.numbers import whole_number

__all__ = ["StateCache", "StatePart", "StateSpec"]


@dataclass(frozen=True, slots=True)
class StatePart:
    """One tensor of a layer's state.

    Attributes:
        name: "S" for a matrix, "h" for a vector, or what the paper calls it.
        axes: the names of its axes.
        shape: their sizes.
    """

    name: str
    axes: tuple[str, ...]
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class StateSpec:
    """What the recurrent state of a layer is.

    Attributes:
        kind: the recurrence.
        formula: how a token changes the state.
        read: how the layer's output is read from it, which fixes the orientation of a matrix.
        parts: its tensors; the first is what `StateCache.get` gives unless told otherwise.
        where: the kernel function or module that keeps it.
    """

    kind: str
    formula: str
    read: str
    parts: tuple[StatePart, ...]
    where: str

    @property
    def axes(self) -> tuple[str, ...]:
        """The axes of the first part."""
        return self.parts[0].axes

    @property
    def shape(self) -> tuple[int, ...]:
        """The sizes of the axes of the first part."""
        return self.parts[0].shape

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as JSON takes them."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """What `to_dict` gave, also after a way through JSON."""
        parts = tuple(
            StatePart(part["name"], tuple(part["axes"]), tuple(part["shape"]))
            for part in values["parts"]
        )
        return cls(**{**values, "parts": parts})


class StateCache(ByLayer):
    """Recurrent states of one capture, by layer and position.

    Sealed: a capture makes it, nothing is added afterwards. Layer numbers are the model's own;
    positions count the prompt's real tokens, from 0 or from the end. A state is what the layer
    remembers after that token.

    Memory
        Every layer's state once per position, in float32: 101 MB per position for 48 layers of 32
        heads of 128 × 128. It does not grow with the prompt.
    """

    __slots__ = ("_layers", "_positions", "_reasons", "_seq", "_specs")

    def __init__(self) -> None:
        self._layers: dict[int, dict[str, Tensor]] = {}
        self._specs: dict[int, StateSpec] = {}
        self._positions: tuple[int, ...] = ()
        self._reasons: dict[int, str] = {}
        self._seq = 0

    @classmethod
    def from_layers(
        cls,
        layers: Mapping[int, Mapping[str, Tensor]],
        specs: Mapping[int, StateSpec],
        *,
        positions: Sequence[int],
        seq: int,
        reasons: Mapping[int, str] | None = None,
    ) -> Self:
        """A cache of captured states, kept detached and by reference.

        Args:
            layers: layer → part → its states.
            specs: layer → what they are; the same layers.
            positions: after which tokens, from 0, ascending.
            seq: tokens of the prompt.
            reasons: why a layer that is not among these has no state, in words.

        Shapes
            every tensor [positions, *shape of its part].

        Raises:
            UsageError: layers and specs differ, or positions are not ascending.
            OutOfRangeError: a position outside the prompt.
            ShapeError: a tensor that does not fit its spec.
            DtypeError: a tensor that is not floating point.
        """
        if set(layers) != set(specs):
            odd = sorted(set(layers) ^ set(specs))
            raise UsageError(f"layers {odd} have states or a spec but not both: give the two")
        cache = cls()
        cache._seq = whole_number(seq, "seq")
        owner = f"a prompt of {seq} tokens"
        cache._positions = tuple(check_index(p, seq, "position", owner) for p in positions)
        if list(cache._positions) != sorted(set(cache._positions)) or not cache._positions:
            raise UsageError(f"positions {list(positions)} are not ascending and distinct")
        for layer in sorted(layers):
            spec = specs[layer]
            names = [part.name for part in spec.parts]
            if sorted(layers[layer]) != sorted(names):
                raise UsageError(
                    f"the state of layer {layer} has parts {sorted(layers[layer])}: its spec names "
                    f"{names}"
                )
            for part in spec.parts:
                _check_part(layer, part, layers[layer][part.name], len(cache._positions))
            # In the order of the spec, whatever order they came in.
            cache._layers[layer] = {name: layers[layer][name].detach() for name in names}
            cache._specs[layer] = spec
        cache._reasons = {int(layer): str(why) for layer, why in (reasons or {}).items()}
        return cache

    @property
    def layers(self) -> tuple[int, ...]:
        """The model's layers whose state is stored, ascending."""
        return tuple(self._layers)

    @property
    def positions(self) -> tuple[int, ...]:
        """After which tokens, counted from 0, ascending."""
        return self._positions

    @property
    def seq(self) -> int:
        """Tokens of the prompt."""
        return self._seq

    @property
    def reasons(self) -> dict[int, str]:
        """Why a layer that is not stored has no state, where that is known."""
        return dict(self._reasons)

    @property
    def nbytes(self) -> int:
        """Bytes of the distinct storages that this cache keeps alive."""
        return distinct_bytes(tensor for _, _, tensor in self.tensors())

    def get(
        self, layer: SupportsIndex, position: SupportsIndex = -1, part: str | None = None
    ) -> Tensor:
        """The state of a layer after a token.

        Args:
            layer: the model's layer number.
            position: one of `positions`, or counted from the prompt's end.
            part: a part's name; the first part of the spec unless given.

        Returns:
            float32 (float64 where the model computes in it), with the axes of `spec(layer)`.

        Raises:
            NotStoredError: no such state is stored; says which are, and why the layer has none.
            OutOfRangeError: a position outside the prompt.
            OutOfRangeError: the layer is not a whole number.
        """
        number = self._layer(layer)
        place = self._place(position)
        parts = self._layers[number]
        name = next(iter(parts)) if part is None else part
        if name not in parts:
            raise NotStoredError(
                f"part {part!r} of the state of layer {number} is not there: it has "
                f"{listed(map(repr, parts))}"
            )
        return parts[name][place]

    def __getitem__(self, layer: SupportsIndex) -> Tensor:
        """The states of a layer's first part: [positions, …]."""
        return next(iter(self._layers[self._layer(layer)].values()))

    def spec(self, layer: SupportsIndex) -> StateSpec:
        """What the state of a layer is: axes, orientation, how it is read.

        Raises:
            AbsentLayerError: no state of this layer is stored.
            OutOfRangeError: the layer is not a whole number.
        """
        return self._specs[self._layer(layer)]

    def norms(self, position: SupportsIndex = -1) -> Floats:
        """The size of each stored layer's state after a token: [layers], in the order of `layers`.

        The Frobenius norm of the state's first part.

        Raises:
            NotStoredError: no state after this token is stored.
            OutOfRangeError: a position outside the prompt.
        """
        place = self._place(position)
        found = [next(iter(parts.values()))[place] for parts in self._layers.values()]
        # PROMOTE: squares of a hundred thousand entries.
        return np.array([float(state.double().norm()) for state in found], dtype=np.float32)

    def unit_norms(
        self, layer: SupportsIndex, position: SupportsIndex = -1, part: str | None = None
    ) -> Floats:
        """The norm of each head's or channel's state after a token: [first axis].

        Raises:
            NotStoredError, OutOfRangeError, UsageError: as `get`.
        """
        state = self.get(layer, position, part).double()
        norms = state.reshape(state.shape[0], -1).norm(dim=1)
        values: Floats = norms.to(torch.float32).cpu().numpy()
        return values

    def tensors(self) -> Iterator[tuple[int, str, Tensor]]:
        """Layer, part and its states [positions, …], of everything stored."""
        for layer, parts in self._layers.items():
            for name, tensor in parts.items():
                yield layer, name, tensor

    def params(self) -> dict[str, Any]:
        """Everything but the tensors, as JSON."""
        return {
            "positions": list(self._positions),
            "seq": self._seq,
            "specs": {str(layer): spec.to_dict() for layer, spec in self._specs.items()},
            "reasons": {str(layer): why for layer, why in self._reasons.items()},
        }

    @classmethod
    def rebuild(
        cls, tensors: Mapping[int, Mapping[str, Tensor]], params: Mapping[str, Any]
    ) -> Self:
        """The cache that gave these tensors, by layer and part, and `params()`.

        Raises:
            UsageError, ShapeError, DtypeError, OutOfRangeError: as `from_layers`.
        """
        specs = {int(layer): StateSpec.from_dict(spec) for layer, spec in params["specs"].items()}
        return cls.from_layers(
            tensors,
            specs,
            positions=params["positions"],
            seq=params["seq"],
            reasons={int(layer): why for layer, why in params["reasons"].items()},
        )

    def to(self, device: torch.device | str | int) -> Self:
        """A new cache on `device`; tensors that are there already are shared, not copied.

        Raises:
            UsageError: torch does not know the device or cannot use it here.
        """
        cache = type(self)()
        cache._layers = {
            layer: {name: moved(tensor, device) for name, tensor in parts.items()}
            for layer, parts in self._layers.items()
        }
        cache._specs, cache._reasons = dict(self._specs), dict(self._reasons)
        cache._positions, cache._seq = self._positions, self._seq
        return cache

    def __repr__(self) -> str:
        if self.is_empty:
            return "StateCache(empty)"
        after = ", ".join(map(str, self._positions))
        return f"StateCache({spell_layers(self.layers)}; after tokens {after} of {self._seq})"

    def _layer(self, layer: SupportsIndex) -> int:
        number = whole_number(layer, "layer")
        if number not in self._layers:
            raise absent_layer(number, self, self.layers, why=self._reasons.get(number, ""))
        return number

    def _place(self, position: SupportsIndex) -> int:
        owner = f"this prompt of {self._seq} tokens"
        index = check_index(position, self._seq, "position", owner, negative=True)
        if index not in self._positions:
            raise NotStoredError(
                f"the state after position {position} is not stored: this cache holds positions "
                f"{listed(self._positions, 8)}; capture with states=({position},)"
            )
        return self._positions.index(index)


def _check_part(layer: int, part: StatePart, tensor: object, n: int) -> None:
    what = f"state {part.name!r} of layer {layer}"
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
        kind = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
        raise DtypeError(f"{what} is {kind}: a state is a floating-point torch.Tensor")
    if tuple(tensor.shape) != (n, *part.shape) or len(part.axes) != len(part.shape):
        raise ShapeError(
            f"{what} has shape {list(tensor.shape)}: {n} positions and its spec "
            f"{list(part.shape)} ({', '.join(part.axes)}) need {[n, *part.shape]}"
        )
