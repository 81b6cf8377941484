"""A recurrent token's write left out: nothing later reads it, and all else is as it was."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import trilens
from tinymodels import build, prompt_ids
from trilens.edits import Knockout
from trilens.lens.lens import Lens

pytestmark = pytest.mark.usefixtures("quiet")

# Whether a token that writes nothing leaves the weights of the others as they were: not where it
# also erases (a delta rule), nor where weights share a denominator (RWKV-4).
SEPARATE = {
    "mamba": True,
    "mamba2": True,
    "falcon_mamba": True,
    "bamba": True,
    "rwkv": False,
    "qwen3_next": False,
    "kimi_linear": False,
    "xlstm": True,
}
TOKEN = 4


def lens_of(model_type: str) -> tuple[Lens, torch.Tensor]:
    if model_type == "rwkv7":
        path = trilens.demo_path("rwkv7")
        return Lens.from_pretrained(path, dtype="float32"), prompt_ids("llama", 12)
    return Lens(build(model_type)), prompt_ids(model_type, 12)


@pytest.mark.parametrize("model_type", [*SEPARATE, "rwkv7"])
def test_nothing_later_reads_a_token_that_wrote_nothing(model_type: str) -> None:
    lens, ids = lens_of(model_type)
    layer = next(i for i in lens.effective_layers if i not in lens.attention_layers)
    asked = {"residual": None, "effective": True, "layers": [layer]}
    plain = lens.capture(ids, **asked).effective
    cut = lens.capture(ids, edits=Knockout(layers=layer, keys=[TOKEN]), **asked).effective
    heads = plain.pattern(layer).heads
    everything = range(len(ids[0]))
    seen = 0
    for head in range(heads):
        before = plain.pattern(layer).rows(everything, head)[0].double().numpy()
        after = cut.pattern(layer).rows(everything, head)[0].double().numpy()
        # Weights are recomputed from what the kernel was given, and proven by what it gave.
        bound = 1e-5 * np.abs(before).max()
        assert np.abs(after[TOKEN + 1 :, TOKEN]).max() <= bound
        seen += int(np.abs(before[TOKEN + 1 :, TOKEN]).max() > bound)
        assert np.abs(after[:TOKEN] - before[:TOKEN]).max() <= bound
        if SEPARATE.get(model_type):
            rest = np.arange(before.shape[1]) != TOKEN
            assert np.abs(after[:, rest] - before[:, rest]).max() <= bound
    assert seen, "no head read the token before it was cut"


@pytest.mark.parametrize("model_type", ["mamba", "mamba2", "rwkv", "qwen3_next", "rwkv7"])
def test_steps_leave_out_what_one_pass_leaves_out(model_type: str) -> None:
    lens, ids = lens_of(model_type)
    layer = next(i for i in lens.effective_layers if i not in lens.attention_layers)
    edit = Knockout(layers=layer, keys=[TOKEN, 13])
    found = lens.generate(ids, max_new_tokens=4, edits=edit, capture={}).capture
    assert found is not None and found.logits is not None
    whole = lens.capture(found.token_ids, edits=edit).logits
    assert whole is not None
    assert float((found.logits - whole).abs().max()) <= 1e-4 * max(1.0, float(whole.abs().max()))


def test_padding_writes_as_it_did() -> None:
    lens, ids = lens_of("mamba")
    edit = Knockout(layers=0, keys=[-2])
    prompts = [ids[0, :n] for n in (12, 7)]
    together = list(lens.capture_many(prompts, batch_size=2, edits=edit))
    for prompt, found in zip(prompts, together, strict=True):
        alone = lens.capture(prompt, edits=edit).logits
        assert alone is not None and found.logits is not None
        assert float((alone - found.logits).abs().max()) <= 1e-5 * float(alone.abs().max())
