"""What a capture costs: one forward pass with everything kept, against the plain pass.

An 88M-parameter Llama with random weights, 512 tokens. nnsight and TransformerLens run the same
prompt in the same process when they are installed (`pip install trilens[bench]`).
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

TOKENS = 512
ROUNDS = 15


def peers(model: Any, ids: torch.Tensor) -> dict[str, Callable[[], Any]]:
    """The same question put to the peers that are installed."""
    found: dict[str, Callable[[], Any]] = {}
    tokenizer = AutoTokenizer.from_pretrained(demo_path())
    if find_spec("nnsight"):
        from nnsight import LanguageModel

        wrapped = LanguageModel(copy.deepcopy(model), tokenizer=tokenizer)

        def nnsight_residual() -> Any:
            with torch.no_grad(), wrapped.trace({"input_ids": ids}):
                saved = list().save()  # noqa: C408 - the tracer follows this very call
                for layer in wrapped.model.layers:
                    saved.append(layer.output)
            return saved

        found["nnsight, residual"] = nnsight_residual
    if find_spec("transformer_lens"):
        from transformer_lens.model_bridge import TransformerBridge

        bridge = TransformerBridge.boot_transformers(
            "random/llama", hf_model=copy.deepcopy(model), tokenizer=tokenizer
        )

        def cached(*endings: str) -> Callable[[], Any]:
            def run() -> Any:
                with torch.no_grad():
                    return bridge.run_with_cache(ids, names_filter=lambda n: n.endswith(endings))

            return run

        found["TransformerLens, residual"] = cached("hook_resid_post")
        found["TransformerLens, residual and patterns"] = cached("hook_resid_post", "hook_pattern")
        found["TransformerLens, residual, patterns and MLP gates"] = cached(
            "hook_resid_post", "hook_pattern", "mlp.gate.hook_out"
        )
    return found


def bare_hooks(model: Any, plain: Callable[[], Any]) -> Callable[[], Any]:
    """The floor of a capture: the same tensors held by hand, nothing proven, nothing wrapped.

    What is held can't be written over by the next layer, so that the pass has to take fresh memory.
    """

    def run() -> Any:
        held: list[Any] = []

        def keep(_module: Any, _args: Any, output: Any) -> None:
            held.append(output)

        def keep_input(_module: Any, args: Any) -> None:
            held.append(args[0])

        def last(_module: Any, _args: Any, output: Any) -> None:
            held.append(output[:, -1].clone())

        handles = []
        for layer in model.model.layers:
            for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj):
                handles.append(projection.register_forward_hook(keep))
            handles.append(layer.mlp.act_fn.register_forward_pre_hook(keep_input))
            handles.append(layer.register_forward_hook(last))
        try:
            return plain(), held
        finally:
            for handle in handles:
                handle.remove()

    return run


def main() -> None:
    """Measure and keep."""
    model = llama_88m()
    ids = torch.randint(0, 2048, (1, TOKENS), generator=torch.Generator().manual_seed(0))
    lens = Lens(model)

    plain = plain_pass(model, ids)
    runs: dict[str, Callable[[], Any]] = {
        "plain": plain,
        "bare hooks": bare_hooks(model, plain),
        "trilens": lambda: lens.capture(ids, residual="last", attention=True, gates=True),
        "trilens, residual": lambda: lens.capture(ids, residual="last"),
    }
    missing = add_running(runs, peers(model, ids))
    figures = {"tokens": TOKENS, "rounds": ROUNDS, "runs": ratios(runs, ROUNDS)}
    save("overhead", {**figures, "did_not_run": missing})


if __name__ == "__main__":
    main()
