"""Names of tensors in files that say how it was saved: wrapped, or with an adapter beside it."""

from __future__ import annotations

import re
from collections.abc import Iterable

from trilens.errors import CorruptFileError

__all__ = ["check_names"]

_INSIDE = (
    "named like {{}}, as saved from {}: save the model inside it, or strip {!r} from the names"
)
_FOREIGN = {
    r"(^|\.)(lora_(embedding_)?[AB]|lora_magnitude_vector|base_layer)(\.|$)": (
        "of an adapter that is not merged, such as {}: without them it is another model; merge the "
        "adapter (merge_and_unload), and save the model again"
    ),
    # A compiled layer has the prefix inside its name.
    r"(^|\.)_orig_mod\.": _INSIDE.format("a compiled model (torch.compile)", "_orig_mod."),
    r"^module\.": _INSIDE.format("a model inside DataParallel or a trainer", "module."),
    r"^base_model\.model\.": _INSIDE.format("a PEFT model", "base_model.model."),
}
"""Patterns of names, and what a message says of the tensors that have them."""


def check_names(where: str, homeless: Iterable[str]) -> None:
    """Refuse tensors without a place in the model whose names tell that it is another model.

    Args:
        where: the checkpoint, for messages.
        homeless: the names of stored tensors that the model has no place for.

    Raises:
        CorruptFileError: they have a wrapper's prefix, or are an adapter's factors.
    """
    names = sorted(homeless)
    for pattern, words in _FOREIGN.items():
        found = [name for name in names if re.search(pattern, name)]
        if found:
            raise CorruptFileError(f"{where} holds {len(found)} tensors {words.format(found[0])}")
