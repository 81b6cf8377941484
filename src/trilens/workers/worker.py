"""A worker in a process of its own: opens what it needs once, does the shards that it is told.

`python -m trilens.workers.worker` reads one JSON object a line from standard input and answers
each with one on standard output; it ends when its input does.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from typing import Any, TextIO

import torch

from trilens import errors
from trilens.errors import ShardError, TrilensError
from trilens.io.messages import reason
from trilens.io.short_memory import is_short_of_memory
from trilens.workers.dispatch import RunShard, WorkerSpec

__all__ = ["ShardWorker", "error_of", "main"]


class ShardWorker:
    """What is held open for the shards of one output.

    Args:
        spec: what to open.

    Raises:
        TrilensError: as `open_worker` of its module.
    """

    def __init__(self, spec: WorkerSpec) -> None:
        torch.set_num_threads(spec.threads)
        self._run: RunShard = importlib.import_module(spec.module).open_worker(spec.arguments)

    def run(self, shard: int) -> dict[str, Any]:
        """Do one shard; its report."""
        return self._run(shard)


def error_of(name: str, words: str) -> TrilensError:
    """The error that a worker raised, from its class's name and its words."""
    found = getattr(errors, name, None) if name in errors.__all__ else None
    if isinstance(found, type) and issubclass(found, TrilensError):
        return found(words)
    return ShardError(words)


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
                answer({"done": worker.run(request["shard"])})
        except TrilensError as error:
            answer({"refused": str(error), "error": type(error).__name__})
        except Exception as error:
            if not is_short_of_memory(error):
                raise
            answer({"lost": reason(error)})


if __name__ == "__main__":
    # What libraries print goes to standard error: the answers have the output to themselves.
    _answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    try:
        main(sys.stdin, _answers)
    except (KeyboardInterrupt, BrokenPipeError):
        os._exit(130)
