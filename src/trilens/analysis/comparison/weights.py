"""Weights of two models: relative error and sparsity of each matrix that differs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor, nn

from trilens.analysis.comparison.rows import Place, Row
from trilens.errors import NonFiniteError
from trilens.lens.lens import Lens
from trilens.statistics.divergence import relative_error
from trilens.ternary.packed.linear import TernaryLinear

__all__ = ["matrix_shapes", "weight_rows"]


def matrix_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shape of every matrix (or stack of matrices) of a model, packed ones as they stand in."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, holder in _matrices(model).items():
        if isinstance(holder, TernaryLinear):
            shape = (holder.out_features, holder.in_features)
            shapes[name] = shape[::-1] if holder.transposed else shape
        else:
            shapes[name] = tuple(holder.shape)
    return shapes


def weight_rows(before: Lens, after: Lens) -> list[Row]:
    """Error and sparsity of each matrix that both models have and that is packed or differs.

    A matrix that is the same bit for bit has no row: its error is 0.

    Memory:
        one unpacked matrix at a time.
    """
    mine, other = _matrices(before.model), _matrices(after.model)
    paths = {block.path: layer for layer, block in reversed([*enumerate(before.anatomy.blocks)])}
    rows = []
    for name in mine.keys() & other.keys():
        packed = any(isinstance(held[name], TernaryLinear) for held in (mine, other))
        found = _compare(name, _dense(mine[name]), _dense(other[name]))
        if found is None:
            continue
        error, zeros_before, zeros_after = found
        if not packed and error == 0.0:
            continue
        at = _place(name, paths)
        rows.append(at.against_itself("weight_relative_error", error))
        rows.append(at.change("weight_sparsity", zeros_before, zeros_after))
    return sorted(rows, key=lambda row: (row.layer is not None, row.layer or 0, row.module))


def _matrices(model: nn.Module) -> dict[str, Tensor | TernaryLinear]:
    """Matrices by the name of their parameter; a packed layer by that of the weight it replaces."""
    found: dict[str, Tensor | TernaryLinear] = {}
    packed: set[str] = set()
    for path, module in model.named_modules():
        if isinstance(module, TernaryLinear):
            found[f"{path}.weight"] = module
            packed.add(path)
    for name, parameter in model.named_parameters():
        if name.rpartition(".")[0] not in packed and parameter.dim() >= 2:
            found[name] = parameter.detach()
    return found


def _dense(held: Tensor | TernaryLinear) -> Tensor:
    return held.reconstruct() if isinstance(held, TernaryLinear) else held


def _compare(name: str, before: Tensor, after: Tensor) -> tuple[float, float, float] | None:
    """Relative error, and the shares of zeros; None where there is nothing to compare."""
    if before.shape != after.shape or not before.numel() or before.is_meta or after.is_meta:
        return None
    after = after.to(before.device)
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
