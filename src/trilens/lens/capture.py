"""`Capture`: what one forward pass over one prompt left behind. Frozen; saved without pickle."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, NoReturn, SupportsIndex

import torch
from torch import Tensor

from trilens.caches.activation import ActivationCache, FullActivationCache
from trilens.caches.attention import AttentionCache, rebuild_pattern
from trilens.caches.gate_spec import GateSpec
from trilens.caches.gates import GateCache
from trilens.caches.indices import check_index
from trilens.caches.states import StateCache
from trilens.caches.storage import distinct_bytes, moved
from trilens.errors import CorruptFileError, NotStoredError, UsageError
from trilens.io.paths import as_path
from trilens.io.tensors import read_tensors, write_tensors
from trilens.io.typed import typed
from trilens.numbers import at_least
from trilens.statistics.probabilities import probabilities

__all__ = ["Capture", "ModelInfo", "Parts"]

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


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Parts:
    """What a capture holds of what can be asked for; None where it was not.

    Attributes:
        logits: [seq, vocab], or [1, vocab] for the last position alone.
        residual: residual stream after each block.
        attention: per-layer attention patterns, lazy. A recurrent layer's effective attention is
            here too, where it was asked and the layer has no softmax attention that was asked as
            well.
        effective: effective attention of every recurrent layer.
        gates: per-layer gates.
        states: recurrent states of layers after chosen tokens.
    """

    logits: Tensor | None = None
    residual: ActivationCache | FullActivationCache | None = None
    attention: AttentionCache | None = None
    effective: AttentionCache | None = None
    gates: GateCache | None = None
    states: StateCache | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """What is there."""
        return tuple(each.name for each in fields(self) if getattr(self, each.name) is not None)


_HOW = {
    "residual": "residual='last' or 'all'",
    "attention": "attention=True",
    "effective": "effective=True",
    "gates": "gates=True",
    "states": "states=True",
}


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Capture:
    """One prompt, one forward pass, no padding anywhere.

    `residual`, `attention`, `effective`, `gates` and `states` raise where they were not captured;
    `has("attention")` asks.

    Attributes:
        tokens: the tokens as text.
        token_ids: [seq], on the CPU.
        model: which model it was.
        parts: what is held, with None for what is not.
        hash_checked: of a capture that was loaded: its file named a hash of its content, and fits
            it; False for files from before there were hashes. None for one that was not loaded.

    Memory
        `nbytes`; queries, keys and full residuals of a single prompt are references to tensors of
        the forward pass.
    """

    tokens: list[str]
    token_ids: Tensor
    model: ModelInfo
    parts: Parts
    hash_checked: bool | None = None

    def __repr__(self) -> str:
        return (
            f"Capture({len(self.tokens)} tokens of {self.model.model_class}: "
            f"{', '.join(self.parts.names) or 'nothing'}; {self.nbytes / 1e6:.1f} MB)"
        )

    def has(self, part: str) -> bool:
        """Whether a part was captured: "logits", "residual", "attention", "effective" …

        Raises:
            UsageError: there is no such part.
        """
        known = [each.name for each in fields(Parts)]
        if part not in known:
            raise UsageError(f"part {part!r} is unknown: the parts are {', '.join(known)}")
        return part in self.parts.names

    @property
    def logits(self) -> Tensor | None:
        """[seq, vocab]; [1, vocab] for the last position alone; None where there are none."""
        return self.parts.logits

    @property
    def residual(self) -> ActivationCache | FullActivationCache:
        """The residual stream after each block; `NotStoredError` where it was not captured."""
        part = self.parts.residual
        return part if part is not None else self._refuse("residual")

    @property
    def attention(self) -> AttentionCache:
        """Per-layer attention patterns, lazy; `NotStoredError` where it was not captured."""
        part = self.parts.attention
        return part if part is not None else self._refuse("attention")

    @property
    def effective(self) -> AttentionCache:
        """Recurrent layers' effective attention; `NotStoredError` where it was not captured."""
        part = self.parts.effective
        return part if part is not None else self._refuse("effective")

    @property
    def gates(self) -> GateCache:
        """Per-layer gates; `NotStoredError` where they were not captured."""
        part = self.parts.gates
        return part if part is not None else self._refuse("gates")

    @property
    def states(self) -> StateCache:
        """Recurrent states after chosen tokens; `NotStoredError` where they were not captured."""
        part = self.parts.states
        return part if part is not None else self._refuse("states")

    def _refuse(self, name: str) -> NoReturn:
        held = ", ".join(self.parts.names) or "nothing"
        raise NotStoredError(
            f"{name} was not captured: this capture holds {held}; capture with {_HOW[name]}"
        )

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors held, each storage counted once."""
        return distinct_bytes(tensor for _, tensor in self._tensors())

    def top_tokens(
        self, k: SupportsIndex = 5, position: SupportsIndex = -1
    ) -> list[tuple[int, float]]:
        """The k most probable next tokens after a position: (token id, probability), descending.

        Raises:
            NotStoredError: the logits were not captured.
            OutOfRangeError: a position that is not there.
            ValueRangeError: k is no whole number from 1 on.
            NonFiniteError: NaN or +Inf among the logits, or nothing but −Inf.
        """
        if self.logits is None:
            raise NotStoredError("logits were not captured: capture with logits='all' or 'last'")
        n = at_least(1, k, "k")
        owner = "this capture's logits"
        at = check_index(position, self.logits.shape[0], "position", owner, negative=True)
        found = probabilities(self.logits[at], f"of position {at}")
        top = found.topk(min(n, len(found)))
        return [
            (int(i), float(p)) for i, p in zip(top.indices.cpu(), top.values.cpu(), strict=True)
        ]

    def to(self, device: str | torch.device) -> Capture:
        """The same capture on another device."""
        parts = self.parts
        attention, effective = self._moved(device)
        return replace(
            self,
            parts=Parts(
                logits=None if parts.logits is None else moved(parts.logits, device),
                residual=None if parts.residual is None else parts.residual.to(device),
                attention=attention,
                effective=effective,
                gates=None if parts.gates is None else parts.gates.to(device),
                states=None if parts.states is None else parts.states.to(device),
            ),
        )

    def _moved(
        self, device: str | torch.device
    ) -> tuple[AttentionCache | None, AttentionCache | None]:
        """Both attention caches elsewhere; patterns that stand in both are moved once."""
        attention, effective = self.parts.attention, self.parts.effective
        there = None if attention is None else attention.to(device)
        if effective is None:
            return there, None
        if there is None:
            return None, effective.to(device)
        shared, memo = self._shared_layers(), dict[tuple[object, ...], Tensor]()
        return there, AttentionCache.from_layers(
            {
                i: there.pattern(i) if i in shared else effective.pattern(i).to(device, memo)
                for i in effective.layers
            },
            n_model_layers=self.model.n_layers,
            reasons=effective.reasons,
        )

    def shares_pattern(self, layer: int) -> bool:
        """Whether `attention` answers for a layer with its effective attention."""
        return layer in self._shared_layers()

    def _shared_layers(self) -> tuple[int, ...]:
        """Layers whose pattern stands in both attention caches."""
        held, attention = self.parts.effective, self.parts.attention
        if held is None or attention is None:
            return ()
        both = [layer for layer in held.layers if layer in attention.layers]
        return tuple(i for i in both if held.pattern(i) is attention.pattern(i))

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        parts = self.parts
        yield "token_ids", self.token_ids
        if parts.logits is not None:
            yield "logits", parts.logits
        if parts.residual is not None:
            for layer in parts.residual.layers:
                yield f"residual.{layer}", parts.residual[layer]
        yield from self._pattern_tensors()
        if parts.gates is not None:
            for name in parts.gates.names:
                for layer in parts.gates.layers(name):
                    yield f"gates.{layer}.{name}", parts.gates.pre(name, layer)
        if parts.states is not None:
            for layer, part, tensor in parts.states.tensors():
                yield f"states.{layer}.{part}", tensor

    def _attention_caches(self) -> Iterator[tuple[str, AttentionCache]]:
        for name, cache in (
            ("attention", self.parts.attention),
            ("effective", self.parts.effective),
        ):
            if cache is not None:
                yield name, cache

    def _pattern_tensors(self) -> Iterator[tuple[str, Tensor]]:
        shared = self._shared_layers()
        for kind, cache in self._attention_caches():
            for layer in cache.layers:
                if not (kind == "effective" and layer in shared):
                    for name, tensor in cache.pattern(layer).tensors().items():
                        yield f"{kind}.{layer}.{name}", tensor

    def save(self, path: str | Path) -> Path:
        """Write one safetensors file: the tensors, and the rest as JSON in its header.

        Written beside its place and renamed when it is whole, so that no half file is left. The
        file names a hash of all its bytes, which `load` checks.

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
            "states": None if self.parts.states is None else self.parts.states.params(),
        }
        shared = self._shared_layers()
        for name, cache in self._attention_caches():
            # What the other cache holds too is written once: null here.
            manifest[name] = {
                str(i): None if name == "effective" and i in shared else cache.pattern(i).params()
                for i in cache.layers
            }
            manifest["reasons"][name] = {str(i): why for i, why in cache.reasons.items()}
        gates = self.parts.gates
        if gates is not None:
            manifest["gates"] = [
                [name, layer, gates.spec(name, layer).to_dict()]
                for name in gates.names
                for layer in gates.layers(name)
            ]
        return write_tensors(as_path(path), dict(self._tensors()), manifest)

    def _residual_kind(self) -> str | None:
        if self.parts.residual is None:
            return None
        return "all" if isinstance(self.parts.residual, FullActivationCache) else "last"

    @classmethod
    def load(cls, path: str | Path) -> Capture:
        """Read a capture that `save` wrote; nothing in the file is executed.

        Raises:
            CorruptFileError: not a capture, of another version, or damaged.
            ModelNotFoundError: no such file.
        """
        tensors, manifest = read_tensors(as_path(path), _FORMAT, _VERSION)
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
        model = typed(ModelInfo, manifest["model"])

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
            model=model,
            hash_checked=manifest["hashed"] is True,
            parts=Parts(
                logits=tensors.get("logits"),
                residual=None if kind is None else kinds[kind].from_layers(residual),
                attention=attention,
                effective=cache("effective", attention),
                gates=gates,
                states=states,
            ),
        )
