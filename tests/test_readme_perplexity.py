"""The README's perplexity table is the benchmark's last result."""

from __future__ import annotations

import json
import re
from pathlib import Path

from trilens.ternary.rules.rules import RULES

ROOT = Path(__file__).parents[1]
SCALES = ("tensor", "row", "g128")


def test_figures_are_the_results() -> None:
    results = json.loads((ROOT / "benchmarks" / "results" / "perplexity.json").read_text())
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    shown = re.search(r"<!-- perplexity: begin -->\n(.*?)\n<!-- perplexity: end", readme, re.DOTALL)
    assert shown is not None
    rows = [line.strip("| ").split(" | ") for line in shown[1].splitlines()[2:]]
    assert [row[0].strip("`") for row in rows] == list(RULES) == list(results["rules"])
    for name, *cells in rows:
        found = results["rules"][name.strip("`")]
        for scale, cell in zip(SCALES, cells, strict=True):
            figures = found[scale]
            assert cell == f"{figures['ratio']:.2f} ({figures['bits_per_weight']:.2f} bits)"
            before = results["perplexity_before"]
            assert abs(figures["perplexity"] / before - figures["ratio"]) < 1e-3 * figures["ratio"]


def test_the_order_of_the_rules() -> None:
    """Less error in the weights is less damage: worst and best stand where theory puts them."""
    rules = json.loads((ROOT / "benchmarks" / "results" / "perplexity.json").read_text())["rules"]
    for scale in SCALES:
        ratios = {rule: found[scale]["ratio"] for rule, found in rules.items()}
        assert max(ratios, key=ratios.__getitem__) == "absmean"
        assert min(ratios, key=ratios.__getitem__) == "planes"
