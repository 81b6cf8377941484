"""The options of generating: how many tokens, how they are drawn, where it stops."""

from __future__ import annotations

from typing import Annotated

import typer

__all__ = ["MaxNewTokens", "Stop", "Temperature", "TopP"]

MaxNewTokens = Annotated[
    int, typer.Option("--max-new-tokens", metavar="N", help="Maximum number of new tokens.", min=1)
]
Temperature = Annotated[
    float,
    typer.Option(
        "--temperature", metavar="T", help="0: the likeliest token; above: drawn.", min=0.0
    ),
]
TopP = Annotated[
    float | None,
    typer.Option(
        "--top-p", metavar="P", help="Draw among the likeliest tokens of this probability."
    ),
]
Stop = Annotated[
    list[str] | None,
    typer.Option("--stop", metavar="TEXT", help="Text that ends the new text; repeatable."),
]
