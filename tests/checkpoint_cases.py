"""Small checkpoints for the tests of `trilens.checkpoint`."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from tinymodels import build

__all__ = ["load", "saved", "tensors"]


def saved(model_type: str, folder: Path, shard_size: str = "50GB", **changes: Any) -> Path:
    """A tiny random checkpoint of this type, with a tokenizer-like side file."""
    model = build(model_type)
    if "dtype" in changes:
        model.to(changes.pop("dtype"))
    logging.disable_progress_bar()
    model.save_pretrained(folder, max_shard_size=shard_size)
    (folder / "tokenizer_config.json").write_text('{"padding_side": "left"}\n')
    (folder / "notes.bin").write_bytes(b"not part of the checkpoint")
    if changes:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return folder


def load(folder: Path, **options: Any) -> Any:
    """`from_pretrained` as a user calls it, without transformers' progress bars.

    Weights mapped from a file lie at any address, and the order of a sum follows the alignment:
    each gets memory of its own here, so that equal weights give equal bits.
    """
    logging.disable_progress_bar()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = AutoModelForCausalLM.from_pretrained(folder, **options)
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, by safetensors' own reader."""
    found: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found
