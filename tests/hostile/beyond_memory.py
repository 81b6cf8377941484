"""How much more memory a command takes where a checkpoint has more blocks.

    python -m hostile.beyond_memory FOLDER NAME=BLOCKS …

Runs `ternarize`, `compare`, a calibration or `plan` (NAME says which) on a checkpoint of two blocks
and on one with more, all in this process, and prints a JSON object for each: how much more memory
that no file can give back the second took at its most, and how many bytes more of weights it had.
NAME+copies loads models the wrong way, each weight a copy in memory.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

from benchmarks.larger_than_memory import build, commands, text, unreclaimable_bytes
from trilens.cli.main import main
from trilens.io import spilled
from trilens.lens import opened
from trilens.planning import sampled_rows

__all__ = ["growth"]

WIDTH = 512
FEWEST = 2


def growth(name: str, n_blocks: int, root: Path) -> dict[str, Any]:
    """Run one of the benchmark's commands on two checkpoints."""
    command, _, how = name.partition("+")
    sizes, peaks = [], []
    for blocks in (1, FEWEST, n_blocks):  # the first one warms up
        shutil.rmtree(root, ignore_errors=True)
        root.mkdir(parents=True)
        facts = build(root / "source", blocks * _BLOCK_BYTES, WIDTH, vocab_size=64)
        assert facts["layers"] == blocks
        asked = commands(root / "source", root, text(root / "text.txt"))
        if command == "compare":
            _run(asked["ternarize"])
        load = _copied if how == "copies" else _LOAD
        with patch.object(opened, "load", load), _peak() as seen:
            _run(asked[command])
        sizes.append(facts["bytes"])
        peaks.append(max(seen) - seen[0])
    shutil.rmtree(root)
    return {"weights_bytes": sizes[2] - sizes[1], "memory_bytes": peaks[2] - peaks[1]}


_BLOCK_BYTES = 2 * (WIDTH * WIDTH * 5 // 2 + 3 * WIDTH * 1408)
_LOAD = opened.load


def _copied(*args: Any, **kwargs: Any) -> Any:
    loaded = _LOAD(*args, **kwargs)
    for tensor in (*loaded.model.parameters(), *loaded.model.buffers()):
        tensor.data = tensor.data.clone()
    return loaded


def _run(command: list[str]) -> None:
    try:
        main([*command, "--format", "json"])
    except SystemExit as ended:
        assert not ended.code, command


@contextmanager
def _peak() -> Iterator[list[int]]:
    """What the process holds, looked at every 2 ms."""
    ctypes.CDLL(None).malloc_trim(0)
    found, stop = [unreclaimable_bytes(os.getpid())], threading.Event()

    def look() -> None:
        while not stop.wait(0.002):
            found.append(unreclaimable_bytes(os.getpid()))

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        yield found
    finally:
        stop.set()
        watcher.join()


if __name__ == "__main__":
    # Smaller things stay in memory, or are looked at whole.
    spilled.KEPT_BYTES, sampled_rows._WEIGHTS = 1 << 22, 1 << 13  # type: ignore[misc]
    out, sys.stdout = sys.stdout, Path(os.devnull).open("w")  # noqa: SIM115
    for each, count in (argument.split("=") for argument in sys.argv[2:]):
        found = growth(each, int(count), Path(sys.argv[1]) / each)
        out.write(json.dumps({"name": each, **found}) + "\n")
