"""Memory does not grow with the weights of a checkpoint, which stay in their files.

Of `compare` that is measured beside 12 GB alone: its runs differ by as much as these weights.
"""

from __future__ import annotations

from pathlib import Path

from checkpoint_cases import saved
from hostile.test_files import driven
from trilens.checkpoint.source import Checkpoint


def test_weights_stay_in_their_files(tmp_path: Path) -> None:
    """One tensor kept of each file would be a quarter of the weights, a copy of a model all."""
    (found,) = driven("hostile.beyond_memory", tmp_path, {"ternarize": 16})
    assert found["weights_bytes"] > 7e7
    assert found["memory_bytes"] <= 0.12 * found["weights_bytes"]


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
