"""Commands on checkpoints: memory does not grow with the weights, which stay in their files."""

from __future__ import annotations

from pathlib import Path

from checkpoint_cases import saved
from hostile.scale import FULL
from hostile.test_files import driven
from trilens.checkpoint.source import Checkpoint

BLOCKS = {"ternarize": 16, **({"compare": 28, "compare+copies": 28} if FULL else {})}


def test_weights_stay_in_their_files(tmp_path: Path) -> None:
    """One tensor kept of each file would be a quarter of the weights, a copy of a model all."""
    found = {each["name"]: each for each in driven("hostile.beyond_memory", tmp_path, BLOCKS)}
    share = {name: each["memory_bytes"] / each["weights_bytes"] for name, each in found.items()}
    assert found["ternarize"]["weights_bytes"] > 7e7
    assert share["ternarize"] <= 0.12
    if FULL:  # runs of compare differ by some 40 MB
        assert share["compare"] <= 0.6
        assert share["compare+copies"] > 0.9


def test_one_memory_is_borrowed_for_all_files(tmp_path: Path) -> None:
    source = Checkpoint.open(saved("llama", tmp_path, shard_size="40KB"))
    assert len(source.files) > 2
    largest = max(source.headers.values(), key=lambda header: header.size_bytes)
    memory = source.borrowed_bytes(largest)
    for name, header in source.headers.items():
        assert source.borrowed_tensor(name).data_ptr() == memory.ctypes.data
        assert (
            source.borrowed_bytes(header)
            == source.opened(header.file).bytes(header.begin, header.end)
        ).all()
