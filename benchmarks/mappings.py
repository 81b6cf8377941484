"""The second sweep: encoder–decoders of text and of sound, and masked LMs, stack by stack.

Every type of three mappings of transformers, a tiny random model each: in full, in part, or refused
by a TrilensError that names the reason. Anything else is a failure of trilens.

    python -m benchmarks.mappings [MAPPING/TYPE ...] [--write]

`--write` renews the table that ships with the package and the last result.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
import warnings
from typing import Any

import torch
import transformers

from benchmarks.families import ROOT, sweep, sweep_in_children

sys.path.insert(0, str(ROOT / "tests"))

from tinymodels.mappings import MAPPINGS
from tinymodels.stack_checks import sweep_as
from trilens.models.mappings import MappingRow, MappingTable, row_from

LEAST = 75
"""Types that the sweep has to capture in full."""
LAST = ROOT / "benchmarks" / "results" / "mappings.json"
SHIPPED = ROOT / "src" / "trilens" / "models" / "mappings.json"
NAMES = [f"{mapping}/{name}" for mapping, types in MAPPINGS.items() for name in types]


def one(name: str) -> tuple[MappingRow, dict[str, Any]]:
    """Sweep one type, named with its mapping."""
    mapping, _, model_type = name.partition("/")
    return sweep_as(mapping, model_type)


def main() -> int:
    """Run the sweep and say what it found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("types", nargs="*", metavar="MAPPING/TYPE")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    if options.child:
        torch.set_num_threads(1)
        sweep(options.types, one)
        return 0
    began = time.monotonic()
    found = sweep_in_children(options.types or NAMES, "benchmarks.mappings")
    failed = [item for item in found if "failed" in item]
    table = MappingTable(
        transformers.__version__,
        torch.__version__.split("+")[0],
        tuple(row_from(item["row"]) for item in found if "row" in item),
    )
    full = len(table.full_types)
    seconds = round(time.monotonic() - began)
    print(json.dumps({**table.count(), "types_in_full": full, "seconds": seconds}))
    figures = {item["name"]: item["figures"] for item in found if item.get("figures")}
    for key in sorted({key for each in figures.values() for key in each}):
        worst = [each[key] for each in figures.values() if key in each]
        print(f"{key}: worst {max(worst):.2e} over {len(worst)} models")
    for item in failed:
        print(f"FAILED {item['failed']}: {item['why']}")
    if options.write and not options.types:
        kept = {
            "outcomes": table.count(),
            "types_in_full": full,
            "seconds": seconds,
            "failed": failed,
            "figures": figures,
        }
        LAST.write_text(json.dumps(kept, indent=1) + "\n")
        SHIPPED.write_text(json.dumps(table.to_dict(), indent=1) + "\n")
    short = not options.types and full < LEAST
    if short:
        print(f"FAILED: {full} types are in full, {LEAST} are promised")
    return 1 if failed or short else 0


if __name__ == "__main__":
    sys.exit(main())
