"""One tensor from the source's file into the output's: coded or copied, then read back."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trilens.checkpoint.format.names import part_name
from trilens.checkpoint.format.plan import Storage, TernaryPlan
from trilens.checkpoint.format.report import Outcome, TensorReport
from trilens.checkpoint.format.shards import ShardWriter
from trilens.checkpoint.format.skeleton import Choice
from trilens.checkpoint.rotation import to_be_coded
from trilens.checkpoint.source import Checkpoint
from trilens.errors import WriteError
from trilens.io.safetensors_header import TensorHeader
from trilens.ternary.calibrated.rules import levels_of, n_planes_of
from trilens.ternary.codecs.packing import Base3, Codec, FourLevels, TwoBit
from trilens.ternary.codecs.rows import compact_rows, pack_rows
from trilens.ternary.granularity import resolve_units
from trilens.ternary.histogram import LevelSample
from trilens.ternary.quantize import PerLayerQuant, Scale
from trilens.ternary.rules.kernels import Kernels, kernels_for, parallel_map
from trilens.ternary.rules.rules import RuleName

__all__ = [
    "CODES_PER_BYTE",
    "CodedBefore",
    "CodedMatrix",
    "Entry",
    "code_tensor",
    "entries",
    "packed_parts",
    "planned",
]

CODES_PER_BYTE: dict[Storage, int] = {"two_bit": 4, "compact": 5}

_SCALE_DTYPES = {"float16": ("F16", 2), "bfloat16": ("BF16", 2), "float32": ("F32", 4)}

Entry = tuple[str, str, tuple[int, ...], int]
"""Name, dtype, shape and bytes of a tensor in the output."""

_ROWS_WEIGHTS = 1 << 20  # weights packed and compared together

_CODED: dict[int, Outcome] = {3: "ternary", 4: "four levels"}
_ELSEWHERE = {"merged": "merged or split when loaded", "experts": "many experts in one tensor"}
_FITTED = "fitted to the dense block's outputs"


@dataclass(frozen=True, slots=True)
class _Sizes:
    """The shapes that a matrix, or n experts, take when packed."""

    lead: tuple[int, ...]
    rows: int
    cols: int

    def codes(self, plan: TernaryPlan) -> tuple[int, ...]:
        return (*self.lead, self.rows, math.ceil(self.cols / CODES_PER_BYTE[plan.storage]))

    def scale(self, plan: TernaryPlan) -> tuple[int, ...]:
        if plan.per == "tensor":
            return (*self.lead, 1, 1)
        units = resolve_units(self.rows, self.cols, plan.per, plan.group_size)
        return (*self.lead, units.rows, units.per_row)


def _sizes(choice: Choice, shape: tuple[int, ...]) -> _Sizes:
    *lead, first, second = shape
    rows, cols = (second, first) if choice.transposed else (first, second)
    return _Sizes(tuple(lead), rows, cols)


def entries(choice: Choice, header: TensorHeader, plan: TernaryPlan) -> list[Entry]:
    """What one tensor of the source becomes in the output."""
    if choice.storage == "kept":
        return [(choice.name, header.dtype, header.shape, header.size_bytes)]
    sizes = _sizes(choice, header.shape)
    found = packed_parts(sizes.lead, sizes.rows, sizes.cols, plan.of(choice.name))
    return [
        (part_name(choice.packed_as, part), dtype, shape, size_bytes)
        for part, dtype, shape, size_bytes in found
    ]


def packed_parts(
    lead: tuple[int, ...], rows: int, cols: int, plan: TernaryPlan
) -> list[tuple[str, str, tuple[int, ...], int]]:
    """What a matrix, or n experts, become in the output.

    Args:
        lead: leading dimensions: none for one matrix, (n,) for experts.
        rows: outputs.
        cols: inputs.
        plan: of this matrix.

    Returns:
        Name, dtype, shape and bytes of each packed part.
    """
    sizes = _Sizes(lead, rows, cols)
    codes, scale = sizes.codes(plan), sizes.scale(plan)
    dtype, width = _SCALE_DTYPES[plan.scale_dtype if plan.storage == "compact" else "float32"]
    wanted = [("codes", "U8", codes), ("scale", dtype, scale)]
    if plan.rule == "asymmetric":
        wanted.append(("offset", dtype, scale))
    if n_planes_of(plan.rule) == 2:
        wanted += [("second_codes", "U8", codes), ("second_scale", dtype, scale)]
    return [
        (part, kind, shape, math.prod(shape) * (1 if kind == "U8" else width))
        for part, kind, shape in wanted
    ]


def planned(choice: Choice, header: TensorHeader, plan: TernaryPlan) -> TensorReport:
    """The report of a tensor as far as headers show."""
    return TensorReport(
        name=header.name,
        packed_as=choice.packed_as,
        shape=header.shape,
        outcome="kept" if choice.storage == "kept" else "planned",
        reason=_ELSEWHERE.get(choice.storage, choice.reason),
        is_matrix=choice.is_matrix,
        size_bytes_before=header.size_bytes,
        size_bytes=sum(size_bytes for *_, size_bytes in entries(choice, header, plan)),
    )


class CodedMatrix(Protocol):
    """What a calibration measured of a matrix: its errors at the outputs, why it has its rule."""

    @property
    def output_error(self) -> float | None:
        """On the text it was fitted to."""

    @property
    def output_error_held_out(self) -> float | None:
        """On text set apart."""

    @property
    def reason(self) -> str:
        """Why it has another rule than the plan's, or ""."""


