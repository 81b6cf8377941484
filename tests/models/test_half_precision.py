"""Half-precision models open and capture bit-identically, whatever dtype their stream has."""

from __future__ import annotations

import pytest
import torch

from tinymodels import build, prompt_ids
from tolerances import assert_near
from trilens.lens.lens import Lens


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("model_type", ["mamba", "mamba2", "falcon_mamba", "gemma2", "gpt_oss"])
def test_opens_and_captures(model_type: str, dtype: torch.dtype) -> None:
    model = build(model_type, dtype=dtype)
    ids = prompt_ids(model_type)
    with torch.no_grad():
        plain = model(input_ids=ids, use_cache=False).logits[0]
    lens = Lens(model)
    cap = lens.capture(ids, residual="all")
    assert torch.equal(cap.logits, plain)
    rebuilt = lens.unembed(cap.residual.get_layer(lens.n_layers - 1))
    assert_near(rebuilt, plain, 0.05, least=1.0)
