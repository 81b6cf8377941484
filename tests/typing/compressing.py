"""What docs/ternary.md, compare.md, sensitivity.md and gguf.md do, as a user's script."""

from __future__ import annotations

from pathlib import Path

import torch

import trilens


def compress(source: Path, out: Path) -> str:
    plan = trilens.TernaryPlan(rule="exact", group_size=128)
    text = trilens.Calibration.from_source("stdlib", seed=0)
    report = trilens.ternarize(source, out, plan=plan, calibration=text)
    print(report.verdict)
    for row in report.table():
        print(row["name"], row["bits_per_weight"])
    for row in trilens.validate_gguf("model.gguf").table():
        print(row["type"])
    return trilens.validate(out).verdict


def judge(before: trilens.Lens, after: Path, prompts: list[str]) -> float | None:
    found = trilens.compare(before, after, prompts, options=trilens.CompareOptions(lens="all"))
    print(found.to_pandas(), found.to_arrow(), found.to_dict())
    found.plot("direction kept").savefig("direction.pdf")
    return found.row("perplexity").delta


def spare(lens: trilens.Lens, documents: list[str]) -> trilens.TernaryPlan:
    blocks = trilens.token_blocks(lens.tokenizer, documents, length=256)
    found = trilens.measure_sensitivity(lens, blocks, rule=trilens.MatrixPlan("exact"))
    print(found.ranked("block")[0].kl_nats, found.table())
    options = trilens.PlanOptions(budget_bits=2.5)
    planned = trilens.make_plan(lens, blocks, blocks, options=options)
    return planned.plan


def weights() -> torch.Tensor:
    quant = trilens.PerLayerQuant.quantize(torch.randn(4, 8), "w", rule="absmean")
    layer = trilens.TernaryLinear(8, 4, bias=False)
    print(quant.sparsity, layer.in_features)
    gating = trilens.GatingAnalysis.from_activations(torch.rand(5, 3), 0.1)
    print(gating.dead_gates, gating.to_pandas())
    trilens.convert_rwkv7("published.pth", "model-dir")
    return torch.as_tensor(quant.reconstruct())
