"""Every gating call of a probe is claimed: as a gate, or by rule as no gate, or said to be neither.

The order of the rules is the order of certainty: kernels say what their arguments are; a GLU is
proven by its product; a router by the top-k that follows; whatever else multiplies data token by
token is a gate, named by where it stands. What multiplies nothing is an activation, not a gate.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from trilens.caches.storage import spell_layers
from trilens.errors import (
    AttentionPathError,
    RecurrentStateError,
    SilentSiteError,
    TrilensError,
    UnclaimedGateError,
)
from trilens.io.messages import listed
from trilens.models.anatomy import Anatomy
from trilens.models.gates.block import BlockView, blocks_of
from trilens.models.gates.events import FunctionCall, GateEvents
from trilens.models.gates.glu import find_glu_gates
from trilens.models.gates.kernels import CONVOLUTIONS
from trilens.models.gates.linear import find_linear_gates
from trilens.models.gates.mixers import Boundary, Recurrent, find_recurrent
from trilens.models.gates.products import find_product_gate
from trilens.models.gates.recurrences import find_recurrence_gates
from trilens.models.gates.rglru import find_rglru_gates
from trilens.models.gates.routers import find_routers
from trilens.models.gates.site import GateSite
from trilens.models.gates.states import find_state_gates
from trilens.models.gates.stream_gates import find_stream_gates
from trilens.models.gates.swiglu import find_limited_glu
from trilens.models.trace import Trace

__all__ = ["GateClaims", "find_gates"]

ClaimRule = Callable[[BlockView], list[GateSite]]
_RULES: tuple[ClaimRule, ...] = (
    find_recurrence_gates,
    find_rglru_gates,
    find_state_gates,
    find_limited_glu,
    find_routers,
)


@dataclass(frozen=True, slots=True)
class GateClaims:
    """The outcome of every gating call of a probe.

    Attributes:
        gates: the proven gates, by (name, layer).
        without: per layer without a GLU gate, why there is none, in words.
        unclaimed: per layer, gating calls that are neither a gate nor ruled out: class, function.
        recurrences: per recurrent layer, where its recurrence is seen, or why it has no effective
            attention.
    """

    gates: dict[tuple[str, int], GateSite]
    without: dict[int, str]
    unclaimed: dict[int, tuple[str, ...]]
    recurrences: dict[int, Recurrent] = field(default_factory=dict)

    @property
    def effective_layers(self) -> tuple[int, ...]:
        """Layers with an effective attention."""
        return tuple(layer for layer, found in self.recurrences.items() if not found.refusal)

    def effective_within(self, layers: Sequence[int], model: str) -> tuple[int, ...]:
        """The recurrent layers among some.

        Args:
            layers: the layers asked for, at least one.
            model: the model's class, for the message.

        Raises:
            AttentionPathError: a recurrence without effective attention, or no recurrent layer.
        """
        how = ("effective attention", "effective=True")
        return self._recurrent(layers, model, AttentionPathError, *how)

    @property
    def state_layers(self) -> tuple[int, ...]:
        """Layers whose recurrent state can be captured: those with an effective attention."""
        return self.effective_layers

    def states_within(self, layers: Sequence[int], model: str) -> tuple[int, ...]:
        """The layers with a recurrent state among some.

        Args:
            layers: the layers asked for, at least one.
            model: the model's class, for the message.

        Raises:
            RecurrentStateError: a recurrence whose state is not known, or no recurrent layer.
        """
        return self._recurrent(layers, model, RecurrentStateError, "recurrent state", "states")

    def _recurrent(
        self, layers: Sequence[int], model: str, error: type[TrilensError], what: str, option: str
    ) -> tuple[int, ...]:
        for layer in layers:
            found = self.recurrences.get(layer)
            if found is not None and found.refusal:
                raise error(
                    f"the {what} of layer {layer} of {model} can't be captured: "
                    f"{found.refusal}; capture without {option}"
                )
        recurrent = tuple(layer for layer in layers if layer in self.recurrences)
        if not recurrent:
            article = "an" if what[0] == "e" else "a"
            raise error(
                f"no layer asked of {model} is recurrent, so that none has {article} {what} "
                f"(there is one of {spell_layers(self.effective_layers)}); capture without {option}"
            )
        return recurrent

    def boundaries(self, layers: Sequence[int]) -> dict[int, Boundary]:
        """Those of some recurrent layers that no kernel function carries, with their boundaries."""
        found = {layer: self.recurrences[layer].boundary for layer in layers}
        return {layer: boundary for layer, boundary in found.items() if boundary is not None}

    def within(self, layers: Sequence[int], model: str) -> dict[tuple[str, int], GateSite]:
        """The gates of some layers.

        Args:
            layers: the layers asked for, at least one.
            model: the model's class, for the message.

        Raises:
            UnclaimedGateError: one of these layers also gates in a way that no rule knows.
            SilentSiteError: none of these layers has a proven gate.
        """
        found = {key: site for key, site in self.gates.items() if key[1] in layers}
        for layer in layers:
            if found and layer in self.unclaimed:
                raise UnclaimedGateError(
                    f"layer {layer} of {model} gates in a way that no rule knows: "
                    f"{self.unclaimed[layer][0]}; capture without gates=True, or with layers= of "
                    "those that are known"
                )
        if not found:
            first = layers[0]
            reason = self.without.get(first, "none is known")
            if first in self.unclaimed:
                reason = self.unclaimed[first][0]
            raise SilentSiteError(
                f"no gate is proven in the layers asked of {model} (layer {first}: {reason}); "
                "capture without gates=True"
            )
        return found


def find_gates(trace: Trace, events: GateEvents, anatomy: Anatomy) -> GateClaims:
    """Apply all rules to one probe."""
    glu, without = find_glu_gates(trace, events, anatomy)
    gates: dict[tuple[str, int], GateSite] = {}
    unclaimed: dict[int, tuple[str, ...]] = {}
    recurrences: dict[int, Recurrent] = {}
    for layer, view in enumerate(blocks_of(trace, events, anatomy)):
        recurrent = find_recurrent(view)
        if recurrent is not None:
            recurrences[layer] = recurrent
        found: list[GateSite] = find_stream_gates(view, anatomy, layer)
        for rule in _RULES:
            found += rule(view)
        site = glu.get(("mlp.gate", layer))
        if site is not None:
            found.append(site)
            view.explain_path(site.spec.where)
        left = []
        for call in view.open_calls():
            if _is_no_gate(call, view):
                continue
            product = find_product_gate(call, view)
            if product is None:
                left.append(call)
            else:
                found.append(product)
        found += find_linear_gates(view)
        kept, doubled = _one_per_name(found)
        gates.update({(site.spec.name, layer): site for site in kept})
        words = [f"{call.class_name} calls {call.function} ({call.path})" for call in left]
        if words or doubled or view.complaints:
            unclaimed[layer] = (*words, *doubled, *view.complaints)
    return GateClaims(gates, without, unclaimed, recurrences)


def _is_no_gate(call: FunctionCall, view: BlockView) -> bool:
    """Whether a gating call is none by rule: it scales no data of the token."""
    if call.kernel in CONVOLUTIONS:
        return True
    if call.kernel and call.function in ("exp", "softplus", "softmax"):
        # A decay's own arithmetic: what it means stands in the kernel's arguments.
        return True
    return (
        not view.scales_data(call)
        or not view.has_tokens(call.x)
        or view.is_expert(call.path, call.x)
        or view.is_activation_inside(call)
        or view.is_convolved(call)
        or view.is_in_norm(call)
        or view.is_sink(call)
    )


def _one_per_name(sites: list[GateSite]) -> tuple[list[GateSite], list[str]]:
    """Sites of one name that read one tensor are one gate; two that do not are none."""
    grouped: dict[str, list[GateSite]] = {}
    for site in sites:
        grouped.setdefault(site.spec.name, []).append(site)
    kept, doubled = [], []
    for name, group in grouped.items():
        merged = _merged(group)
        if merged is None:
            places = listed(site.spec.where for site in group)
            doubled.append(f"{len(group)} gates {name} in one block ({places})")
        else:
            kept.append(merged)
    return kept, doubled


def _merged(group: list[GateSite]) -> GateSite | None:
    first = group[0]
    if len(group) == 1:
        return first
    columns: list[int] = []
    for site in group:
        same_place = site.source == first.source and site.spec.function == first.spec.function
        own = site.layout.columns
        if not same_place or own is None:
            return None
        columns += range(own.start, own.stop) if isinstance(own, slice) else own
    layout = replace(first.layout, columns=tuple(columns))
    return replace(first, layout=layout, spec=replace(first.spec, shape=(len(columns),)))
