"""The family sweep: every causal-LM type of transformers, a tiny random model each.

Each type is captured in full, captured without attention (and counted apart), or refused by a
TrilensError that names the reason. Anything else is a failure of trilens.

    python -m benchmarks.families [TYPE ...] [--write]

`--write` renews the table that ships with the package (`trilens families`) and the last result; of
some types, their rows alone.
"""

from __future__ import annotations

import argparse
import json
import logging
import subprocess
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import transformers

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from tinymodels import TYPES  # noqa: E402
from tinymodels.checks import CheckError, sweep_one  # noqa: E402
from trilens.models.families import FamilyTable, load_families  # noqa: E402

Sweep = Callable[[str], tuple[Any, dict[str, Any]]]
"""Captures one type: its row, and what was measured."""
CHUNK = 12
LEAST = {"gated": 30, "effective": 16, "sited": 120}
"""Types that the sweep has to prove gates, effective attention, and all core sites of."""
LAST = Path(__file__).parent / "results" / "families.json"
SHIPPED = ROOT / "src" / "trilens" / "models" / "families.json"


def sweep(types: list[str], one: Sweep = sweep_one) -> list[dict]:
    """Sweep some types in this process."""
    rows = []
    for name in types:
        try:
            row, figures = one(name)
            rows.append({"name": name, "row": asdict(row), "figures": figures})
        except CheckError as failure:
            rows.append({"name": name, "failed": name, "why": str(failure)})
        except Exception as error:
            why = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            rows.append({"name": name, "failed": name, "why": why})
        print(json.dumps(rows[-1]), flush=True)
    return rows


def sweep_in_children(
    types: list[str], module: str = "benchmarks.families", options: Sequence[str] = ()
) -> list[dict]:
    """Sweep in child processes, so that one model's memory or crash is its own."""
    rows = []
    for start in range(0, len(types), CHUNK):
        group = types[start : start + CHUNK]
        command = [sys.executable, "-m", module, "--child", *group, *options]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
        rows += found
        seen = {item["name"] for item in found}
        missing = [name for name in group if name not in seen]
        tail = " ".join(done.stderr.split())[-300:]
        rows += [
            {"name": name, "failed": name, "why": f"the process ended: {tail}"} for name in missing
        ]
        print(f"{min(start + CHUNK, len(types))}/{len(types)}", file=sys.stderr, flush=True)
    return rows


def merged(
    table: FamilyTable, figures: dict[str, dict], failed: list[dict]
) -> tuple[FamilyTable, dict[str, dict], list[dict]]:
    """The last whole sweep with the rows of some types renewed.

    Raises:
        SystemExit: the last sweep ran on other versions.
    """
    last, held = load_families(), json.loads(LAST.read_text())
    if (last.transformers, last.torch) != (table.transformers, table.torch):
        raise SystemExit("the last sweep ran on other versions: sweep all types")
    new = {row.model_type: row for row in table.rows}
    swept = new.keys() | {row["failed"] for row in failed}
    rows = [new.get(row.model_type, row) for row in last.rows]
    rows += [new[name] for name in new.keys() - {row.model_type for row in last.rows}]
    rows.sort(key=lambda row: TYPES.index(row.model_type))
    failed = [*failed, *(row for row in held["failed"] if row["failed"] not in swept)]
    figures = {**held["figures"], **figures}
    figures = {row.model_type: figures[row.model_type] for row in rows}
    return replace(table, rows=tuple(rows)), figures, failed


def main() -> int:
    """Run the sweep and say what it found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("types", nargs="*", metavar="TYPE")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    types = options.types or list(TYPES)
    if options.child:
        torch.set_num_threads(1)
        sweep(types)
        return 0
    rows = sweep_in_children(types)
    failed = [row for row in rows if "failed" in row]
    table = FamilyTable.from_dict(
        {
            **FamilyTable(transformers.__version__, torch.__version__.split("+")[0], ()).to_dict(),
            "rows": [row["row"] for row in rows if "row" in row],
        }
    )
    print(json.dumps(table.count()))
    counts = {"gated": table.n_gated, "effective": table.n_effective, "sited": table.n_sited}
    print(json.dumps(counts))
    for key in ("attention_vs_eager", "many_vs_one", "effective_many_vs_one"):
        worst = [row["figures"][key] for row in rows if row.get("figures", {}).get(key) is not None]
        print(f"{key}: worst {max(worst, default=0.0):.2e} over {len(worst)} types")
    for row in failed:
        print(f"FAILED {row['failed']}: {row['why']}")
    if options.write:
        LAST.parent.mkdir(exist_ok=True)
        figures = {row["row"]["model_type"]: row["figures"] for row in rows if "row" in row}
        if options.types:
            table, figures, failed = merged(table, figures, failed)
            counts = {key: getattr(table, f"n_{key}") for key in counts}
        kept = {"outcomes": table.count(), **counts, "failed": failed, "figures": figures}
        LAST.write_text(json.dumps(kept, indent=1) + "\n")
        SHIPPED.write_text(json.dumps(table.to_dict(), indent=1) + "\n")
    short = [key for key, least in LEAST.items() if not options.types and counts[key] < least]
    for key in short:
        print(f"FAILED {key}: {counts[key]} types are proven, {LEAST[key]} are promised")
    return 1 if failed or short else 0


if __name__ == "__main__":
    sys.exit(main())