class CodedBefore(Protocol):
    """What a calibration has made of the tensors."""

    def quant(
        self, name: str, expert: int, cols: int, plan: TernaryPlan
    ) -> tuple[PerLayerQuant, CodedMatrix] | None:
        """A coded matrix of several in one tensor, and what was measured of it."""

    def whole_matrix(
        self, name: str, cols: int, plan: TernaryPlan
    ) -> tuple[PerLayerQuant, CodedMatrix] | None:
        """The coded matrix of a tensor that holds one."""

    def vector(self, name: str) -> Tensor | None:
        """The new value of a tensor that is kept otherwise."""


def code_tensor(
    choice: Choice,
    header: TensorHeader,
    plan: TernaryPlan,
    source: Checkpoint,
    writer: ShardWriter,
    *,
    before: CodedBefore | None = None,
) -> TensorReport:
    """Write one tensor and compare what the file then holds with what was meant, bit for bit.

    Raises:
        NonFiniteError: NaN or Inf among the weights.
        ValueRangeError: a scale that its dtype cannot hold.
        WriteError: the file cannot be written, or decodes to something else.

    Memory: 1 byte per weight of the largest matrix (2 for "planes"), plus what the rule needs.
    """
    report = planned(choice, header, plan)
    if choice.storage == "kept":
        new = None if before is None else before.vector(choice.name)
        raw = old = source.borrowed_bytes(header)
        if new is not None:
            raw = new.contiguous().view(torch.uint8).numpy()
        writer.put(writer.slots[choice.name].begin, raw)
        # a small step can round to nothing
        fitted = new is not None and not np.array_equal(raw, old)
        reason = _FITTED if fitted else report.reason
        return replace(report, reason=reason, decoded_exactly=True, fitted=fitted)
    plan = plan.of(choice.name)
    stored = source.borrowed_tensor(choice.name)
    matrices = stored if stored.ndim == 3 else stored[None]
    error = energy = zeros = 0.0
    measured: list[CodedMatrix] = []
    other_rule = ""
    was_ternary = True
    sample = LevelSample()
    for index, stored_matrix in enumerate(matrices):
        matrix = stored_matrix.T if choice.transposed else stored_matrix
        name = header.name if stored.ndim == 2 else f"{header.name}[{index}]"
        matrix = to_be_coded(matrix, name, plan)
        coded, cols = None, matrix.shape[1]
        if before is not None and stored.ndim == 3:
            coded = before.quant(header.name, index, cols, plan)
        elif before is not None:
            coded = before.whole_matrix(header.name, cols, plan)
        if coded is None:
            quant = PerLayerQuant.quantize(
                matrix,
                name,
                rule=cast("RuleName", plan.rule),
                group_size=plan.group_size,
                per=plan.per,
                scale_dtype=plan.scale_dtype,
            )
        else:
            quant, found = coded
            measured.append(found)
            other_rule = found.reason
        _write_matrix(writer, choice.packed_as, quant, index, plan.storage)
        of_error, of_energy = quant.energies(matrix)
        error, energy = error + of_error, energy + of_energy
        zeros += quant.sparsity
        sample.add(matrix, quant)
        was_ternary = was_ternary and quant.was_ternary
        del quant  # before the next one is made
    reasons = [report.reason, f"coded by its weights alone: {other_rule}" if other_rule else ""]
    return replace(
        report,
        outcome="already ternary" if was_ternary else _CODED[levels_of(plan.rule)],
        reason="; ".join(filter(None, reasons)),
        relative_error=float(error / energy) if energy else 0.0,
        sparsity=float(zeros / len(matrices)),
        decoded_exactly=True,
        histogram=sample.result(),
        output_error=measured[0].output_error if len(measured) == 1 else None,
        output_error_held_out=measured[0].output_error_held_out if len(measured) == 1 else None,
    )


