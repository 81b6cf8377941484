"""What `ternarize` does with a checkpoint: what becomes of each of its tensors."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from trilens.checkpoint.format.names import find_parts
from trilens.checkpoint.format.plan import TernaryPlan
from trilens.checkpoint.format.skeleton import HOMELESS, Choice, build_skeleton, choose
from trilens.checkpoint.source import Checkpoint
from trilens.checkpoint.validation import validate
from trilens.errors import UsageError
from trilens.io.messages import listed
from trilens.io.safetensors_header import TensorHeader
from trilens.models.foreign_names import check_names

__all__ = ["DTYPE_NAMES", "Job", "read_job"]

DTYPE_NAMES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}
"""Floating-point dtypes, as safetensors and as torch call them."""


@dataclass(frozen=True, slots=True)
class Job:
    """A checkpoint, and what is to become of each of its tensors.

    Attributes:
        source: The checkpoint.
        headers: Every tensor; of what `ternarize` wrote, as it was before.
        model: The skeleton that the tensors fill.
        choices: What is possible with each tensor, and left by the plan.
        plan: How matrices are ternarized, or were.
        packed: Of what `ternarize` wrote, the stored parts of each matrix; None for plain weights.
        note: What the output computes otherwise than the model that it comes from.
    """

    source: Checkpoint
    headers: Mapping[str, TensorHeader]
    model: Any
    choices: tuple[Choice, ...]
    plan: TernaryPlan
    packed: Mapping[str, Mapping[str, str]] | None
    note: str = ""

    @property
    def keeps_trits(self) -> bool:
        """Whether the source's trits are taken as they are."""
        bitnet = self.source.bitnet
        return self.packed is not None or (bitnet is not None and bool(bitnet.matrices))

    @property
    def pairs(self) -> Iterator[tuple[Choice, TensorHeader]]:
        """Every tensor with its header."""
        return ((choice, self.headers[choice.name]) for choice in self.choices)

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


def read_job(
    src: str | os.PathLike[str],
    plan: TernaryPlan,
    *,
    revision: str | None = None,
    ternary: bool = False,
    tokenizer: Any = None,
) -> Job:
    """Read a checkpoint, and follow a plan's expressions.

    Args:
        src: directory or hub id.
        plan: what the caller asked; a checkpoint that is ternary already takes no orders.
        revision: of a hub id.
        ternary: also take what `ternarize` wrote.
        tokenizer: goes before the checkpoint's own.

    Raises: as `ternarize`, for a source or a plan that cannot be used.
    """
    source = Checkpoint.open(src, revision=revision, ternary=ternary, tokenizer=tokenizer)
    headers, packed, own, note = source.headers, None, plan, ""
    if source.is_ternary:
        headers, packed, own, note = _read_packed(source, replace(plan, embeddings="keep"))
        own = replace(own, embeddings=plan.embeddings)
    elif source.bitnet is not None:
        note = source.bitnet.note
        if source.bitnet.matrices:
            _check_no_orders(source, replace(plan, storage="two_bit", embeddings="keep"))
    elif source.float8 is not None:
        note = source.float8.note
    model = build_skeleton(source.config, headers)
    choices = choose(model, headers)
    check_names(source.name, (choice.name for choice in choices if choice.reason == HOMELESS))
    if packed is not None:
        choices = _as_stored(choices, packed)
    followed = _follow(plan, choices)
    if source.bitnet is not None and not source.bitnet.matrices:
        note = f"{note}{_other_trits(followed, plan)}"
    job = Job(source, headers, model, followed, own, packed, note)
    _check_all_coded(job)
    return job


def _other_trits(choices: Iterable[Choice], plan: TernaryPlan) -> str:
    """What a plan loses of a source whose layers make trits of plain weights in each call."""
    lost = []
    for choice in choices:
        own = plan.of(choice.name)
        is_same = (own.rule, own.per, own.rotate) == ("absmean", "tensor", False)
        if choice.is_matrix and (choice.storage == "kept" or not is_same):
            lost.append(choice.name)
    if not lost:
        return ""
    return (
        f" Its layers were trained with the trits of absmean, one scale per tensor, and this plan "
        f"gives {len(lost)} of its matrices other values ({listed(lost, 2)}): leave rule, scales "
        "and rotation out to keep the trits."
    )


def _read_packed(
    source: Checkpoint, plan: TernaryPlan
) -> tuple[dict[str, TensorHeader], dict[str, dict[str, str]], TernaryPlan, str]:
    """Headers as they were before `ternarize`, the parts of each matrix, the plan, and a note."""
    report = validate(source.folder)
    _check_no_orders(source, plan)
    headers, packed = {}, {}
    for tensor in report.tensors:
        name, size_bytes = tensor.name, tensor.size_bytes_before
        if tensor.outcome == "kept":
            headers[name] = source.headers[name]
            continue
        packed[name] = find_parts(tensor.packed_as, source.headers)
        file = source.headers[packed[name]["codes"]].file
        headers[name] = TensorHeader(name, "F32", tensor.shape, file, 0, size_bytes)
    return headers, packed, report.plan, report.note


def _check_no_orders(source: Checkpoint, plan: TernaryPlan) -> None:
    """Refuse a plan for trits that are there."""
    if plan != TernaryPlan():
        raise UsageError(
            f"{source.name} is ternary already, and its trits are kept as they are: leave out "
            "the rule and every other option of the plan, or give the checkpoint with plain weights"
        )


def _check_all_coded(job: Job) -> None:
    """Refuse packed or float8 matrices that have no place as ternary ones."""
    for choice in job.choices:
        if choice.name in job.source.decoded and choice.storage == "kept":
            raise UsageError(
                f"{job.source.name} stores {choice.name} packed, where trilens keeps weights as "
                f"they are ({choice.reason}): give the checkpoint with plain weights"
            )


def _as_stored(choices: tuple[Choice, ...], packed: Collection[str]) -> tuple[Choice, ...]:
    """Of a ternary checkpoint: what is kept there is kept here."""
    return tuple(
        choice
        if choice.name in packed or choice.storage == "kept"
        else replace(choice, storage="kept", reason="kept in the ternary checkpoint")
        for choice in choices
    )


def _follow(plan: TernaryPlan, choices: tuple[Choice, ...]) -> tuple[Choice, ...]:
    """What the plan's expressions leave of what is possible."""
    possible = [choice.name for choice in choices if choice.storage != "kept"]
    kept = plan.chosen(possible, [choice.name for choice in choices])
    if len(kept) == len(possible):
        reasons = Counter(choice.reason for choice in choices if choice.is_matrix and choice.reason)
        why = "".join(f"; {count} matrices kept: {why}" for why, count in reasons.most_common())
        raise UsageError(
            "nothing is left to make ternary: the checkpoint has no linear layer of a block that "
            f"the plan does not keep{why}"
        )
    return tuple(
        replace(choice, storage="kept", reason=kept[choice.name]) if choice.name in kept else choice
        for choice in choices
    )
