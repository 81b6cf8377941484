"""The matrices of a loaded model that `ternarize` would code, and where their weights lie.

What qualifies is decided by the checkpoint's own rules (`checkpoint.skeleton`), asked about the
loaded model instead of its skeleton.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from trilens.checkpoint.format.skeleton import Choice, choose
from trilens.errors import UsageError
from trilens.io.safetensors_header import TensorHeader
from trilens.lens.lens import Lens
from trilens.taps.matrices import matrices_of
from trilens.ternary.packed.module import PackedModule

__all__ = ["ModelMatrix", "find_matrices", "input_sizes"]

_NAMES = {"float16": "F16", "bfloat16": "BF16", "float32": "F32", "float64": "F64"}


@dataclass(frozen=True, slots=True)
class ModelMatrix:
    """One weight of a loaded model: a matrix, or the matrices of many experts in one tensor.

    Attributes:
        target: The parameter's name in the model.
        stored: The checkpoint's tensors that fill it: one, unless transformers merges or splits.
        layer: The block that it belongs to.
        kind: What it is in its block: "q_proj", "experts.down_proj", "a_lora.lora.2".
        lead: Leading dimensions: none for one matrix, one for experts.
        rows: Outputs.
        cols: Inputs.
        transposed: The parameter holds [in, out].
        dense_bytes: Bytes of one weight that is not quantized, as the checkpoint stores it.
        merged: Filled by transformers from several tensors, or from a part of one.
    """

    target: str
    stored: tuple[str, ...]
    layer: int
    kind: str
    lead: tuple[int, ...]
    rows: int
    cols: int
    transposed: bool
    dense_bytes: int
    merged: bool = False

    @property
    def n_weights(self) -> int:
        """How many weights, of all experts."""
        return math.prod(self.lead) * self.rows * self.cols

    def of(self, parameter: Tensor) -> Iterator[Tensor]:
        """The matrices of the parameter, or of one of its shape, as views [rows, cols].

        Shapes: parameter [*lead, rows, cols], transposed [*lead, cols, rows]
        """
        for matrix in parameter if self.lead else (parameter,):
            yield matrix.T if self.transposed else matrix


def input_sizes(matrices: Sequence[ModelMatrix]) -> dict[str, int]:
    """Parameter name → how many inputs it has, of those whose inputs one module sees."""
    return {matrix.target: matrix.cols for matrix in matrices if not matrix.lead}


def find_matrices(
    lens: Lens, headers: Mapping[str, TensorHeader] | None = None
) -> tuple[ModelMatrix, ...]:
    """The linear layers of a model's blocks that can be ternarized.

    Args:
        lens: the loaded model.
        headers: the tensors of the checkpoint that it was loaded from; None takes the names and
            shapes that the model has in memory.

    Raises:
        UsageError: there is none, or the model is ternary already.
    """
    model: nn.Module = lens.model
    packed = next((path for path, m in model.named_modules() if isinstance(m, PackedModule)), None)
    if packed is not None:
        raise UsageError(
            f"{packed} is packed already: give the checkpoint that the ternary one was made from"
        )
    found: dict[str, list[Choice]] = {}
    stored = _in_memory(model) if headers is None else headers
    for choice in choose(model, stored):
        if choice.storage != "kept":
            found.setdefault(choice.target, []).append(choice)
    paths = {block.path: layer for layer, block in reversed(list(enumerate(lens.anatomy.blocks)))}
    matrices = [
        _matrix(model, target, choices, (paths[home], home), stored)
        for target, choices in found.items()
        if (home := _home(target, paths)) is not None
    ]
    if not matrices:
        raise UsageError("the model has no linear layer of a block that could be ternarized")
    _check_replaceable(model, matrices)
    return tuple(sorted(matrices, key=lambda matrix: matrix.layer))


def _check_replaceable(model: nn.Module, matrices: Sequence[ModelMatrix]) -> None:
    """Refuse a weight that is not what its layer multiplies by: another in its place is no other
    weight of the model."""
    held = matrices_of(model)
    for target in (matrix.target for matrix in matrices):
        known = held.get(target)
        if known is None:
            raise UsageError(
                f"parameter {target} is a part of what its layer multiplies by: merge the adapter "
                "into the weights (merge_and_unload), or give the checkpoint without it"
            )
        if known.source == "tensor":
            kind = type(model.get_parameter(target)).__name__
            raise UsageError(
                f"parameter {target} is a quantized tensor ({kind}): give the checkpoint with "
                "plain weights"
            )


def _in_memory(model: nn.Module) -> dict[str, TensorHeader]:
    return {
        name: TensorHeader(
            name=name,
            dtype=_NAMES.get(str(tensor.dtype).removeprefix("torch."), str(tensor.dtype)),
            shape=tuple(tensor.shape),
            file=Path(),
            begin=0,
            end=tensor.numel() * tensor.element_size(),
        )
        for name, tensor in model.state_dict().items()
    }


def _home(target: str, paths: Mapping[str, int]) -> str | None:
    """The block a parameter lies in; None for those of other parts, as a vision tower."""
    home = target
    while home:
        home = home.rpartition(".")[0]
        if home in paths:
            return home
    return None


def _kind(path: str, leaf: str) -> str:
    """What a matrix is in its block: its module's name, with those above a bare number.

    Args:
        path: of the module, in the block.
        leaf: the parameter's name in the module.
    """
    parts = path.split(".")
    first = len(parts) - 1
    if parts[first].isdigit():
        named = [i for i, part in enumerate(parts) if not part.isdigit()]
        first = named[-2:][0] if named else 0
    name = ".".join(parts[first:])
    return name if leaf == "weight" else f"{name}.{leaf}"


def _matrix(
    model: nn.Module,
    target: str,
    choices: list[Choice],
    block: tuple[int, str],
    stored: Mapping[str, TensorHeader],
) -> ModelMatrix:
    parameter = model.get_parameter(target)
    path, _, leaf = target.rpartition(".")
    module = model.get_submodule(path)
    transposed = any(choice.transposed for choice in choices)
    merged = choices[0].storage == "merged"
    if merged:
        transposed = bool(getattr(module, "is_transposed", False))
    *lead, first, second = parameter.shape
    header = stored[choices[0].name]
    layer, home = block
    return ModelMatrix(
        target=target,
        stored=tuple(choice.name for choice in choices),
        layer=layer,
        kind=_kind(path.removeprefix(f"{home}."), leaf),
        lead=tuple(lead),
        rows=second if transposed else first,
        cols=first if transposed else second,
        transposed=transposed,
        dense_bytes=header.size_bytes // math.prod(header.shape),
        merged=merged,
    )
