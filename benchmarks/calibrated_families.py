"""Calibrated rules from end to end over every causal-LM type that is captured in full.

A tiny model each, `gptq` and `best`, groups of 16, effort `fast`, 512 tokens: each is written,
loaded and compared with the dense weights that it decodes to, or refused by name.

    python -m benchmarks.calibrated_families [TYPE ...]

All types: the result is kept; of some, their rows.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import RESULTS, save
from benchmarks.families import TYPES, sweep_in_children
from tinymodels.calibrated_checks import RULES, calibrate_one
from tinymodels.checks import CheckError
from trilens.models.families import load_families

LAST = RESULTS / "calibrated_families.json"


def sweep(types: list[str]) -> None:
    """A line of JSON for each type."""
    for name in types:
        row: dict[str, Any] = {"name": name}
        began = time.process_time()
        for rule in RULES:
            try:
                with tempfile.TemporaryDirectory() as folder:
                    row[rule] = calibrate_one(name, rule, Path(folder))
            except CheckError as failure:
                row[rule] = {"failed": str(failure)}
            except Exception as error:
                why = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
                row[rule] = {"failed": why}
        print(json.dumps({**row, "seconds": round(time.process_time() - began, 1)}), flush=True)


def main() -> int:
    """Sweep, and say what was found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("types", nargs="*", metavar="TYPE")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    full = [row.model_type for row in load_families().rows if row.outcome == "full"]
    types = options.types or [name for name in TYPES if name in full]
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    if options.child:
        torch.set_num_threads(1)
        sweep(types)
        return 0
    figures: dict[str, Any] = json.loads(LAST.read_text()) if options.types else {}
    figures.setdefault("types", {})
    failed = 0
    for row in sweep_in_children(types, "benchmarks.calibrated_families"):
        figures["types"][row["name"]] = {k: v for k, v in row.items() if k not in {"name", "why"}}
        for rule in RULES:
            found = row.get(rule, {"failed": row.get("why", "")})
            failed += "failed" in found
            for word in ("failed", "refused"):
                if word in found:
                    print(f"{word} {row['name']}, {rule}: {found[word]}")
    ended = [[word for word in ("failed", "refused") if word in row.get(rule, {"failed": ""})]
             for row in figures["types"].values() for rule in RULES]  # fmt: skip
    figures["counts"] = {
        "runs": len(ended),
        "written": ended.count([]),
        "refused": ended.count(["refused"]),
        "failed": ended.count(["failed"]),
    }
    print(json.dumps(figures["counts"]))
    save("calibrated_families", figures)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
