"""The command line: declarations alone; a command imports its work when it runs."""

from __future__ import annotations

import os
from typing import Annotated, Any

import typer

from trilens.cli.commands.attribute import attribute
from trilens.cli.commands.capture import capture
from trilens.cli.commands.compare import compare
from trilens.cli.commands.convert import convert
from trilens.cli.commands.demo import demo
from trilens.cli.commands.evaluate import evaluate
from trilens.cli.commands.families import families
from trilens.cli.commands.generate import generate
from trilens.cli.commands.inspect import inspect
from trilens.cli.commands.lens import lens
from trilens.cli.commands.ls import ls
from trilens.cli.commands.patch import patch
from trilens.cli.commands.plan import plan
from trilens.cli.commands.sensitivity import sensitivity
from trilens.cli.commands.serve import serve
from trilens.cli.commands.ternarize import ternarize
from trilens.cli.commands.validate import validate
from trilens.cli.errors import OneLineGroup
from trilens.cli.groups import flattened
from trilens.cli.streams import prepare_streams
from trilens.version import __version__

__all__ = ["app", "main"]

app = typer.Typer(
    name="trilens",
    cls=OneLineGroup,
    context_settings={"max_content_width": 100},
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"trilens {__version__}")
        raise typer.Exit(0)


@app.callback()
def _root(
    _show_version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    """Open a language model: residual stream, attention and gates, one forward pass."""


for _command in (
    demo, inspect, lens, attribute, capture, generate, patch, compare, ternarize, ls, validate,
    evaluate, sensitivity, plan,
    serve, families, convert,
):  # fmt: skip
    app.command()(flattened(_command))


def main(arguments: list[str] | None = None) -> Any:
    """Entry point of the `trilens` command."""
    # transformers warns of every GPU kernel that is not installed: no news in a table.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    prepare_streams()
    return app(args=arguments, prog_name="trilens")


if __name__ == "__main__":
    main()
