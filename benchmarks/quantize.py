"""Speed, accuracy and error of the ternary rules that need no data.

    python -m benchmarks.quantize            speed ratios and the ladder of errors (1 GB)
    python -m benchmarks.quantize --large    also 2·10⁸ weights and 2³¹ (3 GB, minutes)
    python -m benchmarks.quantize --processor-time    speed alone, where others compute too

Speeds are ratios of the best times, and the median of the ratios within one round, in which
everything runs once, so that what else the machine does falls on all alike. The floor is twice the
time of `tensor.sum()`: a scale that needs all weights and codes that need the scale cannot do with
fewer than two readings.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from benchmarks.common import save
from trilens.ternary.codecs.gguf_blocks import CODECS
from trilens.ternary.codecs.packing import TwoBit
from trilens.ternary.quantize import PerLayerQuant
from trilens.ternary.rules.fused import pack_absmean

ROWS, COLS = 4096, 11008
LADDER = [
    ("absmean", {}),
    ("absmean", {"per": "row"}),
    ("absmean_refit", {}),
    ("twn", {}),
    ("exact", {}),
    ("exact", {"per": "row"}),
    ("exact", {"group_size": 128}),
    ("asymmetric", {"group_size": 128}),
    ("planes", {}),
    ("planes", {"group_size": 128}),
]


def torch_expression(weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """absmean and two-bit packing as one writes it in PyTorch."""
    alpha = weights.abs().mean()
    trits = (weights > 0.5 * alpha).to(torch.int8) - (weights < -0.5 * alpha).to(torch.int8)
    digits = (trits + 1).to(torch.uint8).reshape(-1, 4)
    packed = digits[:, 0] | digits[:, 1] << 2 | digits[:, 2] << 4 | digits[:, 3] << 6
    return alpha, packed


def times_of(
    work: dict[str, Callable[[], object]],
    rounds: int,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, np.ndarray]:
    """Milliseconds in some rounds, in each of which everything runs once."""
    for function in work.values():
        function()  # compile, touch the memory
    found: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(rounds):
        for name, function in work.items():
            begin = clock()
            function()
            found[name].append(1e3 * (clock() - begin))
    return {name: np.array(ms) for name, ms in found.items()}


def speed(clock: Callable[[], float] = time.perf_counter, rounds: int = 9) -> dict[str, Any]:
    """Times and ratios on one 4096 × 11008 float32 matrix in memory."""
    weights = torch.randn(ROWS, COLS, generator=torch.Generator().manual_seed(0))
    array = weights.numpy()
    work: dict[str, Callable[[], object]] = {
        "sum": weights.sum,
        "pack": lambda: pack_absmean(weights, "w"),
        "absmean": lambda: PerLayerQuant.quantize(weights, "w"),
        "absmean row": lambda: PerLayerQuant.quantize(weights, "w", per="row"),
        "exact": lambda: PerLayerQuant.quantize(weights, "w", rule="exact"),
        "exact row": lambda: PerLayerQuant.quantize(weights, "w", rule="exact", per="row"),
        "torch": lambda: torch_expression(weights),
    }
    try:
        import gguf
    except ImportError:
        print("gguf is not installed: its quantizer is left out")
    else:
        kind = gguf.GGMLQuantizationType.TQ2_0
        work["gguf"] = lambda: gguf.quants.quantize(array, kind)
    ms = times_of(work, rounds, clock)
    print(f"{ROWS} × {COLS} float32, {torch.get_num_threads()} threads: best and median")
    for name, each in ms.items():
        print(f"  {name:32} {each.min():8.1f} {np.median(each):8.1f} ms")
    # Alone and often: what else the machine does changes within the other rounds.
    pair = times_of({name: work[name] for name in ("sum", "pack")}, 10 * rounds, clock)
    nothing = np.full(rounds, np.nan)
    ratios = [
        ("two-pass floor / pack", 2 * pair["sum"], pair["pack"], "at least 0.85"),
        ("PyTorch expression / pack", ms["torch"], ms["pack"], "at least 10"),
        ("gguf's TQ2_0 / pack", ms.get("gguf", nothing), ms["pack"], "at least 10"),
        ("exact per row / absmean per row", ms["exact row"], ms["absmean row"], "at most 20"),
        ("exact per row / pack", ms["exact row"], ms["pack"], "at most 20"),
    ]
    figures: dict[str, Any] = {"clock": clock.__name__, "threads": torch.get_num_threads()}
    figures |= {"matrix": f"{ROWS}x{COLS} float32", "ms": {}, "ratios": {}}
    for name, each in ms.items():
        figures["ms"][name] = {"best": round(each.min(), 2), "median": round(np.median(each), 2)}
    for what, theirs, ours, wanted in ratios:
        best, median = theirs.min() / ours.min(), np.median(theirs / ours)
        print(f"  {what:32} {best:8.2f} {median:8.2f}    ({wanted})")
        if median == median:  # gguf may not be there
            found = {"best": round(best, 2), "median": round(median, 2), "asked": wanted}
            figures["ratios"][what] = found
    alpha, packed = torch_expression(weights)
    done = pack_absmean(weights, "w")
    differing = int(np.count_nonzero(packed.numpy() != done.codes))
    print(f"  scale {done.scale!r}, PyTorch's {float(alpha)!r}; {differing} bytes differ")
    return figures


def codecs() -> dict[str, Any]:
    """Milliseconds for a million trits, there and back."""
    trits = torch.randint(-1, 2, (1024, 1024), dtype=torch.int8)
    figures = {}
    for name, codec in CODECS.items():
        scales = None if codec.scale_block is None else 0.5
        data = codec.encode(trits, scales)
        times = times_of(
            {
                "there": lambda c=codec, s=scales: c.encode(trits, s),
                "back": lambda c=codec, d=data: c.decode(d, (1024, 1024)),
            },
            3,
        )
        there, back = times["there"].min(), times["back"].min()
        figures[name] = {"encode_ms": round(there, 3), "decode_ms": round(back, 3)}
        print(f"  {name:8} {codec.bits_per_weight:7.4f} bits {there:8.2f} ms {back:8.2f} ms")
    return figures


def ladder() -> list[dict[str, Any]]:
    """Relative errors and times on 4 million synthetic weights."""
    rng = np.random.default_rng(0)
    kinds = {
        "Gaussian": rng.standard_normal((1024, 4096)).astype(np.float32),
        "Laplace": rng.laplace(size=(1024, 4096)).astype(np.float32),
    }
    figures = []
    print("rule            per           Gaussian  Laplace   ms")
    for rule, options in LADDER:
        per = f"group {options['group_size']}" if "group_size" in options else options.get("per")
        begin = time.perf_counter()
        errors = [
            PerLayerQuant.quantize(w, "w", rule=rule, **options).relative_error(w)
            for w in kinds.values()
        ]
        ms = 500 * (time.perf_counter() - begin)
        print(
            f"{rule:15} {per or 'tensor':12}" + "".join(f"{e:9.4f}" for e in errors), f"{ms:6.0f}"
        )
        found = dict(zip(kinds, (round(e, 4) for e in errors), strict=True))
        figures.append({"rule": rule, "per": per or "tensor", **found, "ms": round(ms)})
    return figures


def large() -> None:
    """α and mse at 2·10⁸ weights against sums in extended precision, chunk by chunk."""
    n, chunk = 200_000_000, 1_000_000
    rng = np.random.default_rng(0)
    weights = np.empty(n, dtype=np.float32)
    for start in range(0, n, chunk):
        weights[start : start + chunk] = 0.02 * rng.standard_normal(chunk, dtype=np.float32) + 0.01
    quant = PerLayerQuant.quantize(weights, "w")
    sums, squares = [], []
    for start in range(0, n, chunk):
        part = weights[start : start + chunk].astype(np.longdouble)
        sums.append(float(np.abs(part).sum()))
    alpha = math.fsum(sums) / n
    for start in range(0, n, chunk):
        part = weights[start : start + chunk].astype(np.longdouble)
        trits = (part > 0.5 * alpha).astype(np.int8) - (part < -0.5 * alpha)
        squares.append(float(((part - np.longdouble(np.float32(alpha)) * trits) ** 2).sum()))
    mse = math.fsum(squares) / n
    print(f"{n} weights: α off by {abs(quant.scale / alpha - 1):.1e}", end=", ")
    print(f"mse off by {abs(quant.mse(weights) / mse - 1):.1e} (at most 1e-6)")
    packed = pack_absmean(weights, "w")
    same = packed.scale == quant.scale and np.array_equal(
        packed.codes, TwoBit().encode(quant.trits)
    )
    print(f"  packed at once: {'the same' if same else 'DIFFERENT'}")


def huge() -> None:
    """More than 2³¹ weights: one row seen 65 537 times, which takes no memory."""
    row = torch.randn(1, 1 << 15, generator=torch.Generator().manual_seed(0)).half()
    weights = row.expand((1 << 16) + 1, -1)
    one, all_rows = PerLayerQuant.quantize(row, "row"), PerLayerQuant.quantize(weights, "w")
    same = torch.equal(one.trits[0], all_rows.trits[-1])
    off = abs(all_rows.scale / one.scale - 1)
    print(
        f"{weights.numel()} weights: α off by {off:.1e}, last row {'the same' if same else 'WRONG'}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--large", action="store_true", help="also 2·10⁸ and 2³¹ weights")
    parser.add_argument(
        "--processor-time", action="store_true", help="of this process: speed alone"
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--speed", action="store_true", help="speed alone, by the wall clock")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.processor_time or arguments.speed:
        clock = time.process_time if arguments.processor_time else time.perf_counter
        print(json.dumps(speed(clock, arguments.rounds), indent=1))
        return
    figures = {
        "speed": speed(rounds=arguments.rounds),
        "codecs_million_trits": codecs(),
        "relative_errors": ladder(),
    }
    save("quantize", figures)
    if arguments.large:
        large()
        huge()


if __name__ == "__main__":
    main()
