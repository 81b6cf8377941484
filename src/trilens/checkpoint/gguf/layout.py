"""Which tensor of a checkpoint becomes which tensor of a GGUF file, decided from headers alone."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from gguf import MODEL_ARCH_NAMES, get_tensor_name_map
from numpy.typing import NDArray
from transformers.pytorch_utils import Conv1D

from trilens.checkpoint.format.report import TensorReport
from trilens.checkpoint.format.skeleton import Choice, module_at
from trilens.checkpoint.gguf.families import Family
from trilens.checkpoint.gguf.formats import FLOAT_TYPES, GgufFormat
from trilens.checkpoint.job import Job
from trilens.errors import CorruptFileError, UsageError
from trilens.io.safetensors_header import TensorHeader

__all__ = ["GgufSlot", "lay_out"]

_TYPE_OF = {"F32": 0, "F64": 0, "F16": 1, "BF16": 30}
_F32 = 0
_SUFFIXES = (".weight", ".bias")


@dataclass(frozen=True, slots=True, eq=False)
class GgufSlot:
    """One tensor that is to be written.

    Attributes:
        name: In the file.
        choice: The tensor of the checkpoint; None for one that is made.
        type_id: The number of its type.
        shape: In the file, rows first.
        dtype: In the checkpoint.
        size_bytes: In the file.
        size_bytes_before: In the checkpoint.
        transposed: The checkpoint has columns first.
        order: Which row of the checkpoint each row is; None where none moved.
        offset: What is added to every number.
        values: What is made; None for a tensor of the checkpoint.
    """

    name: str
    choice: Choice | None
    type_id: int
    shape: tuple[int, ...]
    dtype: str
    size_bytes: int
    size_bytes_before: int
    transposed: bool = False
    order: NDArray[np.int64] | None = None
    offset: float = 0.0
    values: NDArray[np.float32] | None = None

    @property
    def is_coded(self) -> bool:
        """Whether it is stored as trits."""
        return self.choice is not None and self.choice.storage != "kept"

    def report(self, **measured: Any) -> TensorReport:
        """The outcome of the tensor, as far as headers show, and what was measured."""
        choice = self.choice
        known: dict[str, Any] = {
            "name": self.name if choice is None else choice.name,
            "packed_as": self.name,
            "shape": self.shape,
            "outcome": "planned" if self.is_coded else "kept",
            "reason": self._reason(),
            "is_matrix": choice is not None and choice.is_matrix,
            "size_bytes_before": self.size_bytes_before,
            "size_bytes": self.size_bytes,
        }
        return TensorReport(**{**known, **measured})

    def _reason(self) -> str:
        if self.choice is None:
            return "made for the engine"
        notes = [self.choice.reason] if self.choice.reason else []
        if not self.is_coded and FLOAT_TYPES[self.type_id][0] != self.dtype:
            notes.append(f"stored as {FLOAT_TYPES[self.type_id][0]}")
        if self.offset:
            notes.append(f"with {self.offset:g} added, as the model does")
        return "; ".join(notes)


def lay_out(
    job: Job, family: Family, format: GgufFormat
) -> tuple[list[GgufSlot], list[TensorReport]]:
    """Every tensor of the file that the checkpoint has, in the checkpoint's order.

    Returns:
        The tensors to write, and a report of those that the file does not need.

    Raises:
        UsageError: a tensor that the engine has no place for, or of a type that is not written;
            nothing is left to code.
        CorruptFileError: the checkpoint lacks a tensor of the model.
    """
    config, source = job.source.config, job.source.title
    names = get_tensor_name_map(family.arch, config.num_hidden_layers)
    tied = _tied(config, job.model)
    found: dict[str, GgufSlot] = {}
    absent = []
    for choice, header in _with_fallbacks(job, format):
        why = _why_left_out(choice, tied)
        if why:
            absent.append(_left_out(header, why))
            continue
        name = names.get_name(choice.target, try_suffixes=_SUFFIXES)
        if name is None:
            raise UsageError(
                f"tensor {choice.name!r} has no place in the engine's architecture "
                f"{MODEL_ARCH_NAMES[family.arch]!r}: write a checkpoint for transformers instead"
            )
        if name in found:
            raise CorruptFileError(
                f"{source} fills the tensor {name} twice: from {found[name].choice!r} and "
                f"from {choice.name!r}"
            )
        found[name] = _slot(job, choice, header, name, family, format)
    filled = {slot.choice.target for slot in found.values() if slot.choice is not None}
    missing = sorted(
        name for name, _ in job.model.named_parameters() if name not in filled and name not in tied
    )
    if missing:
        raise CorruptFileError(
            f"{source} lacks {len(missing)} tensors of the model, the first is {missing[0]}"
        )
    return list(found.values()), absent


def _with_fallbacks(job: Job, format: GgufFormat) -> list[tuple[Choice, TensorHeader]]:
    """The choices, with matrices kept whose rows are no whole number of blocks.

    Raises:
        UsageError: nothing is left to code, or something that no GGUF file of these can hold.
    """
    found = []
    for choice, header in job.pairs:
        if choice.storage in {"merged", "experts"}:
            raise UsageError(
                f"tensor {choice.name!r} is {choice.storage} by transformers when it is loaded: "
                "its GGUF form is not mapped; keep it, or write a checkpoint for transformers"
            )
        cols = header.shape[0 if choice.transposed else -1] if header.shape else 0
        if choice.storage == "layer" and cols % format.block:
            why = f"rows of {cols} weights are no multiple of {format.block}"
            found.append((replace(choice, storage="kept", reason=why), header))
        else:
            found.append((choice, header))
    if all(choice.storage == "kept" for choice, _ in found):
        raise UsageError(
            f"nothing is left to write as {format.name}: every matrix is kept, or has rows that "
            f"are no multiple of {format.block} weights"
        )
    return found


def _why_left_out(choice: Choice, tied: dict[str, str]) -> str:
    if not choice.target:
        return choice.reason
    if choice.target in tied:
        return f"the same as {tied[choice.target]}"
    return ""


def _left_out(header: TensorHeader, why: str) -> TensorReport:
    return TensorReport(
        name=header.name,
        packed_as=header.name,
        shape=header.shape,
        outcome="left out",
        reason=why,
        is_matrix=False,
        size_bytes_before=header.size_bytes,
        size_bytes=0,
    )


def _tied(config: Any, model: Any) -> dict[str, str]:
    """Parameters that are another one under a second name."""
    if not getattr(config, "tie_word_embeddings", False):
        return {}
    return dict(getattr(model, "all_tied_weights_keys", None) or {})


def _slot(
    job: Job, choice: Choice, header: TensorHeader, name: str, family: Family, format: GgufFormat
) -> GgufSlot:
    coded = choice.storage != "kept"
    # Also a matrix that is kept may be stored as [in, out].
    path, _, leaf = choice.target.rpartition(".")
    transposed = leaf == "weight" and isinstance(module_at(job.model, path), Conv1D)
    shape = header.shape[::-1] if transposed else header.shape
    if not shape or min(shape) < 1 or len(shape) > 2:
        raise UsageError(f"tensor {choice.name!r} has shape {header.shape}: no matrix, no vector")
    if header.dtype not in _TYPE_OF:
        raise UsageError(f"tensor {choice.name!r} is stored as {header.dtype}: no plain numbers")
    # The engine adds and multiplies vectors in float32 alone.
    type_id = _F32 if len(shape) == 1 else _TYPE_OF[header.dtype]
    is_norm = len(shape) == 1 and name.endswith("norm.weight")
    return GgufSlot(
        name=name,
        choice=choice,
        type_id=format.type_id if coded else type_id,
        shape=shape,
        dtype=header.dtype,
        size_bytes=format.codec.size_bytes(shape)
        if coded
        else math.prod(shape) * FLOAT_TYPES[type_id][1],
        size_bytes_before=header.size_bytes,
        transposed=transposed,
        order=family.row_order(name, shape[0], job.source.config),
        offset=family.norm_offset if is_norm else 0.0,
    )
