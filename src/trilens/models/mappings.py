"""What the last sweep found of encoder–decoders, models of sound and masked LMs, stack by stack."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, dataclass
from importlib.resources import files
from typing import Any

from trilens.models.sweep_format import read_sweep
from trilens.results import Tabular

__all__ = ["MappingRow", "MappingTable", "StackRow", "load_mappings", "row_from"]

_FORMAT = "trilens.mappings"
_VERSION = 1


@dataclass(frozen=True, slots=True)
class StackRow:
    """One stack of a model type.

    Attributes:
        name: as `Lens` takes it.
        outcome: "full" (residual of every block, every attention and cross attention layer),
            "partial" (residuals, and not every attention) or "refused".
        attention: layers with captured softmax attention.
        cross: layers with captured cross attention.
        reason: why not full, in words; empty where full.
    """

    name: str
    outcome: str
    n_layers: int
    attention: tuple[int, ...]
    cross: tuple[int, ...]
    reason: str


@dataclass(frozen=True, slots=True)
class MappingRow:
    """One model type of one of transformers' mappings.

    Attributes:
        mapping: "seq2seq", "speech", "masked" or "image" (image and text to text).
        stacks: each stack that the model has.
    """

    mapping: str
    model_type: str
    model_class: str
    stacks: tuple[StackRow, ...]

    @property
    def outcome(self) -> str:
        """ "full" where every stack is, "refused" where every one is, else "partial"."""
        found = {stack.outcome for stack in self.stacks}
        return found.pop() if len(found) == 1 else "partial"

    @property
    def reason(self) -> str:
        """Why not full: of the first stack that is not; empty where full."""
        several = len(self.stacks) > 1
        for stack in self.stacks:
            if stack.outcome != "full":
                return f"{stack.name}: {stack.reason}" if several else stack.reason
        return ""


@dataclass(frozen=True, slots=True)
class MappingTable(Tabular):
    """What was proven of each type of the mappings, and the versions it ran on."""

    transformers: str
    torch: str
    rows: tuple[MappingRow, ...]

    def count(self) -> dict[str, int]:
        """Rows per outcome."""
        return dict(Counter(row.outcome for row in self.rows))

    @property
    def full_types(self) -> frozenset[str]:
        """Model types that are full in a mapping."""
        return frozenset(row.model_type for row in self.rows if row.outcome == "full")

    def table(self) -> list[dict[str, Any]]:
        """One row for each stack."""
        return [
            {
                "mapping": row.mapping,
                "model_type": row.model_type,
                "model_class": row.model_class,
                "stack": stack.name,
                "outcome": stack.outcome,
                "n_layers": stack.n_layers,
                "attention_layers": len(stack.attention),
                "cross_layers": len(stack.cross),
                "reason": stack.reason,
            }
            for row in self.rows
            for stack in row.stacks
        ]

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able dict with format and version."""
        return {"format": _FORMAT, "version": _VERSION, **asdict(self)}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> MappingTable:
        """Rebuild what `to_dict` gave.

        Raises:
            CorruptFileError: another format or version, or not whole.
        """
        return cls(**read_sweep(data, _FORMAT, _VERSION, row_from))


def row_from(plain: dict[str, Any]) -> MappingRow:
    """A row as `asdict` made it plain."""
    stacks = tuple(
        StackRow(**{**each, "attention": tuple(each["attention"]), "cross": tuple(each["cross"])})
        for each in plain["stacks"]
    )
    return MappingRow(**{**plain, "stacks": stacks})


def load_mappings() -> MappingTable:
    """The table of mappings, as last swept."""
    text = files("trilens.models").joinpath("mappings.json").read_text(encoding="utf-8")
    return MappingTable.from_dict(json.loads(text))
