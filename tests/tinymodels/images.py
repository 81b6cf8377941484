"""Tiny vision–language models, and what their processors would hand to them, made by hand.

A processor needs pillow and a tokenizer; what it gives are tensors, whose layout each function here
writes down for one family.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor
from transformers import CONFIG_MAPPING, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
from transformers.models.gemma4.image_processing_pil_gemma4 import Gemma4ImageProcessorPil

from tinymodels.generic import tiny_kwargs
from tinymodels.overrides import OVERRIDES
from tinymodels.weights import redraw

__all__ = ["IMAGE", "IMAGE_TYPES", "build_image_model", "image_inputs"]

IMAGE = 90
"""The id that stands for one patch of an image."""

_TOWER = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
}
_LLAMA = {"model_type": "llama", "vocab_size": 120, "hidden_size": 64, "intermediate_size": 96,
          "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip
_CLIP = {"model_type": "clip_vision_model", **_TOWER, "image_size": 32, "patch_size": 8}
_PIXTRAL = {"model_type": "pixtral", **_TOWER, "image_size": 64, "patch_size": 8, "head_dim": 16}
_SIGLIP = {"model_type": "siglip_vision_model", **_TOWER, "image_size": 32, "patch_size": 8,
           "vision_use_head": False}  # fmt: skip
_MROPE = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}

SETTINGS: dict[str, dict[str, Any]] = {
    "llava": {"vision_config": _CLIP, "text_config": _LLAMA, "image_token_index": IMAGE},
    "pixtral": {"vision_config": _PIXTRAL, "text_config": _LLAMA, "image_token_index": IMAGE,
                "vision_feature_select_strategy": "full", "vision_feature_layer": -1},
    "qwen2_5_vl": {
        "text_config": {"rope_parameters": _MROPE},
        "vision_config": {"depth": 2, "hidden_size": 32, "num_heads": 2, "intermediate_size": 48,
                          "out_hidden_size": 64, "patch_size": 4, "fullatt_block_indexes": [1],
                          "window_size": 16},
        "image_token_id": IMAGE, "video_token_id": 91, "vision_start_token_id": 92,
        "vision_end_token_id": 93,
    },
    "qwen3_vl": {
        "text_config": {"rope_parameters": {**_MROPE, "mrope_interleaved": True}},
        "vision_config": {"depth": 3, "hidden_size": 32, "num_heads": 2, "intermediate_size": 48,
                          "out_hidden_size": 64, "patch_size": 4, "num_position_embeddings": 64,
                          "deepstack_visual_indexes": [0, 1]},
        "image_token_id": IMAGE, "video_token_id": 91, "vision_start_token_id": 92,
        "vision_end_token_id": 93,
    },
    "gemma3": {**OVERRIDES["gemma3"], "vision_config": _SIGLIP, "image_token_index": IMAGE},
    "idefics3": {
        "vision_config": {**_TOWER, "image_size": 32, "patch_size": 8},
        "text_config": {**_LLAMA, "pad_token_id": 0}, "image_token_id": IMAGE, "scale_factor": 2,
    },
    "smolvlm": {
        "vision_config": {**_TOWER, "image_size": 32, "patch_size": 8},
        "text_config": {**_LLAMA, "pad_token_id": 0}, "image_token_id": IMAGE, "scale_factor": 2,
    },
    "paligemma": {
        "vision_config": _SIGLIP,
        "text_config": {**_LLAMA, "model_type": "gemma", "head_dim": 16},
        "image_token_index": IMAGE, "projection_dim": 64,
    },
    "internvl": {
        "vision_config": {**_TOWER, "image_size": [32, 32], "patch_size": [8, 8]},
        "text_config": _LLAMA, "image_token_id": IMAGE, "downsample_ratio": 0.5,
    },
    "gemma4": {
        "text_config": OVERRIDES["gemma4"]["text_config"], "audio_config": None,
        "vision_config": {
            "model_type": "gemma4_vision", **_TOWER, "num_key_value_heads": 2, "head_dim": 16,
            "patch_size": 4, "pooling_kernel_size": 3, "position_embedding_size": 64,
        },
        "image_token_id": IMAGE, "video_token_id": 91,
    },
    "mllama": {
        "text_config": {
            "num_hidden_layers": 5, "cross_attention_layers": [1, 3],
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
        "vision_config": {
            "hidden_size": 32, "num_hidden_layers": 2, "attention_heads": 2,
            "intermediate_size": 48, "num_global_layers": 1, "image_size": 32, "patch_size": 8,
            "max_num_tiles": 2, "intermediate_layers_indices": [0, 1], "vision_output_dim": 96,
            "supported_aspect_ratios": [[1, 1], [1, 2], [2, 1]],
        },
        "image_token_index": IMAGE,
    },
}  # fmt: skip
_NAMED = {"pixtral": "llava"}
IMAGE_TYPES = tuple(SETTINGS)


def build_image_model(name: str, seed: int = 0) -> PreTrainedModel:
    """The tiny model in eval mode, in float32."""
    model_type = _NAMED.get(name, name)
    cls = CONFIG_MAPPING[model_type]
    settings = copy.deepcopy(SETTINGS[name])
    # A nested config that names its type is of that type, not of the class's usual one.
    typed = {k: v for k, v in settings.items() if isinstance(v, dict) and "model_type" in v}
    config = cls(**{**tiny_kwargs(cls, settings), **typed})
    head = getattr(transformers, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[model_type])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = head(config)
    redraw(model, seed)
    return model.eval()


def _words(length: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(10, 80, (length,), generator=generator)


def _pixels(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _patches(n: int) -> Tensor:
    return torch.full((n,), IMAGE)


def _text_with(*parts: Tensor) -> dict[str, Tensor]:
    """Five words, the parts of images, six words; every id of one row with its mask."""
    ids = torch.cat([_words(5, 3), *parts, _words(6, 4)])[None]
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _llava() -> dict[str, Tensor]:
    two = _text_with(_patches(16), _words(3, 5), _patches(16))
    return {**two, "pixel_values": _pixels(2, 3, 32, 32)}


def _pixtral() -> dict[str, Tensor]:
    """Rows of patches end with a token of their own, an image with another."""
    row, cut, end = _patches(6), torch.tensor([91]), torch.tensor([92])
    rows = [row, cut, row, cut, row, cut, row, end]
    sizes = {"image_sizes": torch.tensor([[32, 48]])}
    return {**_text_with(*rows), "pixel_values": _pixels(1, 3, 32, 48), **sizes}


def _qwen() -> dict[str, Tensor]:
    """Patches come flattened, in groups of those that are merged into one token."""
    start, end = torch.tensor([92]), torch.tensor([93])
    found = _text_with(start, _patches(24), end)
    return {
        **found,
        "mm_token_type_ids": (found["input_ids"] == IMAGE).int(),
        "pixel_values": _pixels(96, 96),
        "image_grid_thw": torch.tensor([[1, 8, 12]]),
    }


def _gemma4() -> dict[str, Tensor]:
    """What its image processor makes of an image twice as wide as high, and of a square one."""
    images = [
        np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8)
        for seed, size in enumerate(((60, 120, 3), (50, 50, 3)))
    ]
    processor = Gemma4ImageProcessorPil(patch_size=4, max_soft_tokens=70, pooling_kernel_size=3)
    made = processor(images, return_tensors="pt")
    counts = [int(n) for n in made.pop("num_soft_tokens_per_image")]
    found = _text_with(_patches(counts[0]), _words(3, 5), _patches(counts[1]))
    return {**found, **made, "mm_token_type_ids": (found["input_ids"] == IMAGE).long()}


def _marked(found: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**found, "token_type_ids": (found["input_ids"] == IMAGE).long()}


def _gemma3() -> dict[str, Tensor]:
    begin, end = torch.tensor([3]), torch.tensor([4])
    return {**_marked(_text_with(begin, _patches(4), end)), "pixel_values": _pixels(1, 3, 32, 32)}


def _tiles() -> dict[str, Tensor]:
    """An image cut into two tiles, then the whole of it: a run of patches each."""
    parts = _text_with(_patches(4), _words(1, 6), _patches(4), _words(1, 7), _patches(4))
    return {
        **parts,
        "pixel_values": _pixels(1, 3, 3, 32, 32),
        "pixel_attention_mask": torch.ones(1, 3, 32, 32, dtype=torch.long),
    }


def _paligemma() -> dict[str, Tensor]:
    found = _text_with(_patches(16))
    kinds = torch.zeros_like(found["input_ids"])
    return {**found, "token_type_ids": kinds, "pixel_values": _pixels(1, 3, 32, 32)}


def _internvl() -> dict[str, Tensor]:
    """The tiles of one image stand in one run."""
    return {**_text_with(_patches(8)), "pixel_values": _pixels(2, 3, 32, 32)}


def _mllama() -> dict[str, Tensor]:
    """The text holds one token per image; its patches are keys of cross attention."""
    found = _text_with(_patches(1))
    seq = found["input_ids"].shape[1]
    return {
        **found,
        "pixel_values": _pixels(1, 1, 2, 3, 32, 32),
        "aspect_ratio_ids": torch.tensor([[2]]),
        "aspect_ratio_mask": torch.ones(1, 1, 2, dtype=torch.long),
        "cross_attention_mask": torch.ones(1, seq, 1, 2, dtype=torch.long),
    }


_INPUTS: dict[str, Callable[[], dict[str, Tensor]]] = {
    "llava": _llava,
    "pixtral": _pixtral,
    "qwen2_5_vl": _qwen,
    "qwen3_vl": _qwen,
    "gemma3": _gemma3,
    "gemma4": _gemma4,
    "idefics3": _tiles,
    "smolvlm": _tiles,
    "paligemma": _paligemma,
    "internvl": _internvl,
    "mllama": _mllama,
}


def image_inputs(name: str) -> dict[str, Tensor]:
    """What the model's processor would hand to its forward for a text with images."""
    return _INPUTS[name]()
