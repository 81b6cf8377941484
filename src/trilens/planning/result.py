"""What is asked of a plan, and the plan with what it was measured to do."""

from __future__ import annotations

import math
import os
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, TypeAlias, get_args

from trilens.checkpoint.format.plan import Storage, TernaryPlan
from trilens.errors import UsageError, ValueRangeError
from trilens.evaluation.reference import Degradation
from trilens.io.atomic import write_bytes
from trilens.io.paths import as_path
from trilens.io.sealed import signed
from trilens.results import Tabular
from trilens.ternary.rules.coder import ScaleDtype

__all__ = ["Costs", "MatrixChoice", "PlanOptions", "Planned"]

Costs: TypeAlias = Literal["measured", "predicted"]

_KEYS = {"max_perplexity_ratio": "max_ratio"}  # in the file, where it differs


@dataclass(frozen=True, slots=True)
class PlanOptions:
    """What is asked of a plan.

    Attributes:
        budget_bits: Maximum bits per weight over all matrices that can be ternarized; excluded
            ones count as they are stored; None without a budget.
        max_perplexity_ratio: Maximum ratio of perplexities on the held-out tokens; None without a
            bound.
        costs: "measured", or "predicted" from one perturbation of each matrix.
        storage: As in `TernaryPlan`.
        scale_dtype: As in `TernaryPlan`.

    Raises:
        UsageError: an option that does not exist, or neither a budget nor a bound.
        ValueRangeError: a budget that is not above 0, or a bound below 1.
    """

    budget_bits: float | None = None
    max_perplexity_ratio: float | None = None
    costs: Costs = "measured"
    storage: Storage = "compact"
    scale_dtype: ScaleDtype = "float16"

    def __post_init__(self) -> None:
        """Check every option."""
        if self.budget_bits is None and self.max_perplexity_ratio is None:
            raise UsageError("a plan needs a budget of bits, a bound on the damage, or both")
        if self.budget_bits is not None and not 0 < self.budget_bits < math.inf:
            raise ValueRangeError(
                f"budget of {self.budget_bits} bits is out of range: pass a number above 0"
            )
        if self.max_perplexity_ratio is not None and not 1 <= self.max_perplexity_ratio < math.inf:
            raise ValueRangeError(
                f"maximum perplexity ratio {self.max_perplexity_ratio} is out of range: "
                "pass 1 or more"
            )
        if self.costs not in get_args(Costs):
            raise UsageError(f"costs {self.costs!r} are unknown: pass {', '.join(get_args(Costs))}")
        TernaryPlan(storage=self.storage, scale_dtype=self.scale_dtype)


@dataclass(frozen=True, slots=True)
class MatrixChoice:
    """What a plan does with one matrix.

    Attributes:
        name: The parameter.
        stored: The checkpoint's tensors that fill it.
        choice: What it becomes: "exact g128", "keep".
        bits_per_weight: What that takes.
        output_error: Of its outputs, relative.
        cost_kl_nats: The KL that it was reckoned at, alone.
    """

    name: str
    stored: tuple[str, ...]
    choice: str
    bits_per_weight: float
    output_error: float
    cost_kl_nats: float


@dataclass(frozen=True, slots=True)
class Planned(Tabular):
    """A plan, and what it was measured to do.

    Attributes:
        plan: For `ternarize`.
        options: What was asked.
        choices: One for each matrix, in the model's order.
        bits_per_weight: Over the matrices of the blocks alone, as they will be stored:
            `matrix_bits_per_weight` of `ternarize`'s report.
        damage: Measured on held-out tokens with the whole plan in the model.
        nll_nats: Mean negative log-likelihood of the unchanged model on them.
        n_measured: Candidates whose KL was measured to make it.
        frontier: Of every plan from the smallest to the largest, (bits per weight, the sum of what
            its matrices were reckoned at in nats), for a report's chart; not in files.
    """

    plan: TernaryPlan
    options: PlanOptions
    choices: tuple[MatrixChoice, ...]
    bits_per_weight: float
    damage: Degradation
    nll_nats: float
    n_measured: int
    frontier: tuple[tuple[float, float], ...] = field(default=(), compare=False, repr=False)

    @property
    def matrix_bits_per_weight(self) -> float:
        """`bits_per_weight`, by the name that the report of `ternarize` has for it."""
        return self.bits_per_weight

    @property
    def holds(self) -> bool:
        """Whether the damage is within the bound; True without one."""
        bound = self.options.max_perplexity_ratio
        return bound is None or self.damage.perplexity_ratio <= bound

    def table(self) -> list[dict[str, Any]]:
        """One row for each matrix."""
        return [asdict(choice) for choice in self.choices]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the file that `ternarize --plan` and `TernaryPlan.load` read: JSON with a hash.

        Raises:
            WriteError: it can't be written.
        """
        write_bytes(as_path(path, "output"), signed(self.to_dict()))

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON: what was measured, then the plan itself."""
        return {
            "format": "trilens.plan",
            "version": 1,
            "kind": "trilens-plan",
            "asked": {
                _KEYS.get(name, name): getattr(self.options, name) for name in PlanOptions.__slots__
            },
            "measured": {
                "bits_per_weight": self.bits_per_weight,
                "matrix_bits_per_weight": self.matrix_bits_per_weight,
                "perplexity_ratio": self.damage.perplexity_ratio,
                "nll_nats": self.damage.nll_nats,
                "kl_nats": self.damage.kl_nats,
                "held_out_tokens": self.damage.n_tokens,
                "block_length": self.damage.block_length,
            },
            "costs": self.table(),
            "plan": self.plan.to_dict(),
        }