def _write_matrix(
    writer: ShardWriter, name: str, quant: PerLayerQuant, index: int, storage: Storage
) -> None:
    _write_codes(writer, part_name(name, "codes"), quant.trits, index, storage, quant.levels)
    if quant.second_trits is not None:
        _write_codes(writer, part_name(name, "second_codes"), quant.second_trits, index, storage)
    scales: dict[str, Scale | None] = {
        "scale": quant.scale,
        "offset": quant.offset,
        "second_scale": quant.second_scale,
    }
    kind = torch.float32
    if storage == "compact" and quant.scale_dtype is not None:
        kind = getattr(torch, quant.scale_dtype)
    for part, values in scales.items():
        if values is not None:
            # They were rounded to this dtype before they were used: nothing is lost.
            exact = torch.from_numpy(np.asarray(values, dtype=np.float32).reshape(-1).copy())
            flat = exact.to(kind).view(torch.uint8).numpy()
            slot = writer.slots[part_name(name, part)]
            writer.put(slot.begin + index * flat.nbytes, flat)


def _write_codes(
    writer: ShardWriter,
    name: str,
    trits: Tensor,
    index: int,
    storage: Storage,
    levels: int = 3,
) -> None:
    rows, cols = trits.shape
    row_bytes = math.ceil(cols / CODES_PER_BYTE[storage])
    checked: Callable[[Tensor], tuple[NDArray[np.uint8], bool]]
    checked = partial(_checked_rows, storage=storage, levels=levels)
    if storage == "two_bit" and cols % 4 == 0:
        checked = partial(_checked_words, levels=levels, kernels=kernels_for(trits.numel()))
    begin = writer.slots[name].begin + index * rows * row_bytes

    def write(rows_of_block: tuple[int, int]) -> None:
        first, last = rows_of_block
        packed, is_same = checked(trits[first:last])
        # What is decoded are the bytes that `put` finds in the file.
        writer.put(begin + first * row_bytes, packed)
        if not is_same:
            raise WriteError(f"{name} decodes to other trits than were coded: check the disk")

    parallel_map(write, _row_blocks(rows, cols))


def _checked_words(trits: Tensor, levels: int, kernels: Kernels) -> tuple[NDArray[np.uint8], bool]:
    """As `_checked_rows` of rows that fill whole bytes of two-bit codes, one pass for each."""
    words = np.ascontiguousarray(trits.numpy()).reshape(-1).view(np.uint32)
    packed = np.empty(words.size, dtype=np.uint8)
    kernels.fold(words, packed)
    return packed, kernels.unfolds(packed, words, levels)


def _checked_rows(trits: Tensor, storage: Storage, levels: int) -> tuple[NDArray[np.uint8], bool]:
    """Codes of whole rows, and whether they decode to the trits.

    Shapes: trits [rows, cols] → [rows, row_bytes]
    """
    rows, cols = trits.shape
    pack: Callable[[Tensor], Tensor] = compact_rows
    codec: Codec = Base3()
    if storage == "two_bit":
        pack, codec = partial(pack_rows, levels=levels), TwoBit() if levels == 3 else FourLevels()
    packed = pack(trits).numpy()
    decoded = codec.decode(packed, (rows, CODES_PER_BYTE[storage] * packed.shape[1])).trits
    return packed, np.array_equal(decoded[:, :cols], trits.numpy())


def _row_blocks(rows: int, cols: int) -> Iterator[tuple[int, int]]:
    step = max(1, _ROWS_WEIGHTS // cols)
    for first in range(0, rows, step):
        yield first, min(first + step, rows)
