"""Several texts gone on from at once, and nothing of them kept but their tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from trilens.errors import GenerationError
from trilens.io.messages import reason
from trilens.io.short_memory import is_short_of_memory
from trilens.lens.decoding import Decoding, cache_of, run_alone
from trilens.models.forward_call import device_of
from trilens.taps.mode import evaluating

__all__ = ["continue_batch"]


def continue_batch(
    model: PreTrainedModel,
    ids: Tensor,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
) -> Tensor:
    """Go on from several prompts of one length at once, with the cache; nothing ends a text.

    A token that ends texts is written as any other, and the model goes on after it. Of the model's
    generation config nothing counts; it is put back, as the mode and torch's random state are.

    Shapes: ids int64 [batch, seq] → int64 [batch, seq + max_new_tokens], on the CPU

    Args:
        model: one that generates.
        ids: the prompts.
        max_new_tokens: tokens that are written in each row.
        temperature: 0 for the likeliest token, else tokens are drawn.
        seed: of what is drawn.

    Raises:
        GenerationError: the model's own code fails.
    """
    decoding = Decoding(max_new_tokens, temperature, None, None, seed, (), ())
    there = ids.to(device_of(model))
    found: list[Any] = []

    def generate() -> None:
        try:
            made = model.generate(
                there,
                attention_mask=torch.ones_like(there),
                generation_config=decoding.config(0),
                **cache_of(model),
            )
        # The model's own code, on plain tokens: whatever it raises, it does not generate.
        except Exception as cause:
            if is_short_of_memory(cause):
                raise
            raise GenerationError(
                f"{type(model).__name__} does not go on from {len(there)} texts of "
                f"{there.shape[1]} tokens ({reason(cause)}); give texts to measure or calibrate on"
            ) from cause
        found.append(made)

    with evaluating(model), torch.inference_mode(False), torch.no_grad():
        run_alone(model, there.device, decoding, generate)
    return torch.as_tensor(found[0]).cpu()
