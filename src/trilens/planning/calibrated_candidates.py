"""What a matrix can become with a text: the calibrated rules beside those that need no data.

A plan prices each matrix alone, so each is calibrated on the dense model's inputs. What needs the
other matrices (repairing what those before have lost, fits of norms and scales) is left to
`ternarize`, whose result is usually better than what a plan was measured at.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from trilens.checkpoint.format.matrix_plan import MatrixPlan
from trilens.checkpoint.format.plan import Storage, TernaryPlan
from trilens.lens.lens import Lens
from trilens.planning.candidates import GROUP_SIZES, Candidate, data_free
from trilens.planning.matrices import ModelMatrix, input_sizes
from trilens.taps.inputs import observe_inputs
from trilens.ternary.calibrated.hessian import Hessian, Moments
from trilens.ternary.calibrated.rules import CALIBRATED_RULES, calibrate
from trilens.ternary.rules.coder import ScaleDtype

__all__ = ["hessians_of", "with_text"]


def hessians_of(
    lens: Lens, matrices: Sequence[ModelMatrix], blocks: Sequence[Tensor]
) -> dict[str, Hessian]:
    """H = Σ x xᵀ of what each matrix gets as input, in float64, by the name of its parameter.

    Experts stored in one tensor, whose inputs no module sees, and matrices that no token reached
    are left out.

    Args:
        lens: the model, with dense weights.
        matrices: of the model.
        blocks: token ids, each int64 [tokens].

    Memory: 8·cols² bytes for each input of a matrix.
    """
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def add(name: str, inputs: Tensor) -> None:
        # PROMOTE: thousands of squares of very different sizes are added up
        rows = inputs.cpu().double()
        sums[name] = sums.get(name, 0) + rows.T @ rows
        counts[name] = counts.get(name, 0) + len(rows)

    observe_inputs(lens.model, input_sizes(matrices), blocks, add)
    return {name: Hessian(found, counts[name]) for name, found in sums.items()}


def with_text(hessians: dict[str, Hessian]) -> Callable[..., tuple[Candidate, ...]]:
    """`data_free`, and every calibrated rule for the matrices whose inputs are known.

    Args:
        hessians: of `hessians_of`.
    """

    def candidates(
        matrix: ModelMatrix, *, scale_dtype: ScaleDtype, storage: Storage, exclude: bool = True
    ) -> tuple[Candidate, ...]:
        found = data_free(matrix, scale_dtype=scale_dtype, storage=storage, exclude=exclude)
        hessian = hessians.get(matrix.target)
        if hessian is None or matrix.merged or hessian.n_tokens < matrix.cols:
            return found  # as in ternarize: coded by the weights alone
        entries = []
        for rule, known in CALIBRATED_RULES.items():
            if known.levels == 4 and storage == "compact":
                continue
            entries.append(MatrixPlan(rule, per="row"))  # type: ignore[arg-type]
            entries += [
                MatrixPlan(rule, group_size=size)  # type: ignore[arg-type]
                for size in GROUP_SIZES
                if size < matrix.cols
            ]
        return (*found, *(_of_text(entry, hessian, scale_dtype, storage) for entry in entries))

    return candidates


def _of_text(
    entry: MatrixPlan, hessian: Hessian, scale_dtype: ScaleDtype, storage: Storage
) -> Candidate:
    plan = TernaryPlan(
        rule=entry.rule,  # type: ignore[arg-type]
        per=entry.per,
        group_size=entry.group_size,
        scale_dtype=scale_dtype,
        storage=storage,
    )

    def reconstruct(weights: Tensor, name: str) -> Tensor:
        dense = weights.detach().float().cpu()
        found = calibrate(
            dense,
            name,
            Moments.of(dense, hessian),
            rule=entry.rule,
            group_size=plan.group_size,
            per=plan.per,
            scale_dtype=scale_dtype,
        )
        return found.quant.reconstruct()

    return Candidate(entry, plan, reconstruct)
