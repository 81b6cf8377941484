"""The explorer's page: the report's own, with a form above it and the texts that were written."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from typing import Any

from trilens.explorer.exploring import Explored
from trilens.explorer.state import MAX_NEW_TOKENS, State
from trilens.lens.lens import Lens
from trilens.printable import escaped_text
from trilens.report.html.render import Around, Rendered, rendered
from trilens.report.making import versions
from trilens.report.page import Page

__all__ = ["explorer_page", "facts_of", "knockouts"]


def facts_of(lens: Lens) -> dict[str, str]:
    """What the header says of a model before there is a run."""
    return {
        "class": type(lens.model).__name__,
        "size": f"{lens.n_layers} layers, d_model {lens.d_model}",
        "dtype": str(lens.model.dtype).removeprefix("torch."),
    }


def knockouts(lens: Lens) -> dict[int, list[dict[str, str]]]:
    """Per layer, the edits that a click offers: words, and a text with {head} and {token} in it."""
    found: dict[int, list[dict[str, str]]] = {}
    sites = lens.site_layers
    for layer in sites.get("attn.z", ()):
        found.setdefault(layer, []).append(
            {"words": "Knock out this head", "edit": f"ablate:attn.z@{layer}#{{head}}"}
        )
    for layer in lens.attention_layers:
        found.setdefault(layer, []).append(
            {
                "words": "Hide this token from the head",
                "edit": f"knockout@{layer}#{{head}} keys={{token}}",
            }
        )
    for layer in lens.effective_layers:
        if layer in lens.attention_layers:
            continue
        offered = found.setdefault(layer, [])
        if layer in sites.get("mixer.out", ()):
            offered.append(
                {"words": "Knock out this layer's mixer", "edit": f"ablate:mixer.out@{layer}"}
            )
        offered.append(
            {
                "words": "Keep this token out of the layer's state",
                "edit": f"knockout@{layer} keys={{token}}",
            }
        )
    return found


def explorer_page(
    name: str,
    state: State,
    offered: dict[int, list[dict[str, str]]],
    found: Explored | None,
    *,
    facts: Mapping[str, str],
    auto: bool,
    problem: str = "",
) -> Rendered:
    """The page of a state.

    Args:
        name: of the model.
        state: what its URL says.
        offered: as `knockouts` gives it.
        found: its result, where it has been run.
        facts: what the header says of the model before a run.
        auto: whether the page runs its state by itself; not where another site led here.
        problem: an error to show.
    """
    page = Page(title=name, sections=(), facts=facts) if found is None else found.page
    told: dict[str, Any] = {
        "state": state.to_dict(),
        "offered": offered,
        "auto": auto and found is None and bool(state.prompt) and not problem,
        "run": found is not None,
    }
    values = {
        "state": state,
        "told": json.dumps(told),
        "problem": problem,
        "written": () if found is None else found.written,
        "most_new": MAX_NEW_TOKENS,
        "text": escaped_text,
    }
    around = Around(_template(), _script(), values)
    return rendered(page, versions(), around)


@cache
def _template() -> str:
    return _file("explorer.html")


@cache
def _script() -> str:
    return _file("explorer.js")


def _file(name: str) -> str:
    folder = files("trilens.explorer") / "templates"
    return (folder / name).read_text(encoding="utf-8")
