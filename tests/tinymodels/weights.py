"""Re-draw the weights of a freshly built model so that nothing about it is degenerate.

The families' own initialisers use a std of 0.02 meant for widths of thousands: at width 64 every
attention row comes out uniform and every logit alike, and a test that swaps two heads would pass.
"""

from __future__ import annotations

import re
import zlib

import torch
from torch import nn

_STRUCTURAL = (
    "A_log",
    "dt_bias",
    ".D",
    "time_decay",
    "time_first",
    "time_mix",
    "recurrent_param",
    "decay",
    "act_fn.",
    "rotary",
    "inv_freq",
    "slope",
)
"""Parameters whose sign or range is part of the mechanism: they keep what the family gave them."""


_STARTS = {"qk_norm.temp": 1.0}
"""Zaya's key scale starts at zero, where every key scores alike."""


def _generator(name: str, seed: int) -> torch.Generator:
    """A stream per parameter, so that adding a layer does not shift the others' weights."""
    return torch.Generator().manual_seed(zlib.crc32(name.encode()) + 1_000_003 * seed)


def _matrix_std(module: nn.Module, param: torch.Tensor) -> float:
    """About 1/sqrt(fan-in), kept between 0.08 and 0.2; a convolution only sums its few taps."""
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return param[0].numel() ** -0.5
    if type(module).__name__ == "Conv1D":  # GPT-2's linear keeps [in, out]
        fan_in = param.shape[0]
    elif isinstance(module, nn.Linear):
        fan_in = param.shape[1]
    else:  # stacked experts and the like, [n, out, in] or [n, in, out]
        fan_in = min(param.shape[-2:])
    return min(0.2, max(0.08, fan_in**-0.5))


def _is_matrix(module: nn.Module, param: torch.Tensor) -> bool:
    """Whether a parameter mixes channels. What starts out constant is a scale or an offset."""
    if isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return param.ndim >= 2
    return param.ndim >= 2 and min(param.shape[-2:]) > 1 and param.float().std().item() > 0


@torch.no_grad()
def redraw(model: nn.Module, seed: int) -> None:
    """Give every matrix a std of about 1/sqrt(fan-in), every scale and offset a little noise."""
    for module_name, module in model.named_modules():
        for own_name, param in module.named_parameters(recurse=False):
            name = f"{module_name}.{own_name}"
            if not param.is_floating_point() or any(part in name for part in _STRUCTURAL):
                continue
            noise = torch.randn(param.shape, generator=_generator(name, seed), dtype=torch.float32)
            if isinstance(module, nn.Embedding):
                drawn = 0.3 * noise
                if module.padding_idx is not None:
                    drawn[module.padding_idx] = 0.0
            elif _is_matrix(module, param):
                drawn = noise * _matrix_std(module, param)
            else:
                start = next((v for end, v in _STARTS.items() if name.endswith(end)), 0.0)
                drawn = param.float() + start + 0.1 * noise
            param.copy_(drawn)
        _fill_hash_router(module, module_name, seed)


def _fill_hash_router(module: nn.Module, name: str, seed: int) -> None:
    """Fill DeepSeek-V4's token-to-expert table, all zeros without a checkpoint."""
    table = getattr(module, "tid2eid", None)
    if table is None:
        return
    experts, (tokens, chosen) = module.weight.shape[0], table.shape
    order = torch.rand(tokens, experts, generator=_generator(name, seed)).argsort(dim=-1)
    table.copy_(order[:, :chosen])


def cast(model: nn.Module, dtype: torch.dtype) -> None:
    """Bring every parameter to the dtype that loading a checkpoint in it would give.

    A few families create parameters as float32 whatever the default dtype, and some want certain
    modules kept in it; ``from_pretrained`` sees to both and ``from_config`` to neither.
    """
    if dtype == torch.float32:
        return
    kept = tuple(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    if dtype == torch.float16:
        kept += tuple(getattr(model, "_keep_in_fp32_modules", None) or ())
    patterns = [re.compile(rf"(^|\.){name}(\.|$)") for name in kept]
    for name, param in model.named_parameters():
        if param.is_floating_point():
            exempt = any(pattern.search(name) for pattern in patterns)
            param.data = param.data.to(torch.float32 if exempt else dtype)
