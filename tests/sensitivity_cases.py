"""Small models with text for the tests of sensitivity and plans."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import LlamaForCausalLM
from transformers.utils import logging

from checkpoint_cases import saved
from llama_cases import llama_config
from tinymodels import prompt_ids
from trilens.demo import demo_path
from trilens.lens.lens import Lens

__all__ = ["WORDS", "blocks", "opened", "text_model"]

WORDS = "\n".join(f"def f{i}(x):\n    return x + {i}\n" for i in range(60))


def opened(model_type: str, folder: Path) -> Lens:
    """A tiny checkpoint of this type in a folder, as a lens."""
    saved(model_type, folder)
    (folder / "tokenizer_config.json").unlink()
    logging.disable_progress_bar()
    return Lens.from_pretrained(str(folder), dtype="float32")


def blocks(model_type: str, n: int = 3, length: int = 24) -> list[torch.Tensor]:
    """Random token ids."""
    return [prompt_ids(model_type, length, seed)[0] for seed in range(n)]


def text_model(folder: Path) -> Path:
    """A small random Llama with the demo model's tokenizer."""
    torch.manual_seed(0)
    options = {"num_key_value_heads": 1, "max_position_embeddings": 64, "initializer_range": 0.2}
    config = llama_config(40, 72, layers=2, heads=2, vocab=2048, **options)
    logging.disable_progress_bar()
    LlamaForCausalLM(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((demo_path() / name).read_bytes())
    return folder
