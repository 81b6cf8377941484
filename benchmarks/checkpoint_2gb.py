"""A 2 GB checkpoint in four shards: making it ternary against reading and writing the same bytes.

    python -m benchmarks.checkpoint_2gb    (5 GB of disk, 3 GB of memory)

Four blocks of a Llama of 8B's widths, random bfloat16 weights. The reference reads every source
file and writes it to a new one, flushed to disk. Both run in turn, round by round, with the source
in the page cache. `cpu_ratio` compares processor seconds, system time included: it hardly depends
on what else the machine does.
"""

from __future__ import annotations

import os
import resource
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.checkpoint import PLANS, anonymous_bytes, make
from benchmarks.common import peak_memory, save
from trilens.checkpoint import ternarize
from trilens.ternary.quantize import PerLayerQuant

ROUNDS = 3
_CHUNK_BYTES = 1 << 22


def copy(source: Path, target: Path) -> None:
    """Read and write the same bytes."""
    for file in sorted(source.glob("*.safetensors")):
        with file.open("rb", buffering=0) as reader, target.open("wb", buffering=0) as writer:
            while chunk := reader.read(_CHUNK_BYTES):
                writer.write(chunk)
            os.fsync(writer.fileno())
    target.unlink()


def timed(run: Callable[[], Any]) -> tuple[Any, float, float]:
    """What it gives, its seconds, and its processor seconds."""
    before, start = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    found = run()
    seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return found, seconds, cpu


def main() -> None:
    """Measure and keep."""
    with tempfile.TemporaryDirectory() as name:
        root, source = Path(name), Path(name) / "source"
        make(source, blocks=4, vocab_size=16384, shard_size="560MB")
        figures: dict[str, Any] = {
            "source_bytes": sum(file.stat().st_size for file in source.glob("*.safetensors")),
            "shards": len(list(source.glob("*.safetensors"))),
        }
        for plan in PLANS.values():  # load the compiled kernels
            weights = torch.randn(2048, 2048).bfloat16()
            PerLayerQuant.quantize(
                weights, "w", rule=plan.rule, group_size=plan.group_size, per=plan.per
            ).relative_error(weights)
        ternarize(source, root / "nothing", dry_run=True)
        copy(source, root / "copy")
        rounds: dict[str, list[tuple[float, float, float, float]]] = {name: [] for name in PLANS}
        for _ in range(ROUNDS):
            _, base, base_cpu = timed(lambda: copy(source, root / "copy"))
            for plan_name, plan in PLANS.items():
                shutil.rmtree(root / "out", ignore_errors=True)
                with peak_memory(anonymous_bytes) as peak:
                    report, seconds, cpu = timed(
                        lambda plan=plan: ternarize(source, root / "out", plan=plan)
                    )
                largest = max(tensor.size_bytes_before for tensor in report.tensors)
                rounds[plan_name].append(
                    (seconds, seconds / base, cpu / base_cpu, peak.extra_bytes / largest)
                )
                print(plan_name, [round(value, 2) for value in rounds[plan_name][-1]], flush=True)
    for plan_name, found in rounds.items():
        seconds, ratio, cpu_ratio, memory = (statistics.median(v) for v in zip(*found, strict=True))
        figures[plan_name] = {
            "seconds": round(seconds, 2),
            "ratio_to_copy": round(ratio, 2),
            "cpu_ratio": round(cpu_ratio, 2),
            "extra_memory_over_largest_tensor": round(memory, 2),
        }
    save("checkpoint_2gb", figures)


if __name__ == "__main__":
    main()
