"""What the last family sweep found: one row per causal-LM type of transformers."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.resources import files
from typing import Any

from trilens.caches.storage import spell_layers
from trilens.models.sweep_format import read_sweep
from trilens.results import Tabular

__all__ = [
    "CORE_SITES",
    "FamilyGate",
    "FamilyRow",
    "FamilyTable",
    "load_families",
    "spell_range",
    "spell_short",
]

CORE_SITES = (
    "resid_pre",
    "resid_mid",
    "resid_post",
    "attn.z",
    "attn.out",
    "attn.head_out",
    "mlp.out",
)
"""Sites that every type captured in full should have, in each layer that has such a place."""
_FORMAT = "trilens.families"
_VERSION = 2


@dataclass(frozen=True, slots=True)
class FamilyGate:
    """One proven gate of a model type.

    Attributes:
        kind: as in `GateSpec`: sigmoid, activation, decay, step, linear or router.
        range: lowest and highest attainable value; None where there is no bound.
        layers: where it is, in a tiny model of the type.
    """

    name: str
    kind: str
    range: tuple[float | None, float | None]
    layers: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.name} ({self.kind}, {spell_range(self.range)}): {spell_short(self.layers)}"


@dataclass(frozen=True, slots=True)
class FamilyRow:
    """One model type in the sweep.

    Attributes:
        outcome: "full" (residual of every block, every softmax attention layer; of every recurrence
            effective attention, gates and state), "residual" (one of these can't be captured) or
            "refused".
        attention: layers with captured softmax attention.
        effective: recurrent layers with proven effective attention.
        gates: proven gates.
        reason: why not full, in words; empty where full.
        no_effective: why a recurrent layer has no effective attention; empty where there is none.
        sites: names of the sites that are proven in every layer that has such a place.
        no_sites: names of those that are refused in a layer, each with the first reason.
        states: recurrent layers with a proven state.
    """

    model_type: str
    model_class: str
    outcome: str
    n_layers: int
    attention: tuple[int, ...]
    effective: tuple[int, ...]
    gates: tuple[FamilyGate, ...]
    reason: str
    no_effective: str = ""
    sites: tuple[str, ...] = ()
    no_sites: tuple[tuple[str, str], ...] = ()
    states: tuple[int, ...] = ()

    @property
    def has_core_sites(self) -> bool:
        """Whether each of `CORE_SITES` is proven in every layer that has such a place."""
        refused = {name for name, _ in self.no_sites}
        return "resid_post" in self.sites and not refused & set(CORE_SITES)


@dataclass(frozen=True, slots=True)
class FamilyTable(Tabular):
    """What was proven of each model type of transformers, and the versions it ran on."""

    transformers: str
    torch: str
    rows: tuple[FamilyRow, ...]

    def count(self) -> dict[str, int]:
        """Rows per outcome."""
        return dict(Counter(row.outcome for row in self.rows))

    @property
    def n_recurrent_only(self) -> int:
        """Types captured in full that have no softmax attention."""
        return sum(1 for row in self.rows if row.outcome == "full" and not row.attention)

    @property
    def n_gated(self) -> int:
        """Types with a proven gate."""
        return sum(1 for row in self.rows if row.gates)

    @property
    def n_effective(self) -> int:
        """Types with proven effective attention."""
        return sum(1 for row in self.rows if row.effective)

    @property
    def n_sited(self) -> int:
        """Types with all of `CORE_SITES` among those that are captured in full."""
        return sum(1 for row in self.rows if row.outcome == "full" and row.has_core_sites)

    def table(self) -> list[dict[str, Any]]:
        """One row for each model type."""
        return [
            {
                "model_type": row.model_type,
                "model_class": row.model_class,
                "outcome": row.outcome,
                "n_layers": row.n_layers,
                "attention_layers": len(row.attention),
                "effective_layers": len(row.effective),
                "gates": ", ".join(gate.name for gate in row.gates),
                "sites": ", ".join(row.sites),
                "reason": row.reason,
            }
            for row in self.rows
        ]

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able dict with format and version."""
        return {"format": _FORMAT, "version": _VERSION, **asdict(self)}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> FamilyTable:
        """Rebuild what `to_dict` gave.

        Raises:
            CorruptFileError: another format or version, or not whole.
        """
        return cls(**read_sweep(data, _FORMAT, _VERSION, _row))


def _row(plain: dict[str, Any]) -> FamilyRow:
    gates = tuple(
        FamilyGate(
            name=gate["name"],
            kind=gate["kind"],
            range=(gate["range"][0], gate["range"][1]),
            layers=tuple(gate["layers"]),
        )
        for gate in plain["gates"]
    )
    layers = {key: tuple(plain[key]) for key in ("attention", "effective")}
    layers["states"] = tuple(plain.get("states", ()))
    no_sites = tuple((name, why) for name, why in plain.get("no_sites", ()))
    sites = {"sites": tuple(plain.get("sites", ())), "no_sites": no_sites}
    return FamilyRow(**{**plain, **layers, **sites, "gates": gates})


def load_families() -> FamilyTable:
    """The table of model families, as last swept."""
    text = files("trilens.models").joinpath("families.json").read_text(encoding="utf-8")
    return FamilyTable.from_dict(json.loads(text))


def spell_short(layers: Sequence[int]) -> str:
    """Layer numbers alone: `0–3`, `0, 2`, `–` for none."""
    return spell_layers(layers).removeprefix("layers ").removeprefix("layer ") if layers else "–"


def spell_range(bounds: tuple[float | None, float | None]) -> str:
    """The values that a gate can have: `0 … 1`, `≥ −0.278`, `any`."""
    low, high = (None if b is None or math.isinf(b) else _number(b) for b in bounds)
    if low is None and high is None:
        return "any"
    if high is None:
        return f"≥ {low}"
    return f"≤ {high}" if low is None else f"{low} … {high}"


def _number(value: float) -> str:
    return f"{value:.3g}".replace("-", "−")
