"""What sites and edits cost: a capture of all sites, and single edits, against the plain pass.

An 88M-parameter Llama with random weights, 512 tokens. TransformerLens' and nnsight's ways to the
same tensors run in the same process when they are installed (`pip install trilens[bench]`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from transformers import AutoTokenizer

from benchmarks.common import add_running, llama_88m, plain_pass, ratios, save
from trilens import Lens
from trilens.demo import demo_path
from trilens.edits import Ablate, Knockout, Scale, Steer

TOKENS = 512
ROUNDS = 15


def peers(model: Any, ids: torch.Tensor) -> dict[str, Callable[[], Any]]:
    """All that the peers keep by default of a pass, and one edit, where they are installed."""
    found: dict[str, Callable[[], Any]] = {}
    tokenizer = AutoTokenizer.from_pretrained(demo_path())
    vector = torch.ones(model.config.hidden_size)
    if find_spec("transformer_lens"):
        from transformer_lens.model_bridge import TransformerBridge

        bridge = TransformerBridge.boot_transformers(
            "random/llama", hf_model=copy.deepcopy(model), tokenizer=tokenizer
        )

        def steer(value: torch.Tensor, hook: Any) -> torch.Tensor:
            return value + vector

        def everything() -> Any:
            with torch.no_grad():
                return bridge.run_with_cache(ids)

        def edited() -> Any:
            with torch.no_grad():
                return bridge.run_with_hooks(
                    ids, fwd_hooks=[("blocks.5.hook_resid_post", steer)], return_type="logits"
                )

        found["TransformerLens, run_with_cache"] = everything
        found["TransformerLens, steering"] = edited
    if find_spec("nnsight"):
        from nnsight import LanguageModel

        wrapped = LanguageModel(copy.deepcopy(model), tokenizer=tokenizer)

        def traced() -> Any:
            with torch.no_grad(), wrapped.trace({"input_ids": ids}):
                saved = list().save()  # noqa: C408 - the tracer follows this very call
                for layer in wrapped.model.layers:
                    saved.append(layer.self_attn.q_proj.output)
                    saved.append(layer.self_attn.k_proj.output)
                    saved.append(layer.self_attn.v_proj.output)
                    saved.append(layer.self_attn.o_proj.input)
                    saved.append(layer.self_attn.o_proj.output)
                    saved.append(layer.mlp.gate_proj.output)
                    saved.append(layer.mlp.up_proj.output)
                    saved.append(layer.mlp.down_proj.input)
                    saved.append(layer.mlp.output)
                    saved.append(layer.output)
            return saved

        found["nnsight, ten tensors a layer"] = traced
    return found


def main() -> None:
    """Measure and keep."""
    model = llama_88m()
    ids = torch.randint(0, 2048, (1, TOKENS), generator=torch.Generator().manual_seed(0))
    lens = Lens(model)
    vector = torch.ones(lens.d_model)
    every = list(lens.site_layers)

    def edited(edit: Any) -> Callable[[], Any]:
        return lambda: lens.capture(ids, residual=None, edits=edit)

    runs: dict[str, Callable[[], Any]] = {
        "plain": plain_pass(model, ids),
        f"all {len(every)} sites": lambda: lens.capture(ids, residual=None, sites=every),
        "resid_mid, attn.z, mlp.post": lambda: lens.capture(
            ids, residual=None, sites=["resid_mid", "attn.z", "mlp.post"]
        ),
        "steering": edited(Steer("resid_post", layers=5, vector=vector)),
        "a head ablated": edited(Ablate("attn.z", layers=5, heads=1)),
        "an edge cut": edited(Knockout(layers=5, heads=1, queries=-1, keys=[3])),
        "resid_mid scaled": edited(Scale("resid_mid", 2.0, layers=5)),
        "a pattern scaled": edited(Scale("attn.pattern", 0.5, layers=5, heads=1)),
    }
    missing = add_running(runs, peers(model, ids))
    figures = {"tokens": TOKENS, "rounds": ROUNDS, "runs": ratios(runs, ROUNDS)}
    save("sites", {**figures, "did_not_run": missing})


if __name__ == "__main__":
    main()
