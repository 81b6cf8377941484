"""How much a calibration does: one word in place of a dozen numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Literal, TypeAlias, get_args

from trilens.checkpoint.calibration.fit import FitOptions
from trilens.errors import UsageError

__all__ = ["EFFORTS", "Effort", "EffortName", "find_effort"]

EffortName: TypeAlias = Literal["fast", "default", "max"]


@dataclass(frozen=True, slots=True)
class Effort:
    """What an effort's word stands for.

    Attributes:
        tokens: Of the calibration text, at most.
        fit: How long rules that fit do so.
    """

    tokens: int
    fit: FitOptions

    def seeded(self, seed: int) -> FitOptions:
        """How the fit goes with a calibration's seed."""
        return replace(self.fit, seed=seed)


EFFORTS: Mapping[EffortName, Effort] = MappingProxyType(
    {
        "fast": Effort(16_384, FitOptions(passes=2, whole_passes=2)),
        "default": Effort(65_536, FitOptions()),
        "max": Effort(
            1 << 20,
            FitOptions(
                passes=2, step_tokens=512, block_tokens=32_768, whole_passes=0, trit_passes=2
            ),
        ),
    }
)
"""Every effort by its name."""


def find_effort(name: object) -> Effort:
    """The effort of that name.

    Raises:
        UsageError: there is none.
    """
    for known in get_args(EffortName):
        if name == known:
            return EFFORTS[known]
    raise UsageError(f"effort {name!r} is unknown: there are {', '.join(get_args(EffortName))}")
