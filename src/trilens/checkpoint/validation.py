"""Reading a ternary checkpoint back, every byte, and proving what it claims."""

from __future__ import annotations

import math
import os
from pathlib import Path

import torch

from trilens.checkpoint.coding import CODES_PER_BYTE, packed_parts
from trilens.checkpoint.format.manifest import read_manifest
from trilens.checkpoint.format.names import CONFIG_NAME, MANIFEST_NAME, QUANT_METHOD, find_parts
from trilens.checkpoint.format.plan import TernaryPlan
from trilens.checkpoint.format.report import TensorReport, TernaryReport
from trilens.checkpoint.source import tensor_of
from trilens.errors import ConfigError, CorruptFileError, ModelNotFoundError, TrilensError
from trilens.io.guarded import OpenFile
from trilens.io.json import read_json
from trilens.io.listing import check_files, extra_files
from trilens.io.messages import listed
from trilens.io.paths import as_path
from trilens.io.safetensors_header import TensorHeader
from trilens.io.weight_files import read_headers
from trilens.models.build import read_config
from trilens.models.loading import check_fits
from trilens.ternary.calibrated.rules import levels_of
from trilens.ternary.codecs.rows import expand_rows, holds_code_3, is_compact, unpack_rows

__all__ = ["unlisted", "validate"]

_CHUNK_BYTES = 1 << 22


def validate(path: str | os.PathLike[str]) -> TernaryReport:
    """Check a ternary checkpoint against its manifest, down to the last code.

    In this order: the manifest's own hash; names, sizes and hashes of all files; the headers of
    the weight files; of each coded matrix the shapes, the codes (none is 3, what fills up a row
    is zero), the scales (finite) and the share of zeros that was reported; at last, whether the
    configuration builds a model that these tensors fill.

    Args:
        path: the directory that `ternarize` wrote.

    Returns:
        The report of the run that wrote it.

    Raises:
        ModelNotFoundError: no such directory, or no manifest in it.
        CorruptFileError: says which file or tensor is damaged, and how.
        ConfigError: a configuration that builds no model.
    """
    folder = as_path(path, "directory")
    if not folder.is_dir():
        raise ModelNotFoundError(f"directory {folder} does not exist")
    manifest = read_manifest(folder)
    try:
        report = TernaryReport.from_dict(manifest["report"])
        files = dict(manifest["files"])
    except (TrilensError, KeyError, TypeError, ValueError, AttributeError) as cause:
        raise CorruptFileError(
            f"{folder} has a manifest without a valid report: {cause}"
        ) from cause
    check_files(folder, files)
    settings = read_json(folder / CONFIG_NAME, ConfigError, non_finite=True)
    config = settings.get("quantization_config")
    if not isinstance(config, dict) or config.get("quant_method") != QUANT_METHOD:
        raise CorruptFileError(f"{folder} has a {CONFIG_NAME} without its quantization_config")
    headers = read_headers(folder)
    foreign = sorted({header.file.name for header in headers.values()} - set(files))
    if foreign:
        raise CorruptFileError(
            f"{folder} reads weights from {foreign[0]}, which its manifest lacks"
        )
    _check_tensors(report, headers)
    check_fits(folder, read_config(folder, settings, trusted=False)[0], headers)
    return report


def unlisted(folder: Path) -> tuple[str, ...]:
    """Names in a ternary checkpoint's directory that its manifest does not list.

    Raises:
        LoadError: as `read_manifest`.
    """
    return extra_files(folder, (*read_manifest(folder)["files"], MANIFEST_NAME))


def _check_tensors(report: TernaryReport, headers: dict[str, TensorHeader]) -> None:
    unclaimed = set(headers)
    opened: dict[Path, OpenFile] = {}
    for tensor in report.tensors:
        names = {"": tensor.name}
        if tensor.outcome != "kept":
            names = find_parts(tensor.packed_as, headers)
        missing = [name for name in names.values() if name not in headers]
        if missing or (tensor.outcome != "kept" and "codes" not in names):
            raise CorruptFileError(f"tensor {tensor.name} is missing from the weight files")
        unclaimed -= set(names.values())
        found = {part: headers[name] for part, name in names.items()}
        size_bytes = sum(header.size_bytes for header in found.values())
        if size_bytes != tensor.size_bytes:
            raise CorruptFileError(
                f"tensor {tensor.name} takes {size_bytes} bytes, not "
                f"{tensor.size_bytes} as reported"
            )
        if tensor.outcome == "kept":
            if found[""].shape != tensor.shape:
                raise CorruptFileError(f"tensor {tensor.name} has shape {found[''].shape}")
            continue
        for header in found.values():
            if header.file not in opened:
                opened[header.file] = OpenFile(header.file)
        _check_coded(tensor, report.plan, found, opened)
    if unclaimed:
        raise CorruptFileError(f"tensor {min(unclaimed)} is in the files, but not in the report")


