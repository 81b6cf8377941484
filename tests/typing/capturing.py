"""What README and docs/capture.md do, as a user's script."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

import trilens
from trilens.caches import FullActivationCache, SoftmaxPattern
from trilens.errors import NotStoredError


def questions(folder: Path) -> float:
    lens = trilens.Lens.from_pretrained(folder, dtype=torch.float32)
    cap = lens.capture("def area(r):", residual="all", attention=True, gates=True, effective=True)
    top: list[tuple[int, float]] = cap.attention.top_attended_positions(2, -1, k=5)
    row = cap.attention.attention_from_position(layer=np.int64(2), position=-1, head=3)
    print(top[0][1], row.sum(), cap.attention.entropy(2).mean(), cap.attention[2].heads)
    gates = cap.gates
    print(gates.analyse("mlp.gate", layer=2).effective_capacity(), gates["mlp.gate", 2].mean())
    for layer in cap.residual:
        print(layer, cap.residual[layer].norm().item(), layer in cap.attention)
    everything = np.asarray(cap.residual)
    if isinstance(cap.residual, FullActivationCache):
        print(cap.residual.get_position(0, -1).shape)
    pattern = cap.attention[0]
    if isinstance(pattern, SoftmaxPattern):
        print(pattern.sink_mass())
    if cap.has("states"):
        print(cap.states.norms(-1))
    try:
        print(cap.effective.layers)
    except NotStoredError as error:
        print(error)
    whole = cap.attention.get_layer(0)
    if whole is not None:
        print(whole.shape)
    saved = trilens.Capture.load(cap.save(folder / "cap.tlc"))
    return float(everything.mean()) + len(saved.tokens)


def report(step: trilens.Step) -> None:
    print(f"{step.done} of {step.total}: {step.what}")


def many(lens: trilens.Lens, prompts: list[str]) -> list[float]:
    captures = lens.capture_many(prompts, batch_size=4, logits="last", progress=report)
    return [cap.top_tokens(1)[0][1] for cap in captures]
