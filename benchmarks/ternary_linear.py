"""`TernaryLinear`: one layer against `nn.Linear` and transformers' `BitLinear`, and decoding.

    python -m benchmarks.ternary_linear             everything (two minutes)
    python -m benchmarks.ternary_linear --layer     one 4096 × 4096 layer
    python -m benchmarks.ternary_linear --decode    an 88M Llama, all block linears ternary

A layer is timed as twelve equal ones in turn, so that weights come from memory as they do in a
model, not from the cache: alone, and beside one process that computes without end. All runs of a
comparison are interleaved; figures are medians of the ratios within a round, and the extremes. The
floor for one input is the time in which this machine reads the layer's bytes.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.integrations.bitnet import BitLinear, pack_weights

from benchmarks.common import RESULTS, llama_88m, paired, peak_memory, ratios, save
from trilens.checkpoint import TernaryPlan, ternarize
from trilens.ternary.packed.linear import TernaryLinear
from trilens.ternary.quantize import PerLayerQuant

WIDTH = 4096
COPIES = 12
KINDS = {
    "per tensor": {},
    "groups of 128": {"rule": "exact", "group_size": 128},
    "two planes, groups of 128": {"rule": "planes", "group_size": 128},
}
BATCHES = (1, 4, 16, 64, 512)
BUSY = "while True: pass"
PROMPT, NEW = 16, 48
RESULT = RESULTS / "ternary_linear.json"


def in_turn(layers: list[nn.Module], x: torch.Tensor) -> Callable[[], None]:
    """One call of each of the layers."""

    def run() -> None:
        for layer in layers:
            layer(x)

    return run


def copies(layer: nn.Module) -> list[nn.Module]:
    """The layer and others of its size, whose weights lie elsewhere."""
    others = []
    for _ in range(COPIES - 1):
        other = TernaryLinear(
            WIDTH,
            WIDTH,
            bias=False,
            group_size=layer.group_size,
            has_second=layer.second_codes is not None,
        )
        other.load_state_dict(layer.state_dict())
        others.append(other)
    return [layer, *others]


def read_gigabytes_per_second() -> float:
    """How fast one pass over memory is."""
    big = torch.ones(1 << 26)
    times = []
    for _ in range(7):
        start = time.perf_counter()
        big.sum()
        times.append(time.perf_counter() - start)
    return big.numel() * 4 / min(times) / 1e9


def bit_linear(quant: PerLayerQuant) -> BitLinear:
    """transformers' packed layer with the same trits."""
    layer = BitLinear(WIDTH, WIDTH, bias=False, dtype=torch.bfloat16)
    layer.weight.copy_(pack_weights(quant.trits.clone()))
    layer.weight_scale.fill_(1 / float(quant.scale))
    return layer


@contextmanager
def busy_neighbour(wanted: bool) -> Iterator[None]:
    """One process that computes without end."""
    if not wanted:
        yield
        return
    process = subprocess.Popen([sys.executable, "-c", BUSY])
    try:
        yield
    finally:
        process.kill()
        process.wait()


def layer_figures(
    threads: int, rounds: int, *, busy: bool, clock: Callable[[], float]
) -> dict[str, Any]:
    """Ratios for each number of inputs."""
    with busy_neighbour(busy):
        return _layer_figures(threads, rounds, clock)


def _layer_figures(threads: int, rounds: int, clock: Callable[[], float]) -> dict[str, Any]:
    torch.set_num_threads(threads)
    quants = {
        name: PerLayerQuant.quantize(torch.randn(WIDTH, WIDTH), "w", **options)
        for name, options in KINDS.items()
    }
    packed = {name: copies(TernaryLinear.from_quant(quant)) for name, quant in quants.items()}
    dense = [nn.Linear(WIDTH, WIDTH, bias=False, dtype=torch.bfloat16) for _ in range(COPIES)]
    speed = read_gigabytes_per_second()
    found: dict[str, Any] = {"read_gigabytes_per_second": round(speed, 1)}
    for batch in BATCHES:
        x = torch.randn(batch, WIDTH).bfloat16()
        # With many inputs, it is no matter where the weights come from.
        n = COPIES if batch <= 16 else 1
        runs = {"bf16 nn.Linear": in_turn(dense[:n], x)}
        runs |= {name: in_turn(layers[:n], x) for name, layers in packed.items()}
        compared = ratios(runs, rounds, clock)
        base = compared["bf16 nn.Linear"]["seconds"]
        rows: dict[str, Any] = {"bf16 nn.Linear, ms": round(1e3 * base / n, 3)}
        for name, layers in packed.items():
            ms = 1e3 * compared[name]["seconds"] / n
            rows[name] = {
                "ms": round(ms, 3),
                "times_faster": round(1 / compared[name]["ratio"], 2),
                "least": round(1 / compared[name]["ratio_max"], 2),
                "most": round(1 / compared[name]["ratio_min"], 2),
            }
            if batch == 1:
                floor = layers[0].packed.size_bytes / speed / 1e6
                rows[name]["over_the_bytes_floor"] = round(ms / floor, 2)
        found[f"{batch} inputs"] = rows
    return found


