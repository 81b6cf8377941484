"""Which blocks and which kinds of matrices break a model when they are ternarized.

Each block alone, blocks 0 … i together, and each kind of matrix alone are ternarized in the
loaded model, measured on real tokens and put back. No checkpoint is written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeAlias

from torch import Tensor

from trilens.checkpoint.format.matrix_plan import MatrixPlan
from trilens.errors import RestoreError, UsageError
from trilens.evaluation.reference import Degradation, ReferenceLogits
from trilens.io.safetensors_header import TensorHeader
from trilens.io.spilled import spilling
from trilens.lens.lens import Lens
from trilens.planning.candidates import Candidate, of_plan
from trilens.planning.matrices import ModelMatrix, find_matrices
from trilens.planning.predictor import gain, inputs_of, output_error
from trilens.progress import Progress, Step
from trilens.results import Tabular
from trilens.statistics.ranks import rank_correlation
from trilens.taps.parameters import checksum, swapped

__all__ = ["Sensitivity", "SensitivityRow", "Subject", "measure_sensitivity"]

Subject: TypeAlias = Literal["block", "blocks", "kind", "matrix"]

_SHORT = 4  # the perturbations are measured on one token of this many


@dataclass(frozen=True, slots=True)
class SensitivityRow:
    """One part of the model ternarized.

    Attributes:
        subject: "block": one alone; "blocks": all up to this one; "kind": one kind of matrix in
            every block; "matrix": one alone.
        name: The block's number, the kind's or the parameter's name.
        n_matrices: How many matrices were changed.
        n_weights: Their weights.
        bits_per_weight: What they would take in a checkpoint.
        output_error: Of their outputs, the mean over their weights; see `predictor`.
        nll_nats: Measured change of the mean negative log-likelihood.
        kl_nats: Measured KL(unchanged ‖ changed).
        predicted_kl_nats: The sum of the predictions for the matrices; None where it was not
            requested.
    """

    subject: Subject
    name: str
    n_matrices: int
    n_weights: int
    bits_per_weight: float
    output_error: float
    nll_nats: float
    kl_nats: float
    predicted_kl_nats: float | None


@dataclass(frozen=True, slots=True)
class Sensitivity(Tabular):
    """What `measure_sensitivity` found.

    Attributes:
        rule: The rule's name and grouping.
        n_tokens: Tokens that were predicted.
        nll_nats: Mean negative log-likelihood of the unchanged model.
        rows: The parts, those of one subject together, in the model's order.
        checksum: SHA-256 of all parameters, the same before and after.
        block_length: Tokens of the longest block, on which a loss depends.
    """

    rule: str
    n_tokens: int
    nll_nats: float
    rows: tuple[SensitivityRow, ...]
    checksum: str
    block_length: int | None = None

    def of(self, subject: Subject) -> tuple[SensitivityRow, ...]:
        """The rows of one subject, in the model's order."""
        return tuple(row for row in self.rows if row.subject == subject)

    def ranked(self, subject: Subject) -> tuple[SensitivityRow, ...]:
        """The rows of one subject, the most damaging first."""
        return tuple(sorted(self.of(subject), key=lambda row: -row.kl_nats))

    def rank_correlation(self, subject: Subject) -> float | None:
        """Spearman's, between measured and predicted KL; None below three rows or unpredicted."""
        rows = self.of(subject)
        predictions = [row.predicted_kl_nats for row in rows if row.predicted_kl_nats is not None]
        if len(predictions) < len(rows):
            return None
        return rank_correlation([row.kl_nats for row in rows], predictions)

    def table(self) -> list[dict[str, Any]]:
        """One plain row for each part."""
        return [asdict(row) for row in self.rows]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        subjects: tuple[Subject, ...] = ("block", "blocks", "kind", "matrix")
        found = {subject: self.rank_correlation(subject) for subject in subjects}
        return {
            "rule": self.rule,
            "n_tokens": self.n_tokens,
            "block_length": self.block_length,
            "nll_nats": self.nll_nats,
            "rank_correlation": found,
            "checksum": self.checksum,
            "rows": self.table(),
        }


@dataclass(frozen=True, slots=True)
class _Changed:
    """All matrices as the rule leaves them, and what is known of each."""

    candidate: Candidate
    weights: Mapping[str, Tensor]
    errors: Mapping[str, float]
    predictions: Mapping[str, float] | None


