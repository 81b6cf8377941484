"""Tiny random models for mappings beside causal LMs: encoder–decoders, models of sound, masked LMs.

They are made by the same rules; a table holds what a family needs besides.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import transformers
from torch import nn
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

from tinymodels.generic import tiny_kwargs
from tinymodels.overrides import AMEND, OVERRIDES
from tinymodels.overrides_images import IMAGE_OVERRIDES
from tinymodels.overrides_mappings import MAPPING_OVERRIDES, parts_of
from tinymodels.weights import redraw

__all__ = ["MAPPINGS", "build_as"]

MAPPINGS: dict[str, dict[str, str]] = {
    "seq2seq": dict(modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES),
    "speech": dict(modeling_auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES),
    "masked": dict(modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES),
    "image": dict(modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES),
}
"""Per mapping, the class of each type."""


def tiny_config_as(mapping: str, model_type: str) -> PreTrainedConfig:
    """A tiny config of a type, as a mapping builds it."""
    parts = parts_of(model_type)
    cls = CONFIG_MAPPING[model_type]
    if parts:
        return cls(**{name: config.to_dict() for name, config in parts.items()})
    given: dict[str, Any] = copy.deepcopy(OVERRIDES.get(model_type, {}))
    if mapping == "masked":
        given.pop("is_decoder", None)
    if "encoder_layers" in set(dir(cls)) | set(cls.__dataclass_fields__):
        given.setdefault("encoder_layers", 2)
    beside = IMAGE_OVERRIDES if mapping == "image" else MAPPING_OVERRIDES
    given |= copy.deepcopy(beside.get(model_type, {}))
    # A nested config that names its type is of that type, not of the class's usual one.
    typed = {k: v for k, v in given.items() if isinstance(v, dict) and "model_type" in v}
    config = cls(**{**tiny_kwargs(cls, given), **typed})
    if model_type in AMEND:
        AMEND[model_type](config)
    return config


def build_as(mapping: str, model_type: str, seed: int = 0) -> PreTrainedModel:
    """The tiny model of a type in eval mode, of the class that a mapping names."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        cls = getattr(transformers, MAPPINGS[mapping][model_type])
        config = tiny_config_as(mapping, model_type)
        model = cls._from_config(config)
    redraw(model, seed)
    _scale_queries(model)
    return model.eval()


@torch.no_grad()
def _scale_queries(model: nn.Module) -> None:
    """T5 and its kin do not scale scores: the scale is in the weights of their queries."""
    for module in model.modules():
        width = getattr(module, "key_value_proj_dim", None)
        if width is not None and isinstance(getattr(module, "q", None), nn.Linear):
            module.q.weight.mul_(width**-0.5)