def _check_coded(
    tensor: TensorReport,
    plan: TernaryPlan,
    found: dict[str, TensorHeader],
    opened: dict[Path, OpenFile],
) -> None:
    plan = plan.of(tensor.name)
    wanted = {part: dtype for part, dtype, *_ in packed_parts((), 1, 1, plan)}
    if set(found) != set(wanted):
        raise CorruptFileError(f"tensor {tensor.name} has parts {listed(sorted(found), 8)}")
    zeros = n_codes = 0
    for part, header in found.items():
        file = opened[header.file]
        if part.endswith("codes"):
            part_zeros, part_codes = _count_codes(tensor, header, file, plan)
            zeros, n_codes = zeros + part_zeros, n_codes + part_codes
        elif header.dtype != wanted[part]:
            raise CorruptFileError(
                f"{header.name} is stored as {header.dtype}, not as {wanted[part]}"
            )
        elif not bool(torch.isfinite(tensor_of(header, file)).all()):
            raise CorruptFileError(f"{header.name} holds NaN or Inf: scales are finite")
    if tensor.sparsity is None or abs(zeros / n_codes - tensor.sparsity) > 1e-9:
        raise CorruptFileError(
            f"tensor {tensor.name} has {zeros} zeros of {n_codes} trits, not the share reported"
        )


def _count_codes(
    tensor: TensorReport, header: TensorHeader, file: OpenFile, plan: TernaryPlan
) -> tuple[int, int]:
    """Zeros and trits of one tensor of codes, which are legal."""
    if header.dtype != "U8" or len(header.shape) != len(tensor.shape):
        raise CorruptFileError(
            f"{header.name} is no tensor of codes: {header.dtype} {header.shape}"
        )
    in_byte = CODES_PER_BYTE[plan.storage]
    *lead, rows, row_bytes = header.shape
    cols = next((n for n in tensor.shape[-2:][::-1] if math.ceil(n / in_byte) == row_bytes
                 and rows * n == math.prod(tensor.shape[-2:])), None)  # fmt: skip
    if cols is None or tuple(lead) != tensor.shape[:-2]:
        raise CorruptFileError(
            f"{header.name} has shape {header.shape}, which does not hold {tensor.shape}"
        )
    zeros = 0
    step = max(1, _CHUNK_BYTES // row_bytes) * row_bytes
    for begin in range(header.begin, header.end, step):
        raw = file.bytes(begin, min(begin + step, header.end))
        trits = _trits(torch.from_numpy(raw).reshape(-1, row_bytes), header.name, plan)
        if trits[:, cols:].any():
            raise CorruptFileError(f"{header.name} holds trits past the end of its rows")
        zeros += trits[:, :cols].numel() - int(torch.count_nonzero(trits[:, :cols]))
    return zeros, math.prod(tensor.shape)


def _trits(codes: torch.Tensor, name: str, plan: TernaryPlan) -> torch.Tensor:
    """All trits of some rows, with what fills them up.

    Shapes: codes uint8 [rows, bytes] → int8 [rows, 4 or 5 × bytes]
    """
    row_trits = CODES_PER_BYTE[plan.storage] * codes.shape[-1]
    if plan.storage == "compact":
        if not is_compact(codes):
            raise CorruptFileError(f"{name} holds a byte above 242: five trits make at most that")
        return expand_rows(codes, row_trits)
    if levels_of(plan.rule) == 3 and holds_code_3(codes):
        raise CorruptFileError(f"{name} holds the code 3: codes are 0, 1 or 2")
    return unpack_rows(codes, row_trits)
