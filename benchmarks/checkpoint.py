"""What a ternary checkpoint costs to write, to check and to load.

One block of a Llama of 8B's widths (4096 and 14336), random bfloat16 weights; the largest tensor
has 58.7M weights (117 MB). Memory is anonymous memory (`RssAnon`): the mapped source is not in it,
nor the code that is loaded before (compiled kernels, the model's classes).
"""

from __future__ import annotations

import re
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from benchmarks.common import llama_config, peak_memory, save
from trilens.checkpoint import TernaryPlan, ternarize, validate
from trilens.ternary.quantize import PerLayerQuant

PLANS = {
    "absmean": TernaryPlan(),
    "absmean per row": TernaryPlan(per="row"),
    "exact, groups of 128": TernaryPlan("exact", group_size=128),
}


def anonymous_bytes() -> int:
    """Anonymous resident memory of this process (Linux)."""
    found = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found.group(1)) * 1024 if found else 0


def timed(run: Callable[[], Any]) -> tuple[Any, float]:
    start = time.perf_counter()
    return run(), time.perf_counter() - start


def make(
    folder: Path, *, blocks: int = 1, vocab_size: int = 1024, shard_size: str = "50GB"
) -> None:
    """Blocks of a Llama of 8B's widths, random bfloat16 weights."""
    config = llama_config(4096, 14336, blocks, 32, 8, vocab_size=vocab_size, dtype="bfloat16")
    torch.manual_seed(0)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model.to_empty(device="cpu").to(torch.bfloat16)
    for parameter in model.parameters():
        parameter.data.normal_(std=0.02)
    model.save_pretrained(folder, max_shard_size=shard_size)


def pipeline(source: Path, root: Path) -> dict[str, Any]:
    """Write, check and load, with each plan."""
    figures: dict[str, Any] = {}
    for plan in PLANS.values():  # load the compiled kernels
        PerLayerQuant.quantize(
            torch.randn(1024, 2048), "w", rule=plan.rule, group_size=plan.group_size, per=plan.per
        )
    ternarize(source, root / "nothing", dry_run=True)
    for name, plan in PLANS.items():
        out = root / name.replace(" ", "_")
        with peak_memory(anonymous_bytes) as peak:
            report, seconds = timed(lambda plan=plan, out=out: ternarize(source, out, plan=plan))
        largest = max(tensor.size_bytes_before for tensor in report.tensors)
        _, check_seconds = timed(lambda out=out: validate(out))
        figures[name] = {
            "seconds": round(seconds, 2),
            "source_megabytes_per_second": round(report.size_bytes_before / seconds / 1e6),
            "extra_memory_over_largest_tensor": round(peak.extra_bytes / largest, 2),
            "validate_seconds": round(check_seconds, 2),
            "size_ratio": round(report.size_bytes / report.size_bytes_before, 4),
        }
    _, load_seconds = timed(lambda: AutoModelForCausalLM.from_pretrained(root / "absmean"))
    figures["load_seconds"] = round(load_seconds, 2)
    return figures


def main() -> None:
    """Measure and keep."""
    with tempfile.TemporaryDirectory() as root:
        make(Path(root) / "source")
        figures = pipeline(Path(root) / "source", Path(root))
    save("checkpoint", figures)


if __name__ == "__main__":
    main()
