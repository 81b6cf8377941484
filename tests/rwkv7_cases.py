"""The tiny model of a type, RWKV-7 among them, whose own initialisation hides mistakes."""

from __future__ import annotations

import torch

from tinymodels import build
from trilens.models.rwkv7.config import RWKV7Config
from trilens.models.rwkv7.model import RWKV7ForCausalLM

__all__ = ["model_of"]


def model_of(model_type: str, noise: float, own: float) -> torch.nn.Module:
    """The tiny model in eval mode; RWKV-7's weights are own · weights + noise · N(0, 1)."""
    if model_type != "rwkv7":
        return build(model_type)
    torch.manual_seed(0)
    config = RWKV7Config(vocab_size=120, hidden_size=32, num_hidden_layers=3, head_size=8)
    model = RWKV7ForCausalLM(config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        # Its initialisation has zero output projections, which would hide every mistake.
        for parameter in model.parameters():
            drawn = torch.randn(parameter.shape, generator=generator)
            parameter.mul_(own).add_(drawn, alpha=noise)
    return model.eval()
