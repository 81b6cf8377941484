"""`trilens serve`: a model, or what was saved, in a browser."""

from __future__ import annotations

import math
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

from trilens.cli.console import status
from trilens.cli.groups import Loading
from trilens.cli.run.prompts import open_lens
from trilens.cli.streams import say
from trilens.errors import NoTokenizerError, UsageError
from trilens.io.paths import as_path

__all__ = ["run"]


def run(*, path: str, host: str | None, port: int, time_limit: float, loading: Loading) -> None:
    """Load once, and serve until Ctrl-C."""
    if any(find_spec(name) is None for name in ("starlette", "uvicorn")):
        raise UsageError(
            "starlette and uvicorn are not installed, which serve pages: pip install 'trilens[app]'"
        )
    if math.isnan(time_limit):
        raise UsageError("--time-limit nan is no time: give seconds, 1 or more")
    place = as_path(path, "model")
    serving = import_module("trilens.explorer.serving")
    app = import_module("trilens.explorer.app")
    saved = import_module("trilens.explorer.saved")
    # Taken first: a port in use should not cost the time of a load.
    bound = serving.bind(host, port)
    with bound.socket:
        if saved.is_saved(place):
            given = {name: value for name, value in vars(loading).items() if value}
            given.pop("dtype") if given.get("dtype") == "auto" else None
            if given:
                raise UsageError(
                    f"--{next(iter(given)).replace('_', '-')} is for a model, and {path} is shown "
                    "without one: leave the option out"
                )
            with status(f"reading {path}"):
                shown = saved.open_saved(place)
            answers = app.saved_app(shown, bound.rules)
        else:
            lens = open_lens(path, loading)
            if lens.tokenizer is None:
                raise NoTokenizerError(f"model {path} has no tokenizer: name one with --tokenizer")
            name = Path(path).resolve().name if place.is_dir() else path
            explorer = import_module("trilens.explorer.exploring").Explorer(lens, name)
            answers = app.model_app(explorer, bound.rules, seconds=time_limit)
        serving.serve(
            answers,
            bound,
            lambda: say(f"trilens: serving {path} at {bound.address}; Ctrl-C ends it", err=True),
        )
