"""Tokens per second of one model: llama.cpp's F16, Q2_0 and TQ2_0 files, and `TernaryLinear`.

    python -m benchmarks.engine_speed            (needs `pip install 'trilens[engines]'`)

A Llama of 88M random weights in float16 and files made of it, one thread. Each round decodes the
same tokens one by one with every one of them, so that what else the machine does falls on all;
processor time, medians of the ratios within a round. A prompt of 64 tokens at once is timed too.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from benchmarks.common import llama_88m, ratios, save
from trilens.checkpoint import TernaryPlan, ternarize
from trilens.demo import demo_path

TOKENS, PROMPT, VOCABULARY = 32, 64, 4096
ONE = (
    r"layers\.0\.self_attn\.k_proj"  # the file of F16 has one ternary matrix of 84: none is no job
)
PLAN = TernaryPlan("exact", group_size=128, scale_dtype="float16")
ROWS = TernaryPlan("exact", per="row", scale_dtype="float16")
FILES: dict[str, tuple[TernaryPlan, Any]] = {
    "llama.cpp F16": (TernaryPlan(only=(ONE,), scale_dtype="float16"), "gguf-tq2_0"),
    "llama.cpp Q2_0, groups of 128": (PLAN, "gguf-q2_0"),
    "llama.cpp TQ2_0, rows": (ROWS, "gguf-tq2_0"),
}


def engine(path: Path) -> Any:
    """The file in llama.cpp, on one thread."""
    llama_cpp = __import__("llama_cpp")
    return llama_cpp.Llama(
        str(path), n_ctx=256, n_batch=128, n_threads=1, n_threads_batch=1, verbose=False
    )


def by_engine(model: Any, ids: list[int]) -> tuple[Callable[[], None], Callable[[], None]]:
    """One token after the other, and all at once."""

    def decode() -> None:
        model.reset()
        for token in ids[:TOKENS]:
            model.eval([token])

    def prompt() -> None:
        model.reset()
        model.eval(ids)

    return decode, prompt


def by_torch(
    model: LlamaForCausalLM, ids: list[int]
) -> tuple[Callable[[], None], Callable[[], None]]:
    """The same with transformers and its cache."""

    def decode() -> None:
        cache = None
        for token in ids[:TOKENS]:
            found = model(torch.tensor([[token]]), past_key_values=cache, use_cache=True)
            cache = found.past_key_values

    def prompt() -> None:
        model(torch.tensor([ids]), use_cache=True, logits_to_keep=1)

    return decode, prompt


def measure(rounds: int) -> dict[str, Any]:
    """Tokens per second, and how many times those of the F16 file."""
    torch.set_num_threads(1)
    ids = torch.randint(3, VOCABULARY, (PROMPT,)).tolist()
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        llama_88m(1024, VOCABULARY).half().save_pretrained(root / "source")
        AutoTokenizer.from_pretrained(demo_path()).save_pretrained(root / "source")
        ways: dict[str, tuple[Callable[[], None], Callable[[], None]]] = {}
        sizes: dict[str, int] = {}
        for label, (plan, kind) in FILES.items():
            path = root / f"{len(ways)}.gguf"
            ternarize(root / "source", path, plan=plan, format=kind)
            sizes[label] = round(path.stat().st_size / 1e6)
            ways[label] = by_engine(engine(path), ids)
        ternarize(root / "source", root / "packed", plan=PLAN)
        for label, folder in (("TernaryLinear, groups of 128", "packed"), ("bf16", "source")):
            model = AutoModelForCausalLM.from_pretrained(root / folder, dtype=torch.bfloat16)
            ways[f"transformers, {label}"] = by_torch(model.eval(), ids)
        found: dict[str, Any] = {"file_megabytes": sizes}
        for part, (what, n) in enumerate((("decoding", TOKENS), ("a prompt of 64", PROMPT))):
            runs = {label: pair[part] for label, pair in ways.items()}
            compared = ratios(runs, rounds, time.process_time)
            found[what] = {
                label: {
                    "tokens_per_second": round(n / each["seconds"], 1),
                    "times_of_F16": round(1 / each["ratio"], 2),
                }
                for label, each in compared.items()
            }
    return found


def main() -> None:
    """Measure and keep."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    with torch.no_grad():
        save("engine_speed", measure(parser.parse_args().rounds))


if __name__ == "__main__":
    main()