def bit_linear_figures(quant: PerLayerQuant, rounds: int) -> dict[str, Any]:
    """transformers' packed layer for one input, compiled as it comes, and without torch.compile."""
    ours, theirs = TernaryLinear.from_quant(quant), bit_linear(quant)
    x = torch.randn(1, WIDTH).bfloat16()
    found = {}
    for name, disabled in (("as it comes", False), ("without torch.compile", True)):
        torch._dynamo.config.disable = disabled
        try:
            medians = paired({"ours": lambda: ours(x), "theirs": lambda: theirs(x)}, rounds)
        except Exception as error:  # no compiler on this machine
            found[name] = {"failed": type(error).__name__}
            continue
        finally:
            torch._dynamo.config.disable = False
        found[name] = {
            "ms": round(1e3 * medians["theirs"], 2),
            "ours_times_faster": round(medians["theirs"] / medians["ours"], 1),
        }
    return found


def decode(model: Any) -> torch.Tensor:
    """Greedy tokens, one by one."""
    prompt = torch.arange(PROMPT)[None]
    return model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=NEW,
        min_new_tokens=NEW,
        do_sample=False,
        pad_token_id=0,
    )


def load(folder: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()


def memory_of(folder: str, *, loops: bool) -> None:
    """Print the memory that loading and decoding takes (in a process of its own).

    Args:
        loops: load numba and the compiled loops before, whose memory is the same for any model.
    """
    torch.set_num_threads(1)
    decode(llama_88m(64, 128).bfloat16())  # what is loaded once, whatever the model
    if loops:
        warm = PerLayerQuant.quantize(torch.randn(1024, 1024), "w", rule="exact", group_size=128)
        for n_inputs in (1, PROMPT):
            TernaryLinear.from_quant(warm)(torch.zeros(n_inputs, 1024, dtype=torch.bfloat16))
    with peak_memory() as peak:
        decode(load(folder))
    print(json.dumps({"bytes": peak.extra_bytes}))


def _memory(folder: str, *, loops: bool) -> int:
    command = [sys.executable, "-m", "benchmarks.ternary_linear", "--memory-of", folder]
    command += ["--loops"] if loops else []
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return int(json.loads(printed.splitlines()[-1])["bytes"])


def decode_figures(vocab_size: int, rounds: int) -> dict[str, Any]:
    """Tokens per second and peak memory of a model, dense and packed."""
    with tempfile.TemporaryDirectory() as root:
        folders = {"dense": f"{root}/dense", "packed": f"{root}/packed"}
        llama_88m(1024, vocab_size).bfloat16().save_pretrained(folders["dense"])
        plan = TernaryPlan("exact", group_size=128)
        ternarize(folders["dense"], folders["packed"], plan=plan)
        memory = {name: _memory(folder, loops=False) for name, folder in folders.items()}
        memory["packed, loops loaded before"] = _memory(folders["packed"], loops=True)
        models = {name: load(folder) for name, folder in folders.items()}
        found: dict[str, Any] = {
            "file_megabytes": {
                name: round(sum(p.stat().st_size for p in Path(f).glob("*.safetensors")) / 1e6)
                for name, f in folders.items()
            },
            "peak_megabytes": {name: round(value / 1e6) for name, value in memory.items()},
            "memory_ratio": round(memory["packed"] / memory["dense"], 3),
            "memory_ratio_loops_loaded_before": round(
                memory["packed, loops loaded before"] / memory["dense"], 3
            ),
        }
        for threads in (1, 2):
            torch.set_num_threads(threads)
            medians = paired({n: lambda m=m: decode(m) for n, m in models.items()}, rounds)
            found[f"{threads} threads"] = {
                **{f"{n}_tokens_per_second": round(NEW / s, 1) for n, s in medians.items()},
                "times_faster": round(medians["dense"] / medians["packed"], 2),
            }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layer", action="store_true", help="only one layer")
    parser.add_argument("--decode", action="store_true", help="only decoding")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--alone", action="store_true", help="not beside a busy process too")
    parser.add_argument(
        "--processor-time", action="store_true", help="of this process, where others run too"
    )
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    parser.add_argument("--loops", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory_of:
        memory_of(arguments.memory_of, loops=arguments.loops)
        return
    both = arguments.layer == arguments.decode
    figures: dict[str, Any] = {}
    with torch.no_grad():
        if both or arguments.layer:
            clock = time.process_time if arguments.processor_time else time.perf_counter
            figures["layer 4096 x 4096"] = {
                f"{threads} threads{', beside one busy process' if busy else ''}": layer_figures(
                    threads, arguments.rounds, busy=busy, clock=clock
                )
                for threads in arguments.threads
                for busy in ((False,) if arguments.alone else (False, True))
            }
            figures["layer 4096 x 4096"]["setting"] = {
                "clock": clock.__name__,
                "rounds": arguments.rounds,
                "load_average_at_the_end": round(psutil.getloadavg()[0], 1),
            }
            torch.set_num_threads(1)
            quant = PerLayerQuant.quantize(torch.randn(WIDTH, WIDTH), "w")
            figures["BitLinear, 4096 x 4096"] = bit_linear_figures(quant, arguments.rounds)
        if both or arguments.decode:
            figures["decode, 88M Llama"] = {
                f"vocabulary {size}": decode_figures(size, arguments.rounds)
                for size in (4096, 32000)
            }
    known = json.loads(RESULT.read_text(encoding="utf-8")) if RESULT.is_file() else {}
    save(
        "ternary_linear",
        {**{k: v for k, v in known.items() if "4096" in k or "88M" in k}, **figures},
    )


if __name__ == "__main__":
    main()
