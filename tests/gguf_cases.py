"""Small checkpoints with a tokenizer, for the tests of `trilens.checkpoint.gguf`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

__all__ = ["SMALL", "byte_level", "saved_with_tokenizer"]

SMALL: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
}


def byte_level(**options: Any) -> PreTrainedTokenizerFast:
    """A trained byte-level BPE tokenizer."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the lazy dog and the quick fox " * 4], trainer)
    names: dict[str, Any] = {"bos_token": "<s>", "eos_token": "</s>", **options}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def saved_with_tokenizer(
    folder: Path,
    model_type: str = "llama",
    tokenizer: Any = None,
    dtype: torch.dtype = torch.float32,
    **changes: Any,
) -> Path:
    """A random checkpoint with a tokenizer."""
    logging.disable_progress_bar()
    torch.manual_seed(0)
    config = CONFIG_MAPPING[model_type](**{**SMALL, **changes})
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    with torch.no_grad():
        for values in model.parameters():
            values.add_(torch.randn_like(values) * 0.05)
    model.save_pretrained(folder)
    (tokenizer or byte_level()).save_pretrained(folder)
    return folder
