"""Run every benchmark but the family sweep (`make sweep`), each in a process of its own."""

from __future__ import annotations

import subprocess
import sys

NAMES = (
    "startup",
    "overhead",
    "store",
    "inline_overhead",
    "patching",
    "sites",
    "generation",
    "pairs",
    "induction",
    "gate_overhead",
    "long_attention",
    "attention_questions --json",
    "effective_attention --json",
    "recurrent_states --json",
    "quantize",
    "planes",
    "checkpoint",
    "calibrated",
    "self_calibration",
    "plan",
    "what_survives",
    "checkpoint_2gb",
    "perplexity",
    "compare",
    "ternary_linear",
    "packed_experts",
)


def main() -> int:
    """Run them; the exit code says whether all ran."""
    codes = [
        subprocess.run(
            [sys.executable, "-m", *f"benchmarks.{name}".split()], check=False
        ).returncode
        for name in NAMES
    ]
    return int(any(codes))


if __name__ == "__main__":
    sys.exit(main())
