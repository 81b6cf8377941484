"""A ternary checkpoint written with dense weights, for engines that do not know the format."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trilens.checkpoint.arriving import two_bit_codes
from trilens.checkpoint.coding import Entry
from trilens.checkpoint.format.model_card import Origin, dense_card
from trilens.checkpoint.format.names import DENSE_NAME
from trilens.checkpoint.format.report import TensorReport, TernaryReport
from trilens.checkpoint.format.shards import ShardWriter
from trilens.checkpoint.format.skeleton import Choice
from trilens.checkpoint.job import DTYPE_NAMES, Job
from trilens.checkpoint.plain_folder import write_folder
from trilens.checkpoint.source import Checkpoint
from trilens.io.listed_folder import check_listed
from trilens.io.safetensors_header import TensorHeader
from trilens.progress import Progress
from trilens.ternary.calibrated.rules import levels_of
from trilens.ternary.packed.matrix import Packed
from trilens.ternary.rotation import rotate_back

__all__ = ["stored_dtype", "validate_dense", "write_dense"]

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
    return write_folder(job, out, _Dense(job), dry_run=dry_run, progress=progress)


def validate_dense(path: Path) -> tuple[str, ...]:
    """Check what `write_dense` wrote against its manifest, and whether the weights fit the model.

    Returns, raises: as `check_listed`; also CorruptFileError for weights that do not fit.
    """
    names = check_listed(path, DENSE_NAME, _KIND)
    Checkpoint.open(path)
    return names


def stored_dtype(settings: Mapping[str, Any]) -> str:
    """The configuration's dtype as safetensors calls it."""
    name = settings.get("dtype") or settings.get("torch_dtype") or "float32"
    return _CODES.get(str(name).removeprefix("torch."), "F32")


@dataclass(frozen=True, slots=True)
class _Dense:
    """Matrices as the source held them before, in the dtype of the configuration."""

    job: Job
    kind: str = _KIND
    needs: str = "to make dense"

    def entries(self, choice: Choice, header: TensorHeader) -> list[Entry]:
        dtype = stored_dtype(self.job.source.settings)
        width = getattr(torch, DTYPE_NAMES[dtype]).itemsize
        n_weights = torch.Size(header.shape).numel()
        return [(choice.name, dtype, header.shape, n_weights * width)]

    def write(self, report: TensorReport, choice: Choice, writer: ShardWriter) -> TensorReport:
        dtype = DTYPE_NAMES[stored_dtype(self.job.source.settings)]
        matrix = _unpacked(self.job, choice, self.job.headers[choice.name])
        dense = matrix.to(getattr(torch, dtype))
        begin = writer.slots[choice.name].begin
        writer.put(begin, dense.contiguous().view(torch.uint8).numpy())
        energy = float(matrix.double().square().sum())
        lost = float((dense.double() - matrix.double()).square().sum())
        error = lost / energy if energy else 0.0
        return replace(report, outcome="dense", reason="", relative_error=error)

    def settings(self) -> dict[str, Any]:
        return {}

    def card(self, report: TernaryReport, origin: Origin) -> str:
        return dense_card(report, origin)


def _unpacked(job: Job, choice: Choice, header: TensorHeader) -> Tensor:
    """The weight as the source held it before, in float32."""
    own = job.plan.of(choice.name)
    assert job.packed is not None
    parts = {part: job.source.tensor(name) for part, name in job.packed[choice.name].items()}
    cols = header.shape[-2 if choice.transposed else -1]
    size, levels = own.group_size, levels_of(own.rule)
    two_bit = {
        part: two_bit_codes(tensor, cols, choice.name, own.storage, levels)
        if part.endswith("codes")
        else tensor.float()
        for part, tensor in parts.items()
    }
    dense = Packed(**two_bit, cols=cols, group_size=size, levels=levels).dense()
    if own.rotate or job.plan.rotate:
        dense = rotate_back(dense)
    return dense.transpose(-1, -2) if choice.transposed else dense
