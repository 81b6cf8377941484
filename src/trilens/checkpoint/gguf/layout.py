"""Which tensor of a checkpoint becomes which tensor of a GGUF file, decided from headers alone."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from gguf import MODEL_ARCH_NAMES, TensorNameMap, get_tensor_name_map
from numpy.typing import NDArray
from transformers.pytorch_utils import Conv1D

from trilens.checkpoint.format.report import TensorReport
from trilens.checkpoint.format.skeleton import HOMELESS, Choice, module_at
from trilens.checkpoint.gguf.families import Family
from trilens.checkpoint.gguf.formats import ROUNDED_TYPES, GgufFormat, type_bytes
from trilens.checkpoint.gguf.slots import GgufSlot, Piece
from trilens.checkpoint.job import Job
from trilens.errors import CorruptFileError, UsageError
from trilens.io.safetensors_header import TensorHeader

__all__ = ["lay_out"]

_TYPE_OF = {"F32": 0, "F64": 0, "F16": 1, "BF16": 30}
_F32 = 0
_SUFFIXES = (".weight", ".bias")
_OWN_NAME = "blk."  # the engine's own; no model's begins so
_EXPERT = re.compile(r"\.experts\.(\d+)\.")

# The engine multiplies and convolves with these in float32 alone, whatever their shape.
_FLOAT_NAMES = (
    "_norm.weight",
    ".ssm_conv1d.weight",
    ".ssm_a",
    ".ssm_d",
    ".ffn_gate_inp.weight",
    ".time_mix_lerp_fused.weight",
)
_EMBEDDINGS = ("token_embd.weight", "output.weight")


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
    names = _Names(family, config.num_hidden_layers)
    tied = _tied(config, job.model)
    pieces: dict[str, dict[int | None, Piece]] = {}
    parts: dict[str, tuple[int, int]] = {}
    absent = []
    for choice, header in _with_fallbacks(job, format):
        why = _why_left_out(choice, tied)
        if why:
            absent.append(_left_out(header, why))
            continue
        for name, expert, part in names.places(choice):
            of_name = pieces.setdefault(name, {})
            if expert in of_name:
                raise CorruptFileError(
                    f"{source} fills the tensor {name} twice: from {of_name[expert].choice!r} and "
                    f"from {choice.name!r}"
                )
            of_name[expert] = Piece(choice, header)
            parts[name] = part
    if family.own_head and tied:
        pieces["output.weight"] = pieces["token_embd.weight"]
        parts["output.weight"] = (0, 1)
    found = [
        _slot(job, name, _in_order(name, of_name), parts[name], family, format)
        for name, of_name in pieces.items()
    ]
    filled = {piece.choice.target for slot in found for piece in slot.pieces}
    missing = sorted(
        name for name, _ in job.model.named_parameters() if name not in filled and name not in tied
    )
    if missing:
        raise CorruptFileError(
            f"{source} lacks {len(missing)} tensors of the model, the first is {missing[0]}"
        )
    return found, absent


class _Names:
    """From a tensor of the checkpoint to its names in the file, by the gguf package's tables."""

    def __init__(self, family: Family, n_blocks: int) -> None:
        self._family = family
        self._map: TensorNameMap = get_tensor_name_map(family.arch, n_blocks)

    def places(self, choice: Choice) -> Iterator[tuple[str, int | None, tuple[int, int]]]:
        """Each name that a tensor fills: the name, its expert, and which part of its rows it gets.

        Raises:
            UsageError: the engine has no place for it.
        """
        match = _EXPERT.search(choice.name)
        expert = int(match.group(1)) if match else None
        if self._family.place is not None:
            expert = self._family.place(choice.name)
        stored = _EXPERT.sub(".experts.", choice.name)
        for end, ends in self._family.split.items():
            if stored.endswith(end):
                for number, other in enumerate(ends):
                    name = self._known(choice, stored.removesuffix(end) + other)
                    yield name, expert, (number, len(ends))
                return
        # As the model has it, or, where transformers merges what is stored, as it is stored.
        spellings = (choice.target, stored) if match is None else (stored,)
        yield self._known(choice, *spellings), expert, (0, 1)

    def _known(self, choice: Choice, *spellings: str) -> str:
        for spelling in spellings:
            for pattern, new in self._family.renamed.items():
                spelling = re.sub(pattern, new, spelling)  # noqa: PLW2901
            if spelling.startswith(_OWN_NAME):
                return spelling
            name = self._map.get_name(spelling, try_suffixes=_SUFFIXES)
            if name is not None:
                return str(name)
        raise UsageError(
            f"tensor {choice.name!r} has no place in the engine's architecture "
            f"{MODEL_ARCH_NAMES[self._family.arch]!r}: write a checkpoint for transformers instead"
        )


