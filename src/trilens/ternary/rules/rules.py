"""The rules that need no data: from the weights of a unit to its scale and trits.

Relative error ‖W−Ŵ‖²/‖W‖² as measured on 4 million synthetic weights (`benchmarks/quantize.py`):

    rule            per         Gaussian   Laplace
    absmean         tensor      .264       .393
    absmean_refit   tensor      .213       .318
    twn             tensor      .192       .282
    exact           tensor      .190       .264
    exact           group 128   .187       .256
    asymmetric      group 128   .180       .248
    planes          tensor      .029       .048
    planes          group 128   .025       .040
    quad            group 128   .132       .1XX

`quad` has four levels {−1, 0, 1, 2}·d and is not ternary: it takes the two bits to the full.

A rule takes units of one length and their Σ|w| `[units]`, none of them NaN or Inf, and gives a
`Fit`. Units that are ternary already are taken out of its hands afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from trilens.errors import UsageError
from trilens.ternary.rules.exact import best_survivors
from trilens.ternary.rules.fits import Fit, one_plane
from trilens.ternary.rules.levels import fit_nine_levels, fit_three_levels
from trilens.ternary.rules.quad import fit_four_levels, search_four_levels
from trilens.ternary.rules.unit_scan import UnitScan

__all__ = [
    "FOUR_LEVELS",
    "RULES",
    "Rule",
    "RuleName",
    "absmean",
    "absmean_refit",
    "asymmetric",
    "exact",
    "find_rule",
    "planes",
    "quad",
    "twn",
]

Rule: TypeAlias = Callable[[UnitScan, NDArray[np.float64]], Fit]
"""From units and their Σ|w| `[units]` to a fit."""

RuleName: TypeAlias = Literal[
    "absmean", "absmean_refit", "twn", "exact", "asymmetric", "planes", "quad"
]


def absmean(scan: UnitScan, abs_sums: NDArray[np.float64]) -> Fit:
    """α = mean|w|; ±1 where |w| > α/2, a tie is 0.

    Source: BitNet b1.58, arXiv 2402.17764.
    """
    scales = abs_sums / scan.length
    return one_plane(0.5 * scales, scales)


def absmean_refit(scan: UnitScan, abs_sums: NDArray[np.float64]) -> Fit:
    """The trits of `absmean` with the α that is best for them: the mean |w| where they are not 0.

    Source: the least-squares scale of arXiv 1605.04711, equation 4.
    """
    cuts = 0.5 * abs_sums / scan.length
    return one_plane(cuts, _mean(*scan.survivors(cuts)))


def twn(scan: UnitScan, abs_sums: NDArray[np.float64]) -> Fit:
    """±1 where |w| > 0.7·mean|w|; α = mean |w| of these.

    Source: Ternary Weight Networks, arXiv 1605.04711, equations 4 and 6.
    """
    cuts = 0.7 * abs_sums / scan.length
    return one_plane(cuts, _mean(*scan.survivors(cuts)))


def exact(scan: UnitScan, abs_sums: NDArray[np.float64]) -> Fit:
    """The trits and α with the least squared error there is.

    Source: arXiv 1605.04711, equation 5, maximised without its approximation.
    """
    cuts, counts, sums = best_survivors(scan, abs_sums)
    return one_plane(cuts, _mean(counts, sums))


def asymmetric(scan: UnitScan, abs_sums: NDArray[np.float64]) -> Fit:
    """Ŵ = αT + μ: the nearest of three equally spaced levels, alternating with least squares.

    Begins at `exact`, which it can only improve on, and at levels around the units' mean.

    Source: PT²-LLM, arXiv 2510.03267.
    """
    return fit_three_levels(scan, exact(scan, abs_sums).scales[:, 0])


def planes(scan: UnitScan, abs_sums: NDArray[np.float64]) -> Fit:
    """Ŵ = α₁T₁ + α₂T₂: the nearest of nine levels, alternating with least squares.

    Begins at `exact`, which it can only improve on, and at 25 pairs of scales.

    Source: PTQTP, arXiv 2509.16989.
    """
    return fit_nine_levels(scan, exact(scan, abs_sums).scales[:, 0], abs_sums)


def quad(scan: UnitScan, abs_sums: NDArray[np.float64]) -> Fit:
    """Ŵ = d·L with levels L of −1, 0, 1 and 2 and a signed d: the least squared error there is.

    Not ternary: the fourth level costs no bit where codes take two. Of a unit of more than 2²⁰
    weights a local optimum, at least as good as that of `exact`.
    """
    if scan.n_pieces == 1:
        return fit_four_levels(scan)
    return search_four_levels(scan, exact(scan, abs_sums).scales[:, 0], abs_sums)


RULES: Mapping[str, Rule] = MappingProxyType(
    {
        "absmean": absmean,
        "absmean_refit": absmean_refit,
        "twn": twn,
        "exact": exact,
        "asymmetric": asymmetric,
        "planes": planes,
        "quad": quad,
    }
)

FOUR_LEVELS = frozenset({"quad"})
"""The rules with the level 2 beside the trits."""


def find_rule(name: str) -> Rule:
    """The rule of that name.

    Raises:
        UsageError: there is none.
    """
    if name not in RULES:
        raise UsageError(f"rule {name!r} is unknown: the rules are {', '.join(RULES)}")
    return RULES[name]


def _mean(counts: NDArray[np.int64], sums: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.where(counts > 0, sums / np.maximum(counts, 1), 0.0)
