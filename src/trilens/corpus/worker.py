"""A worker in a process of its own: opens the model, captures the shards that it is told.

`python -m trilens.corpus.worker` reads one JSON object a line from standard input and answers
each with one on standard output; it ends when its input does.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

from trilens.corpus.dispatch import WorkerSpec
from trilens.corpus.fingerprints import model_fingerprint
from trilens.corpus.manifest import read_manifest
from trilens.corpus.shards import ShardDone, capture_shard, threads_of
from trilens.errors import TrilensError, UsageError
from trilens.io.messages import reason
from trilens.lens.lens import Lens

__all__ = ["ShardWorker", "main"]


class ShardWorker:
    """A model that is held for the shards of one store.

    Args:
        spec: what to open.

    Raises:
        LoadError, AnatomyError: as `Lens.from_pretrained`.
        UsageError: the model is another than the store's.
    """

    def __init__(self, spec: WorkerSpec) -> None:
        self._folder = Path(spec.folder)
        self._manifest = read_manifest(self._folder)
        threads_of(self._manifest.options)
        self._lens = Lens.from_pretrained(spec.model, **spec.loading)
        found = model_fingerprint(self._lens.model)
        if found != self._manifest.model_fingerprint:
            raise UsageError(
                f"worker found another model at {spec.model} than the store's: fingerprint "
                f"{found[:12]}, not {self._manifest.model_fingerprint[:12]}; give all workers the "
                "same files"
            )

    def capture(self, shard: int) -> ShardDone:
        """Capture one shard; as `capture_shard`."""
        return capture_shard(self._lens, self._folder, self._manifest, shard)


def main(requests: TextIO, answers: TextIO) -> None:
    """Answer requests until they end."""

    def answer(plain: dict[str, Any]) -> None:
        answers.write(json.dumps(plain) + "\n")
        answers.flush()

    worker: ShardWorker | None = None
    for line in requests:
        request = json.loads(line)
        try:
            if worker is None:
                worker = ShardWorker(WorkerSpec(**request))
                answer({"ready": True})
            else:
                answer({"done": asdict(worker.capture(request["shard"]))})
        except TrilensError as error:
            answer({"refused": str(error)})
        except MemoryError as error:
            answer({"lost": reason(error)})


if __name__ == "__main__":
    # What libraries print goes to standard error: the answers have the output to themselves.
    _answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    try:
        main(sys.stdin, _answers)
    except (KeyboardInterrupt, BrokenPipeError):
        os._exit(130)
