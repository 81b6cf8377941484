"""Declaration of `trilens serve`."""

from __future__ import annotations

from typing import Annotated

import typer

from trilens.cli import options as o
from trilens.cli.groups import Loading
from trilens.cli.lazy import run

__all__ = ["serve"]


def serve(
    path: Annotated[
        str,
        typer.Argument(
            metavar="MODEL|REPORT|STORE",
            help="Checkpoint directory or hub id; or a saved capture, comparison, report or store.",
        ),
    ],
    host: Annotated[
        str | None,
        typer.Option(
            "--host",
            metavar="ADDRESS",
            help="Listen on this address, for whoever has the token. [default: this machine alone]",
        ),
    ] = None,
    port: Annotated[
        int,
        typer.Option("--port", metavar="N", help="Port; 0 for a free one.", min=0, max=65535),
    ] = 8765,
    time_limit: Annotated[
        float,
        typer.Option("--time-limit", metavar="SECONDS", help="Longest time of a run.", min=1),
    ] = 300.0,
    loading: Loading = Loading(),
    debug: o.Debug = False,
) -> None:
    """Explore a model in a browser.

    Type a prompt, watch it run, click a head, knock it out, see what the text becomes; every state
    is a URL. A saved capture, comparison, report or store is shown without a model. Ends with
    Ctrl-C.
    """
    run("serve", locals())
