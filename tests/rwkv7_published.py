"""Random RWKV-7 weights in the layout that the authors publish."""

from __future__ import annotations

import torch

from trilens.models.rwkv7.config import low_rank_dim

__all__ = ["published_tensors"]


def published_tensors(layers, width, vocab, head_size=64, seed=0):
    """Random weights with the names, shapes and low ranks of a published `.pth`."""
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape, std=1.0, mean=0.0):
        return mean + std * torch.randn(*shape, generator=generator)

    heads, root = width // head_size, width**-0.5
    ranks = {
        "w": low_rank_dim("decay_low_rank_dim", width),
        "a": low_rank_dim("a_low_rank_dim", width),
        "v": low_rank_dim("v_low_rank_dim", width),
        "g": low_rank_dim("gate_low_rank_dim", width),
    }
    tensors = {"emb.weight": noise(vocab, width), "head.weight": noise(vocab, width, std=root)}
    norms = ["ln_out", "blocks.0.ln0"]
    for i in range(layers):
        norms += [f"blocks.{i}.ln1", f"blocks.{i}.ln2", f"blocks.{i}.att.ln_x"]
        att, ffn = f"blocks.{i}.att.", f"blocks.{i}.ffn."
        for name in ("x_r", "x_w", "x_k", "x_v", "x_a", "x_g"):
            tensors[att + name] = torch.rand(1, 1, width, generator=generator)
        for gate, rank in ranks.items():
            tensors[f"{att}{gate}1"] = noise(width, rank, std=2 * root)
            tensors[f"{att}{gate}2"] = noise(rank, width, std=rank**-0.5)
            if gate != "g":
                tensors[f"{att}{gate}0"] = noise(1, 1, width, mean=-1.0)
        tensors[att + "k_k"] = noise(1, 1, width, std=0.2, mean=0.7)
        tensors[att + "k_a"] = noise(1, 1, width, std=0.2, mean=1.0)
        tensors[att + "r_k"] = noise(heads, head_size, std=0.1)
        for name in ("receptance", "key", "value", "output"):
            tensors[f"{att}{name}.weight"] = noise(width, width, std=root)
        tensors[ffn + "x_k"] = torch.rand(1, 1, width, generator=generator)
        tensors[ffn + "key.weight"] = noise(4 * width, width, std=root)
        tensors[ffn + "value.weight"] = noise(width, 4 * width, std=root / 2)
    for name in norms:
        tensors[f"{name}.weight"] = noise(width, std=0.1, mean=1.0)
        tensors[f"{name}.bias"] = noise(width, std=0.1)
    return tensors
