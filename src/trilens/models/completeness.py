"""Do a checkpoint's files and a model's parameters match, one for one?

What transformers would complete with random numbers, leave out or cast without a word is an error
here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from trilens.errors import CorruptFileError
from trilens.io.messages import listed
from trilens.io.safetensors_header import TensorHeader
from trilens.models.foreign_names import check_names

__all__ = ["check_complete", "check_floating"]

# Buffers that a model computes from its configuration; old checkpoints store them, new ones do not.
_COMPUTED_BUFFER = re.compile(r"(^|\.)(position_ids|inv_freq)$")


def check_complete(folder: Path, model: Any, report: Mapping[str, Any]) -> None:
    """Refuse weights that are missing, of another size, or without a place.

    Args:
        folder: the checkpoint, for messages.
        model: what its configuration builds; it may be on the meta device.
        report: transformers' loading info.

    Raises:
        CorruptFileError: files and configuration do not match.
    """
    where = f"{folder} does not match its config.json as {type(model).__name__}"
    check_names(str(folder), report["unexpected_keys"])
    mismatched = sorted(report["mismatched_keys"], key=lambda item: item[0])
    if mismatched:
        key, stored, wanted = mismatched[0]
        raise CorruptFileError(
            f"{where}: {len(mismatched)} weights have another size, first {key}: "
            f"{list(stored)} in the file, {list(wanted)} in the model"
        )
    missing = sorted(k for k in report["missing_keys"] if not _COMPUTED_BUFFER.search(k))
    if missing:
        raise CorruptFileError(
            f"{where}: {len(missing)} weights are missing and would be random: {listed(missing)}"
        )
    contradicting = sorted(k for k in report["unexpected_keys"] if _contradicts(model, k))
    if contradicting:
        raise CorruptFileError(
            f"{where}: {len(contradicting)} weights in the files have no place in the model: "
            f"{listed(contradicting)}"
        )


def check_floating(folder: Path, model: Any, headers: Mapping[str, TensorHeader]) -> None:
    """Refuse integers stored in place of weights: transformers would cast them without a word.

    Raises:
        CorruptFileError: there are such tensors, and no quantization_config.
    """
    if getattr(model.config, "quantization_config", None) is not None:
        return
    floating = {name for name, p in model.named_parameters() if p.is_floating_point()}
    odd = sorted(
        name
        for name, header in headers.items()
        if not header.dtype.startswith(("F", "BF")) and floating & set(_spellings(model, name))
    )
    if odd:
        raise CorruptFileError(
            f"{folder} stores {len(odd)} weights as integers, without a quantization_config that "
            f"says what they mean: {listed(odd)} ({headers[odd[0]].dtype})"
        )


def _spellings(model: Any, name: str) -> tuple[str, str, str]:
    """The names that a stored tensor can have in the model: with and without the base's prefix."""
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    return name, name.removeprefix(prefix), prefix + name


def _contradicts(model: Any, key: str) -> bool:
    """Does the stored tensor `key`, for which the model has no place, change what it computes?

    So for another parameter of a module that the model does have (a bias), and for a block beyond
    the last one. A head or another module that the model has not at all may be left out.
    """
    for name in _spellings(model, key):
        module, parts = model, name.split(".")[:-1]
        for part in parts:
            children = dict(module.named_children())
            if part not in children:
                last_block = isinstance(module, torch.nn.ModuleList) and part.isdigit()
                if last_block and len(children) > 0:
                    return True
                break
            module = children[part]
        else:
            if parts and any(True for _ in module.parameters(recurse=False)):
                return True
    return False
