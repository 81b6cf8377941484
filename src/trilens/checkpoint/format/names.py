"""What the files of a ternary checkpoint are called, and the tensors in them."""

from __future__ import annotations

from collections.abc import Iterable

from trilens.ternary.packed.linear import PARTS

__all__ = [
    "CARD_NAME",
    "CONFIG_NAME",
    "DENSE_NAME",
    "FORMAT_VERSION",
    "JOURNAL_NAME",
    "MANIFEST_NAME",
    "OWN_TEXT_NAME",
    "QUANT_METHOD",
    "SOURCE_CARD_NAME",
    "WORK_NAME",
    "find_parts",
    "part_name",
]

FORMAT_VERSION = 1
ROTATION = "hadamard"
"""What `quantization_config` calls the rotation of `ternary.rotation`."""

QUANT_METHOD = "trilens"

CONFIG_NAME = "config.json"
CARD_NAME = "README.md"
SOURCE_CARD_NAME = "README.source.md"
MANIFEST_NAME = "trilens-ternary.json"
DENSE_NAME = "trilens-dense.json"
JOURNAL_NAME = "trilens-unfinished.json"
WORK_NAME = "trilens-calibration"
OWN_TEXT_NAME = "trilens-calibration-text.jsonl"
"""What the model was calibrated on, where it wrote that text itself."""


def part_name(tensor: str, part: str) -> str:
    """The name of one packed part of a tensor.

    `a.q_proj.weight` has `a.q_proj.codes`, as the packed layer names it; experts stored in one
    tensor, `a.experts.down_proj`, have `a.experts.down_proj_codes`.
    """
    stem = tensor.removesuffix(".weight")
    return f"{stem}.{part}" if stem != tensor else f"{tensor}_{part}"


def find_parts(tensor: str, names: Iterable[str]) -> dict[str, str]:
    """The parts of a tensor among the names of a file: part → name."""
    there = set(names)
    wanted = {part: part_name(tensor, part) for part in PARTS}
    return {part: name for part, name in wanted.items() if name in there}