def _in_order(name: str, pieces: dict[int | None, Piece]) -> tuple[Piece, ...]:
    """The pieces of one tensor, experts by their number, also those stored in one tensor."""
    if None not in pieces:
        numbers = sorted(number for number in pieces if number is not None)
        if numbers != list(range(len(numbers))):
            raise CorruptFileError(f"the tensor {name} lacks experts: there are {numbers}")
        return tuple(pieces[number] for number in numbers)
    (piece,) = pieces.values()
    if not piece.choice.is_matrix or len(piece.header.shape) != 3:
        return (piece,)
    return tuple(replace(piece, expert=number) for number in range(piece.header.shape[0]))


def _with_fallbacks(job: Job, format: GgufFormat) -> list[tuple[Choice, TensorHeader]]:
    """The choices, with matrices kept whose rows are no whole number of blocks.

    Raises:
        UsageError: nothing is left to code.
    """
    found = []
    for choice, header in job.pairs:
        cols = header.shape[-2 if choice.transposed else -1] if header.shape else 0
        if choice.storage != "kept" and cols % format.block:
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
    if not choice.target and choice.reason == HOMELESS:
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
    job: Job,
    name: str,
    pieces: tuple[Piece, ...],
    part: tuple[int, int],
    family: Family,
    format: GgufFormat,
) -> GgufSlot:
    config, (choice, header) = job.source.config, (pieces[0].choice, pieces[0].header)
    kinds = {piece.choice.storage for piece in pieces}
    if len(kinds) > 1:
        raise UsageError(
            f"the tensor {name} has experts that the plan codes and others that it keeps: give all "
            "of them the same options"
        )
    coded = choice.storage != "kept"
    # Also a matrix that is kept may be stored as [in, out].
    path, _, leaf = choice.target.rpartition(".")
    is_conv1d = leaf == "weight" and isinstance(module_at(job.model, path), Conv1D)
    transposed = choice.transposed or is_conv1d
    change = family.change(name, config)
    shape = header.shape[1:] if pieces[0].expert is not None else header.shape
    shape = shape[::-1] if transposed else shape
    if change is not None:
        shape = tuple(change(torch.empty(shape, device="meta")).shape)
    order = _rows(family.row_order(name, shape[0], config) if shape else None, shape, part)
    if order is not None:
        shape = (len(order), *shape[1:])
    if len(pieces) > 1 or pieces[0].expert is not None:
        shape = (len(pieces), *shape)
    if not shape or min(shape) < 1 or len(shape) > 4 or (coded and len(shape) < 2):
        raise UsageError(f"tensor {choice.name!r} has shape {header.shape}: no matrix, no vector")
    if any(piece.header.dtype not in _TYPE_OF for piece in pieces):
        raise UsageError(f"tensor {choice.name!r} is stored as {header.dtype}: no plain numbers")
    if any(piece.header.shape != header.shape for piece in pieces):
        raise CorruptFileError(f"experts of the tensor {name} have unlike shapes")
    # The engine adds and multiplies vectors in float32 alone.
    in_float32 = len(shape) == 1 or name.endswith(_FLOAT_NAMES) or change is not None
    type_id = _F32 if in_float32 else _TYPE_OF[header.dtype]
    if name in _EMBEDDINGS and job.plan.embeddings != "keep":
        type_id = _rounded_type(job.plan.embeddings, name, shape)
    is_norm = len(shape) == 1 and name.endswith(("norm.weight", "norm_2.weight"))
    is_norm = is_norm or (name.endswith("norm.weight") and family.norm_offset != 0)
    stored = {piece.choice.name: piece.header.size_bytes for piece in pieces}
    return GgufSlot(
        name=name,
        pieces=pieces,
        type_id=format.type_id if coded else type_id,
        shape=shape,
        dtype=header.dtype,
        size_bytes=format.codec.size_bytes(shape) if coded else type_bytes(type_id, shape) or 0,
        size_bytes_before=sum(stored.values()) // part[1],
        transposed=transposed,
        order=order,
        offset=family.norm_offset if is_norm else 0.0,
        change=change,
    )


def _rounded_type(wanted: str, name: str, shape: tuple[int, ...]) -> int:
    """The number of the type of an embedding or a head in fewer bits.

    Raises:
        UsageError: its rows are no whole number of blocks.
    """
    for number, (known, block, _) in ROUNDED_TYPES.items():
        if known.lower() == wanted:
            if shape[-1] % block:
                raise UsageError(
                    f"embeddings {wanted!r} does not fit {name}, whose rows of {shape[-1]} weights "
                    f"are no whole number of blocks of {block}: leave it out"
                )
            return number
    raise UsageError(f"embeddings {wanted!r} is unknown")


def _rows(
    order: NDArray[np.int64] | None, shape: tuple[int, ...], part: tuple[int, int]
) -> NDArray[np.int64] | None:
    """The rows of one part of a tensor, in the engine's order."""
    number, count = part
    if count == 1:
        return order
    rows = np.arange(shape[0], dtype=np.int64) if order is None else order
    each = len(rows) // count
    return rows[number * each : (number + 1) * each]
