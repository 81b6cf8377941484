"""`trilens convert`: published RWKV-7 weights as a transformers checkpoint."""

from __future__ import annotations

from pathlib import Path

from trilens.cli.console import status, timed
from trilens.cli.streams import say
from trilens.models.rwkv7.convert import convert_rwkv7

__all__ = ["run"]


def run(*, source: Path, output: Path) -> None:
    """Convert and report the sizes."""
    with timed(output):
        with status(f"converting {source}"):
            done = convert_rwkv7(source, output)
        layers = done.config["num_hidden_layers"]
        say(f"{done.path}: {layers} layers, {done.n_tensors} tensors, {done.size_bytes} bytes")
