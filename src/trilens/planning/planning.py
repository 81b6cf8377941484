"""A plan under a budget of bits: what each matrix becomes, so that the model suffers least.

Of every matrix, all candidates are coded once and their output errors taken; those that another
one beats in both bits and error fall away. What the others cost is measured (the KL with this
matrix alone replaced) or predicted (gain × output error). Then the plan begins with the smallest
candidate everywhere and buys, again and again, the upgrade that saves the most KL for a bit, until
the budget is spent. At the end the whole plan is put into the model and measured on tokens that
had no part in it.

Source: the choice by marginal returns of arXiv 2411.17525 (section 5) in its greedy form, with
measured costs where they can be afforded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TypeAlias

from torch import Tensor

from trilens.checkpoint.format.plan import TernaryPlan
from trilens.errors import RestoreError, UsageError, ValueRangeError
from trilens.evaluation.reference import Degradation, ReferenceLogits
from trilens.io.safetensors_header import TensorHeader
from trilens.io.spilled import spilling
from trilens.lens.lens import Lens
from trilens.planning.candidates import EXCLUDED, Candidate, data_free
from trilens.planning.matrices import ModelMatrix, find_matrices
from trilens.planning.predictor import gain, input_bytes, inputs_of, output_error
from trilens.planning.result import Costs, MatrixChoice, Planned, PlanOptions
from trilens.planning.sampled_rows import sampled
from trilens.progress import Progress, Step
from trilens.taps.parameters import checksum, swapped

__all__ = ["Candidates", "Point", "Prices", "choose_plan", "make_plan", "price_candidates"]

Candidates: TypeAlias = Callable[..., Sequence[Candidate]]
"""As `candidates.data_free`: from a matrix and its storage to what it can become."""


@dataclass(frozen=True, slots=True)
class Point:
    """A candidate of one matrix with what it takes and costs."""

    candidate: Candidate
    size_bytes: int
    error: float
    kl_nats: float


@dataclass(frozen=True, slots=True)
class Prices:
    """What each matrix of a model could become, worth its bits, and at what cost.

    Attributes:
        matrices: The matrices, in the model's order.
        fronts: Of each, the points of its hull, smallest first.
        options: What they were reckoned for.
        n_measured: Candidates whose KL was measured.
    """

    matrices: tuple[ModelMatrix, ...]
    fronts: tuple[tuple[Point, ...], ...]
    options: PlanOptions
    n_measured: int


@dataclass(frozen=True, slots=True)
class _Step:
    """An upgrade of one matrix from a point of its hull to the next."""

    matrix: int
    to: int
    size_bytes: int
    saved_nats: float


def make_plan(
    lens: Lens,
    blocks: Sequence[Tensor],
    held_out: Sequence[Tensor],
    *,
    options: PlanOptions,
    headers: Mapping[str, TensorHeader] | None = None,
    candidates: Candidates = data_free,
    progress: Progress | None = None,
) -> Planned:
    """Choose what each matrix becomes, under a budget of bits, a bound on the damage, or both.

    While this runs, nothing else may use the model. Afterwards, also after an exception, it has the
    weights it had, bit for bit.

    Args:
        lens: the model, with dense weights.
        blocks: token ids to measure costs on, each int64 [2 or more tokens].
        held_out: token ids that the end result is measured on.
        options: what is asked.
        headers: of the checkpoint it was loaded from; see `find_matrices`. Without them the plan
            names parameters.
        candidates: what a matrix can become.
        progress: called before every step.

    Raises:
        UsageError: nothing can be ternarized, or the budget is below the smallest plan there is.
        NonFiniteError: NaN or Inf among weights or in the model's own logits.
        RestoreError: the weights did not come back.

    Memory: one coded copy of each matrix's candidates at a time, at the end a second copy of all
    matrices (above 1 GiB in a temporary file, mapped), and the logits of all tokens
    (`ReferenceLogits`). The model's own weights stay mapped from their files.
    """
    matrices = find_matrices(lens, headers)
    if options.budget_bits is not None:  # refused now, not after minutes of measuring
        least = [_smallest(matrix, candidates, options) for matrix in matrices]
        _room(options.budget_bits, matrices, sum(least))
    prices = _prices(lens, matrices, blocks, options, candidates, progress)
    return choose_plan(lens, prices, held_out, options=options)


def price_candidates(
    lens: Lens,
    blocks: Sequence[Tensor],
    *,
    options: PlanOptions,
    headers: Mapping[str, TensorHeader] | None = None,
    candidates: Candidates = data_free,
    progress: Progress | None = None,
) -> Prices:
    """The first and long part of `make_plan`: it holds for any budget and bound.

    Args, Raises, Memory: as `make_plan`; of the options, only costs, storage and scale dtype count.
    """
    return _prices(lens, find_matrices(lens, headers), blocks, options, candidates, progress)


def _prices(
    lens: Lens,
    matrices: tuple[ModelMatrix, ...],
    blocks: Sequence[Tensor],
    options: PlanOptions,
    candidates: Candidates,
    progress: Progress | None,
) -> Prices:
    before = checksum(dict(lens.model.named_parameters()))
    reference = ReferenceLogits(lens, blocks, resumable=True)
    fronts = []
    n_measured = 0
    with spilling(input_bytes(matrices, blocks)) as put_aside:
        inputs = inputs_of(lens, matrices, blocks, put_aside)
        for done, matrix in enumerate(matrices):
            if progress is not None:
                progress(Step(done, len(matrices), matrix.target))
            known = inputs.get(matrix.target)
            points = _front(lens, matrix, candidates, options, known)
            priced, n = _priced(lens, matrix, points, reference, options.costs, known)
            fronts.append(tuple(_hull(priced)))
            n_measured += n
    _check(lens, before)
    return Prices(matrices, tuple(fronts), options, n_measured)


def choose_plan(
    lens: Lens, prices: Prices, held_out: Sequence[Tensor], *, options: PlanOptions
) -> Planned:
    """The second part of `make_plan`: spend a budget, and measure the result.

    Args:
        lens: the model that was priced.
        prices: of `price_candidates`.
        held_out: token ids that the end result is measured on.
        options: the budget and the bound; costs, storage and scale dtype as they were priced.

    Raises:
        UsageError: a budget below the smallest plan there is, or options that were not priced.
    """
    for name in ("costs", "storage", "scale_dtype"):
        asked, there = getattr(options, name), getattr(prices.options, name)
        if asked != there:
            raise UsageError(f"{name} {asked!r} was not priced, but {there!r}: price it anew")
    before = checksum(dict(lens.model.named_parameters()))
    held = ReferenceLogits(lens, held_out)
    chosen, damage = _choose(lens, prices.matrices, prices.fronts, options, held)
    _check(lens, before)
    made = _planned(prices.matrices, chosen, options, damage, held.nll_nats, prices.n_measured)
    return replace(made, frontier=_frontier(prices))


def _check(lens: Lens, before: str) -> None:
    if checksum(dict(lens.model.named_parameters())) != before:
        raise RestoreError("the model did not get its own weights back: load it again")


def _front(
    lens: Lens,
    matrix: ModelMatrix,
    candidates: Candidates,
    options: PlanOptions,
    inputs: Tensor | None,
) -> list[Point]:
    """The candidates that no other one beats in both bits and output error, smallest first.

    Of these, those on the lower hull: greedy steps never stop at the others.
    """
    part, own = sampled(matrix, lens.model.get_parameter(matrix.target).detach())
    points = []
    for candidate in candidates(matrix, scale_dtype=options.scale_dtype, storage=options.storage):
        try:
            new = candidate.apply(part, own)
        except ValueRangeError:
            continue  # a scale that its dtype does not hold
        error = output_error(part, own, new, inputs)
        points.append(Point(candidate, candidate.size_bytes(matrix), error, error))
    return _hull(points)


def _priced(
    lens: Lens,
    matrix: ModelMatrix,
    points: Sequence[Point],
    reference: ReferenceLogits,
    costs: Costs,
    inputs: Tensor | None,
) -> tuple[list[Point], int]:
    """The same points with their KL, and how many were measured."""
    if costs == "predicted":
        factor = gain(lens, matrix, reference, inputs)
        priced = [Point(p.candidate, p.size_bytes, p.error, factor * p.error) for p in points]
        return priced, 0
    own = lens.model.get_parameter(matrix.target).detach()
    first = reference.first_block([matrix.target])
    found, n_measured = [], 0
    for point in points:
        kl_nats = 0.0
        if point.candidate is not EXCLUDED:
            with swapped(lens.model, {matrix.target: point.candidate.apply(matrix, own)}):
                kl_nats = reference.measure(first_block=first).kl_nats
            n_measured += 1
        found.append(Point(point.candidate, point.size_bytes, point.error, kl_nats))
    return found, n_measured


def _hull(points: Sequence[Point]) -> list[Point]:
    """The lower left convex hull of bytes and KL: each step saves less for a byte than the last."""
    hull: list[Point] = []
    for point in sorted(points, key=lambda p: (p.size_bytes, p.kl_nats)):
        if hull and point.kl_nats >= hull[-1].kl_nats:
            continue
        while len(hull) > 1 and _slope(hull[-2], point) >= _slope(hull[-2], hull[-1]):
            hull.pop()
        hull.append(point)
    return hull


def _slope(a: Point, b: Point) -> float:
    """KL saved for a byte."""
    return (a.kl_nats - b.kl_nats) / max(1, b.size_bytes - a.size_bytes)


def _smallest(matrix: ModelMatrix, candidates: Candidates, options: PlanOptions) -> int:
    """Bytes of the smallest thing that a matrix can become."""
    found = candidates(matrix, scale_dtype=options.scale_dtype, storage=options.storage)
    return min(candidate.size_bytes(matrix) for candidate in found)


def _room(budget_bits: float, matrices: Sequence[ModelMatrix], least_bytes: int) -> int:
    """Bytes that a budget leaves for upgrades of the smallest plan."""
    n_weights = sum(matrix.n_weights for matrix in matrices)
    room = math.floor(budget_bits * n_weights / 8 * (1 + 1e-12)) - least_bytes
    if room < 0:
        raise UsageError(
            f"budget of {budget_bits} bits is out of range: the smallest plan takes "
            f"{8 * least_bytes / n_weights:.4f} bits per weight: pass that or more"
        )
    return room


def _choose(
    lens: Lens,
    matrices: Sequence[ModelMatrix],
    fronts: Sequence[Sequence[Point]],
    options: PlanOptions,
    held: ReferenceLogits,
) -> tuple[list[Point], Degradation]:
    """The greedy choice, and what it was measured to do."""
    steps = _steps(fronts)
    if options.budget_bits is not None:
        least = sum(front[0].size_bytes for front in fronts)
        steps = _within(steps, _room(options.budget_bits, matrices, least))

    def measure(count: int) -> tuple[list[Point], Degradation]:
        levels = [0] * len(fronts)
        for step in steps[:count]:
            levels[step.matrix] = step.to
        chosen = [front[level] for front, level in zip(fronts, levels, strict=True)]
        return chosen, _evaluated(lens, matrices, chosen, held)

    best = measure(len(steps))
    highest = options.max_perplexity_ratio
    if highest is None or best[1].perplexity_ratio > highest:
        return best
    # The minimum of upgrades within the bound. Each is measured, never taken from its neighbours.
    low, high = -1, len(steps)
    while high - low > 1:
        middle = (low + high) // 2
        tried = measure(middle)
        if tried[1].perplexity_ratio <= highest:
            high, best = middle, tried
        else:
            low = middle
    return best


def _steps(fronts: Sequence[Sequence[Point]]) -> list[_Step]:
    """All upgrades, those first that save the most for a byte; in order within each matrix."""
    found = [
        (_slope(a, b), _Step(index, level + 1, b.size_bytes - a.size_bytes, a.kl_nats - b.kl_nats))
        for index, front in enumerate(fronts)
        for level, (a, b) in enumerate(pairwise(front))
    ]
    return [step for _, step in sorted(found, key=lambda pair: -pair[0])]


def _frontier(prices: Prices) -> tuple[tuple[float, float], ...]:
    """Bits per weight and summed KL of each plan on the way from the smallest to the largest."""
    n_weights = sum(matrix.n_weights for matrix in prices.matrices)
    size_bytes = sum(front[0].size_bytes for front in prices.fronts)
    nats = [front[0].kl_nats for front in prices.fronts]
    found = [(8 * size_bytes / n_weights, math.fsum(nats))]
    for step in _steps(prices.fronts):
        size_bytes += step.size_bytes
        nats[step.matrix] = prices.fronts[step.matrix][step.to].kl_nats
        found.append((8 * size_bytes / n_weights, math.fsum(nats)))
    return tuple(found)


def _within(steps: Sequence[_Step], room: int) -> list[_Step]:
    """The upgrades that the room pays for; after one that it does not, a matrix stays as it is."""
    taken, full = [], set()
    for step in steps:
        if step.matrix in full:
            continue
        if step.size_bytes > room:
            full.add(step.matrix)
            continue
        room -= step.size_bytes
        taken.append(step)
    return taken


def _evaluated(
    lens: Lens, matrices: Sequence[ModelMatrix], chosen: Sequence[Point], held: ReferenceLogits
) -> Degradation:
    changed = [
        (matrix, point.candidate, lens.model.get_parameter(matrix.target).detach())
        for matrix, point in zip(matrices, chosen, strict=True)
        if point.candidate is not EXCLUDED
    ]
    with spilling(sum(own.nbytes for *_, own in changed)) as put_aside:
        weights = {
            matrix.target: put_aside(candidate.apply(matrix, own))
            for matrix, candidate, own in changed
        }
        with swapped(lens.model, weights):
            return held.measure()


def _planned(
    matrices: Sequence[ModelMatrix],
    chosen: Sequence[Point],
    options: PlanOptions,
    damage: Degradation,
    nll_nats: float,
    n_measured: int,
) -> Planned:
    pairs = list(zip(matrices, chosen, strict=True))
    entries = {name: point.candidate.entry for matrix, point in pairs for name in matrix.stored}
    plan = TernaryPlan(
        rule="exact",
        scale_dtype=options.scale_dtype,
        storage=options.storage,
        matrices=entries,
    )
    choices = tuple(
        MatrixChoice(
            name=matrix.target,
            stored=matrix.stored,
            choice=point.candidate.name,
            bits_per_weight=point.candidate.bits_per_weight(matrix),
            output_error=point.error,
            cost_kl_nats=point.kl_nats,
        )
        for matrix, point in pairs
    )
    n_weights = sum(matrix.n_weights for matrix in matrices)
    size_bytes = sum(point.size_bytes for point in chosen)
    return Planned(plan, options, choices, 8 * size_bytes / n_weights, damage, nll_nats, n_measured)
