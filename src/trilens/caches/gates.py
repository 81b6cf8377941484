"""The gates that a run leaves behind: what was captured, what the model used, how open it was."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal, Self, get_args

import torch
from torch import Tensor

from trilens.axes import GATE_SITES
from trilens.caches.gate_functions import GATE_FUNCTIONS, GateFunction
from trilens.caches.storage import distinct_bytes, moved, spell_layers, whole_number
from trilens.errors import DtypeError, NotStoredError, ShapeError, UsageError, ValueRangeError
from trilens.gating import GatingAnalysis

__all__ = ["GateCache", "GateKind", "GateSpec"]

GateKind = Literal["sigmoid", "activation", "decay", "step", "linear", "router"]
"""What a gate is: a sigmoid, another activation, a recurrence's decay or step size dt, a product
without a function, or a router of experts."""


@dataclass(frozen=True, slots=True)
class GateSpec:
    """What one gate is, and where it was found.

    Attributes:
        name: Site, a key of `axes.GATE_SITES`.
        kind: What the gate is.
        formula: The value in terms of the pre-activation, for people: `silu(x)`.
        function: Key of `GATE_FUNCTIONS`: how the stored pre-activation becomes the value.
        range: Lowest and highest attainable value, infinite where there is none.
        shape: A gate's axes per token before they were flattened to units, in row-major order.
        where: Path of the module whose input or output is the pre-activation.
        static: Whether the gate is a parameter, the same for every token: its seq is 1.

    Raises:
        ValueRangeError: an unknown name, kind or function; a range that is no range; an empty axis.
    """

    name: str
    kind: GateKind
    formula: str
    function: str
    range: tuple[float, float]
    shape: tuple[int, ...]
    where: str
    static: bool = False

    def __post_init__(self) -> None:
        _one_of(self.name, "gate", GATE_SITES)
        _one_of(self.kind, "gate kind", get_args(GateKind))
        _one_of(self.function, "gate function", GATE_FUNCTIONS)
        low, high = self.range
        if not low <= high:
            raise ValueRangeError(
                f"range of the gate {self.name!r} is {low}…{high}: the lowest value comes first"
            )
        if not self.shape or min(self.shape) < 1:
            raise ValueRangeError(
                f"shape of the gate {self.name!r} is {list(self.shape)}: it has one axis or more, "
                "none of them empty"
            )

    @property
    def units(self) -> int:
        """How many units a token has: the product of `shape`."""
        return math.prod(self.shape)

    def to_dict(self) -> dict[str, Any]:
        """The spec as JSON can hold it: an infinite bound becomes None."""
        low, high = self.range
        plain = asdict(self)
        plain["range"] = [_bound_to_json(low), _bound_to_json(high)]
        plain["shape"] = list(self.shape)
        return plain

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Self:
        """The spec that `to_dict` wrote.

        Raises:
            UsageError: an entry is missing, unknown or of the wrong type.
            ValueRangeError: an entry names what does not exist here.
        """
        wanted = {field.name for field in fields(cls)}
        if set(plain) != wanted:
            raise UsageError(
                f"gate spec has the entries {sorted(plain)}: it needs exactly {sorted(wanted)}"
            )
        texts = [plain[name] for name in ("name", "kind", "formula", "function", "where")]
        if not all(isinstance(text, str) for text in texts) or type(plain["static"]) is not bool:
            raise UsageError(
                f"gate spec is malformed: {texts} have to be strings, static {plain['static']!r} "
                "true or false"
            )
        try:
            low, high = plain["range"]
            bounds = (
                -math.inf if low is None else float(low),
                math.inf if high is None else float(high),
            )
            shape = tuple(whole_number(size, "axis") for size in plain["shape"])
        except (TypeError, ValueError) as error:
            raise UsageError(
                f"gate spec is malformed: range {plain['range']!r} has to be two numbers or null, "
                f"shape {plain['shape']!r} a list of whole numbers"
            ) from error
        return cls(**{**plain, "range": bounds, "shape": shape})


class GateCache:
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
        return cache

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
            stored = ", ".join(repr(known) for known in self.names) or "no gates"
            raise NotStoredError(f"gate {name!r} is not stored: this cache holds {stored}")
        return found

    def pre(self, name: str, layer: int) -> Tensor:
        """What was captured: the gate's pre-activation, in the model's dtype.

        Shapes:
            returns [seq, units].

        Raises:
            NotStoredError: the gate, or its layer, is not stored.
            UsageError: the layer is not a whole number.
        """
        return self._records[self._key(name, layer)]

    def get(self, name: str, layer: int) -> Tensor:
        """The value that the model used: the gate's function of the stored pre-activation.

        Computed in the tensor's own dtype by the torch calls of `transformers`, so that it equals
        the model's value bit for bit on the same device.

        Shapes:
            returns [seq, units].

        Raises:
            NotStoredError: the gate, or its layer, is not stored.
            UsageError: the layer is not a whole number.
        """
        key = self._key(name, layer)
        return _function_of(self._specs[key]).value(self._records[key])

    def openness(self, name: str, layer: int) -> Tensor:
        """How open the gate was, from 0 (closed) to 1 (open).

        A sigmoid's openness is its value; of silu(x) it is σ(x), of every gelu(x) the exact Φ(x),
        also where the model uses the tanh approximation; of quick_gelu(x) σ(1.702·x); of relu and
        its square whether x > 0.

        Shapes:
            returns float32 [seq, units] in [0, 1].

        Raises:
            UsageError: the gate's function has no openness, or the layer is not a whole number.
            NotStoredError: the gate, or its layer, is not stored.
        """
        key = self._key(name, layer)
        spec = self._specs[key]
        openness = _function_of(spec).openness
        if openness is None:
            having = ", ".join(k for k, entry in GATE_FUNCTIONS.items() if entry.openness)
            raise UsageError(
                f"gate {name!r} of layer {layer} has no openness: it is {spec.formula}, kind "
                f"{spec.kind!r}; gates by {having} have one; use get() for its values"
            )
        return openness(self._records[key])

    def analyse(self, name: str, layer: int, threshold: float = 0.1) -> GatingAnalysis:
        """Which units of the gate are dead, which saturated: statistics of its openness.

        Args:
            name: The gate.
            layer: The model's layer number.
            threshold: Dead below it, saturated above 1 − it; in [0, 0.5].

        Raises:
            UsageError: the gate's function has no openness, or the layer is not a whole number.
            NotStoredError: the gate, or its layer, is not stored.
            ValueRangeError: the threshold is outside [0, 0.5].
            NonFiniteError: the gate holds NaN.
        """
        return GatingAnalysis.from_activations(self.openness(name, layer), threshold)

    def spec(self, name: str, layer: int | None = None) -> GateSpec:
        """What the gate is.

        Args:
            name: The gate.
            layer: The model's layer number. Without it the layers have to agree in everything but
                `where`, and the answer carries the `where` of the first.

        Raises:
            NotStoredError: the gate, or its layer, is not stored.
            UsageError: no layer is named and the layers differ, or it is not a whole number.
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

    def _key(self, name: str, layer: int) -> tuple[str, int]:
        layers = self.layers(name)
        number = whole_number(layer, "layer")
        if number not in layers:
            raise NotStoredError(
                f"gate {name!r} is not stored for layer {number}: this cache holds it for "
                f"{spell_layers(layers)}"
            )
        return name, number


def _function_of(spec: GateSpec) -> GateFunction:
    return GATE_FUNCTIONS[spec.function]


def _one_of(value: str, noun: str, allowed: Any) -> None:
    if value not in allowed:
        raise ValueRangeError(f"{noun} {value!r} is unknown: known are {', '.join(allowed)}")


def _bound_to_json(bound: float) -> float | None:
    return None if math.isinf(bound) else bound


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
    if len(shape) != 2 or shape[1] != spec.units or shape[0] < 1:
        raise ShapeError(
            f"{what} has shape {shape}: its spec {list(spec.shape)} needs [seq, {spec.units}]"
        )
    if spec.static and shape[0] != 1:
        raise ShapeError(f"{what} has shape {shape}: a static gate has seq = 1")
