"""Calibrated rules from end to end over every causal-LM type that is captured in full.

A tiny model each, `gptq` and `best`, groups of 16, effort `fast`, 512 tokens: each is written,
loaded and compared with the dense weights that it decodes to, or refused by name.

    python -m benchmarks.calibrated_families [TYPE ...] [--rules best]

The rows of what was run replace those of the last result.
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


def sweep(types: list[str], rules: list[str]) -> None:
    """A line of JSON for each type."""
    for name in types:
        row: dict[str, Any] = {"name": name}
        began = time.process_time()
        for rule in rules:
            try:
                with tempfile.TemporaryDirectory() as folder:
                    row[rule] = calibrate_one(name, rule, Path(folder))
            except CheckError as failure:
                row[rule] = {"failed": str(failure)}
            except Exception as error:
                why = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
                row[rule] = {"failed": why}
        print(json.dumps({**row, "seconds": round(time.process_time() - began, 1)}), flush=True)


def counted(types: dict[str, dict[str, Any]]) -> dict[str, dict[str, int]]:
    """How the runs of each rule ended."""
    counts: dict[str, dict[str, int]] = {}
    for row in types.values():
        for rule in RULES:
            if rule in row:
                found = counts.setdefault(rule, {"written": 0, "refused": 0, "failed": 0})
                found[next((w for w in ("failed", "refused") if w in row[rule]), "written")] += 1
    return counts


def main() -> int:
    """Sweep, and say what was found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("types", nargs="*", metavar="TYPE")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--rules", nargs="+", default=list(RULES), choices=RULES)
    parser.add_argument("--rows", type=Path, help="lines that `--child` printed, in place of a run")
    options = parser.parse_args()
    full = [row.model_type for row in load_families().rows if row.outcome == "full"]
    types = options.types or [name for name in TYPES if name in full]
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    if options.child:
        torch.set_num_threads(1)
        sweep(types, options.rules)
        return 0
    if options.rows is not None:
        rows = [json.loads(line) for line in options.rows.read_text().splitlines()]
    else:
        module = "benchmarks.calibrated_families"
        rows = sweep_in_children(types, module, ["--rules", *options.rules])
    last: dict[str, Any] = json.loads(LAST.read_text()) if LAST.is_file() else {}
    found: dict[str, dict[str, Any]] = last.get("types", {})
    for row in rows:
        name = row["name"]
        ended = {rule: row[rule] for rule in RULES if rule in row}
        ended = ended or {rule: {"failed": row.get("why", "")} for rule in options.rules}
        found[name] = {**found.get(name, {}), **ended}
        for rule, result in ended.items():
            for word in ("failed", "refused"):
                if word in result:
                    print(f"{word} {name}, {rule}: {result[word]}")
    found = {name: found[name] for name in TYPES if name in found}
    counts = counted(found)
    save("calibrated_families", {"counts": counts, "types": found})
    return 1 if any(count["failed"] for count in counts.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
