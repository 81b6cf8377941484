"""Blocks on another device than the model's weights, which stay mapped from their files.

What stands outside the blocks is moved once; of the blocks only the copies that are worked on, one
after the other. Streams stay in files: whatever a block or the model is called with is moved as it
is called. One place knows the device, and the processor takes the same way.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from trilens.checkpoint.calibration.blocks import BlockRunner
from trilens.checkpoint.calibration.handover import Carried
from trilens.errors import UsageError
from trilens.io.messages import reason
from trilens.models.anatomy import Anatomy

__all__ = ["PlacedRunner", "device_of", "find_device", "multiplies_bfloat16"]


def find_device(name: object) -> torch.device:
    """The device of that name; of "auto" this machine's accelerator, where it has one that can.

    Raises:
        UsageError: there is none on this machine, or it computes nothing, or not in float64.
    """
    if name == "auto":
        own = torch.accelerator.current_accelerator(check_available=True)
        try:
            return torch.device("cpu") if own is None else find_device(own.type)
        except UsageError:  # one without float64
            return torch.device("cpu")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of names that are no longer used
            found: torch.device = torch.device(name)  # type: ignore[call-overload]
            # Moments need float64: asking for one element is how a device says that it has none.
            torch.empty(1, device=found, dtype=torch.float64)
    except (RuntimeError, TypeError, AssertionError, ImportError) as cause:
        raise UsageError(
            f"device {name!r} cannot be calibrated on: give 'cpu', 'cuda' or 'cuda:N' of this "
            f"machine, which compute in float64, or 'auto' ({reason(cause)})"
        ) from cause
    if found.type == "meta":
        raise UsageError("device 'meta' computes nothing: give 'cpu' or 'cuda'")
    return torch.device("cpu") if found.type == "cpu" else found


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether products in bfloat16 are faster there than in float32: it has units for them."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type != "cpu":
        return False
    return any(
        bool(asks())
        for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        if (asks := getattr(torch.cpu, name, None)) is not None
    )


class PlacedRunner(BlockRunner):
    """Runs a model's blocks on a device.

    Args:
        model: as for `BlockRunner`, on the processor.
        anatomy: its proven parts.
        before: called when the proof has held and the model is still as it was loaded.
        device: where blocks are put, and what stands outside them.

    Raises: as `BlockRunner`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        anatomy: Anatomy,
        *,
        device: torch.device,
        before: Callable[[], None] = lambda: None,
    ) -> None:
        self.device = torch.device("cpu")  # where it is proven
        super().__init__(model, anatomy, before=before)
        self.device = device
        inside = {id(m) for block in anatomy.blocks for m in block.module.modules()}
        for module in model.modules():
            if id(module) not in inside:
                _move_own(module, device)
        model.register_forward_pre_hook(_moving(device), with_kwargs=True)

    def block(self, index: int) -> nn.Module:
        """A copy of a block in float32 on the device, in eval mode, without gradients."""
        return super().block(index).to(self.device)

    def _pass(self, ids: Tensor, carried: Carried, stop: int | None = None) -> Tensor:
        moved = {key: tensor.to(self.device) for key, tensor in carried.items()}
        return super()._pass(ids.to(self.device), moved, stop)


def _move_own(module: nn.Module, device: torch.device) -> None:
    """Move a module's own tensors; a parameter that two modules share stays one."""
    for parameter in module.parameters(recurse=False):
        parameter.data = parameter.data.to(device)
    for name, buffer in module.named_buffers(recurse=False):
        module._buffers[name] = buffer.to(device)


def _moving(device: torch.device) -> Callable[..., Any]:
    def move(_module: nn.Module, args: Any, kwargs: Any) -> Any:
        return _moved(args, device), _moved(kwargs, device)

    return move


def _moved(value: Any, device: torch.device) -> Any:
    """Tensors of a nest of plain tuples, lists and dicts on a device; those there stay the same."""
    if isinstance(value, Tensor):
        return value.to(device)
    if type(value) in {tuple, list}:
        return type(value)(_moved(each, device) for each in value)
    if type(value) is dict:
        return {key: _moved(each, device) for key, each in value.items()}
    return value


def device_of(runner: BlockRunner) -> torch.device:
    """Where a runner's blocks are."""
    return runner.device if isinstance(runner, PlacedRunner) else torch.device("cpu")
