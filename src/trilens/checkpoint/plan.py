"""`TernaryPlan`: which matrices of a checkpoint become ternary, and by which rule."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Self, get_args

from trilens.errors import UsageError
from trilens.ternary.calibrated import CalibratedName, check_rule
from trilens.ternary.engine import ScaleDtype
from trilens.ternary.rules import RuleName
from trilens.ternary.units import Per, resolve_units

__all__ = ["TernaryPlan"]


@dataclass(frozen=True, slots=True)
class TernaryPlan:
    """How to make a checkpoint ternary.

    The linear layers of the blocks are made ternary; embeddings, unembedding, norms, routers,
    convolutions and one-dimensional tensors are kept as they are, whatever the plan says.

    Attributes:
        rule: One of `ternary.rules.RULES`, or with a calibration text one of
            `ternary.calibrated.CALIBRATED_RULES`.
        group_size: Weights that share a scale along a row; None without groups.
        per: What one scale covers: "tensor", "row" or "group". None: "group" where a group size is
            given, else "tensor". Of experts stored in one tensor, each matrix has its own.
        keep: Regular expressions (searched in tensor names) of matrices to keep as they are.
        only: Regular expressions of the matrices to make ternary; empty means all.
        scale_dtype: What scales are rounded to before they are used; they are stored as float32.

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

    def __post_init__(self) -> None:
        """Check every option, and settle what they imply."""
        check_rule(self.rule)
        units = resolve_units(1, 1, self.per, self.group_size)
        if self.scale_dtype not in get_args(ScaleDtype):
            raise UsageError(
                f"scale dtype {self.scale_dtype!r} is unknown: "
                f"pass {', '.join(get_args(ScaleDtype))}"
            )
        object.__setattr__(self, "per", units.per)
        object.__setattr__(self, "group_size", units.group_size)
        object.__setattr__(self, "keep", _expressions("keep", self.keep))
        object.__setattr__(self, "only", _expressions("only", self.only))

    def chosen(self, names: Iterable[str], all_names: Iterable[str]) -> dict[str, str]:
        """Which of the matrices the expressions keep, and why.

        Args:
            names: The matrices that can be made ternary.
            all_names: Every tensor of the checkpoint.

        Returns:
            The reason for each matrix that is kept.

        Raises:
            UsageError: an expression in `keep` that matches no tensor, or one in `only` that
                matches no matrix that can be made ternary.
        """
        matrices, everything = list(names), list(all_names)
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
            by = next((e for e in self.keep if re.search(e, name)), None)
            if by is not None:
                kept[name] = f"the plan keeps {by!r}"
            elif self.only and not any(re.search(e, name) for e in self.only):
                kept[name] = "the plan's only does not name it"
        return kept

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**asdict(self), "keep": list(self.keep), "only": list(self.only)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """The plan that `to_dict` gave these values.

        Raises:
            UsageError: an option that does not exist, or a wrong value.
        """
        if not isinstance(values, dict):
            raise UsageError(f"plan is a {type(values).__name__}: an object of options is needed")
        known = {field.name for field in fields(cls)}
        unknown = sorted(map(str, set(values) - known))
        if unknown:
            raise UsageError(f"plan has no option {unknown[0]!r}: {', '.join(sorted(known))}")
        return cls(**values)

    def to_json(self) -> str:
        """The plan as JSON text."""
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The plan of `to_json`.

        Raises:
            UsageError: no JSON, or as `from_dict`.
        """
        try:
            values = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise UsageError(f"plan is not valid JSON: {error}") from error
        return cls.from_dict(values)


def _expressions(option: str, values: Sequence[str]) -> tuple[str, ...]:
    if isinstance(values, str) or not isinstance(values, Sequence):
        raise UsageError(f"{option} is {values!r}: pass a list of regular expressions")
    for expression in values:
        if not isinstance(expression, str) or not expression:
            raise UsageError(f"{option} holds {expression!r}: pass texts that are not empty")
        try:
            re.compile(expression)
        except re.error as error:
            raise UsageError(
                f"{option} expression {expression!r} is not a regular expression: {error}"
            ) from error
    return tuple(values)


def _hint(names: list[str]) -> str:
    return f"there are for example {', '.join(names[:3])}" if names else "there is none"
