"""Weight files coded by several workers: the same bytes, whoever does it and whoever is lost."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from checkpoint_cases import saved
from hostile.scale import scaled
from trilens.checkpoint import sharding
from trilens.checkpoint.format.plan import TernaryPlan
from trilens.checkpoint.pipeline import ternarize
from trilens.checkpoint.shard_worker import open_worker
from trilens.checkpoint.source import Checkpoint
from trilens.errors import NonFiniteError, ShardError, TrilensError, UsageError, ValueRangeError
from trilens.workers.dispatch import Done, Failure, InProcess, Workers, WorkerSpec
from trilens.workers.worker import error_of

SHARD_SIZE = "80KB"
PLANS = {
    "absmean": TernaryPlan(),
    "planes": TernaryPlan("planes", per="row", storage="compact"),
    "rotated": TernaryPlan("exact", group_size=16, rotate=True, keep=("layers.0.mlp",)),
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved("llama", tmp_path_factory.mktemp("model") / "llama", shard_size=SHARD_SIZE)


@pytest.fixture(scope="module")
def wanted(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return written(source, tmp_path_factory.mktemp("one") / "out", PLANS["rotated"])


def written(source: Path, out: Path, plan: TernaryPlan) -> dict[str, bytes]:
    ternarize(source, out, plan=plan)
    return content(out)


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def workers_of(pid: int) -> list[int]:
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in found if "trilens.workers.worker" in command_of(child)]


def command_of(pid: str) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""


@pytest.mark.parametrize("name", PLANS)
def test_a_worker_does_what_this_process_does(
    name: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What goes to a worker is text, and its answer too: nothing is lost on the way."""
    specs: list[WorkerSpec] = []

    def pool(spec: WorkerSpec, count: int, *, ray: str | None) -> Workers:
        assert (count, ray) == (3, None)
        specs.append(spec)
        run = open_worker(json.loads(json.dumps(spec.arguments)))
        return InProcess(lambda shard: json.loads(json.dumps(run(shard))))

    monkeypatch.setattr(sharding, "open_pool", pool)
    report = ternarize(source, tmp_path / "out", plan=PLANS[name], workers=3)
    own = ternarize(source, tmp_path / "here", plan=PLANS[name])
    shown = [each.histogram for each in own.tensors]
    assert [each.histogram for each in report.tensors] == shown and any(shown)
    assert len(specs) == 1
    assert content(tmp_path / "out") == written(source, tmp_path / "one", PLANS[name])


