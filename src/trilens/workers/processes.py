"""Workers as local processes, each with its own threads."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from multiprocessing.connection import wait
from tempfile import TemporaryFile
from typing import IO, Any

from trilens.workers.dispatch import Done, Failure, WorkerSpec
from trilens.workers.worker import error_of

__all__ = ["LocalWorkers"]

_TAIL_BYTES = 400
_ENDING_S = 5.0


class LocalWorkers:
    """Processes of this machine; one that ends is replaced by a new one.

    Args:
        spec: what each opens.
        count: of processes.
    """

    def __init__(self, spec: WorkerSpec, count: int) -> None:
        self._spec, self._count = spec, count
        self._idle: list[_Process] = []
        self._busy: list[_Process] = []

    @property
    def is_free(self) -> bool:
        """Whether another shard can be given now."""
        return len(self._busy) < self._count

    def give(self, shard: int) -> None:
        """Let an idle process, or a new one, begin a shard."""
        process = self._idle.pop() if self._idle else _Process(self._spec)
        process.begin(shard)
        self._busy.append(process)

    def wait(self) -> Sequence[Done | Failure]:
        """What has ended; waits for at least one."""
        found: list[Done | Failure] = []
        while not found and self._busy:
            by_pipe = {process.answers.fileno(): process for process in self._busy}
            for ready in wait(list(by_pipe)):
                process = by_pipe[ready]  # type: ignore[index]
                outcome = process.read()
                if outcome is None:
                    continue  # it is open now
                self._busy.remove(process)
                if process.is_alive:
                    self._idle.append(process)
                found.append(outcome)
        return found

    def close(self) -> None:
        """End all processes; what one is writing is left to the next run."""
        for process in (*self._idle, *self._busy):
            process.end()
        self._idle, self._busy = [], []


class _Process:
    def __init__(self, spec: WorkerSpec) -> None:
        self._errors = TemporaryFile()  # noqa: SIM115
        self._shard = -1
        self.is_alive = True
        threads = str(spec.threads)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "trilens.workers.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env={**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads},
            bufsize=0,
        )
        self._say(asdict(spec))

    @property
    def answers(self) -> IO[bytes]:
        """Where it answers."""
        assert self._process.stdout is not None
        return self._process.stdout

    def begin(self, shard: int) -> None:
        """Let it do a shard, once it is open."""
        self._shard = shard
        self._say({"shard": shard})

    def read(self) -> Done | Failure | None:
        """Its next answer; None where it says that it is ready."""
        line = self.answers.readline()
        if not line.endswith(b"\n"):
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(_ENDING_S)
            words = self._last_words()
            self.end()
            return Failure(self._shard, words, lost=True)
        answer: dict[str, Any] = json.loads(line)
        if "done" in answer:
            return Done(self._shard, answer["done"])
        if "refused" in answer:
            self.end()
            error = error_of(answer["error"], answer["refused"])
            return Failure(self._shard, answer["refused"], lost=False, error=error)
        if "lost" in answer:
            self.end()
            return Failure(self._shard, answer["lost"], lost=True)
        return None

    def _say(self, plain: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # it has ended: reading its answer will tell
            self._process.stdin.write((json.dumps(plain) + "\n").encode())

    def _last_words(self) -> str:
        code = self._process.returncode
        how = f"signal {-code}" if code is not None and code < 0 else f"exit code {code}"
        self._errors.seek(0, os.SEEK_END)
        self._errors.seek(max(0, self._errors.tell() - _TAIL_BYTES))
        text = self._errors.read().decode(errors="replace").split()
        return f"its process ended with {how}" + (f" ({' '.join(text)})" if text else "")

    def end(self) -> None:
        """Kill it."""
        self.is_alive = False
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with suppress(OSError):
                    pipe.close()
        self._errors.close()
