"""`Parts`: what one forward pass left behind, tensor by tensor; and which model it was."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor

from trilens.caches.activation import ActivationCache, FullActivationCache
from trilens.caches.attention import AttentionCache
from trilens.caches.cross_attention import CrossAttentionCache
from trilens.caches.gates import GateCache
from trilens.caches.sites import SiteCache
from trilens.caches.states import StateCache
from trilens.caches.storage import moved

__all__ = ["ModelInfo", "Parts"]


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """Which model a capture came from; `n_streams` is 1 but for several residual streams."""

    name: str
    model_class: str
    model_type: str
    n_layers: int
    d_model: int
    dtype: str
    n_streams: int = 1

    def to_dict(self) -> dict[str, Any]:
        """As a file names it: one stream is what files without the entry have."""
        plain = asdict(self)
        if self.n_streams == 1:
            del plain["n_streams"]
        return plain


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
        sites: values of named places of the forward pass.
        cross_attention: per-layer patterns of a decoder's tokens over its encoder's positions.
    """

    logits: Tensor | None = None
    residual: ActivationCache | FullActivationCache | None = None
    attention: AttentionCache | None = None
    effective: AttentionCache | None = None
    gates: GateCache | None = None
    states: StateCache | None = None
    sites: SiteCache | None = None
    cross_attention: CrossAttentionCache | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """What is there."""
        return tuple(each.name for each in fields(self) if getattr(self, each.name) is not None)

    @property
    def shared_layers(self) -> tuple[int, ...]:
        """Layers whose pattern stands in both attention caches."""
        held, attention = self.effective, self.attention
        if held is None or attention is None:
            return ()
        both = [layer for layer in held.layers if layer in attention.layers]
        return tuple(i for i in both if held.pattern(i) is attention.pattern(i))

    def attention_caches(self) -> Iterator[tuple[str, AttentionCache]]:
        """The attention caches that are there, by name."""
        for name, cache in (
            ("attention", self.attention),
            ("effective", self.effective),
            ("cross_attention", self.cross_attention),
        ):
            if cache is not None:
                yield name, cache

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor once, under the name that a saved capture gives it."""
        if self.logits is not None:
            yield "logits", self.logits
        if self.residual is not None:
            for layer in self.residual.layers:
                yield f"residual.{layer}", self.residual[layer]
                if self.residual.n_streams > 1:
                    yield f"readout.{layer}", self.residual.readout(layer)
        yield from self._pattern_tensors()
        if self.gates is not None:
            for name in self.gates.names:
                for layer in self.gates.layers(name):
                    yield f"gates.{layer}.{name}", self.gates.pre(name, layer)
        if self.states is not None:
            for layer, part, tensor in self.states.tensors():
                yield f"states.{layer}.{part}", tensor
        if self.sites is not None:
            for name, tensor in self.sites.tensors():
                yield f"sites.{name}", tensor

    def _pattern_tensors(self) -> Iterator[tuple[str, Tensor]]:
        shared = self.shared_layers
        for kind, cache in self.attention_caches():
            for layer in cache.layers:
                if not (kind == "effective" and layer in shared):
                    for name, tensor in cache.pattern(layer).tensors().items():
                        yield f"{kind}.{layer}.{name}", tensor

    def to(self, device: str | torch.device, n_model_layers: int) -> Parts:
        """The same parts on another device."""
        attention, effective = self._moved(device, n_model_layers)
        return Parts(
            logits=None if self.logits is None else moved(self.logits, device),
            residual=None if self.residual is None else self.residual.to(device),
            attention=attention,
            effective=effective,
            gates=None if self.gates is None else self.gates.to(device),
            states=None if self.states is None else self.states.to(device),
            sites=None if self.sites is None else self.sites.to(device),
            cross_attention=None
            if self.cross_attention is None
            else self.cross_attention.to(device),
        )

    def _moved(
        self, device: str | torch.device, n_model_layers: int
    ) -> tuple[AttentionCache | None, AttentionCache | None]:
        """Both attention caches elsewhere; patterns that stand in both are moved once."""
        attention, effective = self.attention, self.effective
        there = None if attention is None else attention.to(device)
        if effective is None:
            return there, None
        if there is None:
            return None, effective.to(device)
        shared, memo = self.shared_layers, dict[tuple[object, ...], Tensor]()
        return there, AttentionCache.from_layers(
            {
                i: there.pattern(i) if i in shared else effective.pattern(i).to(device, memo)
                for i in effective.layers
            },
            n_model_layers=n_model_layers,
            reasons=effective.reasons,
        )
