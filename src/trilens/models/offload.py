"""Weights that are not in memory: on the meta device, with or without a hook that brings them.

`accelerate` leaves meta tensors in place of what it keeps on disk or in the host's memory, and
hooks the modules to fill them for the length of a call.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import nn

__all__ = ["execution_device", "hooks_on", "in_memory", "unfilled"]


def hooks_on(model: nn.Module, path: str) -> list[tuple[nn.Module, Any]]:
    """The modules on the way to a path, itself included, that have a hook; outermost first."""
    parts = path.split(".") if path else []
    way = (model.get_submodule(".".join(parts[:end])) for end in range(len(parts) + 1))
    hooked = ((module, getattr(module, "_hf_hook", None)) for module in way)
    return [(module, hook) for module, hook in hooked if hasattr(hook, "pre_forward")]


@contextmanager
def in_memory(model: nn.Module, path: str) -> Iterator[nn.Module]:
    """A module with its weights where a call would have them; offloaded again afterwards."""
    called: list[tuple[nn.Module, Any]] = []
    try:
        for module, hook in hooks_on(model, path):
            called.append((module, hook))
            hook.pre_forward(module)
        yield model.get_submodule(path)
    finally:
        for module, hook in reversed(called):
            hook.post_forward(module, None)


def unfilled(model: nn.Module) -> str | None:
    """The first parameter or buffer on the meta device that no hook fills; None where all are."""
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        if tensor.is_meta and not hooks_on(model, name.rpartition(".")[0]):
            return name
    return None


def execution_device(model: nn.Module, path: str) -> torch.device:
    """Where a module computes: where its weights lie, or where its hook brings them."""
    module = model.get_submodule(path)
    for tensor in chain(module.parameters(), module.buffers()):
        if not tensor.is_meta:
            return tensor.device
    for _, hook in reversed(hooks_on(model, path)):
        for part in (hook, *getattr(hook, "hooks", ())):
            device = getattr(part, "execution_device", None)
            if device is not None:
                return torch.device(device)
    found = (tensor.device for tensor in model.parameters() if not tensor.is_meta)
    return next(found, torch.device("cpu"))
