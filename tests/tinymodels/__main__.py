"""``PYTHONPATH=tests python -m tinymodels [types...]``: build and run every type, a row for each.

A process for every twenty types, because the modeling modules of all families together are large.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.modeling_utils import AttentionInterface
from transformers.utils import logging

import tinymodels

_PER_PROCESS = 20


@contextmanager
def attention_callers() -> Iterator[list[nn.Module]]:
    """Collect the modules that call an attention function through transformers' registry."""
    callers: list[nn.Module] = []
    original = AttentionInterface.get_interface

    def get_interface(self: AttentionInterface, *args: Any, **kwargs: Any) -> Callable[..., Any]:
        function = original(self, *args, **kwargs)

        def noted(module: nn.Module, *inner: Any, **options: Any) -> Any:
            callers.append(module)
            return function(module, *inner, **options)

        return noted

    AttentionInterface.get_interface = get_interface
    try:
        yield callers
    finally:
        AttentionInterface.get_interface = original


def depth(config: PreTrainedConfig) -> int | str:
    """How many layers the decoder has; encoder-decoders call their encoder's number the depth."""
    for name in ("decoder_layers", "num_decoder_layers", "num_hidden_layers"):
        layers = getattr(config, name, None)
        if layers is not None:
            return layers
    return "?"


def row(model_type: str) -> str:
    """Build and run one type and say in a line what came of it."""
    start = time.perf_counter()
    model = tinymodels.build(model_type)
    built = time.perf_counter()
    with attention_callers() as callers:
        logits = tinymodels.forward(model, tinymodels.prompt_ids(model_type)).float()
    ran = time.perf_counter()
    text = model.config.get_text_config(decoder=True)
    spread = logits.std(dim=-2).mean().item()
    return (
        f"{model_type:26s} build {built - start:5.2f}s  forward {ran - built:5.2f}s"
        f"  {sum(p.numel() for p in model.parameters()):>9,} params"
        f"  finite {'yes' if logits.isfinite().all() else 'NO '}"
        f"  varies {f'{spread:.2f}' if spread > 0.01 else 'NO  '}"
        f"  attention {text._attn_implementation!s:6s}"
        f" {len({id(module) for module in callers}):2d} modules {len(callers):2d} calls"
        f" / {depth(text)} layers"
    )


def sweep(types: tuple[str, ...]) -> int:
    """Print the rows of these types and count the ones that failed."""
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    failed = 0
    for model_type in types:
        try:
            line = row(model_type)
        except Exception as error:  # noqa: BLE001 - a sweep reports whatever a family raises
            failed += 1
            where = traceback.extract_tb(error.__traceback__)[-1]
            message = str(error).strip().splitlines()[0] if str(error).strip() else ""
            line = f"{model_type:26s} FAILED {type(error).__name__}: {message} ({where.name})"
        sys.stdout.write(line + "\n")
        sys.stdout.flush()
    return failed


def main() -> int:
    """Sweep the types given, or all of them, some in each process."""
    parser = argparse.ArgumentParser(prog="tinymodels", description=__doc__)
    parser.add_argument("types", nargs="*", metavar="type")
    types = tuple(parser.parse_args().types)
    if types:
        return sweep(types)
    codes = []
    for first in range(0, len(tinymodels.TYPES), _PER_PROCESS):
        chunk = tinymodels.TYPES[first : first + _PER_PROCESS]
        codes.append(subprocess.run([sys.executable, "-m", __package__, *chunk], check=False))
    failed = sum(done.returncode for done in codes)
    sys.stdout.write(f"{len(tinymodels.TYPES)} types, {failed} failed\n")
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main())
