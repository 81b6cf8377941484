"""A ternary checkpoint written as transformers' own BitNet layout, which loads without trilens.

Each packed matrix becomes `weight`, uint8 [out / 4, in], and `weight_scale`, one number. The class
is `autobitlinear`, which multiplies by the scale; it also rounds the input of each such layer to 8
bits, so that outputs differ a little from those of the same trits here.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from trilens.checkpoint.arriving import two_bit_codes
from trilens.checkpoint.bitnet import BITNET
from trilens.checkpoint.coding import Entry
from trilens.checkpoint.dense import stored_dtype
from trilens.checkpoint.format.model_card import Origin, bitnet_card
from trilens.checkpoint.format.names import DENSE_NAME
from trilens.checkpoint.format.report import TensorReport, TernaryReport
from trilens.checkpoint.format.shards import ShardWriter
from trilens.checkpoint.format.skeleton import Choice
from trilens.checkpoint.job import DTYPE_NAMES, Job
from trilens.checkpoint.plain_folder import write_folder
from trilens.checkpoint.source import Checkpoint
from trilens.errors import UsageError, WriteError
from trilens.io.listed_folder import check_listed
from trilens.io.safetensors_header import TensorHeader
from trilens.progress import Progress
from trilens.ternary.calibrated.rules import levels_of, n_planes_of
from trilens.ternary.codecs.packing import BitNet as Codec
from trilens.ternary.codecs.rows import unpack_rows

__all__ = ["BITNET_KIND", "validate_bitnet", "write_bitnet"]

BITNET_KIND = "trilens-bitnet-checkpoint"
"""What the manifest of such a folder calls it."""


def write_bitnet(
    job: Job, out: Path, *, dry_run: bool = False, progress: Progress | None = None
) -> TernaryReport:
    """Write a checkpoint that transformers loads by itself, packed: its own BitNet layout.

    Scales have the dtype of the configuration, in which transformers holds them; where one is no
    number of that dtype it is rounded, and the report gives the error (`TernaryPlan.scale_dtype`
    makes it exact).

    Args:
        job: a ternary checkpoint with one scale for each matrix.
        out: a new directory, written whole or not at all.
        dry_run: report what would be written.
        progress: called with each tensor.

    Raises:
        UsageError: the source is not ternary, has a matrix that the layout cannot hold, or the
            directory is not empty.
        WriteError: it cannot be written, or decodes to other trits.

    Memory: the trits of the largest matrix, twice.
    """
    if job.packed is not None:
        for choice, header in job.pairs:
            if choice.storage != "kept":
                _check(job, choice, header)
    return write_folder(job, out, _BitNet(job), dry_run=dry_run, progress=progress)


def validate_bitnet(path: Path) -> tuple[str, ...]:
    """Check what `write_bitnet` wrote against its manifest, and whether the weights fit the model.

    Returns, raises: as `check_listed`; also CorruptFileError for weights that do not fit.
    """
    names = check_listed(path, DENSE_NAME, BITNET_KIND)
    Checkpoint.open(path)
    return names


def _check(job: Job, choice: Choice, header: TensorHeader) -> None:
    """Refuse what the layout cannot hold, by name."""
    plan = job.plan.of(choice.name)
    problem = ""
    if job.plan.rotate:
        problem = "is rotated"
    elif plan.rule == "asymmetric" or n_planes_of(plan.rule) == 2:
        problem = f"has an offset or a second plane (rule {plan.rule!r})"
    elif levels_of(plan.rule) == 4:
        problem = f"has four levels (rule {plan.rule!r})"
    elif plan.per != "tensor":
        problem = f"has a scale per {plan.per}"
    elif choice.storage != "layer" or choice.transposed:
        problem = "is merged, transposed or one of many experts"
    elif f"{choice.name.removesuffix('.weight')}.bias" in job.headers:
        problem = "has a bias, which transformers would multiply by the scale too"
    elif header.shape[0] % 4:
        problem = f"has {header.shape[0]} rows"
    if problem:
        raise UsageError(
            f"{choice.name} {problem}: transformers' BitNet layout holds trits of plain linear "
            "layers without bias whose rows are a multiple of 4, with one scale for each matrix; "
            "ternarize with --per tensor, keep the matrix, or take the format 'dense'"
        )


@dataclass(frozen=True, slots=True)
class _BitNet:
    """Matrices as packed trits and one number."""

    job: Job
    kind: str = BITNET_KIND
    needs: str = "to write as BitNet"

    def entries(self, choice: Choice, header: TensorHeader) -> list[Entry]:
        rows, cols = header.shape
        dtype = stored_dtype(self.job.source.settings)
        width = getattr(torch, DTYPE_NAMES[dtype]).itemsize
        return [
            (choice.name, "U8", (rows // 4, cols), rows * cols // 4),
            (f"{choice.name}_scale", dtype, (1,), width),
        ]

    def write(self, report: TensorReport, choice: Choice, writer: ShardWriter) -> TensorReport:
        packed = self.job.packed or {}
        parts = {p: self.job.source.tensor(n) for p, n in packed[choice.name].items()}
        own = self.job.plan.of(choice.name)
        cols = report.shape[1]
        codes = two_bit_codes(parts["codes"], cols, choice.name, own.storage)
        trits = unpack_rows(codes, cols).contiguous()
        found = Codec().encode(trits)
        begin = writer.slots[choice.name].begin
        writer.put(begin, found)
        back = writer.get(begin, found.nbytes)
        if not np.array_equal(Codec().decode(back, report.shape).trits, trits.numpy()):
            raise WriteError(
                f"{choice.name} decodes to other trits than there were: check the disk"
            )
        exact = parts["scale"].float().reshape(1)
        dtype = getattr(torch, DTYPE_NAMES[stored_dtype(self.job.source.settings)])
        scale = exact.to(dtype)
        writer.put(writer.slots[f"{choice.name}_scale"].begin, scale.view(torch.uint8).numpy())
        error = (
            float(((scale.double() - exact.double()) / exact.double()).square()) if exact else 0.0
        )
        kept = "its scale is rounded to the configuration's dtype" if error else ""
        return replace(
            report,
            outcome="ternary" if error else "already ternary",
            reason=kept,
            relative_error=error,
            sparsity=1.0 - int(torch.count_nonzero(trits)) / trits.numel(),
        )

    def settings(self) -> dict[str, Any]:
        coded = {c.target.removesuffix(".weight") for c, _ in self.job.pairs if c.storage != "kept"}
        others = [
            path
            for path, module in self.job.model.named_modules()
            if isinstance(module, nn.Linear) and path not in coded
        ]
        return {
            "quantization_config": {
                "quant_method": BITNET,
                "linear_class": "autobitlinear",
                "quantization_mode": "offline",
                "modules_to_not_convert": others,
            }
        }

    def card(self, report: TernaryReport, origin: Origin) -> str:
        return bitnet_card(report, origin)
