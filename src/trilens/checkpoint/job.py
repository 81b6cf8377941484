"""What `ternarize` does with a checkpoint: what becomes of each tensor, and what is copied."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from trilens.checkpoint.coding import entries
from trilens.checkpoint.format.names import (
    CARD_NAME,
    CONFIG_NAME,
    JOURNAL_NAME,
    MANIFEST_NAME,
    SOURCE_CARD_NAME,
)
from trilens.checkpoint.format.plan import TernaryPlan
from trilens.checkpoint.format.quantization_config import overrides
from trilens.checkpoint.format.skeleton import Choice, build_skeleton, choose
from trilens.checkpoint.source import Checkpoint
from trilens.errors import UsageError
from trilens.io.safetensors_header import TensorHeader

__all__ = ["DTYPE_NAMES", "Job", "follow", "read_job"]

DTYPE_NAMES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}
"""Floating-point dtypes, as safetensors and as torch call them."""


_WEIGHT_SUFFIXES = (".safetensors", ".safetensors.index.json", ".bin.index.json")
_SIDE_SUFFIXES = frozenset(
    {".txt", ".model", ".tiktoken", ".jinja", ".vocab", ".bpe", ".spm", ".py"}
)
# Other JSON files may say of the source what is not true of the output (how well it was trained).
_SIDE_FILE = re.compile(
    r"(tokenizer|special_tokens|added_tokens|vocab|merges|generation_config|chat_template"
    r"|tekken|normalizer|(\w+_)?(pre)?processor_config).*\.json|(LICENSE|NOTICE|USE_POLICY).*",
    re.IGNORECASE,
)
_NOT_COPIED = frozenset({CONFIG_NAME, CARD_NAME, SOURCE_CARD_NAME, MANIFEST_NAME, JOURNAL_NAME})


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
    def cards(self) -> tuple[Path, ...]:
        """The source's own README.md, if it has one."""
        path = self.source.folder / CARD_NAME
        return (path,) if path.is_file() else ()

    @property
    def pairs(self) -> Iterator[tuple[Choice, TensorHeader]]:
        """Every tensor with its header."""
        return ((choice, self.source.headers[choice.name]) for choice in self.choices)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The stored floating-point tensors, mapped."""
        return {
            name: self.source.tensor(name)
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
    job = Job(source, choices, plan, _side_files(source.folder), type(skeleton))
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


def _side_files(folder: Path) -> tuple[Path, ...]:
    """Tokenizer, generation settings, licence: small files that belong to the checkpoint."""
    return tuple(
        path
        for path in sorted(folder.iterdir())
        if path.is_file()
        and (path.suffix in _SIDE_SUFFIXES or _SIDE_FILE.fullmatch(path.name))
        and not path.name.endswith(_WEIGHT_SUFFIXES)
        and not path.name.startswith(".")
        and path.name not in _NOT_COPIED
    )