def test_a_worker_refuses_another_source_and_another_version(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    specs: list[WorkerSpec] = []

    def pool(spec: WorkerSpec, count: int, *, ray: str | None) -> Workers:
        specs.append(spec)
        raise UsageError("no pool here")

    monkeypatch.setattr(sharding, "open_pool", pool)
    with pytest.raises(UsageError, match="no pool here"):
        ternarize(source, tmp_path / "out", workers=2)
    assert not (tmp_path / "out").exists()
    arguments = specs[0].arguments
    (tmp_path / "out").mkdir()
    copied = saved("llama", tmp_path / "copied", shard_size=SHARD_SIZE)  # equal, and other files
    file = copied / list(arguments["files"])[1]
    assert open_worker({**arguments, "source": str(copied)})(0)["sha256"]
    changed = {name: value + 1 for name, value in load_file(file).items()}
    save_file(changed, file, metadata={"format": "pt"})
    run = open_worker({**arguments, "source": str(copied)})
    with pytest.raises(UsageError, match=rf"other weights at .*{file.name}"):
        run(1)
    with pytest.raises(UsageError, match=r"trilens .*, and the driver 9\.9"):
        open_worker({**arguments, "code": "9.9"})


def test_what_a_worker_refuses_is_raised_as_here_and_leaves_nothing(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = saved("llama", tmp_path / "src", shard_size=SHARD_SIZE)
    *_, path, last = Checkpoint.open(broken).files
    changed = load_file(path)
    name = next(name for name, values in changed.items() if values.ndim == 2 and "layers" in name)
    changed[name][0, 0] = float("nan")
    save_file(changed, path, metadata={"format": "pt"})
    out = tmp_path / "out"

    class Refusing(InProcess):
        def wait(self) -> Sequence[Done | Failure]:
            shard = self._next
            assert shard is not None
            try:
                return super().wait()
            except TrilensError as error:
                # Meanwhile others were writing, and are ended before they could report it.
                (out / last.name).write_bytes(b"whole, not noted")
                (out / ".model-00001.01234567.partial").write_bytes(b"half")
                told = error_of(type(error).__name__, str(error))
                return [Failure(shard, str(error), lost=False, error=told)]

    def pool(spec: WorkerSpec, count: int, *, ray: str | None) -> Workers:
        return Refusing(open_worker(spec.arguments))

    monkeypatch.setattr(sharding, "open_pool", pool)
    with pytest.raises(NonFiniteError, match=name):
        ternarize(broken, out, workers=2)
    assert not out.exists()


def test_lost_workers_are_named_with_the_shard_and_leave_what_is_done(
    source: Path, wanted: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Losing(InProcess):
        def wait(self) -> Sequence[Done | Failure]:
            if self._next == 2:
                self._next = None
                return [Failure(2, "out of luck", lost=True)]
            return super().wait()

    def pool(spec: WorkerSpec, count: int, *, ray: str | None) -> Workers:
        return Losing(open_worker(spec.arguments))

    files = Checkpoint.open(source).files
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(sharding, "open_pool", pool)
        with pytest.raises(
            ShardError,
            match=rf"shard {files[2].name} could not be ternarized: its worker was lost 3 times: "
            "out of luck",
        ):
            ternarize(source, out, plan=PLANS["rotated"], workers=2)
    names = {name for name in content(out) if name.endswith(".safetensors")}
    assert names == {file.name for file in files[:2]}
    ternarize(source, out, plan=PLANS["rotated"])
    assert content(out) == wanted


def test_workers_are_for_directories_and_at_least_one(source: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"workers 2 cannot write format 'gguf-tq2_0'"):
        ternarize(source, tmp_path / "x.gguf", format="gguf-tq2_0", workers=2)
    with pytest.raises(UsageError, match=r"ray 'auto' cannot write format 'dense'"):
        ternarize(source, tmp_path / "x", format="dense", ray="auto")
    with pytest.raises(ValueRangeError, match="workers 0 is out of range"):
        ternarize(source, tmp_path / "x", workers=0)


DRIVER = """
import sys
from checkpoint.test_sharding import PLANS
from trilens.checkpoint.pipeline import ternarize
ternarize(
    sys.argv[1], sys.argv[2], plan=PLANS["rotated"], workers=int(sys.argv[3]),
    progress=lambda step: print(step.done, flush=True),
)
"""


def test_killed_workers_and_drivers_leave_nothing_half_written(
    source: Path, wanted: dict[str, bytes], tmp_path: Path
) -> None:
    """SIGKILL to a worker, which is replaced, then to the driver; then the same call."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    for number in range(scaled(full=50, subset=1)):
        out = tmp_path / str(number)
        driver = subprocess.Popen(
            [sys.executable, "-c", DRIVER, source, out, str(2 - number % 2)],
            stdout=subprocess.PIPE,
            env=environment,
        )
        assert driver.stdout is not None
        assert driver.stdout.readline()
        for worker in workers_of(driver.pid)[:1]:
            os.kill(worker, signal.SIGKILL)
        for _ in range(number % 4 + 2):
            assert driver.stdout.readline()
        left = workers_of(driver.pid)
        assert number % 2 or left
        driver.kill()
        driver.wait()
        driver.stdout.close()
        for name, data in content(out).items():
            assert name not in wanted or data == wanted[name]
        ternarize(source, out, plan=PLANS["rotated"])
        assert content(out) == wanted
        assert not ended_late(left)


def ended_late(pids: list[int]) -> list[int]:
    """Workers that are still there long after their driver went."""
    until = time.monotonic() + 20
    while time.monotonic() < until and any(command_of(str(pid)) for pid in pids):
        time.sleep(0.05)
    return [pid for pid in pids if command_of(str(pid))]
