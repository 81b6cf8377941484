"""AttentionCache: questions about who attends to whom, over any kind of pattern."""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy
from typing import Any, Self, SupportsIndex

import numpy as np
import torch
from torch import Tensor

from trilens.caches.indices import check_index
from trilens.caches.patterns.channel.heads import ChannelHeadsPattern
from trilens.caches.patterns.channel.pattern import ChannelPattern, DecayedSoftmaxPattern
from trilens.caches.patterns.parts import PartsPattern
from trilens.caches.patterns.protocol import DensePattern, Device, Moved, Pattern
from trilens.caches.patterns.recurrent.pattern import RecurrentPattern
from trilens.caches.patterns.relu_l1 import ReluL1Pattern
from trilens.caches.patterns.softmax.pattern import SoftmaxPattern
from trilens.caches.storage import ByLayer, Floats, absent_layer, distinct_bytes, spell_layers
from trilens.errors import NonFiniteError, TooLargeError, UsageError
from trilens.numbers import at_least, whole_number

__all__ = ["DENSE_LIMIT_BYTES", "AttentionCache", "rebuild_pattern"]

#: Largest pattern that `get_layer` builds without being told to.
DENSE_LIMIT_BYTES = 256 * 2**20


_KINDS: Mapping[
    str,
    type[
        DensePattern
        | SoftmaxPattern
        | RecurrentPattern
        | ChannelPattern
        | ChannelHeadsPattern
        | DecayedSoftmaxPattern
    ],
] = {
    "dense": DensePattern,
    "softmax": SoftmaxPattern,
    "recurrent": RecurrentPattern,
    "channel": ChannelPattern,
    "channel_heads": ChannelHeadsPattern,
    "decayed_softmax": DecayedSoftmaxPattern,
}


def rebuild_pattern(tensors: Mapping[str, Tensor], params: Mapping[str, Any]) -> Pattern:
    """The pattern that gave these `tensors()` and `params()`.

    Raises:
        UsageError: `params["kind"]` names no kind of pattern.
    """
    kind = params.get("kind")
    if kind == "relu_l1":
        return ReluL1Pattern(rebuild_pattern(tensors, params["base"]), causal=params["causal"])
    if kind == "parts":
        return PartsPattern.rebuild(tensors, params["parts"], rebuild_pattern)
    if not isinstance(kind, str) or kind not in _KINDS:
        raise UsageError(f"pattern kind {kind!r} is unknown: the kinds are {', '.join(_KINDS)}")
    return _KINDS[kind].rebuild(tensors, params)


