"""One prompt, layer by layer: what `trilens inspect` and `trilens demo` show."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from trilens.caches.activation import FullActivationCache
from trilens.errors import CorruptFileError
from trilens.io.messages import clip, other_version
from trilens.lens.capture import Capture
from trilens.results import Tabular
from trilens.statistics.gating import GatingAnalysis

__all__ = [
    "Attended",
    "GateSummary",
    "Inspection",
    "LayerRow",
    "NextToken",
    "StateSummary",
    "inspect_capture",
]

_FORMAT = "trilens.inspection"
_VERSION = 1


@dataclass(frozen=True, slots=True)
class Attended:
    """A key position that the last token attends to.

    weight is the mean over heads: in [0, 1] of softmax attention, signed and without bounds of
    effective attention.
    """

    position: int
    token: str
    weight: float


@dataclass(frozen=True, slots=True)
class GateSummary:
    """One gate of one layer over the prompt.

    Attributes:
        mean: mean openness over units and tokens, in [0, 1].
        dead: share of units whose mean openness is below the threshold.
        saturated: share of units whose mean openness is above 1 − threshold.
        capacity: share of units that are neither.
    """

    name: str
    mean: float
    dead: float
    saturated: float
    capacity: float
    units: int
    threshold: float


@dataclass(frozen=True, slots=True)
class StateSummary:
    """One tensor of a layer's recurrent state after the last token that was stored.

    `norm` is its Frobenius norm.
    """

    part: str
    shape: tuple[int, ...]
    norm: float


@dataclass(frozen=True, slots=True)
class LayerRow:
    """One layer. `residual_norm` is ‖resid_post‖₂ of the last token.

    Attributes:
        attended: softmax attention of the last token, heaviest first.
        effective: effective attention of the last token in a recurrent layer, by size, with signs.
        states: the recurrent state's tensors, where the capture holds them.
    """

    layer: int
    residual_norm: float
    attended: tuple[Attended, ...]
    attention_entropy_nats: float | None
    gates: tuple[GateSummary, ...]
    effective: tuple[Attended, ...] = ()
    states: tuple[StateSummary, ...] = ()


@dataclass(frozen=True, slots=True)
class NextToken:
    """A candidate for the next token."""

    token_id: int
    token: str
    probability: float


@dataclass(frozen=True, slots=True)
class Inspection(Tabular):
    """What one prompt did in a model, layer by layer, as plain numbers and words."""

    model: str
    model_class: str
    n_layers: int
    d_model: int
    dtype: str
    tokens: tuple[str, ...]
    layers: tuple[LayerRow, ...]
    next_tokens: tuple[NextToken, ...]
    notes: tuple[str, ...]

    def table(self) -> list[dict[str, Any]]:
        """One row for each layer: the heaviest attended token, the mean of each gate."""
        names = dict.fromkeys(gate.name for row in self.layers for gate in row.gates)
        rows = []
        for row in self.layers:
            first = next(iter(row.attended or row.effective), None)
            means = {gate.name: gate.mean for gate in row.gates}
            rows.append(
                {
                    "layer": row.layer,
                    "residual_norm": row.residual_norm,
                    "attention_entropy_nats": row.attention_entropy_nats,
                    "top_position": None if first is None else first.position,
                    "top_token": None if first is None else first.token,
                    "top_weight": None if first is None else first.weight,
                    **{name: means.get(name) for name in names},
                }
            )
        return rows

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able dict with format and version."""
        return {"format": _FORMAT, "version": _VERSION, **asdict(self)}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Inspection:
        """Rebuild what `to_dict` gave.

        Raises:
            CorruptFileError: another format or version, or a field is missing.
        """
        if data.get("format") != _FORMAT:
            raise CorruptFileError(f"not {_FORMAT}: format {clip(data.get('format'))}")
        if data.get("version") != _VERSION:
            raise CorruptFileError(
                other_version(f"this is {_FORMAT}", data.get("version"), _VERSION)
            )
        try:
            rows = tuple(
                LayerRow(
                    layer=row["layer"],
                    residual_norm=row["residual_norm"],
                    attended=tuple(Attended(**item) for item in row["attended"]),
                    attention_entropy_nats=row["attention_entropy_nats"],
                    gates=tuple(GateSummary(**item) for item in row["gates"]),
                    effective=tuple(Attended(**item) for item in row.get("effective", ())),
                    states=tuple(
                        StateSummary(**{**item, "shape": tuple(item["shape"])})
                        for item in row.get("states", ())
                    ),
                )
                for row in data["layers"]
            )
            return cls(
                model=data["model"],
                model_class=data["model_class"],
                n_layers=data["n_layers"],
                d_model=data["d_model"],
                dtype=data["dtype"],
                tokens=tuple(data["tokens"]),
                layers=rows,
                next_tokens=tuple(NextToken(**item) for item in data["next_tokens"]),
                notes=tuple(data["notes"]),
            )
        except (KeyError, TypeError) as error:
            raise CorruptFileError(f"{_FORMAT} is not whole: {error}") from error


