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

from benchmarks.common import llama_88m, paired, save
from trilens import Lens

TOKENS = 512
ROUNDS = 15


def peers(model: Any, ids: torch.Tensor) -> dict[str, Callable[[], Any]]:
    """The same question put to the peers that are installed."""
    found: dict[str, Callable[[], Any]] = {}
    if find_spec("nnsight"):
        from nnsight import LanguageModel

        wrapped = LanguageModel(copy.deepcopy(model), tokenizer=_NoTokenizer())

        def nnsight_run() -> Any:
            saved = []
            with torch.no_grad(), wrapped.trace({"input_ids": ids}):
                for layer in wrapped.model.layers:
                    saved.append(layer.output.save())
            return saved

        found["nnsight, residual"] = nnsight_run
    if find_spec("transformer_lens"):
        from transformer_lens.model_bridge import TransformerBridge

        bridge = TransformerBridge.boot_transformers(hf_model=copy.deepcopy(model))
        found["TransformerLens, residual and patterns"] = lambda: bridge.run_with_cache(
            ids, names_filter=lambda n: n.endswith(("resid_post", "hook_pattern", "hook_out"))
        )
    return found


class _NoTokenizer:
    """nnsight wants one even for token ids."""

    pad_token = eos_token = "<eos>"
    pad_token_id = eos_token_id = 0


def main() -> None:
    """Measure and keep."""
    model = llama_88m()
    ids = torch.randint(0, 4096, (1, TOKENS), generator=torch.Generator().manual_seed(0))
    lens = Lens(model)

    def plain() -> Any:
        with torch.no_grad():
            return model(input_ids=ids, use_cache=False).logits

    runs: dict[str, Callable[[], Any]] = {
        "plain": plain,
        "trilens": lambda: lens.capture(ids, residual="last", attention=True, gates=True),
        "trilens, residual": lambda: lens.capture(ids, residual="last"),
    }
    missing = {}
    for name, run in peers(model, ids).items():
        try:
            run()
            runs[name] = run
        except Exception as error:
            missing[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
    medians = paired(runs, ROUNDS)
    ratios = {name: round(value / medians["plain"], 3) for name, value in medians.items()}
    save(
        "overhead",
        {
            "tokens": TOKENS,
            "ratio_to_plain": ratios,
            "plain_seconds": medians["plain"],
            "did_not_run": missing,
        },
    )


if __name__ == "__main__":
    main()
