"""What a finished calibration keeps beside its blocks: its damage, and what it is measured on."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from trilens.checkpoint.format.damage import Damage
from trilens.errors import CorruptFileError
from trilens.io.sealed import read_sealed

__all__ = ["DAMAGE_NAME", "PROMPTS_NAME", "prompts_of", "read_damage"]

DAMAGE_NAME = "damage.json"
PROMPTS_NAME = "prompts.json"


def prompts_of(folder: Path) -> dict[str, list[Tensor]]:
    """The beginnings of the blocks that a finished calibration measured on, by text.

    Raises:
        CorruptFileError: they are not as they were written.
    """
    path = folder / PROMPTS_NAME
    found = read_sealed(path)[0].get("prompts")
    if not isinstance(found, dict):
        raise CorruptFileError(f"{path} holds no prompts: begin in a new directory")
    return {name: [torch.tensor(ids) for ids in rows] for name, rows in found.items()}


def read_damage(path: Path) -> Damage:
    """The damage as it was written.

    Raises:
        CorruptFileError: it is not as it was written.
    """
    values, _ = read_sealed(path, required=False)  # older ones have no hash
    try:
        return Damage.from_dict(values)
    except (KeyError, TypeError) as cause:
        raise CorruptFileError(
            f"{path} is no record of a damage: begin in a new directory"
        ) from cause
