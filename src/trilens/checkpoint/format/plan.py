"""`TernaryPlan`: which matrices of a checkpoint are ternarized, and by which rule."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, Self, TypeAlias, get_args

from trilens.checkpoint.format.matrix_plan import MatrixPlan
from trilens.errors import UsageError
from trilens.io.guarded import read_bytes
from trilens.io.json import SIZE_LIMIT_BYTES, parse_json
from trilens.io.messages import listed
from trilens.io.paths import as_path
from trilens.io.sealed import check_seal
from trilens.printable import as_unicode
from trilens.ternary.calibrated.rules import (
    CALIBRATED_RULES,
    CalibratedName,
    check_rule,
    levels_of,
)
from trilens.ternary.granularity import Per, resolve_units
from trilens.ternary.rules.coder import ScaleDtype
from trilens.ternary.rules.rules import RuleName

__all__ = ["Embeddings", "Storage", "TernaryPlan"]

Storage: TypeAlias = Literal["two_bit", "compact"]
Embeddings: TypeAlias = Literal["keep", "q8_0", "q4_0"]


@dataclass(frozen=True, slots=True)
class TernaryPlan:
    """How to make a checkpoint ternary.

    The linear layers of the blocks are ternarized; embeddings, unembedding, norms, routers,
    convolutions and one-dimensional tensors are kept as they are, whatever the plan says.

    Attributes:
        rule: One of `ternary.rules.RULES`, or with a calibration text one of
            `ternary.calibrated.CALIBRATED_RULES`.
        group_size: Weights that share a scale along a row; None without groups.
        per: What one scale covers: "tensor", "row" or "group". None: "group" where a group size is
            given, else "tensor". Of experts stored in one tensor, each matrix has its own.
        keep: Regular expressions (searched in tensor names) of matrices to keep as they are.
        only: Regular expressions of the matrices to make ternary; empty means all.
        scale_dtype: What scales are rounded to before they are used.
        storage: "two_bit": codes of two bits and float32 scales, as they lie in memory; "compact":
            five trits to a byte (1.6 bits each) and scales of `scale_dtype`, turned into the former
            when loaded.
        rotate: Turn each matrix and its inputs by a Hadamard rotation (`ternary.rotation`) before
            coding; the layers turn their inputs when they run.
        matrices: What some matrices become, by tensor name: it goes before all other options.
        embeddings: Of a GGUF file, the embedding and the head: "keep" their dtype, or in blocks of
            32 with 8 or 4 bits and a float16 scale ("q8_0": 8.5, "q4_0": 4.5 bits per weight).

    Raises:
        UsageError: an option that does not exist, or an expression that is not valid.
        ValueRangeError: a group size below 1.
    """

    rule: RuleName | CalibratedName = "absmean"
    group_size: int | None = None
    per: Per | None = None
    keep: tuple[str, ...] = ()
    only: tuple[str, ...] = ()
    scale_dtype: ScaleDtype = "float32"
    storage: Storage = "two_bit"
    rotate: bool = False
    matrices: Mapping[str, MatrixPlan] = field(default_factory=dict, hash=False)
    embeddings: Embeddings = "keep"

    def __post_init__(self) -> None:
        """Check every option, and derive what they imply."""
        check_rule(self.rule)
        units = resolve_units(1, 1, self.per, self.group_size)
        if self.scale_dtype not in get_args(ScaleDtype):
            raise UsageError(
                f"scale dtype {self.scale_dtype!r} is unknown: "
                f"pass {', '.join(get_args(ScaleDtype))}"
            )
        if self.storage not in get_args(Storage):
            raise UsageError(
                f"storage {self.storage!r} is unknown: pass {', '.join(get_args(Storage))}"
            )
        if self.embeddings not in get_args(Embeddings):
            raise UsageError(
                f"embeddings {self.embeddings!r} is unknown: pass {', '.join(get_args(Embeddings))}"
            )
        if not isinstance(self.rotate, bool):
            raise UsageError(f"rotate is {self.rotate!r}: pass True or False")
        object.__setattr__(self, "matrices", _entries(self.matrices))
        _check_levels(self)
        object.__setattr__(self, "per", units.per)
        object.__setattr__(self, "group_size", units.group_size)
        object.__setattr__(self, "keep", _expressions("keep", self.keep))
        object.__setattr__(self, "only", _expressions("only", self.only))

    def of(self, name: str) -> TernaryPlan:
        """The plan for one matrix that is not kept: no entries and expressions, its own options."""
        entry = self.matrices.get(name)
        bare = replace(self, keep=(), only=(), matrices={})
        if entry is None or entry.rule == "keep":
            return bare
        return replace(bare, rule=entry.rule, per=entry.per, group_size=entry.group_size)

    @property
    def calibrated(self) -> tuple[str, ...]:
        """The rules in it that need a calibration text, sorted."""
        rules = {self.rule, *(entry.rule for entry in self.matrices.values())}
        return tuple(sorted(rule for rule in rules if rule in CALIBRATED_RULES))

    def chosen(self, names: Iterable[str], all_names: Iterable[str]) -> dict[str, str]:
        """Which of the matrices the plan keeps, and why.

        Args:
            names: The matrices that can be ternarized.
            all_names: Every tensor of the checkpoint.

        Returns:
            The reason for each matrix that is kept.

        Raises:
            UsageError: an expression in `keep` that matches no tensor, or one in `only` that
                matches no matrix that can be ternarized, or an entry of `matrices` for
                something else than such a matrix.
        """
        matrices, everything = list(names), list(all_names)
        foreign = sorted(set(self.matrices) - set(matrices))
        if foreign:
            raise UsageError(
                f"plan has an entry for {foreign[0]!r}, which is no linear layer of a block that "
                f"can be ternarized: {_hint(matrices)}"
            )
        for expression in self.keep:
            if not any(re.search(expression, name) for name in everything):
                raise UsageError(
                    f"keep expression {expression!r} matches no tensor name: {_hint(everything)}"
                )
        for expression in self.only:
            if not any(re.search(expression, name) for name in matrices):
                raise UsageError(
                    f"only expression {expression!r} matches no linear layer of a block: "
                    f"{_hint(matrices)}"
                )
        kept = {}
        for name in matrices:
            if name in self.matrices:
                if self.matrices[name].rule == "keep":
                    kept[name] = "the plan keeps it"
                continue
            by = next((e for e in self.keep if re.search(e, name)), None)
            if by is not None:
                kept[name] = f"the plan keeps {by!r}"
            elif self.only and not any(re.search(e, name) for e in self.only):
                kept[name] = "the plan's only does not name it"
        return kept

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; entries and storage where they say something."""
        values = {option.name: getattr(self, option.name) for option in fields(self)}
        entries = {name: entry.to_dict() for name, entry in self.matrices.items()}
        lists = {"keep": list(self.keep), "only": list(self.only)}
        values |= {**lists, "matrices": entries}
        silent = {"matrices": {}, "storage": "two_bit", "rotate": False, "embeddings": "keep"}
        return {k: v for k, v in values.items() if k not in silent or v != silent[k]}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """The plan that `to_dict` gave these values.

        Raises:
            UsageError: an option that does not exist, or a wrong value.
        """
        if not isinstance(values, dict):
            raise UsageError(f"plan is a {type(values).__name__}: an object of options is needed")
        known = {option.name for option in fields(cls)}
        unknown = sorted(map(str, set(values) - known))
        if unknown:
            raise UsageError(f"plan has no option {unknown[0]!r}: {', '.join(sorted(known))}")
        entries = values.get("matrices", {})
        if not isinstance(entries, dict):
            raise UsageError(f"matrices of the plan are {entries!r}: an object by name is needed")
        made = {name: MatrixPlan.from_dict(entry, name) for name, entry in entries.items()}
        return cls(**{**values, "matrices": made})

    def to_json(self) -> str:
        """The plan as JSON text."""
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """The plan of `to_json`, or of a report that holds one as "plan".

        Raises:
            UsageError: no JSON, or as `from_dict`.
        """
        return cls._of_values(parse_json(text, "plan", UsageError))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """The plan of a file: of `to_json`, or what `trilens plan` wrote.

        Raises:
            UsageError: the file cannot be read, or as `from_json`.
            CorruptFileError: it does not fit the hash that it carries.
        """
        return cls.read(path)[0]

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> tuple[Self, bool]:
        """The plan of a file, and whether the file carries a hash, which it fits.

        Raises: as `load`.
        """
        file = as_path(path, "plan")
        values = parse_json(
            read_bytes(file, UsageError, max_bytes=SIZE_LIMIT_BYTES), "plan", UsageError
        )
        checked = isinstance(values, dict) and check_seal(values, f"plan {file}")
        return cls._of_values(values), checked

    @classmethod
    def _of_values(cls, values: Any) -> Self:
        if isinstance(values, dict) and "plan" in values:
            values = values["plan"]
        return cls.from_dict(values)


