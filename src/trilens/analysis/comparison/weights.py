"""Weights of two models: relative error and sparsity of each matrix that differs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

from torch import nn

from trilens.analysis.comparison.rows import Place, Row
from trilens.errors import CaptureError, NonFiniteError
from trilens.lens.lens import Lens
from trilens.statistics.divergence import relative_error
from trilens.taps.matrices import Matrix, matrices_of

__all__ = ["matrix_shapes", "weight_rows"]


def matrix_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shape of every matrix (or stack of matrices) of a model; of linear layers [out, in]."""
    return {name: matrix.shape for name, matrix in matrices_of(model).found.items()}


def weight_rows(before: Lens, after: Lens) -> tuple[list[Row], list[str]]:
    """Error and sparsity of each matrix that both models have and that is packed or differs.

    What is compared is what the layers multiply by (`taps.matrices`), whatever they store. A matrix
    that is the same bit for bit has no row: its error is 0.

    Returns:
        The rows, and a sentence for what could not be compared.

    Memory:
        one unpacked matrix at a time.
    """
    mine, other = matrices_of(before.model), matrices_of(after.model)
    blocks = reversed([*enumerate(before.anatomy.blocks)])
    paths = {block.path.replace("._orig_mod", ""): layer for layer, block in blocks}
    rows = []
    missing: dict[str, list[str]] = {}
    for side, held, beside in (("before", mine, other), ("after", other, mine)):
        for name, why in held.left_out.items():
            missing.setdefault(f"{why} ({side})", []).append(name)
        known = {*beside.found, *beside.aliases, *beside.left_out}
        for name in held.found.keys() - known:
            missing.setdefault(f"only the model {side} has it", []).append(name)
    for name in sorted(mine.found.keys() | other.found.keys()):
        one, two = mine.get(name), other.get(name)
        if one is None or two is None:
            continue
        try:
            found = _compare(name, one, two)
        except CaptureError as unread:
            missing.setdefault(str(unread).removeprefix(f"{name}: "), []).append(name)
            continue
        if found is None:
            continue
        if one.shape != two.shape:
            sizes = f"{one.shape[0]} before and {two.shape[0]} after"
            missing.setdefault(f"of {sizes} rows, those of shared tokens count", []).append(name)
        error, zeros_before, zeros_after = found
        if error == 0.0 and "packed" not in (one.source, two.source):
            continue
        at = _place(name, paths)
        rows.append(at.against_itself("weight_relative_error", error))
        rows.append(at.change("weight_sparsity", zeros_before, zeros_after))
    rows.sort(key=lambda row: (row.layer is not None, row.layer or 0, row.module))
    return rows, [_note(why, names) for why, names in sorted(missing.items())]


def _note(why: str, names: list[str]) -> str:
    names = sorted(names)
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    what = "weight row of" if why.startswith("of ") else "no weight row for"
    return f"{what} {names[0]}{more}: {why}"


def _compare(name: str, mine: Matrix, other: Matrix) -> tuple[float, float, float] | None:
    """Relative error, and the shares of zeros; None where there is nothing to compare."""
    if mine.shape[1:] != other.shape[1:] or not math.prod(mine.shape):
        return None
    # Rows of tokens that one vocabulary has beyond the other's end are not compared.
    n_rows = min(mine.shape[0], other.shape[0])
    before = mine.read()[:n_rows]
    after = other.read()[:n_rows].to(before.device)
    try:
        error = relative_error(before, after)
    except NonFiniteError as cause:
        side = "after" if bool(before.isfinite().all()) else "before"
        raise NonFiniteError(f"weight {name} of the model {side} holds NaN or Inf") from cause
    zeros = [1 - int(side.count_nonzero()) / side.numel() for side in (before, after)]
    return error, zeros[0], zeros[1]


def _place(name: str, blocks: Mapping[str, int]) -> Place:
    """Layer and name within the block; a parameter outside of the blocks keeps its whole name."""
    for prefix in _prefixes(name):
        if prefix in blocks:
            return Place(name.removeprefix(f"{prefix}."), blocks[prefix])
    return Place(name)


def _prefixes(name: str) -> Iterator[str]:
    parts = name.split(".")
    for end in range(len(parts) - 1, 0, -1):
        yield ".".join(parts[:end])
