"""The outcome of each tensor: a frozen report, its table and its JSON."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, Self, TypeAlias, get_args

from trilens.checkpoint.format.damage import Damage
from trilens.checkpoint.format.plan import TernaryPlan
from trilens.checkpoint.format.sample import SampleReport, worst_of
from trilens.io.messages import clip, in_blocks
from trilens.results import Tabular
from trilens.ternary.histogram import LevelHistogram

__all__ = ["Outcome", "SampleReport", "TensorReport", "TernaryReport"]

Outcome: TypeAlias = Literal[
    "ternary", "four levels", "already ternary", "planned", "kept", "rounded", "left out", "dense"
]


@dataclass(frozen=True, slots=True)
class TensorReport:
    """One stored tensor.

    Attributes:
        name: As the source names it.
        packed_as: The name from which those of its packed parts are made.
        shape: Its shape in the source.
        outcome: "ternary": coded by the rule; "four levels": likewise, by a rule with the level 2;
            "already ternary": its trits and scale were kept exactly; "planned": a dry run;
            "rounded": to 8 or 4 bits in blocks; "kept": the source's own values; "left out": not
            in the output, because it does not need it; "dense": trits written as dense weights.
        reason: Why it is kept; for an unpacked one, what happens when it is loaded.
        is_matrix: It is a linear layer's weight inside a block; where it is kept all the same,
            that is a fallback.
        size_bytes_before: In the source.
        size_bytes: In the output: codes, scales, offsets.
        relative_error: ‖W−Ŵ‖²/‖W‖²; None where nothing was coded. 0 for exact.
        sparsity: Share of zeros among the trits; None where nothing was coded.
        decoded_exactly: What the file holds was decoded and compared bit for bit.
        output_error: Σ‖Ŵx − y‖²/Σ‖y‖² on the calibration text, which the matrix was fitted to: on
            other text it is larger (1.2 to 2.1 times on demo models); None where not measured.
        output_error_held_out: The same on the text set apart, which nothing was fitted to; None
            where not measured, and in files that lack it.
        fitted: A kept vector has new values, fitted to the dense block's outputs.
        histogram: Weights by size and level, of a sample, for a report's charts; not in files.
    """

    name: str
    packed_as: str
    shape: tuple[int, ...]
    outcome: Outcome
    reason: str
    is_matrix: bool
    size_bytes_before: int
    size_bytes: int
    relative_error: float | None = None
    sparsity: float | None = None
    decoded_exactly: bool = False
    output_error: float | None = None
    fitted: bool = False
    output_error_held_out: float | None = None
    histogram: LevelHistogram | None = field(default=None, compare=False, repr=False)

    @property
    def n_weights(self) -> int:
        """How many numbers the tensor has."""
        return math.prod(self.shape)

    @property
    def bits_per_weight(self) -> float:
        """Everything stored for the tensor, in bits for each weight."""
        return 8 * self.size_bytes / self.n_weights if self.n_weights else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        values = asdict(replace(self, histogram=None))
        del values["histogram"]
        return {**values, "shape": list(self.shape)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """The report that `to_dict` gave these values.

        Raises:
            TypeError, KeyError: values that are none.
        """
        tensor = cls(**{**values, "shape": tuple(values["shape"]), "histogram": None})
        sizes = (*tensor.shape, tensor.size_bytes, tensor.size_bytes_before)
        errors = (tensor.relative_error, tensor.output_error, tensor.output_error_held_out)
        shares = (*errors, tensor.sparsity)
        truths = (tensor.is_matrix, tensor.decoded_exactly, tensor.fitted)
        right = (
            all(isinstance(text, str) for text in (tensor.name, tensor.packed_as, tensor.reason))
            and all(type(size) is int and 0 <= size < 2**63 for size in sizes)
            and all(share is None or type(share) in {int, float} for share in shares)
            and all(type(truth) is bool for truth in truths)
            and tensor.outcome in get_args(Outcome)
            and (tensor.outcome == "kept" or len(tensor.shape) in {2, 3})
        )
        if not right:
            raise TypeError(f"the entry of tensor {clip(tensor.name)} has values of the wrong kind")
        return tensor


@dataclass(frozen=True, slots=True)
class TernaryReport(Tabular):
    """What `ternarize` did, or in a dry run would do.

    Attributes:
        plan: The plan that was followed.
        tensors: Every tensor of the checkpoint.
        dry_run: Nothing was written.
        samples: The perplexity of each text that was given, before and after.
        damage: Perplexities that a calibration measured; None without one.
        note: What the result computes otherwise than the source; "" for nothing.
    """

    plan: TernaryPlan
    tensors: tuple[TensorReport, ...]
    dry_run: bool = False
    samples: tuple[SampleReport, ...] = ()
    damage: Damage | None = None
    note: str = ""

    @property
    def sample(self) -> SampleReport | None:
        """Of the texts that were given, the one with the largest ratio; None without any."""
        return worst_of(self.samples)

    @property
    def matrices(self) -> tuple[TensorReport, ...]:
        """Linear layers inside blocks, coded or not."""
        return tuple(tensor for tensor in self.tensors if tensor.is_matrix)

    @property
    def coded(self) -> tuple[TensorReport, ...]:
        """Matrices that are stored as trits."""
        return tuple(tensor for tensor in self.matrices if tensor.outcome != "kept")

    @property
    def fallbacks(self) -> tuple[TensorReport, ...]:
        """Matrices that are kept, each with its reason."""
        return tuple(tensor for tensor in self.matrices if tensor.outcome == "kept")

    @property
    def size_bytes_before(self) -> int:
        """All tensors in the source."""
        return sum(tensor.size_bytes_before for tensor in self.tensors)

    @property
    def size_bytes(self) -> int:
        """All tensors in the output."""
        return sum(tensor.size_bytes for tensor in self.tensors)

    @property
    def bits_per_weight(self) -> float:
        """Over all tensors, the kept ones at their own dtype."""
        n_weights = sum(tensor.n_weights for tensor in self.tensors)
        return 8 * self.size_bytes / n_weights if n_weights else 0.0

    @property
    def matrix_bits_per_weight(self) -> float:
        """Over the matrices of the blocks alone, coded or kept: what a plan's budget counts."""
        n_weights = sum(tensor.n_weights for tensor in self.matrices)
        size_bytes = sum(tensor.size_bytes for tensor in self.matrices)
        return 8 * size_bytes / n_weights if n_weights else 0.0

    @property
    def verdict(self) -> str:
        """What the weight errors allow to say about the model: never that it is fine."""
        return f"{self._finding} {self.note}" if self.note else self._finding

    @property
    def _finding(self) -> str:
        if self.dry_run:
            return "A dry run: nothing was written, no error was measured."
        if self.coded and all(tensor.outcome == "dense" for tensor in self.coded):
            worst = max(tensor.relative_error or 0.0 for tensor in self.coded)
            exact = "each weight is scale × trit, bit for bit"
            rounded = f"rounded to their dtype: up to {worst:.1e} of a matrix's energy is lost"
            return f"Dense weights; {exact if worst == 0 else rounded}."
        if all(tensor.outcome == "already ternary" for tensor in self.coded):
            return (
                "Every coded matrix was ternary already: its trits and scale are kept exactly"
                + ("." if self.note else ", the model computes what it computed before.")
            ) + self._sentences
        if self.damage is not None:
            found = self.damage
            return (
                f"Ternarized after training: perplexity {found.perplexity_before:.4g} became "
                f"{found.perplexity_after:.4g} ({found.ratio:.3g} times) on {found.n_tokens} "
                f"tokens{in_blocks(found.block_length)} that were not calibrated on"
                f"{found.which}. Compare outputs of your own before any use."
            ) + self._sentences
        worst = max(tensor.relative_error or 0.0 for tensor in self.coded)
        return (
            f"Ternarized after training: up to {worst:.1%} of a matrix's energy is lost. A model "
            "that was not trained for ternary weights is usually unusable after this. "
        ) + (
            f"{self._sentences.strip()} One text is a sample: compare outputs before any use."
            if self.samples
            else "The damage was not measured, and weight errors do not show it: give a text "
            "(--evaluate) and compare outputs before any use."
        )

    @property
    def _sentences(self) -> str:
        """Of each text that was given; each after a space."""
        return "".join(f" {sample.sentence}" for sample in self.samples)

    def table(self) -> list[dict[str, Any]]:
        """One row for each matrix, coded ones and fallbacks."""
        return [
            {
                "name": tensor.name,
                "shape": "×".join(map(str, tensor.shape)),
                "bits_per_weight": round(tensor.bits_per_weight, 3),
                "relative_error": tensor.relative_error,
                "output_error": tensor.output_error,
                "output_error_held_out": tensor.output_error_held_out,
                "sparsity": tensor.sparsity,
                "outcome": tensor.outcome + (f": {tensor.reason}" if tensor.reason else ""),
            }
            for tensor in self.matrices
        ]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "plan": self.plan.to_dict(),
            "dry_run": self.dry_run,
            "size_bytes_before": self.size_bytes_before,
            "size_bytes": self.size_bytes,
            "bits_per_weight": self.bits_per_weight,
            "matrix_bits_per_weight": self.matrix_bits_per_weight,
            "verdict": self.verdict,
            "damage": None if self.damage is None else self.damage.to_dict(),
            "sample": self.sample.to_dict() if self.sample else None,
            **({"samples": [s.to_dict() for s in self.samples]} if len(self.samples) > 1 else {}),
            **({"note": self.note} if self.note else {}),
            "tensors": [tensor.to_dict() for tensor in self.tensors],
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """The report that `to_dict` gave these values."""
        tensors = (TensorReport.from_dict(tensor) for tensor in values["tensors"])
        damage = values.get("damage")
        sample = values.get("sample")
        samples = values.get("samples", [] if sample is None else [sample])
        return cls(
            TernaryPlan.from_dict(values["plan"]),
            tuple(tensors),
            values["dry_run"],
            tuple(SampleReport.from_dict(each) for each in samples),
            None if damage is None else Damage.from_dict(damage),
            str(values.get("note", "")),
        )
