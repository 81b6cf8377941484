"""The gates that a run leaves behind: what was captured, what the model used, how open it was."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Self, SupportsIndex

import torch
from torch import Tensor

from trilens.caches.gate_functions import GATE_FUNCTIONS, RATED_FUNCTIONS
from trilens.caches.gate_spec import UNARY_FUNCTIONS, GateKind, GateSpec
from trilens.caches.storage import absent_layer, distinct_bytes, moved, spell_layers
from trilens.errors import DtypeError, NotStoredError, ShapeError, UsageError, ValueRangeError
from trilens.io.messages import listed
from trilens.numbers import whole_number
from trilens.results import Shown
from trilens.statistics.gating import GatingAnalysis

__all__ = ["GateCache", "GateKind", "GateSpec"]


class GateCache(Shown):
    """The gates of one capture: pre-activations per (name, layer), and what each of them is.

    Sealed: a capture makes it, nothing is added afterwards. Layer numbers are the model's own.

    Shapes:
        every stored tensor [seq, units]; seq is 1 for a static gate.

    Memory:
        seq · units elements per gate and layer: 3.2 GB for 32 GLU gates of 12288 units over 4096
        tokens in bfloat16. `get` and `openness` compute one gate of one layer at a time.
    """

    __slots__ = ("_records", "_specs")

    def __init__(self) -> None:
        self._records: dict[tuple[str, int], Tensor] = {}
        self._specs: dict[tuple[str, int], GateSpec] = {}

    @classmethod
    def from_records(
        cls,
        records: Mapping[tuple[str, int], Tensor],
        specs: Mapping[tuple[str, int], GateSpec],
    ) -> Self:
        """A cache of captured pre-activations, kept detached and by reference.

        Args:
            records: (name, layer) → the pre-activation.
            specs: (name, layer) → what it is; the same keys.

        Shapes:
            every record [seq, units], with seq = 1 for a static gate.

        Raises:
            UsageError: the keys of records and specs differ, or a spec names another gate.
            ShapeError: a record whose shape does not fit its spec, or its seq the others'.
            DtypeError: a record that is no floating-point tensor.
        """
        if set(records) != set(specs):
            odd = sorted(set(records) ^ set(specs))
            raise UsageError(
                f"gates {odd} have a tensor or a spec but not both: every gate needs the two"
            )
        cache = cls()
        seq: int | None = None
        for key in sorted(records):
            spec, tensor = specs[key], records[key]
            _check_record(key, tensor, spec)
            if not spec.static:
                seq = tensor.shape[0] if seq is None else seq
                if tensor.shape[0] != seq:
                    raise ShapeError(
                        f"gate {key[0]!r} of layer {key[1]} has {tensor.shape[0]} tokens, "
                        f"the gates before {seq}: one cache holds the gates of one prompt"
                    )
            cache._records[key] = tensor.detach()
            cache._specs[key] = spec
        for (name, layer), spec in cache._specs.items():
            if spec.rate and not cache._has_rate(spec, layer):
                raise UsageError(
                    f"gate {name!r} of layer {layer} needs the static gate {spec.rate!r} of the "
                    f"same layer, a multiple of {spec.stored_units} units: it is not among the "
                    "records"
                )
        return cache

    def _has_rate(self, spec: GateSpec, layer: int) -> bool:
        rate = self._specs.get((spec.rate, layer))
        if rate is None or not rate.static:
            return False
        wanted = spec.units if spec.stored_units != spec.units else 0
        return rate.units % spec.stored_units == 0 and wanted in (0, rate.units)

    @property
    def names(self) -> tuple[str, ...]:
        """The stored gates, sorted by name."""
        return tuple(dict.fromkeys(name for name, _ in self._records))

    @property
    def is_empty(self) -> bool:
        """Whether no gate is stored."""
        return not self._records

    @property
    def nbytes(self) -> int:
        """Bytes of the distinct storages that this cache keeps alive."""
        return distinct_bytes(self._records.values())

    def layers(self, name: str) -> tuple[int, ...]:
        """The model's layers that have this gate stored, ascending.

        Raises:
            NotStoredError: no layer has a gate of this name.
        """
        found = tuple(layer for known, layer in self._records if known == name)
        if not found:
            stored = listed(map(repr, self.names), 8, nothing="no gates")
            raise NotStoredError(f"gate {name!r} is not stored: this cache holds {stored}")
        return found

    def pre(self, name: str, layer: SupportsIndex) -> Tensor:
        """What was captured: the gate's pre-activation, in the model's dtype.

        Shapes:
            returns [seq, units].

        Raises:
            NotStoredError: the gate, or its layer, is not stored.
            OutOfRangeError: the layer is not a whole number.
        """
        return self._records[self._key(name, layer)]

    def get(self, name: str, layer: SupportsIndex) -> Tensor:
        """The value that the model used: the gate's function of the stored pre-activation.

        Computed in the tensor's own dtype by the torch calls of `transformers`, so that it equals
        the model's value bit for bit on the same device.

        Shapes:
            returns [seq, units].

        Raises:
            NotStoredError: the gate, or its layer, is not stored.
            OutOfRangeError: the layer is not a whole number.
        """
        key = self._key(name, layer)
        spec, x = self._specs[key], self._records[key]
        if spec.rate:
            return RATED_FUNCTIONS[spec.function].value(x, self._records[spec.rate, key[1]])
        return UNARY_FUNCTIONS[spec.function].value(x)

    def __getitem__(self, key: tuple[str, SupportsIndex]) -> Tensor:
        name, layer = key
        return self.get(name, layer)

    def __len__(self) -> int:
        return len(self._records)

    def __iter__(self) -> Iterator[tuple[str, int]]:
        return iter(self._records)

    def __contains__(self, key: object) -> bool:
        return key in self._records

    def openness(self, name: str, layer: SupportsIndex) -> Tensor:
        """How open the gate was, from 0 (closed) to 1 (open).

        A sigmoid's openness is its value; of silu(x) it is σ(x), of every gelu(x) the exact Φ(x),
        also where the model uses the tanh approximation; of quick_gelu(x) σ(1.702·x); of relu and
        its square whether x > 0. A router's is the probability, a doubled sigmoid's half its value.
        A decay's is its place in its attainable range: 1 remembers all. A step's is
        1 − mean over states of exp(dt·A): 1 takes the new token and forgets the old.

        Shapes:
            returns float32 [seq, units] in [0, 1].

        Raises:
            UsageError: the gate's function has no openness.
            NotStoredError: the gate, or its layer, is not stored.
        """
        key = self._key(name, layer)
        spec = self._specs[key]
        if spec.rate:
            rate = self._records[spec.rate, key[1]]
            return RATED_FUNCTIONS[spec.function].openness(self._records[key], rate)
        openness = UNARY_FUNCTIONS[spec.function].openness
        if openness is None:
            having = ", ".join(k for k, entry in GATE_FUNCTIONS.items() if entry.openness)
            raise UsageError(
                f"gate {name!r} of layer {layer} has no openness: it is {spec.formula}, kind "
                f"{spec.kind!r}; gates by {having} have one; use get() for its values"
            )
        opened = openness(self._records[key])
        if spec.kind == "decay" and spec.range != (0.0, 1.0):
            low, high = spec.range
            opened = ((opened - low) / (high - low)).clamp(0.0, 1.0)
        return opened

    def horizon_tokens(self, name: str, layer: SupportsIndex) -> Tensor:
        """How far back a decay remembers: 1/(1−a) tokens, the sum of all weights 1, a, a² …

        Shapes:
            returns float64 [seq, units], from 1 to infinity.

        Raises:
            UsageError: the gate is no decay.
            NotStoredError: the gate, or its layer, is not stored.
        """
        # PROMOTE: 1 − a has no digits left for a near 1; −expm1(ln a) has all of them.
        return 1.0 / -torch.expm1(self._log_decay(name, layer))

    def half_life_tokens(self, name: str, layer: SupportsIndex) -> Tensor:
        """After how many tokens at this decay half is left: ln 2 / −ln a.

        Shapes:
            returns float64 [seq, units], from 0 to infinity.

        Raises: as `horizon_tokens`.

        Source: time constants of recurrences, arXiv 1804.11188.
        """
        return math.log(2.0) / -self._log_decay(name, layer)

    def _log_decay(self, name: str, layer: SupportsIndex) -> Tensor:
        key = self._key(name, layer)
        spec, x = self._specs[key], self._records[key].double()
        if spec.kind != "decay":
            raise UsageError(
                f"gate {name!r} of layer {layer} is of kind {spec.kind!r}: only a decay has a "
                "memory horizon and a half-life"
            )
        if spec.rate:
            rate = self._records[spec.rate, key[1]].double()
            return (x[:, :, None] * rate.reshape(x.shape[1], -1)).flatten(1)
        if spec.function == "log_decay":
            return x
        if spec.function == "sigmoid":
            return torch.nn.functional.logsigmoid(x)
        return torch.log(UNARY_FUNCTIONS[spec.function].value(x))

    def analyse(self, name: str, layer: SupportsIndex, threshold: float = 0.1) -> GatingAnalysis:
        """Which units of the gate are dead, which saturated: statistics of its openness.

        Args:
            name: The gate.
            layer: The model's layer number.
            threshold: Dead below it, saturated above 1 − it; in [0, 0.5].

        Raises:
            UsageError: the gate's function has no openness.
            NotStoredError: the gate, or its layer, is not stored.
            ValueRangeError: the threshold is outside [0, 0.5].
            NonFiniteError: the gate holds NaN.
        """
        return GatingAnalysis.from_activations(self.openness(name, layer), threshold)

    def spec(self, name: str, layer: SupportsIndex | None = None) -> GateSpec:
        """What the gate is.

        Args:
            name: The gate.
            layer: The model's layer number. Without it the layers have to agree in everything but
                `where`, and the answer carries the `where` of the first.

        Raises:
            NotStoredError: the gate, or its layer, is not stored.
            UsageError: no layer is named and the layers differ.
        """
        if layer is not None:
            return self._specs[self._key(name, layer)]
        layers = self.layers(name)
        first = self._specs[name, layers[0]]
        for other in layers[1:]:
            spec = self._specs[name, other]
            if replace(spec, where=first.where) != first:
                raise UsageError(
                    f"gate {name!r} differs between layers: layer {layers[0]} has "
                    f"{first.formula} {list(first.shape)}, layer {other} {spec.formula} "
                    f"{list(spec.shape)}; name the layer"
                )
        return first

    def to(self, device: torch.device | str | int) -> Self:
        """A new cache on `device`; tensors that are there already are shared, not copied.

        Raises:
            UsageError: torch does not know the device or cannot use it here.
        """
        cache = type(self)()
        cache._records = {key: moved(tensor, device) for key, tensor in self._records.items()}
        cache._specs = dict(self._specs)
        return cache

    def __repr__(self) -> str:
        if self.is_empty:
            return "GateCache(empty)"
        return f"GateCache({'; '.join(f'{n}: {spell_layers(self.layers(n))}' for n in self.names)})"

    def _key(self, name: str, layer: SupportsIndex) -> tuple[str, int]:
        layers = self.layers(name)
        number = whole_number(layer, "layer")
        if number not in layers:
            raise absent_layer(number, self, layers, of=f"gate {name!r} of ")
        return name, number


def _check_record(key: tuple[str, int], tensor: object, spec: GateSpec) -> None:
    name, layer = key
    what = f"gate {name!r} of layer {layer}"
    if whole_number(layer, "layer") < 0:
        raise ValueRangeError(f"{what} is out of range: the model's layers count from 0")
    if spec.name != name:
        raise UsageError(f"{what} has the spec of {spec.name!r}: name and spec belong together")
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
        kind = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
        raise DtypeError(f"{what} is {kind}: a gate is a floating-point torch.Tensor")
    shape = list(tensor.shape)
    if len(shape) != 2 or shape[1] != spec.stored_units or shape[0] < 1:
        raise ShapeError(
            f"{what} has shape {shape}: its spec {list(spec.shape)} needs "
            f"[seq, {spec.stored_units}]"
        )
    if spec.static and shape[0] != 1:
        raise ShapeError(f"{what} has shape {shape}: a static gate has seq = 1")