def inspect_capture(
    capture: Capture,
    *,
    name: str,
    top_k: int,
    token_text: Callable[[int], str],
    notes: Sequence[str] = (),
    threshold: float = 0.1,
) -> Inspection:
    """Summarise a capture layer by layer.

    Args:
        capture: with residual and logits; attention, effective attention and gates where the
            model has them.
        name: what to call the model.
        top_k: attended tokens per layer, and next tokens.
        token_text: token id → text, for the next tokens.
        notes: what could not be shown, in words.
        threshold: for dead and saturated units, in [0, 0.5].
    """
    residual = capture.parts.residual
    layers = () if residual is None else residual.layers
    return Inspection(
        model=name,
        model_class=capture.model.model_class,
        n_layers=capture.model.n_layers,
        d_model=capture.model.d_model,
        dtype=capture.model.dtype,
        tokens=tuple(capture.tokens),
        layers=tuple(_row(capture, layer, top_k, threshold) for layer in layers),
        next_tokens=tuple(
            NextToken(token, token_text(token), probability)
            for token, probability in (
                capture.top_tokens(top_k) if capture.logits is not None else ()
            )
        ),
        notes=tuple(notes),
    )


def _row(capture: Capture, layer: int, top_k: int, threshold: float) -> LayerRow:
    residual = capture.parts.residual
    tensor = None if residual is None else residual.get_layer(layer)
    if isinstance(residual, FullActivationCache):
        tensor = residual.get_position(layer, -1)
    # PROMOTE: a norm in half precision overflows where the residual is large.
    norm = float("nan") if tensor is None else float(tensor.float().norm())
    attended: tuple[Attended, ...] = ()
    entropy = None
    attention, last = capture.parts.attention, len(capture.tokens) - 1
    recurrent = () if not capture.has("effective") else capture.effective.layers
    alone = not capture.shares_pattern(layer)
    if attention is not None and layer in attention.layers and alone:
        attended = tuple(
            Attended(position, capture.tokens[position], weight)
            for position, weight in attention.top_attended_positions(layer, last, top_k)
        )
        entropy = float(attention.entropy(layer)[:, last].mean())
    gates = capture.parts.gates
    found = [] if gates is None else [name for name in gates.names if layer in gates.layers(name)]
    return LayerRow(
        layer=layer,
        residual_norm=norm,
        attended=attended,
        attention_entropy_nats=entropy,
        gates=tuple(
            _summary(name, gates.analyse(name, layer, threshold), threshold)
            for name in found
            if gates is not None and gates.spec(name, layer).has_openness
        ),
        effective=_effective(capture, layer, last, top_k) if layer in recurrent else (),
        states=_states(capture, layer),
    )


def _states(capture: Capture, layer: int) -> tuple[StateSummary, ...]:
    if not capture.has("states") or layer not in capture.states.layers:
        return ()
    states = capture.states
    position = states.positions[-1]
    return tuple(
        StateSummary(
            part.name,
            part.shape,
            float(states.get(layer, position, part.name).float().norm()),
        )
        for part in states.spec(layer).parts
    )


def _effective(capture: Capture, layer: int, last: int, top_k: int) -> tuple[Attended, ...]:
    """The weights of largest size, with their signs: a negative one is no lesser one."""
    if not capture.has("effective"):
        return ()
    weights = capture.effective.attention_from_position(layer, last)
    order = np.argsort(-np.abs(weights), kind="stable")[:top_k]
    return tuple(Attended(int(i), capture.tokens[i], float(weights[i])) for i in order)


def _summary(name: str, analysis: GatingAnalysis, threshold: float) -> GateSummary:
    units = len(analysis.avg_gate)
    return GateSummary(
        name=name,
        mean=float(sum(analysis.avg_gate) / units),
        dead=len(analysis.dead_gates) / units,
        saturated=len(analysis.saturated_gates) / units,
        capacity=float(analysis.effective_capacity()),
        units=units,
        threshold=threshold,
    )