def measure_sensitivity(
    lens: Lens,
    blocks: Sequence[Tensor],
    *,
    rule: MatrixPlan | None = None,
    headers: Mapping[str, TensorHeader] | None = None,
    each_matrix: bool = False,
    predict: bool = True,
    progress: Progress | None = None,
) -> Sensitivity:
    """Make parts of a model ternary, one after the other, and measure each.

    Nothing else may use the model meanwhile; it gets its weights back, also after an exception.

    Args:
        lens: the model, with dense weights.
        blocks: token ids, each int64 [2 or more tokens].
        rule: what a matrix becomes; `MatrixPlan("absmean")` where not given.
        headers: of the checkpoint it was loaded from; see `find_matrices`.
        each_matrix: measure every matrix alone, too.
        predict: predict the KL cheaply, for which every matrix is perturbed once.
        progress: called before every step.

    Raises:
        UsageError: nothing can be ternarized, or `rule` excludes matrices.
        NonFiniteError: NaN or Inf among weights or in the model's own logits.
        RestoreError: the weights did not come back.

    Memory: a second copy of the matrices, above 1 GiB in a temporary file, mapped; and the logits
    of all tokens (`ReferenceLogits`).
    """
    entry = rule or MatrixPlan("absmean")
    if entry.rule == "keep":
        raise UsageError("rule 'keep' changes nothing: give one that makes matrices ternary")
    candidate = of_plan(entry)
    matrices = find_matrices(lens, headers)
    parts = _parts(matrices, each_matrix)
    steps = len(matrices) * (2 if predict else 1) + len(parts)
    done = 0

    def report(what: str) -> None:
        nonlocal done
        if progress is not None:
            progress(Step(done, steps, what))
        done += 1

    model = lens.model
    before = checksum(dict(model.named_parameters()))
    reference = ReferenceLogits(lens, blocks, resumable=True)
    rows = []
    with ExitStack() as together:
        size_bytes = sum(model.get_parameter(matrix.target).nbytes for matrix in matrices)
        put_aside = together.enter_context(spilling(size_bytes))
        changed = _change(lens, matrices, candidate, blocks, predict, report, put_aside)
        for subject, name, members in parts:
            report(f"{subject} {name}")
            weights = {matrix.target: changed.weights[matrix.target] for matrix in members}
            if subject == "blocks":
                # Those of the blocks before are in place already.
                new = {m.target: weights[m.target] for m in members if str(m.layer) == name}
                together.enter_context(swapped(model, new))
                damage = reference.measure()
            else:
                first = reference.first_block(weights)
                with swapped(model, weights):
                    damage = reference.measure(first_block=first)
            rows.append(_row(subject, name, members, changed, damage))
    after = checksum(dict(model.named_parameters()))
    if after != before:
        raise RestoreError("the model did not get its own weights back: load it again")
    return Sensitivity(
        entry.label,
        reference.n_tokens,
        reference.nll_nats,
        tuple(rows),
        after,
        reference.block_length,
    )


def _parts(
    matrices: Sequence[ModelMatrix], each_matrix: bool
) -> list[tuple[Subject, str, list[ModelMatrix]]]:
    """What is measured, those of blocks together last: they stay in place while it runs."""
    layers = sorted({matrix.layer for matrix in matrices})
    kinds = list(dict.fromkeys(matrix.kind for matrix in matrices))

    def those(test: Callable[[ModelMatrix], bool]) -> list[ModelMatrix]:
        return [matrix for matrix in matrices if test(matrix)]

    found: list[tuple[Subject, str, list[ModelMatrix]]] = []
    for layer in layers:
        found.append(("block", str(layer), those(lambda m, i=layer: m.layer == i)))  # type: ignore[misc]
    for kind in kinds:
        found.append(("kind", kind, those(lambda m, k=kind: m.kind == k)))  # type: ignore[misc]
    if each_matrix:
        found += [("matrix", matrix.target, [matrix]) for matrix in matrices]
    for layer in layers:
        found.append(("blocks", str(layer), those(lambda m, i=layer: m.layer <= i)))  # type: ignore[misc]
    return found


def _change(
    lens: Lens,
    matrices: Sequence[ModelMatrix],
    candidate: Candidate,
    blocks: Sequence[Tensor],
    predict: bool,
    report: Callable[[str], None],
    put_aside: Callable[[Tensor], Tensor],
) -> _Changed:
    inputs = inputs_of(lens, matrices, blocks, put_aside)
    weights, errors = {}, {}
    for matrix in matrices:
        report(f"coding {matrix.target}")
        own = lens.model.get_parameter(matrix.target).detach()
        weights[matrix.target] = put_aside(candidate.apply(matrix, own))
        known = inputs.get(matrix.target)
        errors[matrix.target] = output_error(matrix, own, weights[matrix.target], known)
    predictions = None
    if predict:
        some = blocks[: max(1, len(blocks) // _SHORT)]
        short = ReferenceLogits(lens, some, resumable=True)
        predictions = {}
        for matrix in matrices:
            report(f"perturbing {matrix.target}")
            factor = gain(lens, matrix, short, inputs.get(matrix.target))
            predictions[matrix.target] = factor * errors[matrix.target]
    return _Changed(candidate, weights, errors, predictions)


def _row(
    subject: Subject,
    name: str,
    members: Iterable[ModelMatrix],
    changed: _Changed,
    damage: Degradation,
) -> SensitivityRow:
    members = list(members)
    n_weights = sum(matrix.n_weights for matrix in members)
    size_bytes = sum(changed.candidate.size_bytes(matrix) for matrix in members)
    error = sum(changed.errors[m.target] * m.n_weights for m in members) / n_weights
    predictions = changed.predictions
    return SensitivityRow(
        subject=subject,
        name=name,
        n_matrices=len(members),
        n_weights=n_weights,
        bits_per_weight=8 * size_bytes / n_weights,
        output_error=error,
        nll_nats=damage.nll_nats,
        kl_nats=damage.kl_nats,
        predicted_kl_nats=None
        if predictions is None
        else sum(predictions[m.target] for m in members),
    )
