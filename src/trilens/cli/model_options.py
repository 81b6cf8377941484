"""The options of models that are no plain decoder: several stacks, a source, a GGUF file."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

__all__ = ["GgufFile", "Stack", "TargetText"]

Stack = Annotated[
    Literal["decoder", "encoder", "language", "vision", "audio"] | None,
    typer.Option("--stack", help="Of a model with several stacks of blocks, the one to open."),
]
GgufFile = Annotated[
    str | None,
    typer.Option(
        "--gguf-file", metavar="NAME", help="GGUF file in the directory MODEL to read weights from."
    ),
]
TargetText = Annotated[
    str | None,
    typer.Option(
        "--target-text", metavar="TEXT", help="Of an encoder–decoder, what the decoder is to write."
    ),
]
