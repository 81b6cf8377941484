"""One GGUF file: written beside its place, read back tensor by tensor, hashed, renamed."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from gguf import MODEL_ARCH_NAMES, GGMLQuantizationType, GGUFWriter
from gguf.constants import GGML_QUANT_VERSION
from gguf.quants import dequantize, quantize
from numpy.typing import NDArray
from torch import Tensor

from trilens.checkpoint.format.plan import TernaryPlan
from trilens.checkpoint.format.report import TensorReport, TernaryReport
from trilens.checkpoint.gguf.families import find_family
from trilens.checkpoint.gguf.formats import GgufFormat, fitting_plan, row_spans
from trilens.checkpoint.gguf.layout import lay_out
from trilens.checkpoint.gguf.matrices import GgufMatrix, matrix_of
from trilens.checkpoint.gguf.reader import read_gguf
from trilens.checkpoint.gguf.slots import GgufSlot, Piece
from trilens.checkpoint.gguf.tokenizer import read_vocabulary
from trilens.checkpoint.gguf.validation import (
    HASH_KEY,
    HEAD_HASH_KEY,
    N_HASHES_KEY,
    before_hash,
    data_hash,
    head_hash,
)
from trilens.checkpoint.job import Job
from trilens.checkpoint.source import Checkpoint
from trilens.errors import CorruptFileError, NonFiniteError, UsageError, WriteError
from trilens.io.atomic import AtomicFile, atomic
from trilens.io.sealed import NO_HASH
from trilens.progress import Progress, Step
from trilens.ternary.histogram import LevelSample
from trilens.version import __version__

__all__ = ["check_place", "write_gguf"]

_FLOAT_DTYPES = {0: torch.float32, 1: torch.float16, 30: torch.bfloat16}


def write_gguf(
    job: Job,
    format: GgufFormat,
    out: Path,
    *,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> TernaryReport:
    """Write a checkpoint as one GGUF file.

    Everything that can be refused is refused before the file is begun. Each tensor is read back
    from the file, decoded, and compared with what was meant, bit for bit; tensors of a type that
    the gguf package knows are decoded by it too.

    Args:
        job: the checkpoint, and what is to become of each of its tensors.
        format: of the ternary tensors. Kept matrices keep their dtype, kept vectors are float32.
        out: the file, which must not exist.
        dry_run: report what would be stored, write nothing.
        progress: called with each tensor that was written.

    Raises:
        UsageError: the architecture, the plan or the tokenizer does not fit; `out` exists.
        NoTokenizerError: the checkpoint has no tokenizer.
        CorruptFileError: the checkpoint lacks a tensor of the model.
        NonFiniteError, ValueRangeError: of a matrix; see `matrix_of`.
        WriteError: the file cannot be written.

    Memory: the source is mapped; of the largest matrix, or all experts of a layer, up to 3 bytes
    per weight (trits, moved rows, blocks twice), and what the rule needs. Of kept tensors, up to
    three times the largest.
    """
    config = job.source.config
    family = find_family(config)
    plan = fitting_plan(job.plan, format, packed=job.packed is not None)
    todo, absent = lay_out(job, family, format)
    writer = GGUFWriter(None, MODEL_ARCH_NAMES[family.arch])
    extras = family.describe(writer, config)
    todo = [_made(name, values) for name, values in extras.items()] + todo
    embedding = next(slot for slot in todo if slot.name == "token_embd.weight")
    vocabulary = read_vocabulary(
        job.source.tokenizer(), config, embedding.shape[0], job.source.title
    )
    writer.add_type("model")
    writer.add_name(job.source.title)
    writer.add_file_type(format.file_type)
    writer.add_quantization_version(GGML_QUANT_VERSION)
    vocabulary.describe(writer)
    _announce(writer, plan, todo)
    if dry_run:
        return TernaryReport(
            plan, (*(s.report() for s in todo), *absent), dry_run=True, note=job.note
        )
    _check_space(out, todo)
    with atomic(out, alone=True) as file:
        reports = _write(file, writer, job, todo, plan, format, progress)
        _seal(file)
        job.source.check_unchanged()
    return TernaryReport(plan, (*reports, *absent), note=job.note)


def check_place(out: Path) -> None:
    """Refuse a place that a file cannot be written to.

    Raises:
        UsageError: another ending than .gguf, something that exists, or a folder that does not.
    """
    if out.suffix != ".gguf":
        raise UsageError(f"output {out} is no name of a GGUF file: let it end in .gguf")
    if out.exists() or out.is_symlink():
        raise UsageError(f"output {out} exists: give a new name, or remove it first")
    if not out.parent.is_dir():
        raise UsageError(f"folder {out.parent} does not exist: make it first")


def _announce(writer: GGUFWriter, plan: TernaryPlan, todo: list[GgufSlot]) -> None:
    """What the file says of itself, and the tensors that are to follow."""
    writer.add_string("trilens.version", __version__)
    writer.add_string("trilens.plan", plan.to_json())
    writer.add_string(HASH_KEY, NO_HASH)
    writer.add_string(HEAD_HASH_KEY, NO_HASH)
    writer.add_uint32(N_HASHES_KEY, 2)
    for slot in todo:
        # The package takes any number for a type, but names only those it can decode.
        kind = cast("GGMLQuantizationType", slot.type_id)
        writer.add_tensor_info(
            slot.name, slot.shape, np.dtype(np.float32), slot.size_bytes, raw_dtype=kind
        )


def _made(name: str, values: NDArray[np.float32]) -> GgufSlot:
    return GgufSlot(name, (), 0, values.shape, "F32", values.nbytes, 0, values=values)


def _write(
    file: AtomicFile,
    writer: GGUFWriter,
    job: Job,
    todo: list[GgufSlot],
    plan: TernaryPlan,
    format: GgufFormat,
    progress: Progress | None,
) -> list[TensorReport]:
    reports = []
    try:
        writer.write_header_to_file(file.temporary)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for slot in todo:
            measured: dict[str, Any] = {}
            if slot.is_coded:
                measured = _write_coded(file, writer, job, slot, plan, format)
            elif slot.is_rounded:
                measured = _write_rounded(file, writer, job.source, slot)
            else:
                _put(file, writer, slot, _kept_bytes(job.source, slot))
            reports.append(slot.report(decoded_exactly=True, **measured))
            if progress is not None:
                progress(Step(len(reports), len(todo), slot.name))
    finally:
        writer.close()
    return reports


def _write_coded(
    file: AtomicFile,
    writer: GGUFWriter,
    job: Job,
    slot: GgufSlot,
    plan: TernaryPlan,
    format: GgufFormat,
) -> dict[str, Any]:
    """Write a matrix, or one for each expert, and give what its report says of it."""
    coded, measured = [], []
    sample = LevelSample()
    for piece in slot.pieces:
        matrix = matrix_of(job, piece, plan, sample)
        quant = matrix.quant
        trits, scales = quant.trits.numpy(), quant.units.per_block(quant.scales, format.block)
        if slot.order is not None:
            trits, scales = trits[slot.order], scales[slot.order]
        coded.append((trits, scales))
        measured.append((matrix, quant.sparsity))
    packed = [format.encode(*one) for one in coded]
    found = _put(file, writer, slot, np.concatenate(packed)).reshape(len(packed), -1)
    for part, like, one in zip(found, packed, coded, strict=True):
        _check_holds(format, part.reshape(like.shape), *one, slot.name)
    outcome, why = _worst(measured).outcome
    return {
        "outcome": outcome,
        "reason": why,
        "relative_error": sum(m.relative_error for m, _ in measured) / len(measured),
        "sparsity": sum(sparsity for _, sparsity in measured) / len(measured),
        "histogram": sample.result(),
    }


def _worst(measured: list[tuple[GgufMatrix, float]]) -> GgufMatrix:
    return max((matrix for matrix, _ in measured), key=lambda matrix: matrix.relative_error)


def _check_holds(
    format: GgufFormat,
    packed: NDArray[np.uint8],
    trits: NDArray[np.int8],
    scales: NDArray[np.float32],
    name: str,
) -> None:
    try:
        same = format.holds(packed, trits, scales)
    except CorruptFileError as cause:
        raise WriteError(f"{name} does not decode ({cause}): check the disk") from cause
    if not same:
        raise WriteError(f"{name} decodes to other weights than were coded: check the disk")


def _write_rounded(
    file: AtomicFile, writer: GGUFWriter, source: Checkpoint, slot: GgufSlot
) -> dict[str, Any]:
    """Write an embedding or a head in blocks of fewer bits, and measure what that costs."""
    kind = GGMLQuantizationType(slot.type_id)
    (piece,) = slot.pieces
    dense = _kept(source, slot, piece, torch.float32).contiguous().numpy()
    packed = np.empty((len(dense), slot.size_bytes // len(dense)), dtype=np.uint8)
    error = energy = 0.0
    for first, last in row_spans(*dense.shape):
        rows = dense[first:last]
        with np.errstate(over="ignore"):
            packed[first:last] = quantize(rows, kind)
        lost = (dequantize(packed[first:last], kind) - rows).astype(np.float64)
        error += float(np.sum(lost * lost))
        energy += float(np.sum(rows.astype(np.float64) ** 2))
    if not np.isfinite(error):
        raise NonFiniteError(
            f"tensor {piece.choice.name!r} has NaN, Inf or numbers beyond float16, which cannot be "
            f"rounded to {kind.name}: keep the embeddings"
        )
    _put(file, writer, slot, packed)
    return {"relative_error": error / energy if energy else 0.0}


def _kept_bytes(source: Checkpoint, slot: GgufSlot) -> NDArray[np.uint8]:
    """What a kept tensor is in the file.

    Shapes: → [size_bytes]
    """
    if slot.values is not None or slot.choice is None:
        return np.ascontiguousarray(slot.values).view(np.uint8).reshape(-1)
    dtype = _FLOAT_DTYPES[slot.type_id]
    found = [_kept(source, slot, piece, dtype) for piece in slot.pieces]
    values = found[0] if len(found) == 1 else torch.stack(found)
    return values.contiguous().view(torch.uint8).reshape(-1).numpy()


def _kept(source: Checkpoint, slot: GgufSlot, piece: Piece, dtype: torch.dtype) -> Tensor:
    """One tensor of the checkpoint as the file has it, before it is rounded."""
    values: Tensor = source.tensor(piece.choice.name)
    if piece.expert is not None:
        values = values[piece.expert]
    if slot.transposed:
        values = values.T
    if slot.change is not None:
        values = slot.change(values)
    if slot.order is not None:
        values = values[torch.from_numpy(slot.order)]
    values = values.to(dtype)
    return values + slot.offset if slot.offset else values


def _put(
    file: AtomicFile, writer: GGUFWriter, slot: GgufSlot, data: NDArray[np.uint8]
) -> NDArray[np.uint8]:
    """Write a tensor, and read it back.

    Shapes: data [...] uint8 → [size_bytes]

    Raises:
        WriteError: other bytes came back.
    """
    (stream,) = cast("list[Any]", writer.fout)
    begin = writer.ggml_pad(stream.tell(), writer.data_alignment)
    writer.write_tensor_data(data)
    stream.flush()
    found = np.frombuffer(file.get(slot.size_bytes, begin), dtype=np.uint8)
    if not np.array_equal(found, data.reshape(-1)):
        raise WriteError(f"{file.path} does not hold what was written to it: check the disk")
    return found


def _seal(file: AtomicFile) -> None:
    """Read the head back, put the tensors' hash in it, and the head's own."""
    written = read_gguf(file.temporary)
    head = written.content.bytes(0, written.data_begin).tobytes()
    hashes = ((HASH_KEY, data_hash), (HEAD_HASH_KEY, head_hash))  # the second covers the first
    for key, hash_of in hashes:
        before = before_hash(key)
        digest = hash_of(written)  # of the file as it is now
        if digest is None:
            raise WriteError(f"{file.path} does not hold what was written to it: check the disk")
        file.put(digest.encode(), head.index(before) + len(before))


def _check_space(out: Path, todo: list[GgufSlot]) -> None:
    needed = sum(slot.size_bytes for slot in todo)
    free = shutil.disk_usage(out.parent).free
    if needed > free:
        raise WriteError(
            f"folder {out.parent} has {free} bytes of free space: the file needs {needed}"
        )
