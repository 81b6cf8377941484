"""What a caller gives as a model and a tokenizer: unwrapped, or refused with the way."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedModel

from trilens.errors import UsageError

__all__ = ["is_pipeline", "tokenizer_of", "unwrapped"]

_ATTRIBUTES = ("_orig_mod", "module")
"""Where torch.compile, and DataParallel and its kin, keep the module that they call."""


def unwrapped(model: Any) -> PreTrainedModel:
    """The transformers model inside a pipeline, an adapter, torch.compile, DataParallel or a
    sentence-transformers model.

    Adapters stand inside the model's own layers, so that the model computes with them.

    Raises:
        UsageError: there is none, or what is around it changes what the model reads: a soft prompt.
    """
    found = model
    while not isinstance(found, PreTrainedModel):
        inner = _inside(found)
        if inner is None or inner is found:
            raise UsageError(
                f"the model is a {type(model).__name__}: a loaded transformers model is needed; "
                "for a directory or hub id use Lens.from_pretrained"
            )
        found = inner
    return found


def tokenizer_of(model: Any) -> Any:
    """The tokenizer that a pipeline or a sentence-transformers model brings; None of another."""
    if not is_pipeline(model) and _embedded(model) is None:
        return None
    found = getattr(model, "tokenizer", None)
    # A processor of text and images has it inside.
    return getattr(found, "tokenizer", found)


def is_pipeline(model: object) -> bool:
    """Whether it is a pipeline of transformers; asked by name, for their import is slow."""
    return any(cls.__module__.startswith("transformers.pipelines") for cls in type(model).__mro__)


def _inside(wrapper: object) -> Any:
    model: Any = wrapper
    if is_pipeline(wrapper):
        return model.model
    if not isinstance(wrapper, nn.Module):
        return None
    for name in _ATTRIBUTES:
        if isinstance(wrapper._modules.get(name), nn.Module):
            return wrapper._modules[name]
    if not callable(getattr(model, "get_base_model", None)):
        return _embedded(wrapper)
    kind: Any = getattr(model, "active_peft_config", None)
    if getattr(kind, "is_prompt_learning", False):
        raise UsageError(
            f"the model is a {type(model).__name__} with a soft prompt ({kind.peft_type.value}), "
            "which puts vectors beside the tokens: open the model without it "
            "(model.get_base_model())"
        )
    return model.get_base_model()


def _embedded(wrapper: object) -> Any:
    """The model whose tokens sentence-transformers pools: it stands in the first of its parts."""
    if not isinstance(wrapper, nn.Sequential) or not hasattr(wrapper, "tokenizer"):
        return None
    parts = wrapper._modules["0"]._modules.values() if len(wrapper) else ()
    known = [each for each in parts if isinstance(each, PreTrainedModel) or _has_base(each)]
    return known[0] if len(known) == 1 else None


def _has_base(part: object) -> bool:
    return callable(getattr(part, "get_base_model", None))
