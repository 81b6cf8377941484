"""Shards handed to workers, whatever they are: in order, again where a worker is lost."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

from trilens.errors import ShardError, TrilensError

__all__ = [
    "MOST_RETRIES",
    "Done",
    "Failure",
    "InProcess",
    "RunShard",
    "WorkerSpec",
    "Workers",
    "run_shards",
]

RunShard: TypeAlias = Callable[[int], dict[str, Any]]
"""The shard function: does a shard, whole or not at all, and reports it in plain values."""

MOST_RETRIES = 2
"""How often a shard whose worker was lost is given to another."""


@dataclass(frozen=True, slots=True)
class Done:
    """A shard that is finished.

    Attributes:
        shard: its number.
        report: what the worker reports of it, in values that JSON can hold.
    """

    shard: int
    report: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Failure:
    """A shard that a worker did not finish.

    Attributes:
        shard: its number.
        cause: why, in words.
        lost: whether the worker was lost: it may go better with another. What a worker itself
            reports would be the same again.
        error: what the worker raised, where it refused.
    """

    shard: int
    cause: str
    lost: bool
    error: TrilensError | None = None


@dataclass(frozen=True, slots=True)
class WorkerSpec:
    """What a worker opens: plain values that go to another process or machine.

    Attributes:
        module: where `open_worker` is, which takes `arguments` and gives a `RunShard`.
        arguments: plain values; paths in them must be reached by every worker.
        threads: of torch.
    """

    module: str
    arguments: dict[str, Any]
    threads: int


class Workers(Protocol):
    """Where shards go."""

    @property
    def is_free(self) -> bool:
        """Whether another shard can be given now."""

    def give(self, shard: int) -> None:
        """Let a free worker begin a shard."""

    def wait(self) -> Sequence[Done | Failure]:
        """What has ended; waits for at least one while any is running."""

    def close(self) -> None:
        """End all workers."""


class InProcess:
    """This process as the only worker."""

    def __init__(self, run: RunShard) -> None:
        self._run = run
        self._next: int | None = None

    @property
    def is_free(self) -> bool:
        """Whether another shard can be given now."""
        return self._next is None

    def give(self, shard: int) -> None:
        """Note the shard; `wait` does the work."""
        self._next = shard

    def wait(self) -> Sequence[Done | Failure]:
        """Do it; errors are raised as they are."""
        shard, self._next = self._next, None
        return [] if shard is None else [Done(shard, self._run(shard))]

    def close(self) -> None:
        """Nothing is left."""


def run_shards(
    workers: Workers,
    shards: Iterable[int],
    *,
    done: str,
    name: Callable[[int], str] = "shard {}".format,
) -> Iterator[Done]:
    """Run shards on workers, in order as they are free.

    Args:
        workers: which are closed at the end.
        shards: their numbers.
        done: what is done with a shard: "captured".
        name: what errors call a shard.

    Yields:
        Each shard as it is done.

    Raises:
        ShardError: a worker reports an error, which is its cause, or was lost with one shard
            several times.
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
                if isinstance(outcome, Done):
                    yield outcome
                    continue
                lost[outcome.shard] += 1
                if not outcome.lost or lost[outcome.shard] > MOST_RETRIES:
                    words = _words(outcome, lost[outcome.shard], name(outcome.shard), done)
                    raise ShardError(words) from outcome.error
                waiting.appendleft(outcome.shard)
    finally:
        workers.close()


def _words(failure: Failure, times: int, name: str, done: str) -> str:
    how = f"its worker was lost {times} times" if failure.lost else "its worker refused it"
    return (
        f"{name} could not be {done}: {how}: {failure.cause}; what is done stays, "
        "and the same command goes on from there"
    )
