"""What the last family sweep found: one row per causal-LM type of transformers."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, dataclass
from importlib.resources import files
from typing import Any

from trilens.errors import CorruptFileError

__all__ = ["FamilyRow", "FamilyTable", "load_families"]

_FORMAT = "trilens.families"
_VERSION = 1


@dataclass(frozen=True, slots=True)
class FamilyRow:
    """One model type in the sweep.

    Attributes:
        outcome: "full" (residual of every block, every softmax attention layer), "residual"
            (attention goes a way that can't be captured, or there is none) or "refused".
        attention: layers with captured softmax attention.
        gates: layers with a proven gate, by gate name.
        reason: why not full, in words; empty where full.
    """

    model_type: str
    model_class: str
    outcome: str
    n_layers: int
    attention: int
    gates: dict[str, int]
    reason: str


@dataclass(frozen=True, slots=True)
class FamilyTable:
    """The whole sweep, and the versions it ran on."""

    transformers: str
    torch: str
    rows: tuple[FamilyRow, ...]

    def count(self) -> dict[str, int]:
        """Rows per outcome."""
        return dict(Counter(row.outcome for row in self.rows))

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able dict with format and version."""
        return {"format": _FORMAT, "version": _VERSION, **asdict(self)}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> FamilyTable:
        """Rebuild what `to_dict` gave.

        Raises:
            CorruptFileError: another format or version.
        """
        if data.get("format") != _FORMAT or data.get("version") != _VERSION:
            raise CorruptFileError(f"not {_FORMAT} version {_VERSION}")
        rows = tuple(FamilyRow(**row) for row in data["rows"])
        return cls(transformers=data["transformers"], torch=data["torch"], rows=rows)


def load_families() -> FamilyTable:
    """The table that ships with the package."""
    text = files("trilens").joinpath("families.json").read_text(encoding="utf-8")
    return FamilyTable.from_dict(json.loads(text))
