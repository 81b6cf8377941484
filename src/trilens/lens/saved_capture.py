"""What stands in a saved capture's header beside its tensors, and the parts made of both again."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from trilens.caches.activation import ActivationCache, FullActivationCache
from trilens.caches.attention import AttentionCache, rebuild_pattern
from trilens.caches.cross_attention import CrossAttentionCache
from trilens.caches.gate_spec import GateSpec
from trilens.caches.gates import GateCache
from trilens.caches.sites import SiteCache
from trilens.caches.states import StateCache
from trilens.lens.parts import Parts

__all__ = ["FORMAT", "VERSION", "described", "rebuilt"]

FORMAT = "trilens.capture"
VERSION = 1

_Layers = dict[int, dict[str, Tensor]]


def described(parts: Parts) -> dict[str, Any]:
    """What the header says of the parts: everything but their tensors, as JSON."""
    found: dict[str, Any] = {
        "residual": _residual_kind(parts),
        "attention": None,
        "gates": None,
        "effective": None,
        "reasons": {},
        "states": None if parts.states is None else parts.states.params(),
        "sites": None if parts.sites is None else parts.sites.params(),
    }
    shared = parts.shared_layers
    for name, cache in parts.attention_caches():
        # What the other cache holds too is written once: null here.
        found[name] = {
            str(i): None if name == "effective" and i in shared else cache.pattern(i).params()
            for i in cache.layers
        }
        found["reasons"][name] = {str(i): why for i, why in cache.reasons.items()}
    gates = parts.gates
    if gates is not None:
        found["gates"] = [
            [name, layer, gates.spec(name, layer).to_dict()]
            for name in gates.names
            for layer in gates.layers(name)
        ]
    return found


def _residual_kind(parts: Parts) -> str | None:
    if parts.residual is None:
        return None
    return "all" if isinstance(parts.residual, FullActivationCache) else "last"


def rebuilt(tensors: dict[str, Tensor], manifest: dict[str, Any], n_model_layers: int) -> Parts:
    """The parts whose `tensors()` and `described` these are.

    Raises:
        KeyError, TypeError, ValueError, AttributeError, UsageError: they do not fit each other.
    """
    held: dict[str, _Layers] = {
        kind: {} for kind in ("attention", "effective", "cross_attention", "gates", "states")
    }
    residual: dict[int, Tensor] = {}
    readouts: dict[int, Tensor] = {}
    at_sites: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        kind, _, rest = name.partition(".")
        if kind == "residual":
            residual[int(rest)] = tensor
        elif kind == "readout":
            readouts[int(rest)] = tensor
        elif kind == "sites":
            at_sites[rest] = tensor
        elif kind in held:
            layer, _, part = rest.partition(".")
            held[kind].setdefault(int(layer), {})[part] = tensor
    attention = _attention("attention", held, manifest, n_model_layers, None)
    # Files from before states and sites could be captured do not speak of them.
    states, sites = manifest.get("states"), manifest.get("sites")
    kinds: dict[str, type[ActivationCache] | type[FullActivationCache]] = {
        "last": ActivationCache,
        "all": FullActivationCache,
    }
    kind = manifest["residual"]
    return Parts(
        logits=tensors.get("logits"),
        residual=None
        if kind is None
        else kinds[kind].from_layers(residual, readouts=readouts or None),
        attention=attention,
        effective=_attention("effective", held, manifest, n_model_layers, attention),
        gates=_gates(held["gates"], manifest["gates"]),
        states=None if states is None else StateCache.rebuild(held["states"], states),
        sites=None if sites is None else SiteCache.rebuild(at_sites, sites),
        cross_attention=_cross_attention(held, manifest, n_model_layers),
    )


def _cross_attention(
    held: dict[str, _Layers], manifest: dict[str, Any], n_model_layers: int
) -> CrossAttentionCache | None:
    # Files of other models do not speak of it.
    found = _attention("cross_attention", held, manifest, n_model_layers, None)
    if found is None:
        return None
    return CrossAttentionCache.from_layers(
        {layer: found.pattern(layer) for layer in found.layers},
        n_model_layers=n_model_layers,
        reasons=found.reasons,
    )


def _attention(
    name: str,
    held: dict[str, _Layers],
    manifest: dict[str, Any],
    n_model_layers: int,
    other: AttentionCache | None,
) -> AttentionCache | None:
    # Files from before there was an effective cache, or reasons, lack these entries.
    described = manifest.get(name)
    if described is None:
        return None
    patterns = {
        int(layer): rebuild_pattern(held[name][int(layer)], params)
        if params is not None or other is None
        else other.pattern(int(layer))
        for layer, params in described.items()
    }
    reasons = manifest.get("reasons", {}).get(name, {})
    return AttentionCache.from_layers(
        patterns,
        n_model_layers=n_model_layers,
        reasons={int(layer): str(why) for layer, why in reasons.items()},
    )


def _gates(held: _Layers, described: list[Any] | None) -> GateCache | None:
    if described is None:
        return None
    specs = {(name, layer): GateSpec.from_dict(spec) for name, layer, spec in described}
    records = {(name, layer): held[layer][name] for name, layer in specs}
    return GateCache.from_records(records, specs)
