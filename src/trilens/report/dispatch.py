"""`page_of`: the page of a result; each module of pages registers what it knows."""

from __future__ import annotations

from functools import singledispatch

from trilens.errors import UsageError
from trilens.lens.parts import ModelInfo
from trilens.report.page import Page

__all__ = ["model_facts", "page_of", "short_name"]


@singledispatch
def page_of(result: object) -> Page:
    """The page of a result.

    Raises:
        UsageError: nothing that a report is made of.
    """
    raise UsageError(
        f"{type(result).__name__} is nothing that a report is made of: give a Capture, or a result "
        "with a table"
    )


def model_facts(model: ModelInfo) -> dict[str, str]:
    """What a header says of a model."""
    return {
        "model": short_name(model.name) or "–",
        "class": model.model_class,
        "size": f"{model.n_layers} layers, d_model {model.d_model}",
        "dtype": model.dtype,
    }


def short_name(name: str) -> str:
    """A directory by its last name, a hub id whole."""
    return name.rstrip("/").rpartition("/")[2] if name.startswith("/") else name
