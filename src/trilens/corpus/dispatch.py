"""Shards handed to workers, whatever they are: in order, again where a worker is lost."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from trilens.corpus.manifest import StoreManifest
from trilens.corpus.shards import ShardDone, capture_shard
from trilens.errors import ShardError
from trilens.lens.lens import Lens

__all__ = ["MOST_RETRIES", "Failure", "InProcess", "WorkerSpec", "Workers", "run_shards"]

MOST_RETRIES = 2
"""How often a shard whose worker was lost is given to another."""


@dataclass(frozen=True, slots=True)
class Failure:
    """A shard that a worker did not finish.

    Attributes:
        shard: its number.
        cause: why, in words.
        lost: whether the worker was lost: it may go better with another. What a worker itself
            reports would be the same again.
    """

    shard: int
    cause: str
    lost: bool


@dataclass(frozen=True, slots=True)
class WorkerSpec:
    """What a worker opens: plain values that go to another process or machine.

    Attributes:
        folder: of the store, which every worker must reach.
        model: checkpoint directory or hub id.
        loading: further arguments of `Lens.from_pretrained`.
        threads: of torch.
    """

    folder: str
    model: str
    loading: dict[str, Any]
    threads: int


class Workers(Protocol):
    """Where shards go."""

    @property
    def is_free(self) -> bool:
        """Whether another shard can be given now."""

    def give(self, shard: int) -> None:
        """Let a free worker begin a shard."""

    def wait(self) -> Sequence[ShardDone | Failure]:
        """What has ended; waits for at least one while any is running."""

    def close(self) -> None:
        """End all workers."""


class InProcess:
    """This process as the only worker."""

    def __init__(self, lens: Lens, folder: Path, manifest: StoreManifest) -> None:
        self._lens, self._folder, self._manifest = lens, folder, manifest
        self._next: int | None = None

    @property
    def is_free(self) -> bool:
        """Whether another shard can be given now."""
        return self._next is None

    def give(self, shard: int) -> None:
        """Note the shard; `wait` does the work."""
        self._next = shard

    def wait(self) -> Sequence[ShardDone | Failure]:
        """Capture it; errors are raised as they are."""
        shard, self._next = self._next, None
        return [] if shard is None else [self._capture(shard)]

    def _capture(self, shard: int) -> ShardDone:
        return capture_shard(self._lens, self._folder, self._manifest, shard)

    def close(self) -> None:
        """Nothing is left."""


def run_shards(workers: Workers, shards: Iterable[int]) -> Iterator[ShardDone]:
    """Run shards on workers, in order as they are free.

    Yields:
        Each shard as it is done.

    Raises:
        ShardError: a worker reports an error, or was lost with one shard several times.
    """
    waiting = deque(shards)
    lost: Counter[int] = Counter()
    running = 0
    try:
        while waiting or running:
            while waiting and workers.is_free:
                workers.give(waiting.popleft())
                running += 1
            for outcome in workers.wait():
                running -= 1
                if isinstance(outcome, ShardDone):
                    yield outcome
                    continue
                lost[outcome.shard] += 1
                if not outcome.lost or lost[outcome.shard] > MOST_RETRIES:
                    raise ShardError(_words(outcome, lost[outcome.shard]))
                waiting.appendleft(outcome.shard)
    finally:
        workers.close()


def _words(failure: Failure, times: int) -> str:
    how = f"its worker was lost {times} times" if failure.lost else "its worker refused it"
    return (
        f"shard {failure.shard} could not be captured: {how}: {failure.cause}; what is done stays, "
        "and the same command goes on from there"
    )
