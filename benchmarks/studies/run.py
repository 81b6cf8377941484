"""Six studies with three tools: whether they agree, how long their bodies are, what they cost.

    python -m benchmarks.studies.run

Peers run when they are installed (`pip install trilens[bench]`). A body's lines are those between
the `def` and the next one, as ruff formats them. Times are medians of processor seconds.
"""

from __future__ import annotations

import ast
import importlib
import statistics
import time
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import save
from trilens import Lens
from trilens.demo import demo_path

TOOLS = {"trilens": "trilens", "transformer_lens": "TransformerLens", "nnsight": "nnsight"}
ROUNDS = 5
PROMPT = "def add(f1, second):\n    return f1 +"
OTHER = "def add(f2, second):\n    return f2 +"


def body_lines(path: Path) -> dict[str, int]:
    """Lines of each function's body."""
    tree = ast.parse(path.read_text())
    found = {}
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            found[node.name] = (node.end_lineno or 0) - node.body[0].lineno + 1
    return found


def main() -> None:
    """Measure and keep."""
    warnings.simplefilter("ignore")
    path = str(demo_path("transformer"))
    logits = Lens.from_pretrained(path, dtype="float32").capture(PROMPT).logits[-1]
    target, against = logits.topk(2).indices.tolist()
    vector = 20 * torch.randn(256, generator=torch.Generator().manual_seed(0))
    studies: dict[str, tuple[Any, ...]] = {
        "head_outputs": (PROMPT,),
        "ablate_head": (PROMPT,),
        "patching": (PROMPT, OTHER, target, against),
        "steering": (PROMPT, vector),
        "decoding_steps": (PROMPT,),
        "gradients": (PROMPT, target),
    }
    figures: dict[str, dict[str, Any]] = {name: {} for name in studies}
    reference: dict[str, torch.Tensor] = {}
    for tool, package in TOOLS.items():
        if find_spec(tool) is None:
            continue
        module = importlib.import_module(f"benchmarks.studies.with_{tool}")
        lines = body_lines(Path(module.__file__ or ""))
        model = module.open_model(path)
        for name, arguments in studies.items():
            study = getattr(module, name)
            result = torch.as_tensor(study(model, *arguments)).detach().double()
            seconds = []
            for _ in range(ROUNDS):
                begun = time.process_time()
                study(model, *arguments)
                seconds.append(time.process_time() - begun)
            reference.setdefault(name, result)
            ours = reference[name][: len(result)] if result.dim() else reference[name]
            figures[name][package] = {
                "lines": lines[name],
                "cpu_ms": round(1000 * statistics.median(seconds), 1),
                "largest_difference": float((result - ours).abs().max()),
            }
    save("studies", figures)


if __name__ == "__main__":
    main()
