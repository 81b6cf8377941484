"""`trilens convert`: published RWKV-7 weights as a transformers checkpoint."""

from __future__ import annotations

from pathlib import Path

from trilens.cli.console import status, timed
from trilens.cli.streams import say
from trilens.models.rwkv7.convert import convert_rwkv7
from trilens.models.tokenizer_files import read_tokenizer

__all__ = ["run"]


def run(*, source: Path, output: Path, tokenizer: Path | None) -> None:
    """Convert and report the sizes."""
    with timed(output):
        with status(f"converting {source}"):
            found = None if tokenizer is None else read_tokenizer(tokenizer)
            done = convert_rwkv7(source, output, tokenizer=found)
        layers = done.config["num_hidden_layers"]
        if found is None:
            say("no tokenizer was written: --tokenizer adds one", err=True)
        say(f"{done.path}: {layers} layers, {done.n_tensors} tensors, {done.size_bytes} bytes")
