"""Measures that tests draw: one of each kind that is neither a capture nor a comparison."""

from __future__ import annotations

import numpy as np
import torch

import tinymodels
import trilens
from trilens.analysis.model_evaluation import ModelEvaluation, TextEvaluation
from trilens.checkpoint.calibration.cost import CalibrationCost
from trilens.lens.parts import ModelInfo
from trilens.results import Tabular
from trilens.text.alignment import align

HELD_OUT = (0.5, 0.25)


def measures() -> dict[str, Tabular]:
    """By what they are of."""
    values = np.linspace(0, 1, 40, dtype=np.float32).reshape(4, 10)
    tokens, others = ("a", "b", "c", "d"), ("a", "x", "c", "d", "e")
    change = trilens.checkpoint.SampleReport("code", 128, 8.0, 12.0, kl_nats=0.4, same_top1=0.7)
    texts = (
        TextEvaluation("code", 128, 64, 12.0, 0.1, change),
        TextEvaluation("prose", 256, 64, 30.0, None, change),
    )
    lens = trilens.Lens(tinymodels.build("llama"))
    ids = tinymodels.prompt_ids("llama", 9)
    return {
        "gate": trilens.GatingAnalysis.from_activations(values, 0.2),
        "alignment": align(tokens, others, (tokens, others)),
        "tuned lens": trilens.TunedLens(
            layers=(0, 1), changes=torch.zeros(2, 4, 4), biases=torch.zeros(2, 4),
            held_out_errors=HELD_OUT, fitted_errors=(0.4, 0.2), untranslated_errors=(0.9, 0.7),
            n_tokens=100, n_held_out=20, ridge=1e-4,
            model=ModelInfo("m", "LlamaForCausalLM", "llama", 3, 4, "float32"),
        ),
        "path": trilens.path_patch(
            lens, ids, ids.flip(-1), ("attn.z", 0, 1), [("attn.q", 1, 0), ("attn.v", 1, 1)],
            metric=lambda logits: logits[-1, 1] - logits[-1, 2],
        ),
        "evaluation": ModelEvaluation("after", "before", texts, {"arc": {"acc": 0.5, "norm": 0.6}}),
        "families": trilens.load_families(),
        "mappings": trilens.load_mappings(),
        "cost": CalibrationCost("high", 10, 0, 5, 100, {"moments": 1e9, "coding": 3e9}, 2.0),
    }  # fmt: skip
