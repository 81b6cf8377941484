"""What a model's class is for, by transformers' tables of auto classes."""

from __future__ import annotations

from typing import Any, Literal

from transformers.models.auto import modeling_auto

__all__ = ["is_built_for"]

_TABLES = {"causal": "MODEL_FOR_CAUSAL_LM_MAPPING", "masked": "MODEL_FOR_MASKED_LM_MAPPING"}


def is_built_for(task: Literal["causal", "masked"], model: Any) -> bool:
    """Whether a model's class is the one that a type of transformers has for a task.

    Names are compared: a look at a table's classes would import every model that it has, for
    seconds.

    Args:
        task: predicting the next token, or one in the middle.
        model: a model of transformers, or of a class that is registered with it.
    """
    cls, table = type(model), _TABLES[task]
    names = getattr(modeling_auto, f"{table}_NAMES").values()
    if cls.__module__.startswith("transformers.") and any(
        _has(found, cls.__name__) for found in names
    ):
        return True
    return _has(getattr(modeling_auto, table).get(type(model.config), ()), cls)


def _has(found: Any, one: Any) -> bool:
    """Whether an entry is this one; some are several."""
    return one in found if isinstance(found, list | tuple) else bool(found == one)
