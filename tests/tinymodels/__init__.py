"""Tiny random models, one for every type that transformers can build as a causal language model.

The library promises to open all of them; these are the models that promise is tested on. Each is
small enough to run in milliseconds, yet has every kind of layer its family has.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tinymodels.generic import tiny_kwargs
from tinymodels.notes import NOTES, SLOW
from tinymodels.overrides import AMEND, OVERRIDES
from tinymodels.weights import cast, redraw

__all__ = [
    "NOTES",
    "SLOW",
    "TYPES",
    "build",
    "forward",
    "forward_kwargs",
    "prompt_ids",
    "tiny_config",
]

TYPES: tuple[str, ...] = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)

_FIRST_PLAIN_ID = 10
"""Ids below this are kept for pad, bos, eos and placeholders, so no prompt contains them."""
_PLAIN_IDS = 80


_BUILT_FROM_PART = {"musicgen": "decoder", "musicgen_melody": "decoder"}
"""Types whose config is mapped to a class that only takes a part of it."""


def tiny_config(model_type: str) -> PreTrainedConfig:
    """A config of this type that is tiny but has every kind of layer of its family."""
    cls = CONFIG_MAPPING[model_type]
    config = cls(**tiny_kwargs(cls, copy.deepcopy(OVERRIDES.get(model_type, {}))))
    if model_type in AMEND:
        AMEND[model_type](config)
    return config


def build(model_type: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The tiny model of this type in eval mode; the same seed gives the same weights anywhere."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = tiny_config(model_type)
        if model_type in _BUILT_FROM_PART:
            cls = getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type])
            model = cls._from_config(getattr(config, _BUILT_FROM_PART[model_type]), dtype=dtype)
        else:
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    cast(model, dtype)
    redraw(model, seed)
    return model.eval()


def prompt_ids(model_type: str, length: int = 40, seed: int = 0) -> torch.Tensor:
    """A [1, length] prompt of ordinary tokens: no pad, no bos or eos, no image placeholder."""
    generator = torch.Generator().manual_seed(seed)
    top = _FIRST_PLAIN_ID + _PLAIN_IDS
    return torch.randint(_FIRST_PLAIN_ID, top, (1, length), generator=generator)


def forward_kwargs(model_type: str, ids: torch.Tensor) -> dict[str, Any]:
    """What the model's forward takes for this prompt; for most types only the ids."""
    if model_type.startswith("musicgen"):
        # One row per codebook: [batch x codebooks, length].
        rows = [ids, (ids + 17) % _PLAIN_IDS + _FIRST_PLAIN_ID]
        return {"input_ids": torch.cat(rows), "use_cache": False}
    if model_type.endswith("_assistant"):
        return _assistant_kwargs(model_type, ids)
    return {"input_ids": ids, "use_cache": False}


def _assistant_kwargs(model_type: str, ids: torch.Tensor) -> dict[str, Any]:
    """What a drafting model gets from the model it assists: hidden states, keys and values."""
    config = tiny_config(model_type)
    text = config.text_config
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(text.vocab_size, 2 * config.backbone_hidden_size, generator=generator)
    shared = {}
    for index, kind in enumerate(text.layer_types):
        layer = text.per_layer_config[index]
        shape = (1, layer.num_key_value_heads, ids.shape[1], layer.head_dim)
        shared[kind] = tuple(torch.randn(shape, generator=generator) for _ in range(2))
    return {
        "inputs_embeds": table[ids],
        "shared_kv_states": shared,
        # Given as an int (0 by default), Gemma 4 slices per-layer inputs that an assistant lacks.
        "logits_to_keep": torch.arange(ids.shape[1]),
    }


@torch.no_grad()
def forward(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """The logits of the prompt: [1, length, vocabulary], or a row per codebook."""
    kwargs = forward_kwargs(model.config.model_type, ids)
    if "inputs_embeds" in kwargs:
        kwargs["inputs_embeds"] = kwargs["inputs_embeds"].to(model.dtype)
        kwargs["shared_kv_states"] = {
            kind: tuple(state.to(model.dtype) for state in pair)
            for kind, pair in kwargs["shared_kv_states"].items()
        }
    return model(**kwargs).logits
