"""Calibrated rules from end to end over families; `benchmarks.calibrated_families` has all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from calibration_cases import DOCUMENTS, SMALL, tiny
from checkpoint_cases import tensors
from tinymodels.calibrated_checks import calibrate_one
from trilens.checkpoint import Calibration, TernaryPlan, ternarize
from trilens.errors import UsageError

pytestmark = pytest.mark.usefixtures("quiet")


@pytest.mark.parametrize(
    ("model_type", "rule"),
    [
        ("hrm_text", "best"),
        ("bart", "gptq"),
        ("rwkv", "gptq"),
        ("modernbert-decoder", "gptq"),
        ("xlstm", "gptq"),
    ],
)
def test_what_is_written_loads_and_is_what_it_says(
    model_type: str, rule: str, tmp_path: Path
) -> None:
    found = calibrate_one(model_type, rule, tmp_path)
    assert "refused" not in found, found
    assert found["matrices"] > found["without_text"]


def test_rows_of_several_layers_in_one_tensor(tmp_path: Path) -> None:
    """Each layer is coded on its own input; one scale for all of them there cannot be."""
    source = tiny("hrm_text", tmp_path / "src")
    options: dict[str, Any] = {"calibration": Calibration(DOCUMENTS, **SMALL)}
    plan = TernaryPlan("gptq", per="row", only=("gqkv_proj",))
    report = ternarize(source, tmp_path / "out", plan=plan, **options)
    assert report.damage is not None and not report.damage.fallbacks
    before, after = tensors(source), tensors(tmp_path / "out")
    for tensor in report.coded:
        rows = before[tensor.name].shape[0]
        base = tensor.name.removesuffix(".weight")
        assert after[f"{base}.scale"].numel() == rows
        exact = TernaryPlan("exact", per="row", only=("gqkv_proj",))
        ternarize(source, tmp_path / "exact", plan=exact)
        assert not torch.equal(after[f"{base}.codes"], tensors(tmp_path / "exact")[f"{base}.codes"])
    plan = TernaryPlan("gptq", only=("gqkv_proj",))
    with pytest.raises(UsageError, match=r"gqkv_proj.* rows of several layers.* per='row'"):
        ternarize(source, tmp_path / "one", plan=plan, **options)
    assert not (tmp_path / "one").exists()
