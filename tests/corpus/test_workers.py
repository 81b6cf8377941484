"""The same bytes from every kind of worker; lost ones are replaced, a bounded number of times."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

import trilens
from corpus_cases import contents, id_documents, tiny_checkpoint
from hostile.scale import scaled
from trilens.corpus.worker import worker_spec
from trilens.errors import CorruptFileError, ShardError, UsageError
from trilens.workers.dispatch import MOST_RETRIES, Done, Failure, run_shards
from trilens.workers.processes import LocalWorkers

OPTIONS = trilens.StoreOptions(
    context=16, shard_tokens=64, layers=(0, 1), dtype="bfloat16", reduce=("covariance", "gating")
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_checkpoint(tmp_path_factory.mktemp("model") / "llama")


@pytest.fixture(scope="module")
def wanted(checkpoint: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("stores") / "store"
    trilens.capture_corpus(checkpoint, id_documents(30), folder, options=OPTIONS)
    return contents(folder)


def test_processes_write_the_same_bytes_and_are_replaced(
    checkpoint: str, wanted: dict[str, bytes], tmp_path: Path
) -> None:
    steps: list[trilens.Step] = []
    killed: list[int] = []

    def kill_one(step: trilens.Step) -> None:
        steps.append(step)
        workers = [int(pid) for pid in children() if pid not in killed]
        if len(steps) == 3 and workers:
            os.kill(workers[0], signal.SIGKILL)
            killed.append(workers[0])

    trilens.capture_corpus(
        checkpoint,
        id_documents(30),
        tmp_path / "s",
        options=OPTIONS,
        workers=2,
        progress=kill_one,
    )
    assert killed
    assert contents(tmp_path / "s") == wanted
    assert steps[0].done == 0
    assert [step.done for step in steps] == sorted(step.done for step in steps)
    assert steps[-1].done == steps[-1].total
    assert "tokens/s" in steps[-1].what
    assert steps[-1].seconds_left == 0
    assert not children()


def children() -> list[int]:
    found = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    return [int(pid) for pid in found if "trilens.workers.worker" in command_of(pid)]


def command_of(pid: str) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""


def test_what_a_worker_refuses_names_the_shard(checkpoint: str, tmp_path: Path) -> None:
    folder = tmp_path / "s"
    trilens.capture_corpus(checkpoint, id_documents(30), folder, options=OPTIONS)
    tokens = folder / "tokens-00003.safetensors"
    tokens.write_bytes(tokens.read_bytes()[:-1])
    workers = LocalWorkers(worker_spec(folder, checkpoint, {}, threads=1), 1)
    with pytest.raises(
        ShardError, match=r"shard 3 could not be captured.*tokens-00003.*truncated"
    ) as caught:
        list(run_shards(workers, [2, 3, 4], done="captured"))
    assert isinstance(caught.value.__cause__, CorruptFileError)
    assert not children()


class Losing:
    """Workers that are lost with some shards."""

    def __init__(self, losses: dict[int, int], *, lost: bool = True) -> None:
        self.losses, self.lost = losses, lost
        self.given: list[int] = []
        self.running: list[int] = []
        self.closed = False

    @property
    def is_free(self) -> bool:
        return len(self.running) < 2

    def give(self, shard: int) -> None:
        self.given.append(shard)
        self.running.append(shard)

    def wait(self) -> Sequence[Done | Failure]:
        shard = self.running.pop(0)
        if self.losses.get(shard, 0):
            self.losses[shard] -= 1
            return [Failure(shard, "out of luck", lost=self.lost)]
        return [Done(shard, {})]

    def close(self) -> None:
        self.closed = True


def test_retries_are_bounded() -> None:
    workers = Losing({1: MOST_RETRIES, 3: 1})
    assert sorted(done.shard for done in run_shards(workers, range(5), done="captured")) == [
        0,
        1,
        2,
        3,
        4,
    ]
    assert workers.given.count(1) == MOST_RETRIES + 1
    assert workers.closed
    workers = Losing({1: MOST_RETRIES + 1})
    with pytest.raises(ShardError, match=r"shard 1 .* its worker was lost 3 times: out of luck"):
        list(run_shards(workers, range(5), done="captured"))
    assert workers.closed
    workers = Losing({2: 1}, lost=False)
    with pytest.raises(ShardError, match=r"shard 2 .* its worker refused it: out of luck"):
        list(run_shards(workers, range(5), done="captured"))
    assert workers.given.count(2) == 1


def test_several_workers_need_a_path(tmp_path: Path, checkpoint: str) -> None:
    lens = trilens.Lens.from_pretrained(checkpoint)
    with pytest.raises(UsageError, match="workers need the checkpoint's path"):
        trilens.capture_corpus(lens, [[1]], tmp_path / "s", workers=2)
    with pytest.raises(trilens.UsageError, match="workers"):
        trilens.capture_corpus(lens, [[1]], tmp_path / "s", workers=0)


DRIVER = """
import sys
import trilens
from corpus.test_workers import OPTIONS
from corpus_cases import id_documents
trilens.capture_corpus(
    sys.argv[1], id_documents(30), sys.argv[2], options=OPTIONS, workers=int(sys.argv[3]),
    progress=lambda step: print(step.done, flush=True),
)
"""


def test_a_killed_driver_is_finished_by_the_next(
    checkpoint: str, wanted: dict[str, bytes], tmp_path: Path
) -> None:
    """SIGKILL after the n-th shard, and so at another moment each time; then the same call."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    for number in range(scaled(full=50, subset=1)):
        folder = tmp_path / str(number)
        driver = subprocess.Popen(
            [sys.executable, "-c", DRIVER, checkpoint, folder, str(2 - number % 2)],
            stdout=subprocess.PIPE,
            env=environment,
        )
        assert driver.stdout is not None
        for _ in range(1 + number % 6):
            assert driver.stdout.readline()
        time.sleep(0.001 * (number % 7))
        driver.kill()
        driver.wait()
        driver.stdout.close()
        store = trilens.capture_corpus(checkpoint, id_documents(30), folder, options=OPTIONS)
        assert contents(folder) == wanted
        assert store.n_tokens == sum(map(len, id_documents(30)))
