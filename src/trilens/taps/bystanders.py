"""Blocks that did not run on the probe, and must not run unseen afterwards."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

from trilens.errors import CaptureError
from trilens.models.anatomy import Anatomy
from trilens.models.trace import Trace, parent_path
from trilens.taps.undo import undone

__all__ = ["bystanders_of", "standing_by"]


def bystanders_of(model: nn.Module, anatomy: Anatomy, trace: Trace) -> dict[str, nn.Module]:
    """The siblings of a model's blocks that did not run on the probe, by path."""
    ran = {call.path for call in trace.calls}
    found = {}
    for parent in {parent_path(block.path) for block in anatomy.blocks}:
        for name, module in model.get_submodule(parent).named_children():
            path = f"{parent}.{name}"
            if name.isdigit() and path not in ran:
                found[path] = module
    return found


@contextmanager
def standing_by(bystanders: Mapping[str, nn.Module]) -> Iterator[None]:
    """Refuse a pass in which one of these modules runs.

    Raises:
        CaptureError: naming it.
    """
    handles = list[Any]()

    def remove() -> None:
        for handle in handles:
            handle.remove()

    with undone(remove):
        for path, module in bystanders.items():
            handles.append(module.register_forward_pre_hook(_refusal(path)))
        yield


def _refusal(path: str) -> Any:
    def refuse(*_: Any) -> None:
        raise CaptureError(
            f"{path} runs on these inputs, and did not when the lens was made: a block that text "
            "passes by; open the model with Lens(model, probe=inputs), inputs like these"
        )

    return refuse
