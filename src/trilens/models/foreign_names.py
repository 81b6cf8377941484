"""Names of tensors in files that say how it was saved: wrapped, or with an adapter beside it."""

from __future__ import annotations

import re
from collections.abc import Iterable

from trilens.errors import CorruptFileError

__all__ = ["check_names"]

_WRAPPERS = {
    "_orig_mod.": "a compiled model (torch.compile)",
    "module.": "a model inside DataParallel or a trainer",
    "base_model.model.": "a PEFT model",
}
_FACTORS = re.compile(r"(^|\.)(lora_(embedding_)?[AB]|lora_magnitude_vector|base_layer)(\.|$)")


def check_names(where: str, homeless: Iterable[str]) -> None:
    """Refuse tensors without a place in the model whose names tell that it is another model.

    Args:
        where: the checkpoint, for messages.
        homeless: the names of stored tensors that the model has no place for.

    Raises:
        CorruptFileError: they have a wrapper's prefix, or are an adapter's factors.
    """
    names = sorted(homeless)
    factors = [name for name in names if _FACTORS.search(name)]
    if factors:
        raise CorruptFileError(
            f"{where} holds {len(factors)} tensors of an adapter that is not merged, such as "
            f"{factors[0]}: without them it is another model; merge the adapter "
            "(merge_and_unload), and save the model again"
        )
    for prefix, what in _WRAPPERS.items():
        # A compiled layer has the prefix inside its name.
        inner = f".{prefix}" if prefix.startswith("_") else prefix
        wrapped = [n for n in names if n.startswith(prefix) or (inner != prefix and inner in n)]
        if wrapped:
            raise CorruptFileError(
                f"{where} holds {len(wrapped)} tensors named like {wrapped[0]}, as saved from "
                f"{what}: save the model inside it, or strip {prefix!r} from the names"
            )
