"""A checkpoint that is larger than memory: ternarize, calibrate, compare, plan under a limit.

    python -m benchmarks.larger_than_memory [--size-gb 12] [--limit-gb 4] [--width 4096]
        [--tokens 64] [--runs ternarize …]

Random bfloat16 weights of a Llama, one file a block. Each command runs in a process of its own,
watched from outside: memory that cannot leave (anonymous, shared, swapped) is looked at every
20 ms, and the process is killed above the limit. Pages of mapped files count for nothing: the
system drops them when it needs room, at the cost of reading them again. Where the whole machine has
more memory than the checkpoint, the seconds are those of a page cache that holds it.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.common import RESULTS, llama_config, save

_LETTERS = "abcdefghijklmnopqrstuvwxyz .,"
_EVERY_S = 0.02

FITTED = r"layers\.\d*0\.self_attn\.k_proj"
"""Matrices that a calibration codes: one of each tenth block."""


def build(folder: Path, size_bytes: int, width: int, vocab_size: int = 8192) -> dict[str, Any]:
    """Write a checkpoint of about that size, a block in memory at a time."""
    folder.mkdir(parents=True)
    inner, heads = width * 11 // 4 // 64 * 64, width // 128
    options = {"vocab_size": vocab_size, "tie_word_embeddings": False}
    kv_heads = max(1, heads // 4)
    with torch.device("meta"):
        one = LlamaForCausalLM(llama_config(width, inner, 1, heads, kv_heads, **options))
    shapes = {name: value.shape for name, value in one.state_dict().items()}
    block = {name: shape for name, shape in shapes.items() if ".layers.0." in name}
    count = max(1, round(size_bytes / 2 / sum(shape.numel() for shape in block.values())))
    config = llama_config(width, inner, count, heads, kv_heads, **options)
    config.dtype, config.architectures = torch.bfloat16, ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    parts = [{k: v for k, v in shapes.items() if k not in block}]
    parts += [{k.replace(".0.", f".{i}."): v for k, v in block.items()} for i in range(count)]
    places: dict[str, str] = {}
    generator = torch.Generator().manual_seed(0)
    for number, part in enumerate(parts, start=1):
        name = f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        tensors = {key: _weights(shape, generator) for key, shape in part.items()}
        save_file(tensors, folder / name, metadata={"format": "pt"})
        places |= dict.fromkeys(part, name)
    total = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    words = {"<unk>": 0, **{letter: i for i, letter in enumerate(_LETTERS, start=1)}}
    letters = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    letters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=letters, unk_token="<unk>").save_pretrained(folder)
    return {"bytes": total, "files": len(parts), "layers": count, "width": width, "inner": inner}


def _weights(shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    return torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)


def text(path: Path, lines: int = 6, letters: int = 80) -> Path:
    """Random letters: a calibration measures on all that it does not calibrate on."""
    drawn = random.Random(0)
    path.write_text("\n".join("".join(drawn.choices(_LETTERS, k=letters)) for _ in range(lines)))
    return path


def unreclaimable_bytes(pid: int) -> int:
    """Anonymous, shared and swapped memory of a process, which no file can give back."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    wanted = ("RssAnon:", "RssShmem:", "VmSwap:")
    return sum(int(line.split()[1]) << 10 for line in lines if line.startswith(wanted))


def watched(command: list[str], limit_bytes: int) -> dict[str, Any]:
    """Run a command, killed where it takes more than the limit."""
    began, spent, peak, over = time.perf_counter(), _processor_seconds(), 0, False
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors)
        while process.poll() is None:
            peak = max(peak, unreclaimable_bytes(process.pid))
            if peak > limit_bytes and not over:
                over = True
                process.kill()
            time.sleep(_EVERY_S)
        errors.seek(0)
        words = errors.read().decode(errors="replace").split()
    usage = {"seconds": round(time.perf_counter() - began, 1), "peak_bytes": peak}
    usage["processor_seconds"] = round(_processor_seconds() - spent, 1)
    failed = "above the limit" if over else " ".join(words[-40:]) if process.returncode else ""
    return {**usage, "exit_code": process.returncode, **({"failed": failed} if failed else {})}


def _processor_seconds() -> float:
    """Of all children that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def commands(
    source: Path, root: Path, data: Path, *, n_tokens: int = 64, fitted: str = FITTED
) -> dict[str, list[str]]:
    """The four commands; few tokens, because what is asked is whether memory is enough.

    The calibration runs every block of both models, and codes some matrices alone: what coding
    takes grows with the cube of the width.
    """
    tokens = ["--max-tokens", str(n_tokens), "--seq-length", str(n_tokens // 4)]
    fit = ["--rule", "gptq", "--group-size", "128", "--only", fitted]
    fit += ["--calibrate", str(data), "--effort", "fast", "--max-tokens", "256"]  # the fewest
    plain = ["ternarize", str(source), "-o"]
    return {
        "ternarize": [*plain, str(root / "ternary"), "--group-size", "128"],
        "compare": [
            *("compare", str(source), str(root / "ternary"), "--data", str(data)),
            *("--lens", "none", "--batch-size", "1", *tokens),
        ],
        "calibrate": [*plain, str(root / "calibrated"), *fit, "--batch-size", "1", *tokens[2:]],
        "plan": [
            *("plan", str(source), "--data", str(data), "--costs", "predicted"),
            *("--dtype", "auto", "--budget-bits", "1.8", *tokens),
        ],
    }


def _facts(source: Path, root: Path, size_bytes: int, width: int) -> dict[str, Any]:
    """Of the checkpoint, which is built where it is not there from an earlier run."""
    noted = root / "facts.json"
    if not noted.exists():
        shutil.rmtree(source, ignore_errors=True)
        root.mkdir(parents=True, exist_ok=True)
        noted.write_text(json.dumps(build(source, size_bytes, width)))
    facts: dict[str, Any] = json.loads(noted.read_text())
    return facts


def main() -> None:
    """Build, run, print and save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--size-gb", type=float, default=12.0)
    parser.add_argument("--limit-gb", type=float, default=4.0)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--fitted", default=FITTED, help="matrices that a calibration codes")
    parser.add_argument("--tokens", type=int, default=64, help="of each text, but a calibration's")
    parser.add_argument("--folder", type=Path, help="kept; else a temporary one, removed")
    parser.add_argument("--runs", nargs="+", default=["ternarize", "compare", "calibrate", "plan"])
    given = parser.parse_args()
    root = given.folder or Path(tempfile.mkdtemp(prefix="trilens-large-"))
    source = root / "source"
    try:
        facts = _facts(source, root, int(given.size_gb * 1e9), given.width)
        print(facts, flush=True)
        facts["threads"] = os.environ.get("OMP_NUM_THREADS", "all")
        facts |= {"limit_bytes": int(given.limit_gb * 1e9), "tokens": given.tokens}
        data = text(root / "text.txt")
        asked = commands(source, root, data, n_tokens=given.tokens, fitted=given.fitted)
        for name in given.runs:
            command = [sys.executable, "-m", "trilens", *asked[name]]
            _keep(name, facts | watched(command, facts["limit_bytes"]))
    finally:
        if given.folder is None:
            shutil.rmtree(root)


def _keep(name: str, figures: dict[str, Any]) -> None:
    """Save one run beside the others, at once: the next may take hours."""
    before = RESULTS / "larger_than_memory.json"
    runs = json.loads(before.read_text())["runs"] if before.exists() else {}
    save("larger_than_memory", {"runs": runs | {name: figures}})


if __name__ == "__main__":
    main()
