"""A mixture of experts loaded packed and dense: memory while loading and held, and its speed.

    python -m benchmarks.packed_experts     a Mixtral with 63M weights in its experts (a minute)

Each load runs in a program of its own. Held is what the tensors of the model take; the peaks are
what loading takes at most, and one forward of 32 tokens beside the loaded model.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

from benchmarks.common import peak_memory, save
from trilens.checkpoint import TernaryPlan, ternarize
from trilens.ternary.packed.linear import TernaryLinear
from trilens.ternary.quantize import PerLayerQuant

TOKENS = 32


def main() -> None:
    """Make both checkpoints, load each, and keep the figures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(_measure(args.measure)))
        return
    config = MixtralConfig(
        vocab_size=512,
        hidden_size=512,
        intermediate_size=1024,
        num_hidden_layers=5,
        num_attention_heads=8,
        num_key_value_heads=4,
        num_local_experts=8,
        num_experts_per_tok=2,
        max_position_embeddings=256,
    )
    with tempfile.TemporaryDirectory() as folder:
        dense, packed = Path(folder, "dense"), Path(folder, "packed")
        torch.manual_seed(0)
        model = MixtralForCausalLM(config).to(torch.bfloat16)
        n_experts = sum(p.numel() for n, p in model.named_parameters() if ".experts." in n)
        model.save_pretrained(dense)
        del model
        ternarize(dense, packed, plan=TernaryPlan("exact", group_size=128))
        tiny = {
            "vocab_size": 32,
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
        }
        heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 2}
        MixtralForCausalLM(MixtralConfig(**tiny, **heads)).save_pretrained(Path(folder, "tiny"))
        ternarize(Path(folder, "tiny"), Path(folder, "warm"))
        found = {path.name: _run(path) for path in (dense, packed)}
    ratios = {
        name: round(found["packed"][name] / found["dense"][name], 3)
        for name in ("held_bytes", "loading_peak_bytes", "expert_bytes")
    }
    save("packed_experts", {"expert_weights": n_experts, **found, "packed over dense": ratios})


def _run(folder: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.packed_experts", "--measure", str(folder)]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found: dict[str, Any] = json.loads(printed.splitlines()[-1])
    return found


def _measure(folder: str) -> dict[str, Any]:
    torch.set_num_threads(1)
    ids = torch.arange(TOKENS)[None]
    # What is imported at the first ternary load is no part of a model.
    warm = AutoModelForCausalLM.from_pretrained(Path(folder).with_name("warm"))
    quant = PerLayerQuant.quantize(torch.randn(1024, 1024), "warm", rule="exact", group_size=128)
    layer = TernaryLinear.from_quant(quant, dtype=torch.bfloat16)
    with torch.no_grad():
        warm(ids[:, :4])
        for n_inputs in (1, 8, 32):
            layer(torch.randn(n_inputs, 1024, dtype=torch.bfloat16))
        with peak_memory() as loading:
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
        with peak_memory() as running:
            model(ids)
        one = ids[:, :1]
        seconds = []
        for _ in range(9):
            start = time.process_time()
            model(one, use_cache=False)
            seconds.append(time.process_time() - start)
    tensors = dict(model.state_dict())
    size = {name: t.numel() * t.element_size() for name, t in tensors.items()}
    return {
        "held_bytes": sum(size.values()),
        "loading_peak_bytes": loading.extra_bytes,
        "forward_peak_bytes": running.extra_bytes,
        "expert_bytes": sum(n for name, n in size.items() if ".experts." in name),
        "one_token_cpu_ms": round(1e3 * sorted(seconds)[4], 2),
    }


if __name__ == "__main__":
    main()
