"""Captures by the thousand: no descriptor, thread, tensor or hook more at the end than before."""

from __future__ import annotations

import gc
import threading
from pathlib import Path

import psutil
import pytest
import torch

from hostile.scale import scaled
from tinymodels import build, prompt_ids
from trilens.errors import TrilensError
from trilens.lens.capture import Capture
from trilens.lens.lens import Lens
from trilens.taps import hooks as taps_hooks
from trilens.taps.kernels import KERNELS
from trilens.taps.registry import REGISTRY

ROUNDS = scaled(full=2000, subset=60)
# Allocators keep some of what they are given back; a capture kept by each round would be far more.
ALLOWED_BYTES = 8e6


def counts() -> dict[str, int]:
    gc.collect()
    return {
        "descriptors": len(list(Path("/proc/self/fd").iterdir())),
        "threads": threading.active_count(),
        "tensors": sum(type(each) is torch.Tensor for each in gc.get_objects()),
        "hook sets": len(taps_hooks._SETS),
        "replaced functions": len(REGISTRY._overrides.active) + len(KERNELS._overrides.active),
        "watchers": len(REGISTRY._watchers) + len(KERNELS._watchers),
    }


@pytest.mark.parametrize("model_type", ["llama", "mamba"])
def test_captures_leave_nothing_behind(model_type: str, tmp_path: Path) -> None:
    model, ids = build(model_type), prompt_ids(model_type)
    lens = Lens(model)
    attention, effective = bool(lens.attention_layers), bool(lens.effective_layers)
    path = tmp_path / "capture"

    def fail(*_: object) -> None:
        raise RuntimeError("the model failed")

    def once(number: int) -> int:
        capture = lens.capture(
            ids, residual="all", attention=attention, gates=True, effective=effective
        )
        if number % 10 == 0:
            capture.save(path)
            Capture.load(path)
            list(lens.capture_many([ids[0, :9], ids[0]], batch_size=2, gates=True))
            with pytest.raises(TrilensError):
                lens.capture([10**9])
            handle = model.get_output_embeddings().register_forward_hook(fail)
            with pytest.raises(RuntimeError, match="the model failed"):
                lens.capture(ids, gates=True)
            handle.remove()
        if number % 50 == 0:
            Lens(model)
        return capture.nbytes

    size = max(once(number) for number in range(max(20, ROUNDS // 10)))
    process = psutil.Process()
    before, resident = counts(), process.memory_info().rss
    for number in range(ROUNDS):
        once(number)
    assert counts() == before
    grown = process.memory_info().rss - resident
    assert grown < max(ALLOWED_BYTES, ROUNDS * size / 10), f"{grown / ROUNDS:.0f} bytes a capture"
