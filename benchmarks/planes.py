"""Error and time of the `planes` rule, against the best of 25 starts and the two starts of before.

    python -m benchmarks.planes

Three ways to fit the same units in one run, each timed with its own sort:

- the rule;
- 25 starts (and the best single plane), each until it converges: the reference for the error;
- two starts, each until it converges, over all nine signed levels: the rule up to 0.1.0.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.torch import load_file

from benchmarks.common import save
from trilens.demo import demo_path
from trilens.ternary.rules import alternating, levels
from trilens.ternary.rules.cell_counts import CellCounts, magnitude_counts, signed_counts
from trilens.ternary.rules.exact import best_survivors
from trilens.ternary.rules.kernels import kernels_for
from trilens.ternary.rules.rules import planes
from trilens.ternary.rules.unit_scan import UnitScan

Weights = NDArray[np.float32]
Vector = NDArray[np.float64]

_TRITS = np.array([-1.0, 0.0, 1.0])
_BOOK = np.stack([np.repeat(_TRITS, 3), np.tile(_TRITS, 3)], axis=1)
_TURNS = 25
ROUNDS = 5


def one_plane(scan: UnitScan, abs_sums: Vector) -> Vector:
    _, counts, sums = best_survivors(scan, abs_sums)
    return sums / np.maximum(counts, 1)


def best_of_25(scan: UnitScan, abs_sums: Vector) -> Vector:
    """What the best of all starts explains, each carried on until it converges."""
    counts, mean = magnitude_counts(scan), abs_sums / scan.length
    starts = [(one_plane(scan, abs_sums), 0 * mean)]
    starts += [(a * mean, a * r * mean) for a in levels._LARGER for r in levels._RATIOS]
    explained = np.zeros(scan.n_units)
    for start in starts:
        point = levels._nine_levels_step(counts, np.stack(start, axis=1))
        converged = alternating._converge(levels._nine_levels_step, counts, point)
        explained = np.maximum(explained, converged.explained)
    return explained


def two_starts(scan: UnitScan, abs_sums: Vector) -> Vector:
    """What the rule of before explains: from one plane, and from nine equally spaced levels."""
    counts, first = signed_counts(scan), one_plane(scan, abs_sums)
    step = 0.65 * abs_sums / scan.length
    found = [
        _former(counts, np.stack(start, axis=1)) for start in ((first, 0 * first), (3 * step, step))
    ]
    return np.maximum(*found)


def _former(counts: CellCounts, scales: Vector) -> Vector:
    best = np.zeros(counts.n_units)
    open_units = np.arange(counts.n_units)
    for turn in range(_TURNS):
        values = scales[:, :1] * _BOOK[:, 0] + scales[:, 1:] * _BOOK[:, 1]
        order = np.argsort(values, axis=1, kind="stable")
        ordered = np.take_along_axis(values, order, axis=1)
        n, sums = counts.cells(ordered[:, :-1] + 0.5 * (ordered[:, 1:] - ordered[:, :-1]))
        one, two = _BOOK[order][..., 0], _BOOK[order][..., 1]
        gram = ((n * one * one).sum(1), (n * one * two).sum(1), (n * two * two).sum(1))
        products = ((sums * one).sum(1), (sums * two).sum(1))
        scales, explained = alternating.least_squares(gram, products, scales)
        gained = explained - best[open_units]
        best[open_units] = np.maximum(best[open_units], explained)
        still = gained > 1e-6 * explained
        if turn and not still.any():
            break
        if turn and np.count_nonzero(still) < 0.75 * len(still):
            open_units, counts, scales = open_units[still], counts.only(still), scales[still]
    return best


def explained_by_rule(scan: UnitScan, abs_sums: Vector) -> Vector:
    fit = planes(scan, abs_sums)
    counts, sums = scan.cells(fit.cuts)
    values = np.einsum("upc,up->uc", fit.tables.astype(np.float64), fit.scales)
    return np.sum(2 * values * sums - values * values * counts, axis=1)


def matrices() -> dict[str, list[Weights]]:
    rng = np.random.default_rng(0)
    demo = [
        tensor.float().numpy()
        for name in ("transformer", "rwkv7", "mamba")
        for file in sorted(demo_path(name).glob("*.safetensors"))
        for tensor in load_file(file).values()
        if tensor.ndim == 2 and tensor.numel() >= 1 << 14
    ]
    return {
        "Gaussian": [rng.standard_normal((512, 2048), dtype=np.float32)],
        "Laplace": [rng.laplace(size=(512, 2048)).astype(np.float32)],
        "demo": demo,
    }


def scans(weights: list[Weights], per: str) -> list[UnitScan]:
    found = []
    for matrix in weights:
        if per == "tensor":
            units = matrix.reshape(1, -1)
        elif per == "row":
            units = matrix
        else:
            units = matrix.reshape(-1)[: matrix.size // 128 * 128].reshape(-1, 128)
        kernels = kernels_for(matrix.size)
        found.append(UnitScan(*units.shape, 1, lambda _, x=units: x, kernels))  # type: ignore[misc]
    return found


def main() -> None:
    ways: dict[str, Callable[[UnitScan, Vector], Any]] = {
        "rule": planes,
        "two starts": two_starts,
    }
    figures = []
    print("weights   per        error of the rule, of 25 starts, of two    worst unit    time")
    for kind, weights in matrices().items():
        for per in ("tensor", "row", "group 128"):
            units = [(scan, scan.abs_sums()) for scan in scans(weights, per)]
            energies = [np.square(scan.load(0), dtype=np.float64).sum(axis=1) for scan, _ in units]
            errors = {}
            for name, way in (
                ("rule", explained_by_rule),
                ("25 starts", best_of_25),
                ("two starts", two_starts),
            ):
                explained = (way(*unit) for unit in units)
                errors[name] = np.concatenate(
                    [e - x for e, x in zip(energies, explained, strict=True)]
                )
            seconds: dict[str, list[float]] = {name: [] for name in ways}
            for _ in range(ROUNDS):
                for name, way in ways.items():
                    begin = time.perf_counter()
                    for unit in units:
                        way(*unit)
                    seconds[name].append(time.perf_counter() - begin)
            ratio = min(seconds["rule"]) / min(seconds["two starts"])
            total = np.concatenate(energies).sum()
            relative = {name: float(error.sum() / total) for name, error in errors.items()}
            excess = relative["rule"] / relative["25 starts"] - 1
            reference = np.maximum(errors["25 starts"], 1e-6 * np.concatenate(energies))
            worst = float(np.quantile(errors["rule"] / reference, 0.99) - 1)
            print(
                f"{kind:9} {per:10} {relative['rule']:.5f} (+{100 * excess:.2f} %) "
                f"{relative['25 starts']:.5f} {relative['two starts']:.5f}   "
                f"p99 +{100 * worst:.1f} %   ×{ratio:.2f}"
            )
            figures.append(
                {
                    "weights": kind,
                    "per": per,
                    "error": {name: round(value, 5) for name, value in relative.items()},
                    "excess": round(excess, 5),
                    "p99_unit_excess": round(worst, 4),
                    "time_over_two_starts": round(ratio, 2),
                }
            )
    save("planes", {"fits": figures})


if __name__ == "__main__":
    main()