class AttentionCache(ByLayer):
    """Attention patterns by layer, asked after the run.

    Built by hand it starts empty and takes patterns with `push`, one layer after the other. Out of
    a capture it is sealed, keyed by the model's own layer numbers, and holds q and k instead of
    patterns; `AttentionCache.from_layers` makes such a cache.

    Answers are float32 NumPy arrays. Weights keep their raw mass, and a masked weight is exactly
    0; entropy and mean distance are those of the row renormalised over its keys. Query and key
    positions count from 0, or from the end: −n … n − 1.
    """

    __slots__ = ("_capacity", "_layers", "_n_model_layers", "_reasons", "_sealed")

    def __init__(self) -> None:
        self._layers: dict[int, Pattern] = {}
        self._sealed = False
        self._capacity: int | None = None
        self._n_model_layers: int | None = None
        self._reasons: dict[int, str] = {}

    @classmethod
    def with_capacity(cls, n_layers: SupportsIndex) -> Self:
        """An empty cache that expects n_layers patterns.

        Patterns are kept by reference, so that there is nothing to reserve, and more may come.

        Raises:
            ValueRangeError: n_layers is not an integer of 0 or more.
        """
        cache = cls()
        cache._capacity = at_least(0, n_layers, "capacity")
        return cache

    @classmethod
    def from_layers(
        cls,
        layers: Mapping[int, Pattern],
        *,
        n_model_layers: int,
        reasons: Mapping[int, str] | None = None,
    ) -> Self:
        """A sealed cache of a model's layers.

        Args:
            layers: pattern by the model's layer number.
            n_model_layers: blocks of the model.
            reasons: why a layer without a pattern has none, such as "mixer is Mamba2".

        Raises:
            OutOfRangeError: a layer number outside 0 … n_model_layers − 1.
        """
        cache = cls()
        cache._sealed = True
        cache._n_model_layers = n_model_layers
        for layer in sorted(layers):
            check_index(layer, n_model_layers, "layer", "this model")
            cache._layers[layer] = layers[layer]
        cache._reasons = dict(reasons or {})
        return cache

    def push(self, pattern: Tensor) -> None:
        """Add the next layer's pattern, kept by reference and detached.

        Shapes
            pattern [batch, heads, seq_q, seq_k]

        Raises:
            UsageError: the cache came out of a capture.
            ShapeError, DtypeError: not a pattern.
            NonFiniteError: a weight is NaN or infinite.
        """
        if self._sealed:
            raise UsageError(
                "this cache came out of a capture and is sealed: push into an AttentionCache() "
                "of your own"
            )
        layer, dense = len(self._layers), DensePattern(pattern)
        bad = int((~dense.tensor.isfinite()).sum())
        if bad:
            raise NonFiniteError(
                f"pattern of layer {layer} has {bad:,} of {pattern.numel():,} weights that are NaN "
                "or infinite: an attention weight is a finite number; a query that sees no key has "
                "a row of zeros"
            )
        self._layers[layer] = dense

    @property
    def layers(self) -> tuple[int, ...]:
        """Numbers of the layers that have a pattern."""
        return tuple(self._layers)

    @property
    def n_model_layers(self) -> int | None:
        """Blocks of the model that the cache came from; None for a cache built by hand."""
        return self._n_model_layers

    @property
    def reasons(self) -> dict[int, str]:
        """Why layers of the model have no pattern, where that is known."""
        return dict(self._reasons)

    @property
    def patterns(self) -> tuple[Pattern | Tensor, ...]:
        """What is stored, in layer order: tensors where pushed, else the lazy patterns."""
        return tuple(
            each.tensor if isinstance(each, DensePattern) and not self._sealed else each
            for each in self._layers.values()
        )

    @property
    def nbytes(self) -> int:
        """Bytes of the distinct storages that the cache keeps alive."""
        return distinct_bytes(
            tensor for pattern in self._layers.values() for tensor in pattern.tensors().values()
        )

    def pattern(self, layer: SupportsIndex) -> Pattern:
        """The pattern of a layer, nothing computed yet.

        Raises:
            AbsentLayerError: the layer has no pattern here.
            OutOfRangeError: it is not a whole number.
        """
        number = whole_number(layer, "layer")
        if number not in self._layers:
            n = self._n_model_layers
            why = self._reasons.get(number, "")
            if n is not None and not 0 <= number < n:
                why = f"this model has layers 0–{n - 1}"
            raise absent_layer(number, self, self.layers, why=why)
        return self._layers[number]

    def parts(self, layer: SupportsIndex) -> dict[str, range]:
        """The heads of each module that attends in a layer, by its name in the block.

        Empty where one module attends, as in nearly all models.

        Raises:
            AbsentLayerError, OutOfRangeError: as `pattern`.
        """
        pattern = self.pattern(layer)
        return pattern.parts if isinstance(pattern, PartsPattern) else {}

    def __getitem__(self, layer: SupportsIndex) -> Pattern:
        return self.pattern(layer)

    def get_layer(self, layer: SupportsIndex, *, allow_large: bool = False) -> Tensor | None:
        """The whole pattern of a layer [batch, heads, seq_q, seq_k], or None where none is stored.

        A pushed pattern comes back as it was pushed; a captured one is computed now.

        Memory
            Up to 256 MiB (`DENSE_LIMIT_BYTES`); with allow_large whatever the pattern takes,
            4 bytes per weight.

        Raises:
            TooLargeError: the pattern would take more than 256 MiB and allow_large is False.
            OutOfRangeError: layer is not a whole number.
        """
        pattern = self._layers.get(whole_number(layer, "layer"))
        if pattern is None:
            return None
        if isinstance(pattern, DensePattern):
            return pattern.tensor
        if pattern.dense_bytes > DENSE_LIMIT_BYTES and not allow_large:
            shape = [pattern.batch, pattern.heads, pattern.seq_q, pattern.seq_k]
            raise TooLargeError(
                f"pattern of layer {layer} {shape} would take {pattern.dense_bytes / 2**20:,.0f} "
                f"MiB: up to {DENSE_LIMIT_BYTES // 2**20} MiB are built without asking; ask for "
                "rows, columns or statistics, or pass allow_large=True"
            )
        return pattern.dense()

    def attention_from_position(
        self,
        layer: SupportsIndex,
        position: SupportsIndex,
        head: SupportsIndex | None = None,
        batch: SupportsIndex = 0,
    ) -> Floats:
        """How much a query position attends to every key: [seq_k], the mean over heads or one head.

        Raises:
            AbsentLayerError: the layer has no pattern.
            OutOfRangeError: a position, head or batch that is not there.
        """
        pattern, row, one = self._place(layer, head, batch)
        query = check_index(
            position, pattern.seq_q, "query position", f"layer {layer}", negative=True
        )
        return _floats(pattern.rows([query], one, row)[:, 0].mean(0))

    def attention_to_position(
        self,
        layer: SupportsIndex,
        position: SupportsIndex,
        head: SupportsIndex | None = None,
        batch: SupportsIndex = 0,
    ) -> Floats:
        """How much every query attends to a key position: [seq_q], the mean over heads or one head.

        Raises: as `attention_from_position`.
        """
        pattern, row, one = self._place(layer, head, batch)
        key = check_index(position, pattern.seq_k, "key position", f"layer {layer}", negative=True)
        return _floats(pattern.columns([key], one, row)[..., 0].mean(0))

    def top_attended_positions(
        self,
        layer: SupportsIndex,
        from_position: SupportsIndex,
        k: SupportsIndex,
        head: SupportsIndex | None = None,
        batch: SupportsIndex = 0,
    ) -> list[tuple[int, float]]:
        """The k keys that a query position attends to most, as (key position, weight), descending.

        Equal weights come in order of position. A k above the number of keys gives every key,
        hidden ones with their weight of 0.

        Raises:
            ValueRangeError: k is not an integer of 1 or more.
            AbsentLayerError: the layer has no pattern.
            OutOfRangeError: a position, head or batch that is not there.
        """
        n = at_least(1, k, "k")
        weights = self.attention_from_position(layer, from_position, head, batch)
        order = np.argsort(-weights, kind="stable")[:n]
        return [(int(position), float(weights[position])) for position in order]

    def entropy(self, layer: SupportsIndex, *, batch: SupportsIndex = 0) -> Floats:
        """Entropy of every row in nats, renormalised over its keys: [heads, seq_q].

        Raises:
            AbsentLayerError: the layer has no pattern.
            OutOfRangeError: a batch that is not there.
            UsageError: the pattern is signed.
        """
        return self._statistic(layer, batch, "entropy")

    def mean_distance(self, layer: SupportsIndex, *, batch: SupportsIndex = 0) -> Floats:
        """Mean distance in tokens from query to key, of the renormalised row: [heads, seq_q].

        Raises: as `entropy`.
        """
        return self._statistic(layer, batch, "mean_distance")

    def received(self, layer: SupportsIndex, *, batch: SupportsIndex = 0) -> Floats:
        """Mean raw weight that each key gets from the queries that may see it: [heads, seq_k].

        Raises: as `entropy`.
        """
        return self._statistic(layer, batch, "received")

    def sink_mass(self, layer: SupportsIndex, *, batch: SupportsIndex = 0) -> Floats:
        """Share of each row that no key got, because a sink took it: [heads, seq_q], in [0, 1].

        Raises: as `entropy`.
        """
        return self._statistic(layer, batch, "sink_mass")

    def relu_l1(self) -> Self:
        """A cache that answers of signed patterns through their unsigned view.

        In a signed pattern, such as the effective attention of a recurrence, negative weights are
        dropped and every row is divided by what is left. Patterns without signs stay as they are.
        """
        return self._with({layer: _unsigned_view(each) for layer, each in self._layers.items()})

    def to(self, device: Device) -> Self:
        """A cache with the same layers on another device; what layers shared they go on sharing."""
        moved_so_far: Moved = {}
        return self._with(
            {layer: each.to(device, moved_so_far) for layer, each in self._layers.items()}
        )

    def _with(self, layers: dict[int, Pattern]) -> Self:
        cache = copy(self)
        cache._layers, cache._reasons = layers, dict(self._reasons)
        return cache

    def __repr__(self) -> str:
        if self.is_empty:
            return f"{type(self).__name__}(empty)"
        return f"{type(self).__name__}({spell_layers(self.layers)}, {self.nbytes / 2**20:,.1f} MiB)"

    def _place(
        self, layer: SupportsIndex, head: SupportsIndex | None, batch: SupportsIndex
    ) -> tuple[Pattern, int, int | None]:
        pattern = self.pattern(layer)
        owner = f"layer {layer}"
        row = check_index(batch, pattern.batch, "batch row", owner)
        one = None if head is None else check_index(head, pattern.heads, "head", owner)
        return pattern, row, one

    def _statistic(self, layer: SupportsIndex, batch: SupportsIndex, name: str) -> Floats:
        pattern, row, _ = self._place(layer, None, batch)
        if pattern.signed:
            raise UsageError(
                f"layer {layer} has a signed pattern, whose {name} is not defined: ask its "
                "view relu_l1() (negative weights dropped, rows scaled to sum 1)"
            )
        return _floats(getattr(pattern, name)(row))


def _unsigned_view(pattern: Pattern) -> Pattern:
    if not pattern.signed:
        return pattern
    # A stored pattern does not say what is hidden; a recurrence is causal.
    return ReluL1Pattern(pattern, causal=not isinstance(pattern, DensePattern))


def _floats(tensor: Tensor) -> Floats:
    array: Floats = tensor.to("cpu", torch.float32).numpy()
    return array
