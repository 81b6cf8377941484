"""The section `quantization_config` that a ternary checkpoint's config.json gets."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from trilens.checkpoint.format.names import FORMAT_VERSION, QUANT_METHOD, ROTATION
from trilens.checkpoint.format.plan import TernaryPlan
from trilens.checkpoint.format.skeleton import Choice
from trilens.errors import UsageError
from trilens.io.safetensors_header import TensorHeader

__all__ = ["overrides", "quantization_config"]

_DIGITS = re.compile(r"\.\d+\.")


def quantization_config(
    plan: TernaryPlan, choices: Sequence[Choice], headers: Mapping[str, TensorHeader]
) -> dict[str, Any]:
    """What `integration.TrilensConfig` reads.

    Args:
        plan: as it was followed.
        choices: what becomes of each tensor.
        headers: the source's tensors, by name.

    Raises:
        UsageError: as `overrides`.
    """
    found: dict[str, Any] = {
        "quant_method": QUANT_METHOD,
        "format_version": FORMAT_VERSION,
        "rule": plan.rule,
        "per": plan.per,
        "group_size": plan.group_size,
        "layers": [c.target.removesuffix(".weight") for c in choices if c.storage == "layer"],
        "merged": any(choice.storage == "merged" for choice in choices),
        "experts": sorted({_ending(c.target) for c in choices if c.storage == "experts"}),
    }
    if plan.storage != "two_bit":
        found["storage"] = plan.storage
    if plan.rotate:
        found["rotation"] = ROTATION
    if own := overrides(plan, choices, headers):
        found["overrides"] = own
    return found


def overrides(
    plan: TernaryPlan, choices: Sequence[Choice], headers: Mapping[str, TensorHeader]
) -> dict[str, dict[str, Any]]:
    """What the plan's entries say of each parameter that differs from its general options.

    Args: as `quantization_config`.

    Raises:
        UsageError: tensors that are merged into one parameter, with unlike options.
    """
    _check_lists(choices)
    found: dict[str, dict[str, Any]] = {}
    for choice in choices:
        if choice.storage == "kept":
            continue
        own = plan.of(choice.name)
        options: dict[str, Any] = {"rule": own.rule, "per": own.per}
        options["group_size"] = own.group_size
        if own.storage == "compact" and choice.storage == "merged":
            options["cols"] = headers[choice.name].shape[-1]
        if found.setdefault(choice.target, options) != options:
            raise UsageError(
                f"{choice.name} is merged into {choice.target} with tensors that the plan codes in "
                "another way: give all of them the same options"
            )
    plain = {"rule": plan.rule, "per": plan.per, "group_size": plan.group_size}
    return {target: options for target, options in found.items() if options != plain}


def _check_lists(choices: Sequence[Choice]) -> None:
    """Refuse lists of like tensors, as of experts, that are coded in part: they become one."""
    merged = {(c.target, _DIGITS.sub(".*.", c.name)) for c in choices if c.storage == "merged"}
    for choice in choices:
        if choice.storage == "kept" and (choice.target, _DIGITS.sub(".*.", choice.name)) in merged:
            raise UsageError(
                f"{choice.name} is kept, and merged into {choice.target} with tensors that are "
                "not: keep all of them or none"
            )


def _ending(target: str) -> str:
    """The last names of an expert tensor's parameter, the same in every layer."""
    parts = target.split(".")
    return ".".join(parts[-3:] if parts[-1] == "weight" else parts[-2:])
