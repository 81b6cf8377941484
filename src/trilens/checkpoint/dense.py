"""A ternary checkpoint written with dense weights, for engines that do not know the format."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trilens.checkpoint.arriving import two_bit_codes
from trilens.checkpoint.auxiliary_files import origin_of, weight_index
from trilens.checkpoint.coding import Entry, planned
from trilens.checkpoint.format.model_card import dense_card
from trilens.checkpoint.format.names import CARD_NAME, CONFIG_NAME, DENSE_NAME, SOURCE_CARD_NAME
from trilens.checkpoint.format.report import TensorReport, TernaryReport
from trilens.checkpoint.format.shards import ShardWriter
from trilens.checkpoint.format.skeleton import Choice
from trilens.checkpoint.job import DTYPE_NAMES, Job
from trilens.checkpoint.source import Checkpoint
from trilens.errors import UsageError
from trilens.io.atomic import atomic_folder, write_bytes
from trilens.io.guarded import read_bytes
from trilens.io.json import json_bytes
from trilens.io.listed_folder import check_listed, write_list
from trilens.io.safetensors_header import TensorHeader
from trilens.progress import Progress, Step
from trilens.ternary.calibrated.rules import levels_of
from trilens.ternary.packed.matrix import Packed
from trilens.ternary.rotation import rotate_back

__all__ = ["validate_dense", "write_dense"]

_KIND = "trilens-dense-checkpoint"
_CODES = {name: code for code, name in DTYPE_NAMES.items()}


def write_dense(
    job: Job, out: Path, *, dry_run: bool = False, progress: Progress | None = None
) -> TernaryReport:
    """Write a checkpoint that transformers loads by itself: each matrix as scale · trit.

    Weights have the dtype of the configuration. Where a product is no number of that dtype it is
    rounded, and the report gives the error; float32, and scales that were rounded to the dtype
    when the trits were made (`TernaryPlan.scale_dtype`), are exact but for the rules of two terms.

    Args:
        job: a ternary checkpoint.
        out: a new directory, written whole or not at all.
        dry_run: report what would be written.
        progress: called with each tensor.

    Raises:
        UsageError: the source is not ternary, or the directory is not empty.
        WriteError: it cannot be written.

    Memory: the largest matrix in float32, twice.
    """
    if job.packed is None:
        raise UsageError(
            f"{job.source.name} has no packed weights to make dense: ternarize it into a directory "
            "first, and give that directory"
        )
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{out} exists and is no empty directory: give a new one")
    dtype = _dtype(job.source.settings)
    todo = [(c, h, _entry(c, h, dtype)) for c, h in job.pairs]
    reports: list[TensorReport] = []
    if dry_run:
        reports = [replace(planned(c, h, job.plan), size_bytes=entry[3]) for c, h, entry in todo]
        return TernaryReport(job.plan, tuple(reports), dry_run=True, note=job.note)
    with atomic_folder(out) as folder:
        for file in job.source.files:
            mine = [each for each in todo if each[1].file == file]
            with ShardWriter(folder / file.name, [entry for _, _, entry in mine]) as writer:
                for choice, header, entry in mine:
                    reports.append(_write(job, choice, header, entry, writer))
                    if progress is not None:
                        progress(Step(len(reports), len(todo), choice.name))
                writer.commit()
        report = TernaryReport(job.plan, tuple(reports), note=job.note)
        for name, data in _small_files(job, report, todo).items():
            write_bytes(folder / name, data)
        job.source.check_unchanged()
        write_list(folder, DENSE_NAME, _KIND)
    return report


def validate_dense(path: Path) -> tuple[str, ...]:
    """Check what `write_dense` wrote against its manifest, and whether the weights fit the model.

    Returns, raises: as `check_listed`; also CorruptFileError for weights that do not fit.
    """
    names = check_listed(path, DENSE_NAME, _KIND)
    Checkpoint.open(path)
    return names


def _dtype(settings: Mapping[str, Any]) -> str:
    """The configuration's dtype as safetensors calls it."""
    name = settings.get("dtype") or settings.get("torch_dtype") or "float32"
    return _CODES.get(str(name).removeprefix("torch."), "F32")


def _entry(choice: Choice, header: TensorHeader, dtype: str) -> Entry:
    if choice.storage == "kept":
        return choice.name, header.dtype, header.shape, header.size_bytes
    n_weights = torch.Size(header.shape).numel()
    width = getattr(torch, DTYPE_NAMES[dtype]).itemsize
    return choice.name, dtype, header.shape, n_weights * width


def _write(
    job: Job, choice: Choice, header: TensorHeader, entry: Entry, writer: ShardWriter
) -> TensorReport:
    report = replace(planned(choice, header, job.plan), size_bytes=entry[3], decoded_exactly=True)
    begin = writer.slots[choice.name].begin
    if choice.storage == "kept":
        writer.put(begin, job.source.opened(header.file).bytes(header.begin, header.end))
        return report
    matrix = _unpacked(job, choice, header)
    dense = matrix.to(getattr(torch, DTYPE_NAMES[entry[1]]))
    writer.put(begin, dense.contiguous().view(torch.uint8).numpy())
    energy = float(matrix.double().square().sum())
    lost = float((dense.double() - matrix.double()).square().sum())
    error = lost / energy if energy else 0.0
    return replace(report, outcome="dense", reason="", relative_error=error)


def _unpacked(job: Job, choice: Choice, header: TensorHeader) -> Tensor:
    """The weight as the source held it before, in float32."""
    own = job.plan.of(choice.name)
    assert job.packed is not None
    parts = {part: job.source.tensor(name) for part, name in job.packed[choice.name].items()}
    cols = header.shape[-2 if choice.transposed else -1]
    two_bit = {
        part: two_bit_codes(tensor, cols, choice.name, own.storage, levels_of(own.rule))
        if part.endswith("codes")
        else tensor.float()
        for part, tensor in parts.items()
    }
    dense = Packed(**two_bit, cols=cols, group_size=own.group_size).dense()
    if own.rotate or job.plan.rotate:
        dense = rotate_back(dense)
    return dense.transpose(-1, -2) if choice.transposed else dense


def _small_files(
    job: Job, report: TernaryReport, todo: list[tuple[Choice, TensorHeader, Entry]]
) -> dict[str, bytes]:
    found = job.source.copied
    for path in job.source.cards:
        found[SOURCE_CARD_NAME] = read_bytes(path)
    config = dict(job.source.settings)
    explicit = config.pop("quantization_config").get("weights")
    del config["transformers_weights"]
    if explicit:
        config["transformers_weights"] = explicit
    index = weight_index(job.source.files, explicit, [(h.file, e) for _, h, e in todo])
    if index is not None:
        found[index[0]] = json_bytes(index[1])
    found[CONFIG_NAME] = json_bytes(config)
    found[CARD_NAME] = dense_card(report, origin_of(job)).encode()
    return found
