"""What a GGUF file holds: a frozen report, its table and its JSON."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from trilens.results import Tabular

__all__ = ["GgufReport", "GgufTensor"]


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """One tensor of a file.

    Attributes:
        name: As the engine knows it.
        type: "TQ1_0", "TQ2_0" and "Q2_0" for trits, "F32", "F16", "BF16", "Q8_0" and
            "Q4_0" for the rest.
        shape: Rows first.
        size_bytes: In the file.
        sparsity: Share of zeros among the trits; None for the rest.
        levels: 3 for trits, 4 where the level 2 is among them; None for the rest.
    """

    name: str
    type: str
    shape: tuple[int, ...]
    size_bytes: int
    sparsity: float | None = None
    levels: int | None = None

    @property
    def bits_per_weight(self) -> float:
        """Everything stored for the tensor, in bits for each weight."""
        return 8 * self.size_bytes / math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class GgufReport(Tabular):
    """A file in which no damage was found.

    Attributes:
        architecture: What the engine takes it for.
        tensors: Every tensor, in the order of the bytes.
        hash_checked: The file names a hash of its tensors (those that trilens writes do), and the
            tensors have it.
        whole_checked: It names a hash of its metadata too, so that every byte was checked.
    """

    architecture: str
    tensors: tuple[GgufTensor, ...]
    hash_checked: bool
    whole_checked: bool = False

    @property
    def coded(self) -> tuple[GgufTensor, ...]:
        """The tensors that are stored as trits."""
        return tuple(tensor for tensor in self.tensors if tensor.sparsity is not None)

    @property
    def size_bytes(self) -> int:
        """All tensors."""
        return sum(tensor.size_bytes for tensor in self.tensors)

    @property
    def bits_per_weight(self) -> float:
        """Over all tensors."""
        n_weights = sum(math.prod(tensor.shape) for tensor in self.tensors)
        return 8 * self.size_bytes / n_weights if n_weights else 0.0

    def table(self) -> list[dict[str, Any]]:
        """One row for each tensor."""
        return [
            {
                "name": tensor.name,
                "type": tensor.type,
                "shape": "×".join(map(str, tensor.shape)),
                "bits_per_weight": round(tensor.bits_per_weight, 4),
                "sparsity": tensor.sparsity,
            }
            for tensor in self.tensors
        ]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "architecture": self.architecture,
            "hash_checked": self.hash_checked,
            "whole_checked": self.whole_checked,
            "size_bytes": self.size_bytes,
            "bits_per_weight": self.bits_per_weight,
            "tensors": [{**asdict(tensor), "shape": list(tensor.shape)} for tensor in self.tensors],
        }
