"""Which stored tensors stand in which block of the model, and where."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate

import torch
from torch import Tensor, nn

from trilens.checkpoint.calibration.block_job import BlockMatrix
from trilens.checkpoint.format.plan import TernaryPlan
from trilens.checkpoint.format.skeleton import Choice
from trilens.errors import UsageError
from trilens.models.anatomy import Anatomy

__all__ = ["Placed", "place_choices"]

_MERGED = "transformers merges it with others when it loads them: its inputs are not seen alone"
_EXPERTS = "its experts share one tensor, and no product of one expert alone was seen"


@dataclass(frozen=True, slots=True)
class Placed:
    """What calibration works on in one block.

    Attributes:
        matrices: What is ternarized.
        vectors: Norms and biases: parameter in the block → stored tensor and its dtype.
        shared: Matrices of earlier blocks that this block runs too, where they stand in it.
        shared_vectors: Likewise norms and biases: parameter in the block → stored tensor.
    """

    matrices: tuple[BlockMatrix, ...]
    vectors: dict[str, tuple[str, torch.dtype]]
    shared: tuple[BlockMatrix, ...] = ()
    shared_vectors: dict[str, str] = field(default_factory=dict)


def place_choices(
    model: nn.Module,
    anatomy: Anatomy,
    choices: tuple[Choice, ...],
    tensors: Mapping[str, Tensor],
    plan: TernaryPlan,
) -> tuple[Placed, ...]:
    """Give every block its matrices and vectors.

    Args:
        model: the model that was built over the tensors.
        anatomy: its parts.
        choices: what becomes of each stored tensor.
        tensors: the stored tensors.
        plan: how many scales a matrix has.

    Raises:
        UsageError: a matrix that is to be ternarized is outside the blocks, is not found in the
            parameter that it fills, or is shared out over several layers and has one scale.
    """
    starts = [block.path + "." for block in anatomy.blocks]
    matrices: list[list[BlockMatrix]] = [[] for _ in starts]
    vectors: list[dict[str, tuple[str, torch.dtype]]] = [{} for _ in starts]
    for choice in choices:
        index = next((i for i, start in enumerate(starts) if choice.target.startswith(start)), None)
        if choice.storage == "kept":
            stored = tensors.get(choice.name)
            if index is not None and stored is not None and stored.ndim == 1:
                held = _parameter(model, choice.target)
                if held is not None and held.shape == stored.shape:
                    inside = choice.target.removeprefix(starts[index])
                    vectors[index][inside] = (choice.name, stored.dtype)
            continue
        if index is None:
            raise UsageError(
                f"tensor {choice.name} is to be ternarized, but stands outside the blocks that a "
                "text runs through: keep it, or leave the calibration out"
            )
        inside = choice.target.removeprefix(starts[index])
        matrices[index] += _matrices(choice, inside, tensors[choice.name], model, plan)
    return _with_shared(
        anatomy, [Placed(tuple(m), v) for m, v in zip(matrices, vectors, strict=True)]
    )


def _with_shared(anatomy: Anatomy, placed: Sequence[Placed]) -> tuple[Placed, ...]:
    """Tell each block which weights of earlier ones it runs: a module of several, or a tied one."""
    known: dict[int, tuple[list[BlockMatrix], list[str]]] = {}
    found = []
    for block, own in zip(anatomy.blocks, placed, strict=True):
        names = dict(block.module.named_parameters(remove_duplicate=False))
        matrices: list[BlockMatrix] = []
        vectors: dict[str, str] = {}
        seen: set[int] = set()
        for inside, parameter in names.items():
            earlier = known.get(id(parameter))
            if earlier is None or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            for matrix in earlier[0]:
                path = inside.removesuffix(".weight") if matrix.path else ""
                matrices.append(replace(matrix, path=path, parameter=inside))
            for name in earlier[1]:
                vectors[inside] = name
        found.append(replace(own, shared=tuple(matrices), shared_vectors=vectors))
        for matrix in own.matrices:
            inside = f"{matrix.path}.weight" if matrix.path else matrix.parameter
            known.setdefault(id(names[inside]), ([], []))[0].append(matrix)
        for inside, (name, _) in own.vectors.items():
            known.setdefault(id(names[inside]), ([], []))[1].append(name)
    return tuple(found)


def _parameter(model: nn.Module, name: str) -> Tensor | None:
    return dict(model.named_parameters()).get(name)


def _matrices(
    choice: Choice, inside: str, stored: Tensor, model: nn.Module, plan: TernaryPlan
) -> list[BlockMatrix]:
    name = choice.name
    if choice.storage == "layer":
        return [BlockMatrix(name, inside.removesuffix(".weight"), inside)]
    if choice.storage == "experts":
        return [
            BlockMatrix(name, "", inside, i, _expert(i), choice.transposed, _EXPERTS)
            for i in range(len(stored))
        ]
    held = model.get_parameter(choice.target)
    if held.ndim == 2 and len(held) < len(stored):
        if plan.of(name).per == "tensor":
            raise UsageError(
                f"tensor {name} holds the rows of several layers, which are calibrated one by one, "
                "and was to have one scale: give per='row' or a group size, or keep it"
            )
        return _split(name, choice.target.removesuffix(inside), stored, model)
    return [BlockMatrix(name, "", inside, 0, _rows(held, stored, name), False, _MERGED)]


def _split(name: str, block: str, stored: Tensor, model: nn.Module) -> list[BlockMatrix]:
    """The layers over which the rows of a stored matrix are shared out: found by their values."""
    parts: list[tuple[int, str, int]] = []
    for path, held in model.named_parameters():
        layer = path.removesuffix(".weight")
        if not path.startswith(block) or held.ndim != 2 or held.shape[1] != stored.shape[1]:
            continue
        if not isinstance(model.get_submodule(layer), nn.Linear):
            continue
        start = _start_of(held, stored)
        if start is not None:
            parts.append((start, layer.removeprefix(block), len(held)))
    parts.sort()
    ends = [0, *accumulate(rows for *_, rows in parts)]
    if [start for start, *_ in parts] != ends[:-1] or ends[-1] != len(stored):
        raise _lost(name)
    return [BlockMatrix(name, layer, f"{layer}.weight", i) for i, (_, layer, _) in enumerate(parts)]


def _start_of(part: Tensor, whole: Tensor) -> int | None:
    """The first row of a matrix at which another one stands in it."""
    first = part[0].detach().to(whole.dtype)
    for start in torch.nonzero(whole[: len(whole) - len(part) + 1, 0] == first[0])[:, 0].tolist():
        if torch.equal(whole[start : start + len(part)], part.detach().to(whole.dtype)):
            return int(start)
    return None


def _lost(name: str) -> UsageError:
    return UsageError(
        f"tensor {name} is not found in the parameter that transformers makes of it: keep it, or "
        "leave the calibration out"
    )


def _expert(index: int) -> Callable[[Tensor], Tensor]:
    return lambda parameter: parameter[index]


def _rows(held: Tensor, stored: Tensor, name: str) -> Callable[[Tensor], Tensor]:
    """Where a stored matrix stands in the parameter it was merged into: found by its values."""
    rows, cols = stored.shape
    if held.shape[-1] == cols:
        start = _start_of(stored, held.detach().reshape(-1, cols))
        if start is not None:
            return lambda parameter: parameter.view(-1, cols)[start : start + rows]
    raise _lost(name)
