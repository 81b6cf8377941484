"""What each ternary rule does to the demo model's perplexity on text that it never saw.

    python -m benchmarks.perplexity            every rule per tensor, row and group of 128
    python -m benchmarks.perplexity --readme   write the last figures into README.md

All linear layers of the blocks are replaced by what the rule makes of them; embeddings and norms
stay. Arithmetic is float32 before and after, so the ratio is the weights' alone. Bits per weight
are those of the replaced matrices: codes, scales and offsets.
"""

from __future__ import annotations

import argparse
import json
import math
import re
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.common import RESULTS, save
from trilens.checkpoint import TernaryPlan, ternarize
from trilens.demo import demo_path
from trilens.demo.corpus import checked_heldout_documents
from trilens.evaluation.perplexity import measure_perplexity
from trilens.ternary.quantize import PerLayerQuant
from trilens.ternary.rules.rules import RULES
from trilens.text.token_blocks import token_blocks

README = Path(__file__).parents[1] / "README.md"
LENGTH, LIMIT_TOKENS = 512, 1 << 14
SCALES: dict[str, dict[str, Any]] = {
    "tensor": {"per": "tensor"},
    "row": {"per": "row"},
    "g128": {"group_size": 128},
}
_BEGIN, _END = "<!-- perplexity: begin -->", "<!-- perplexity: end -->"


def measure() -> dict[str, Any]:
    """The ratio and the bits per weight of every rule and scale."""
    documents = [document.text for document in checked_heldout_documents()]
    tokenizer = AutoTokenizer.from_pretrained(demo_path())
    blocks = token_blocks(tokenizer, documents, length=LENGTH, limit_tokens=LIMIT_TOKENS)
    model = AutoModelForCausalLM.from_pretrained(demo_path(), dtype=torch.float32)
    before = measure_perplexity(model, blocks)
    figures: dict[str, Any] = {
        "perplexity_before": round(before.value, 4),
        "n_tokens": before.n_tokens,
        "rules": {},
    }
    for rule in RULES:
        for name, options in SCALES.items():
            plan = TernaryPlan(rule=rule, **options)
            report = ternarize(demo_path(), "nowhere", plan=plan, dry_run=True)
            originals = {
                tensor.name: model.get_parameter(tensor.name).detach().clone()
                for tensor in report.coded
            }
            for tensor, weight in originals.items():
                quant = PerLayerQuant.quantize(weight, tensor, rule=rule, **options)
                model.get_parameter(tensor).data.copy_(quant.reconstruct())
            after = measure_perplexity(model, blocks)
            for tensor, weight in originals.items():
                model.get_parameter(tensor).data.copy_(weight)
            n_weights = sum(tensor.n_weights for tensor in report.coded)
            bits = 8 * sum(tensor.size_bytes for tensor in report.coded) / n_weights
            found = {
                "perplexity": round(after.value, 4),
                "ratio": round(after.value / before.value, 3),
                "bits_per_weight": round(bits, 3),
            }
            figures["rules"].setdefault(rule, {})[name] = found
            print(rule, name, found, flush=True)
    assert math.isclose(measure_perplexity(model, blocks).nll_nats, before.nll_nats)
    return figures


def table(figures: dict[str, Any]) -> str:
    """The README's table: a row for each rule, ratio and bits per weight of each scale."""
    lines = [
        "| rule | one scale per tensor | per row | per 128 weights |",
        "|---|---|---|---|",
    ]
    for rule, found in figures["rules"].items():
        cells = [
            f"{found[name]['ratio']:.2f} ({found[name]['bits_per_weight']:.2f} bits)"
            for name in SCALES
        ]
        lines.append(f"| `{rule}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def write_readme(figures: dict[str, Any]) -> None:
    """Put the table between its two marks."""
    text = README.read_text(encoding="utf-8")
    new = f"{_BEGIN}\n{table(figures)}\n{_END}"
    text, n = re.subn(f"{_BEGIN}.*?{_END}", lambda _: new, text, flags=re.DOTALL)
    if n != 1:
        raise SystemExit(f"README.md lacks the marks {_BEGIN} … {_END}")
    README.write_text(text, encoding="utf-8")


def main() -> None:
    """Measure and keep, or write the last figures into the README."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--readme", action="store_true", help="only rewrite README.md")
    if not parser.parse_args().readme:
        save("perplexity", measure())
    write_readme(json.loads((RESULTS / "perplexity.json").read_text()))


if __name__ == "__main__":
    main()
