"""Patching and sweeps of edits on a decoder: every run has the source of its prompt."""

from __future__ import annotations

import torch
from transformers import T5Config, T5ForConditionalGeneration

from tolerances import assert_near
from trilens import Lens, SourceTarget
from trilens.analysis.edit_effects import edit_effect, effect_between
from trilens.analysis.effect_sweeps import ablation_sweep
from trilens.analysis.metrics import logit_diff
from trilens.analysis.patching import patch_sweep
from trilens.edits import Ablate

METRIC = logit_diff(14, 15)
CLEAN, CORRUPTED = (SourceTarget(ids, [0, 21, 30]) for ids in ([11, 50, 27], [11, 12, 27, 33]))


def opened() -> Lens:
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=60, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4,
        decoder_start_token_id=0,
    )  # fmt: skip
    return Lens(T5ForConditionalGeneration(config).eval())


def test_runs_of_edits_keep_the_source() -> None:
    lens, edit = opened(), Ablate("mlp.out", layers=1)
    plain, changed = lens.capture(CLEAN), lens.capture(CLEAN, edits=edit)
    effect = edit_effect(lens, CLEAN, edit)
    assert effect.to_dict() == effect_between(lens, plain, changed, (edit,)).to_dict()
    swept = ablation_sweep(
        lens, [CLEAN], METRIC, site="mlp.out", layers=[1], by="layer", method="zero"
    )
    assert swept.base == float(METRIC(plain.logits)) != float(METRIC(changed.logits))
    assert swept.values.ravel().tolist() == [float(METRIC(changed.logits))]


def test_a_patched_run_has_its_own_source() -> None:
    lens = opened()
    clean, corrupted = (float(METRIC(lens.capture(p).logits)) for p in (CLEAN, CORRUPTED))
    found = patch_sweep(lens, CLEAN, CORRUPTED, METRIC, site="resid_post")
    assert (found.base, found.target) == (corrupted, clean)
    # The logits are read from the last layer's last token, and from no other.
    assert_near(found.values[-1], [corrupted, corrupted, clean], 1e-5)
