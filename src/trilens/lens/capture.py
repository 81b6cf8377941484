"""`Capture`: what one forward pass over one prompt left behind. Frozen; saved without pickle."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trilens.caches.activation import ActivationCache, FullActivationCache
from trilens.caches.attention import AttentionCache, rebuild_pattern
from trilens.caches.gates import GateCache, GateSpec
from trilens.caches.states import StateCache
from trilens.caches.storage import moved
from trilens.errors import (
    CorruptFileError,
    NotStoredError,
    OutOfRangeError,
    UsageError,
    ValueRangeError,
)
from trilens.io.tensors import read_tensors, write_tensors

__all__ = ["Capture", "ModelInfo"]

_FORMAT = "trilens.capture"
_VERSION = 1


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """Which model a capture came from."""

    name: str
    model_class: str
    model_type: str
    n_layers: int
    d_model: int
    dtype: str


@dataclass(frozen=True, slots=True, eq=False)
class Capture:
    """One prompt, one forward pass, no padding anywhere.

    Attributes:
        tokens: the tokens as text.
        token_ids: [seq], on the CPU.
        logits: [seq, vocab], [1, vocab] for the last position alone, or None.
        residual: residual stream after each block; None where it was not asked.
        attention: per-layer attention patterns, lazy; None where not asked. A recurrent layer's
            effective attention is here too, where it was asked and the layer has no softmax
            attention that was asked as well.
        gates: per-layer gates; None where not asked.
        model: which model it was.
        effective: effective attention of every recurrent layer; None where not asked.
        states: recurrent states of layers after chosen tokens; None where not asked.

    Memory
        `nbytes`; queries, keys and full residuals of a single prompt are references to tensors of
        the forward pass.
    """

    tokens: list[str]
    token_ids: Tensor
    logits: Tensor | None
    residual: ActivationCache | FullActivationCache | None
    attention: AttentionCache | None
    gates: GateCache | None
    model: ModelInfo
    effective: AttentionCache | None = None
    states: StateCache | None = None

    def __repr__(self) -> str:
        parts = ("logits", "residual", "attention", "effective", "gates", "states")
        held = [name for name in parts if self._has(name)]
        size = self.nbytes / 1e6
        return (
            f"Capture({len(self.tokens)} tokens of {self.model.model_class}: "
            f"{', '.join(held) or 'nothing'}; {size:.1f} MB)"
        )

    def _has(self, name: str) -> bool:
        return getattr(self, name) is not None

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors held, each storage counted once."""
        storages = {}
        for _, tensor in self._tensors():
            storage = tensor.untyped_storage()
            storages[storage.data_ptr(), str(tensor.device)] = storage.nbytes()
        return sum(storages.values())

    def top_tokens(self, k: int = 5, position: int = -1) -> list[tuple[int, float]]:
        """The k most probable next tokens after a position: (token id, probability), descending.

        Raises:
            NotStoredError: the logits were not captured.
            OutOfRangeError: a position that is not there.
            ValueRangeError: k is no whole number from 1 on.
        """
        if self.logits is None:
            raise NotStoredError("logits were not captured: capture with logits='all' or 'last'")
        if isinstance(k, bool) or not isinstance(k, int) or k < 1:
            raise ValueRangeError(f"k {k!r} is out of range: it is a whole number from 1 on")
        n = self.logits.shape[0]
        if isinstance(position, bool) or not isinstance(position, int) or not -n <= position < n:
            raise OutOfRangeError(
                f"position {position!r} is out of range: logits of positions {-n}–{n - 1} are held"
            )
        # PROMOTE: a softmax over a vocabulary loses its tail in half precision.
        probabilities = self.logits[position].float().softmax(-1)
        top = probabilities.topk(min(k, probabilities.shape[-1]))
        return [
            (int(i), float(p)) for i, p in zip(top.indices.cpu(), top.values.cpu(), strict=True)
        ]

    def to(self, device: str | torch.device) -> Capture:
        """The same capture on another device."""
        attention, effective = self._moved(device)
        return replace(
            self,
            logits=None if self.logits is None else moved(self.logits, device),
            residual=None if self.residual is None else self.residual.to(device),
            attention=attention,
            effective=effective,
            gates=None if self.gates is None else self.gates.to(device),
            states=None if self.states is None else self.states.to(device),
        )

    def _moved(
        self, device: str | torch.device
    ) -> tuple[AttentionCache | None, AttentionCache | None]:
        """Both attention caches elsewhere; patterns that stand in both are moved once."""
        attention = None if self.attention is None else self.attention.to(device)
        if self.effective is None:
            return attention, None
        if attention is None:
            return None, self.effective.to(device)
        shared, memo = self._shared_layers(), dict[tuple[object, ...], Tensor]()
        return attention, AttentionCache.from_layers(
            {
                i: attention.pattern(i)
                if i in shared
                else self.effective.pattern(i).to(device, memo)
                for i in self.effective.layers
            },
            n_model_layers=self.model.n_layers,
            reasons=self.effective.reasons,
        )

    def shares_pattern(self, layer: int) -> bool:
        """Whether `attention` answers for a layer with its effective attention."""
        return layer in self._shared_layers()

    def _shared_layers(self) -> tuple[int, ...]:
        """Layers whose pattern stands in both attention caches."""
        if self.effective is None or self.attention is None:
            return ()
        held, attention = self.effective, self.attention
        both = [layer for layer in held.layers if layer in attention.layers]
        return tuple(i for i in both if held.pattern(i) is attention.pattern(i))

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        yield "token_ids", self.token_ids
        if self.logits is not None:
            yield "logits", self.logits
        if self.residual is not None:
            for layer in self.residual.layers:
                tensor = self.residual.get_layer(layer)
                if tensor is not None:
                    yield f"residual.{layer}", tensor
        yield from self._pattern_tensors()
        if self.gates is not None:
            for name in self.gates.names:
                for layer in self.gates.layers(name):
                    yield f"gates.{layer}.{name}", self.gates.pre(name, layer)
        if self.states is not None:
            for layer, part, tensor in self.states.tensors():
                yield f"states.{layer}.{part}", tensor

    def _pattern_tensors(self) -> Iterator[tuple[str, Tensor]]:
        shared = self._shared_layers()
        for kind, cache in (("attention", self.attention), ("effective", self.effective)):
            for layer in () if cache is None else cache.layers:
                if cache is not None and not (kind == "effective" and layer in shared):
                    for name, tensor in cache.pattern(layer).tensors().items():
                        yield f"{kind}.{layer}.{name}", tensor

    def save(self, path: str | Path) -> Path:
        """Write one safetensors file: the tensors, and the rest as JSON in its header.

        Written beside its place and renamed when it is whole, so that no half file is left.

        Returns:
            The path.
        """
        manifest: dict[str, Any] = {
            "format": _FORMAT,
            "version": _VERSION,
            "tokens": self.tokens,
            "model": asdict(self.model),
            "residual": self._residual_kind(),
            "attention": None,
            "gates": None,
            "effective": None,
            "reasons": {},
            "states": None if self.states is None else self.states.params(),
        }
        shared = self._shared_layers()
        for name, cache in (("attention", self.attention), ("effective", self.effective)):
            if cache is not None:
                # What the other cache holds too is written once: null here.
                manifest[name] = {
                    str(i): None
                    if name == "effective" and i in shared
                    else cache.pattern(i).params()
                    for i in cache.layers
                }
                manifest["reasons"][name] = {str(i): why for i, why in cache.reasons.items()}
        if self.gates is not None:
            manifest["gates"] = [
                [name, layer, self.gates.spec(name, layer).to_dict()]
                for name in self.gates.names
                for layer in self.gates.layers(name)
            ]
        return write_tensors(Path(path), dict(self._tensors()), manifest)

    def _residual_kind(self) -> str | None:
        if self.residual is None:
            return None
        return "all" if isinstance(self.residual, FullActivationCache) else "last"

    @classmethod
    def load(cls, path: str | Path) -> Capture:
        """Read a capture that `save` wrote; nothing in the file is executed.

        Raises:
            CorruptFileError: not a capture, of another version, or damaged.
            ModelNotFoundError: no such file.
        """
        tensors, manifest = read_tensors(Path(path), _FORMAT, _VERSION)
        try:
            return cls._rebuild(tensors, manifest)
        except (KeyError, TypeError, ValueError, AttributeError, UsageError) as error:
            raise CorruptFileError(
                f"{path} is not a whole capture: {type(error).__name__}: {error}; capture again"
            ) from error

    @classmethod
    def _rebuild(cls, tensors: dict[str, Tensor], manifest: dict[str, Any]) -> Capture:
        parts: dict[str, dict[int, dict[str, Tensor]]] = {
            "attention": {},
            "effective": {},
            "gates": {},
            "states": {},
        }
        residual: dict[int, Tensor] = {}
        for name, tensor in tensors.items():
            kind, _, rest = name.partition(".")
            if kind == "residual":
                residual[int(rest)] = tensor
            elif kind in parts:
                layer, _, part = rest.partition(".")
                parts[kind].setdefault(int(layer), {})[part] = tensor
        if len(manifest["tokens"]) != len(tensors["token_ids"]):
            raise ValueError("tokens and token ids differ in number")
        model = ModelInfo(**manifest["model"])

        def cache(name: str, other: AttentionCache | None) -> AttentionCache | None:
            # Files from before there was an effective cache, or reasons, lack these entries.
            held = manifest.get(name)
            if held is None:
                return None
            patterns = {
                int(layer): rebuild_pattern(parts[name][int(layer)], params)
                if params is not None or other is None
                else other.pattern(int(layer))
                for layer, params in held.items()
            }
            reasons = manifest.get("reasons", {}).get(name, {})
            return AttentionCache.from_layers(
                patterns,
                n_model_layers=model.n_layers,
                reasons={int(layer): str(why) for layer, why in reasons.items()},
            )

        attention = cache("attention", None)
        gates = None
        if manifest["gates"] is not None:
            specs = {
                (name, layer): GateSpec.from_dict(spec) for name, layer, spec in manifest["gates"]
            }
            records = {(name, layer): parts["gates"][layer][name] for name, layer in specs}
            gates = GateCache.from_records(records, specs)
        # Files from before states could be captured do not speak of them.
        held = manifest.get("states")
        states = None if held is None else StateCache.rebuild(parts["states"], held)
        kinds: dict[str, type[ActivationCache] | type[FullActivationCache]] = {
            "last": ActivationCache,
            "all": FullActivationCache,
        }
        kind = manifest["residual"]
        return cls(
            tokens=[str(token) for token in manifest["tokens"]],
            token_ids=tensors["token_ids"],
            logits=tensors.get("logits"),
            residual=None if kind is None else kinds[kind].from_layers(residual),
            attention=attention,
            gates=gates,
            model=model,
            effective=cache("effective", attention),
            states=states,
        )
