"""The second sweep: encoder–decoders of text and of sound, and masked LMs, stack by stack.

Every type of three mappings of transformers, a tiny random model each: in full, in part, or refused
by a TrilensError that names the reason. Anything else is a failure of trilens.

    python -m benchmarks.mappings [MAPPING/TYPE ...] [--write]

`--write` renews the table that ships with the package and the last result; of types, their rows.
"""

from __future__ import annotations

import argparse
import json
import logging
import resource
import sys
import time
import warnings
from dataclasses import replace
from typing import Any

import torch
import transformers

from benchmarks.families import ROOT, sweep, sweep_in_children

sys.path.insert(0, str(ROOT / "tests"))

from tinymodels.mappings import MAPPINGS
from tinymodels.stack_checks import sweep_as
from trilens.models.mappings import MappingRow, MappingTable, load_mappings, row_from

LEAST = 126
"""Types that the sweep has to capture in full."""
LAST = ROOT / "benchmarks" / "results" / "mappings.json"
SHIPPED = ROOT / "src" / "trilens" / "models" / "mappings.json"
NAMES = [f"{mapping}/{name}" for mapping, types in MAPPINGS.items() for name in types]


def one(name: str) -> tuple[MappingRow, dict[str, Any]]:
    """Sweep one type, named with its mapping."""
    mapping, _, model_type = name.partition("/")
    return sweep_as(mapping, model_type)


def merged(
    table: MappingTable, figures: dict[str, dict], failed: list[dict]
) -> tuple[MappingTable, dict[str, dict], list[dict], dict[str, int]]:
    """The last whole sweep with the rows of some types renewed, and the seconds that it took.

    Raises:
        SystemExit: the last sweep ran on other versions.
    """
    last, held = load_mappings(), json.loads(LAST.read_text())
    if (last.transformers, last.torch) != (table.transformers, table.torch):
        raise SystemExit("the last sweep ran on other versions: sweep all types")
    new = {f"{row.mapping}/{row.model_type}": row for row in table.rows}
    old = {f"{row.mapping}/{row.model_type}": row for row in last.rows}
    rows = tuple((old | new)[name] for name in NAMES if name in old | new)
    swept = new.keys() | {item["failed"] for item in failed}
    failed = [*failed, *(item for item in held["failed"] if item["failed"] not in swept)]
    kept = {name: each for name, each in held["figures"].items() if name not in swept}
    seconds = {key: held[key] for key in held if key.endswith("seconds")}
    return replace(table, rows=rows), {**kept, **figures}, failed, seconds


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
    processor = resource.getrusage(resource.RUSAGE_CHILDREN)
    table = MappingTable(
        transformers.__version__,
        torch.__version__.split("+")[0],
        tuple(row_from(item["row"]) for item in found if "row" in item),
    )
    full = len(table.full_types)
    seconds = {
        "seconds": round(time.monotonic() - began),
        "processor_seconds": round(processor.ru_utime + processor.ru_stime),
    }
    print(json.dumps({**table.count(), "types_in_full": full, **seconds}))
    figures = {item["name"]: item["figures"] for item in found if item.get("figures")}
    for key in sorted({key for each in figures.values() for key in each}):
        worst = [each[key] for each in figures.values() if key in each]
        print(f"{key}: worst {max(worst):.2e} over {len(worst)} models")
    for item in failed:
        print(f"FAILED {item['failed']}: {item['why']}")
    if options.write:
        if options.types:
            table, figures, failed, seconds = merged(table, figures, failed)
        kept = {
            "outcomes": table.count(),
            "types_in_full": len(table.full_types),
            **seconds,
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
