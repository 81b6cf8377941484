"""Texts and tiny checkpoints to calibrate on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from checkpoint_cases import saved
from tinymodels import build

DOCUMENTS = tuple(
    "\n".join(f"def f{i}_{j}(x, y):\n    return x * {i} + y - {j}\n" for j in range(30))
    for i in range(12)
)
SMALL = {"tokens": 512, "evaluation_tokens": 256, "length": 64, "batch_size": 4}


def tiny(model_type: str, folder: Path) -> Path:
    """A tiny random checkpoint with a tokenizer of single characters, which fits its vocabulary."""
    saved(model_type, folder)
    letters = sorted({letter for text in DOCUMENTS for letter in text} - {" "})
    words = {"<unk>": 0, **{letter: i + 1 for i, letter in enumerate(letters)}}
    assert len(words) <= build(model_type).config.get_text_config().vocab_size
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(folder)
    return folder


def load_tokenizer(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder)