def _check_levels(plan: TernaryPlan) -> None:
    """Refuse four levels where a byte holds five codes of three."""
    rules = {plan.rule, *(entry.rule for entry in plan.matrices.values())}
    four = sorted(rule for rule in rules if rule != "keep" and levels_of(rule) == 4)
    if four and plan.storage == "compact":
        raise UsageError(
            f"rule {four[0]!r} has four levels, and the storage 'compact' five codes of three "
            "levels in a byte: take the storage 'two_bit'"
        )


def _expressions(option: str, values: Sequence[str]) -> tuple[str, ...]:
    if isinstance(values, str) or not isinstance(values, Sequence):
        raise UsageError(f"{option} is {values!r}: pass a list of regular expressions")
    for expression in values:
        if not isinstance(expression, str) or not expression:
            raise UsageError(f"{option} holds {expression!r}: pass texts that are not empty")
        if as_unicode(expression) != expression:
            raise UsageError(f"{option} holds {expression!r}: pass text, without lone surrogates")
        try:
            re.compile(expression)
        except re.error as error:
            raise UsageError(
                f"{option} expression {expression!r} is not a regular expression: {error}"
            ) from error
    return tuple(values)


def _entries(matrices: Mapping[str, MatrixPlan]) -> dict[str, MatrixPlan]:
    if not isinstance(matrices, Mapping):
        raise UsageError(f"matrices is {matrices!r}: pass a mapping of tensor names")
    for name, entry in matrices.items():
        if not isinstance(entry, MatrixPlan):
            raise UsageError(f"plan of matrix {name!r} is {entry!r}: pass a MatrixPlan")
    return dict(matrices)


def _hint(names: list[str]) -> str:
    return f"there are for example {listed(names, 3)}" if names else "there is none"
