"""From results to a page: which sections each kind of result has."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import replace
from importlib.metadata import version

from trilens.analysis.inspection import inspect_capture
from trilens.analysis.lenses.logit_lens import logit_lens, same_model
from trilens.caches.activation import FullActivationCache
from trilens.errors import UsageError
from trilens.lens.capture import Capture
from trilens.lens.lens import Lens
from trilens.models.token_strings import token_strings
from trilens.report import measure_pages, result_pages
from trilens.report.dispatch import model_facts, page_of, short_name
from trilens.report.page import Chart, Page, Section
from trilens.report.views.absent import absent_views
from trilens.report.views.capture import (
    head_section,
    layer_section,
    lens_section,
    state_section,
)
from trilens.report.views.gates import gate_section
from trilens.report.views.inspection import next_table
from trilens.version import __version__

__all__ = ["LENS_TOKENS", "capture_page", "joined", "page_of", "versions"]

LENS_TOKENS = 512
"""Tokens of a long prompt, its last ones, whose logit lens a page holds."""

_NEXT = 8
_KINDS = (measure_pages, result_pages)  # each registers the results that it knows


def versions() -> dict[str, str]:
    """What a report was made with."""
    return {
        "trilens": __version__,
        "torch": version("torch"),
        "transformers": version("transformers"),
        "Python": platform.python_version(),
    }


def capture_page(capture: Capture, *, lens: Lens | None = None, top_k: int = 5) -> Page:
    """The page of a capture; with its lens also what each layer would predict.

    Raises:
        UsageError: it holds nothing to show; says what to capture.
        IncomparableError: the lens is of another model.
    """
    found = None
    limits: tuple[str, ...] = ()
    if lens is not None and not lens.anatomy.unembedding:
        same_model(capture.model, lens, "capture")
    elif lens is not None and capture.has("residual"):
        seq = len(capture.tokens)
        is_long = isinstance(capture.residual, FullActivationCache) and seq > LENS_TOKENS
        last = range(seq - LENS_TOKENS, seq) if is_long else None
        found = logit_lens(capture, lens, k=top_k, positions=last)
        if is_long:
            limits = (f"Of the last {LENS_TOKENS} tokens.",)
    sections = [
        _next_section(capture, lens),
        head_section(capture, "softmax"),
        head_section(capture, "effective"),
        layer_section(capture, found),
        None if found is None else lens_section(found, limits),
        None if capture.parts.gates is None else gate_section(capture.gates),
        state_section(capture),
    ]
    there = tuple(section for section in sections if section is not None)
    if not there:
        parts = ", ".join(capture.parts.names) or "nothing"
        raise UsageError(
            f"this capture holds {parts}, of which nothing can be shown: capture with "
            "residual='all', attention=True, gates=True"
        )
    notes = absent_views(capture, lens, found, {section.anchor for section in there})
    tokens = len(capture.tokens)
    return Page(
        title=short_name(capture.model.name) or capture.model.model_class,
        sections=there,
        facts={**model_facts(capture.model), "tokens": f"{tokens:,}"},
        tokens=tuple(capture.tokens),
        notes=tuple(notes),
    )


def joined(title: str, pages: Mapping[str, Page], *first: Section) -> Page:
    """One page of several models that read the same prompt, by their names.

    Their parts stand in one order of sections; tokens are those of the first.
    """
    sections = [
        replace(section, title=f"{name}: {section.title}", name=f"{name}-{section.anchor}")
        for name, page in pages.items()
        for section in page.sections
    ]
    some = next(iter(pages.values()))
    notes = [f"{name}: {note}" for name, page in pages.items() for note in page.notes]
    return Page(
        title=title,
        sections=(*first, *sections),
        facts={"models": ", ".join(pages), "tokens": f"{len(some.tokens):,}"},
        tokens=some.tokens,
        notes=tuple(notes),
    )


def _next_section(capture: Capture, lens: Lens | None) -> Section | None:
    if capture.logits is None:
        return None
    known = dict(zip(capture.token_ids.tolist(), capture.tokens, strict=True))

    def text(token: int) -> str:
        if lens is not None:
            return str(token_strings([token], lens.tokenizer)[0])
        return str(known.get(token, f"#{token}"))

    found = inspect_capture(capture, name="", top_k=_NEXT, token_text=text)
    table = next_table(found)
    chart = Chart(kind="bars", table=table, x="token", y=("probability",))
    return Section("Next token", (chart,), name="next")


page_of.register(Capture, capture_page)
