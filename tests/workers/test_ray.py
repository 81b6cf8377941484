"""Two nodes of a Ray cluster on one machine: the same bytes, also when one is lost."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

import trilens
from checkpoint_cases import saved
from corpus_cases import contents, id_documents, tiny_checkpoint
from trilens.corpus.worker import worker_spec
from trilens.errors import UsageError

os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import ray
    from ray.cluster_utils import Cluster

    from trilens.workers.ray import RayWorkers

OPTIONS = trilens.StoreOptions(context=16, shard_tokens=64, layers=(0, 1), reduce=("mean",))
DOCUMENTS = id_documents(30)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_checkpoint(tmp_path_factory.mktemp("model") / "llama")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    found = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False}
    )
    ray.init(address=found.address, log_to_driver=False, configure_logging=False)
    yield found
    ray.shutdown()
    found.shutdown()


def raylets_with_actors() -> set[int]:
    """Process ids of the nodes whose children are our actors.

    Actors whose node was lost have another parent for a moment: they count for none.
    """
    parents = [
        process.info["ppid"]
        for process in psutil.process_iter(["cmdline", "ppid"])
        if any("ray::ShardWorker" in word for word in process.info["cmdline"] or ())
    ]
    return {parent for parent in parents if is_raylet(parent)}


def is_raylet(pid: int) -> bool:
    with suppress(psutil.Error):
        return "raylet" in psutil.Process(pid).name()
    return False


@pytest.mark.filterwarnings("ignore")  # Ray's own
def test_both_nodes_work_and_one_is_lost(cluster: Any, checkpoint: str, tmp_path: Path) -> None:
    trilens.capture_corpus(checkpoint, DOCUMENTS, tmp_path / "wanted", options=OPTIONS)
    wanted = contents(tmp_path / "wanted")
    second = cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes()
    nodes: set[int] = set()
    steps: list[int] = []

    def lose_a_node(step: trilens.Step) -> None:
        steps.append(step.done)
        nodes.update(raylets_with_actors())
        if len(nodes) == 2 and second in cluster.worker_nodes:
            cluster.remove_node(second, allow_graceful=False)

    trilens.capture_corpus(
        checkpoint, DOCUMENTS, tmp_path / "s", options=OPTIONS, ray="auto", progress=lose_a_node
    )
    assert len(nodes) == 2
    assert second not in cluster.worker_nodes
    assert contents(tmp_path / "s") == wanted
    assert ray.is_initialized()  # the session of the caller stays

    # What was damaged meanwhile is found, and captured again on the node that is left.
    shard = tmp_path / "s" / "shard-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1] + b"\\0")
    with pytest.raises(trilens.LoadError, match="shard-00002"):
        trilens.validate_store(tmp_path / "s")
    trilens.capture_corpus(checkpoint, DOCUMENTS, tmp_path / "s", options=OPTIONS, ray="auto")
    assert contents(tmp_path / "s") == wanted


# It reports its second shard and goes no further, with a third one at work.
DRIVER = """
import sys
import time
import trilens
from workers.test_ray import DOCUMENTS, OPTIONS

reports = []

def report(step):
    reports.append(step)
    if len(reports) == 3:
        print(step.done, flush=True)
        time.sleep(600)

trilens.capture_corpus(
    sys.argv[1], DOCUMENTS, sys.argv[2], options=OPTIONS, ray=sys.argv[3], progress=report
)
"""


@pytest.mark.filterwarnings("ignore")
def test_a_killed_driver_is_finished_by_the_next(
    cluster: Any, checkpoint: str, tmp_path: Path
) -> None:
    trilens.capture_corpus(checkpoint, DOCUMENTS, tmp_path / "wanted", options=OPTIONS)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER, checkpoint, tmp_path / "s", cluster.address],
        stdout=subprocess.PIPE,
        env=environment,
    )
    assert driver.stdout is not None
    done = int(driver.stdout.readline())
    driver.kill()
    driver.wait()
    driver.stdout.close()
    assert 0 < done < sum(map(len, DOCUMENTS))
    steps: list[trilens.Step] = []
    trilens.capture_corpus(
        checkpoint, DOCUMENTS, tmp_path / "s", options=OPTIONS, ray="auto", progress=steps.append
    )
    assert steps[0].done >= done  # what is there stays
    assert contents(tmp_path / "s") == contents(tmp_path / "wanted")


@pytest.mark.filterwarnings("ignore")
def test_a_cluster_ternarizes_to_the_same_bytes(cluster: Any, tmp_path: Path) -> None:
    source = saved("llama", tmp_path / "src", shard_size="80KB")
    trilens.ternarize(source, tmp_path / "wanted")
    trilens.ternarize(source, tmp_path / "out", ray="auto")
    assert contents(tmp_path / "out") == contents(tmp_path / "wanted")


@pytest.mark.filterwarnings("ignore")
def test_an_actor_without_room_waits_for_one_that_is_done(
    cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where a node was lost a moment ago: it is still counted, and has no room."""
    true = RayWorkers._room
    monkeypatch.setattr(RayWorkers, "_room", lambda self: true(self) + 1)
    source = saved("llama", tmp_path / "src", shard_size="80KB")
    trilens.ternarize(source, tmp_path / "wanted")
    trilens.ternarize(source, tmp_path / "out", ray="auto")
    assert contents(tmp_path / "out") == contents(tmp_path / "wanted")


@pytest.mark.filterwarnings("ignore")
def test_a_cluster_without_room_is_refused(cluster: Any, checkpoint: str, tmp_path: Path) -> None:
    spec = worker_spec(tmp_path, checkpoint, {}, threads=64)
    with pytest.raises(UsageError, match="no room for a worker of 64 CPUs"):
        RayWorkers(spec, address="auto", count=None)
