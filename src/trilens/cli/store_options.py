"""The options of a store of a corpus: what is kept, and who captures it."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

__all__ = [
    "BatchTokens",
    "GpusPerWorker",
    "Label",
    "Overwrite",
    "Ray",
    "Reduce",
    "ShardTokens",
    "StoreDtype",
    "StoreValues",
    "Strict",
    "Threads",
    "Workers",
]

StoreDtype = Annotated[
    Literal["auto", "bfloat16", "float16", "float32", "int8"],
    typer.Option("--store-dtype", help="Dtype of stored values; auto: the model's."),
]
Reduce = Annotated[
    str | None,
    typer.Option(
        "--reduce",
        metavar="LIST",
        help="Reducers: mean, covariance, class_means, top_contexts, gating, attention.",
    ),
]
StoreValues = Annotated[
    bool, typer.Option("--values/--no-values", help="Store values, or reducers alone.")
]
ShardTokens = Annotated[
    int, typer.Option("--shard-tokens", metavar="N", help="Tokens of a shard.", min=1)
]
BatchTokens = Annotated[
    int,
    typer.Option("--batch-tokens", metavar="N", help="Maximum tokens of a forward pass.", min=1),
]
Threads = Annotated[
    int, typer.Option("--threads", metavar="N", help="Threads of each worker.", min=1)
]
Label = Annotated[
    str | None, typer.Option("--label", metavar="NAME", help="Key of a document's class.")
]
Strict = Annotated[
    bool, typer.Option("--strict", help="End at the first entry of the text that is unreadable.")
]
Workers = Annotated[
    int, typer.Option("--workers", metavar="N", help="Processes of this machine.", min=1)
]
Ray = Annotated[
    str | None,
    typer.Option("--ray", metavar="ADDRESS", help="Ray cluster to run on: auto, local, HOST:PORT."),
]
GpusPerWorker = Annotated[
    float, typer.Option("--gpus-per-worker", metavar="N", help="GPUs of each Ray worker.", min=0.0)
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Remove the output that is there.")]
