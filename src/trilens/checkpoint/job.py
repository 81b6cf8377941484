"""What `ternarize` does with a checkpoint: what becomes of each tensor, and what is copied."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from trilens.checkpoint.coding import entries
from trilens.checkpoint.format.names import CARD_NAME, CONFIG_NAME, JOURNAL_NAME, MANIFEST_NAME
from trilens.checkpoint.format.plan import TernaryPlan
from trilens.checkpoint.format.quantization_config import overrides
from trilens.checkpoint.format.skeleton import Choice, build_skeleton, choose
from trilens.checkpoint.source import Checkpoint
from trilens.errors import UsageError
from trilens.io.safetensors_header import TensorHeader
from trilens.io.side_files import side_files

__all__ = ["DTYPE_NAMES", "Job", "follow", "read_job"]

DTYPE_NAMES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}
"""Floating-point dtypes, as safetensors and as torch call them."""


_NOT_COPIED = frozenset({CONFIG_NAME, CARD_NAME, MANIFEST_NAME, JOURNAL_NAME})


@dataclass(frozen=True, slots=True)
class Job:
    """A checkpoint, and what is to become of each of its tensors.

    Attributes:
        source: The checkpoint.
        choices: What is possible with each tensor, and left by the plan.
        plan: How matrices are ternarized.
        side_files: Small files that are copied.
        model_class: The class that the tensors fill.
    """

    source: Checkpoint
    choices: tuple[Choice, ...]
    plan: TernaryPlan
    side_files: tuple[Path, ...]
    model_class: type

    @property
    def pairs(self) -> Iterator[tuple[Choice, TensorHeader]]:
        """Every tensor with its header."""
        return ((choice, self.source.headers[choice.name]) for choice in self.choices)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The stored floating-point tensors, mapped."""
        return {
            name: self.source.mapped_tensor(name)
            for name, header in self.source.headers.items()
            if header.dtype in DTYPE_NAMES
        }

    def of_file(self, file: Path) -> list[tuple[Choice, TensorHeader]]:
        """The tensors of one source file, in the order of their bytes."""
        return [(choice, header) for choice, header in self.pairs if header.file == file]


def read_job(src: str | os.PathLike[str], plan: TernaryPlan, *, revision: str | None = None) -> Job:
    """Read a checkpoint, and follow a plan's expressions.

    Raises: as `ternarize`, for a source or a plan that cannot be used.
    """
    source = Checkpoint.open(src, revision=revision)
    skeleton = build_skeleton(source.config, source.headers)
    choices = follow(plan, choose(skeleton, source.headers))
    copied = tuple(p for p in side_files(source.folder) if p.name not in _NOT_COPIED)
    job = Job(source, choices, plan, copied, type(skeleton))
    names = [name for pair in job.pairs for name, *_ in entries(*pair, plan)]
    if len(set(names)) < len(names):
        raise UsageError(f"{source.name} has tensors named like packed parts: they would collide")
    overrides(plan, choices, source.headers)  # refuses before anything is written
    return job


def follow(plan: TernaryPlan, choices: tuple[Choice, ...]) -> tuple[Choice, ...]:
    """What the plan's expressions leave of what is possible."""
    possible = [choice.name for choice in choices if choice.storage != "kept"]
    kept = plan.chosen(possible, [choice.name for choice in choices])
    if len(kept) == len(possible):
        raise UsageError(
            "nothing is left to make ternary: the checkpoint has no linear layer of a block that "
            "the plan does not keep"
        )
    return tuple(
        replace(choice, storage="kept", reason=kept[choice.name]) if choice.name in kept else choice
        for choice in choices
    )
