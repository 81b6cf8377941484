"""Fingerprints of a model and of a tokenizer: what a store must find again to go on."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from torch import nn

__all__ = ["model_fingerprint", "tokenizer_fingerprint"]

_SAMPLE = 4096
_VOLATILE = {"_name_or_path", "transformers_version", "_commit_hash", "dtype", "torch_dtype"}
_PROBES = ("The quick brown fox", "def f(x):\n    return x + 1", "Größe 7 — 漢字")


@torch.no_grad()
def model_fingerprint(model: nn.Module) -> str:
    """A hash of a model's configuration, and of every tensor's name, shape, dtype and values.

    Of a tensor with more than 4,096 values as many are read, evenly spread: a fingerprint of 70 B
    weights takes no minute. Tensors that are nowhere in memory (offloaded) count by their names.
    """
    digest = hashlib.sha256()
    config = getattr(model, "config", None)
    plain = config.to_dict() if config is not None else {}
    kept = {key: value for key, value in plain.items() if key not in _VOLATILE}
    digest.update(json.dumps(kept, sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        if not isinstance(tensor, torch.Tensor) or tensor.is_meta or not tensor.numel():
            continue
        flat = tensor.detach().reshape(-1)
        step = max(1, flat.numel() // _SAMPLE)
        some = flat[::step][:_SAMPLE].cpu().contiguous()
        digest.update(some.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """A hash of a tokenizer: its own description where it has one, and what it makes of a few
    texts; "" for none.
    """
    if tokenizer is None:
        return ""
    digest = hashlib.sha256(type(tokenizer).__name__.encode())
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    if hasattr(backend, "to_str"):
        # Truncation and padding are settings of the last call.
        plain = {**json.loads(backend.to_str()), "truncation": None, "padding": None}
        digest.update(json.dumps(plain, sort_keys=True).encode())
    digest.update(json.dumps(getattr(tokenizer, "chat_template", None), default=str).encode())
    for text in _PROBES:
        ids = tokenizer(text, add_special_tokens=True)["input_ids"]
        digest.update(json.dumps([int(i) for i in ids]).encode())
    return digest.hexdigest()
