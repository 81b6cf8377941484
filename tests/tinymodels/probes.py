"""Made-up inputs for models that do not run on text alone: text with one image, or with sound.

What a processor would hand over is made by rule, from names of the forward's parameters and from
numbers of the configuration; what runs first is taken.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tinymodels import prompt_ids

__all__ = ["beside_text"]

_TEXT = 11
_COUNTS = ("num_query_tokens", "latent_query_num", "image_seq_length", "mm_tokens_per_image")
_IMAGE_IDS = ("image_token_id", "image_token_index")
_FRAMES = 88


def beside_text(model: PreTrainedModel) -> dict[str, Tensor] | None:
    """Inputs of the whole model that it runs on, or None where nothing that was tried runs."""
    for inputs in _candidates(model):
        try:
            with torch.no_grad():
                model(**inputs)
        # What a model takes is only known to itself.
        except Exception:  # noqa: BLE001
            continue
        return inputs
    return None


def _candidates(model: PreTrainedModel) -> Iterator[dict[str, Tensor]]:
    taken = inspect.signature(model.forward).parameters
    text = prompt_ids("", _TEXT)
    if model.config.is_encoder_decoder:
        return
    if "input_features" in taken:
        for width in _numbers(model.config, ("num_mel_bins", "feature_size")):
            yield {"input_ids": text, "input_features": _noise(1, width, _FRAMES)}
    if "pixel_values" not in taken:
        return
    for count in (*_numbers(model.config, _COUNTS), 0):
        ids = next(iter(_numbers(model.config, _IMAGE_IDS)), 0)
        places = torch.full((1, count), ids)
        inputs = {"input_ids": torch.cat([places, text], dim=1)}
        if "qformer_input_ids" in taken:
            # Of another length than the text with its images: two stacks would look alike.
            inputs["qformer_input_ids"] = text[:, :7]
        if "image_embeds_position_mask" in taken:
            inputs["image_embeds_position_mask"] = torch.cat(
                [torch.ones_like(places), torch.zeros_like(text)], dim=1
            )
        for side in _numbers(model.config, ("image_size",)):
            for leading in ((1,), (1, 1)):
                pixels = _noise(*leading, 3, side, side)
                yield {**inputs, "pixel_values": pixels}
                if "image_attention_mask" in taken:
                    mask = torch.ones(1, inputs["input_ids"].shape[1], 1, dtype=torch.long)
                    every = torch.ones_like(inputs["input_ids"])
                    yield {
                        **inputs, "pixel_values": pixels, "image_attention_mask": mask,
                        "attention_mask": every,
                    }  # fmt: skip


def _numbers(config: Any, names: tuple[str, ...]) -> list[int]:
    """Whole numbers that a configuration or one inside it gives under some names."""
    inner = [each for each in vars(config).values() if hasattr(each, "to_dict")]
    found = [getattr(each, name, None) for each in (config, *inner) for name in names]
    return list(dict.fromkeys(each for each in found if isinstance(each, int) and each > 0))


def _noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))
