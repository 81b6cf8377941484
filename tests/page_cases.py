"""Pages that tests read: made-up heads, tokens that would like to be more than text."""

from __future__ import annotations

import base64
import json
import zlib
from html.parser import HTMLParser

import torch

from trilens.caches.attention import AttentionCache
from trilens.caches.patterns.protocol import DensePattern
from trilens.report.html.render import render_page
from trilens.report.page import Heads, Page, Section
from trilens.report.patterns import head_patterns
from trilens.report.tables import Column, Table

HOSTILE = (
    "<script>alert(1)</script>",
    "</script><img src=x onerror=alert(1)>",
    "\x1b[31mred\x1b[0m",
    "\u202eevil\u202c",
    "{{ 7*7 }}",
    '=HYPERLINK("http://x")',
    "a\u0000b\u2028c\ud800",
    "👩‍👩‍👧",
    "שלום",
    "x" * 5000,
    "",
)


def attention(n: int, *, layers: int = 12, heads: int = 12, seed: int = 0, signed: bool = False):
    """Random causal patterns [1, heads, n, n] of several layers."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for layer in range(layers):
        scores = 2 * torch.randn(1, heads, n, n, generator=generator)
        hidden = torch.ones(n, n, dtype=torch.bool).triu(1)
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        if signed:
            weights = weights * torch.randn(n, n, generator=generator).sign()
        found[layer] = DensePattern(weights)
    return AttentionCache.from_layers(found, n_model_layers=layers)


def heads_page(cache: AttentionCache, tokens, kind="softmax") -> Page:
    patterns = head_patterns(cache, kind, cache.layers)
    summary = Table((Column("head"),), tuple((i,) for i in range(patterns.n_heads)), title="heads")
    return Page(
        title="heads",
        sections=(Section("Attention", (Heads(patterns, summary),)),),
        tokens=tuple(tokens),
    )


def rendered(page: Page) -> str:
    return render_page(page, {"trilens": "0"})


class Parsed(HTMLParser):
    """Every tag with its attributes, text by tag, and the scripts."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[tuple[dict[str, str | None], str]] = []
        self.text: list[str] = []
        self._inside: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag, attributes) -> None:
        self.tags.append((tag, dict(attributes)))
        self._inside.append(tag)
        if tag == "script":
            self.scripts.append((dict(attributes), ""))

    def handle_endtag(self, tag) -> None:
        while self._inside and self._inside.pop() != tag:
            pass

    def handle_data(self, data) -> None:
        if self._inside and self._inside[-1] == "script":
            attributes, text = self.scripts[-1]
            self.scripts[-1] = attributes, text + data
        else:
            self.text.append(data)

    def script(self, name: str) -> str:
        return next(text for attributes, text in self.scripts if attributes.get("id") == name)


def data_of(html: str) -> dict:
    """What the page's own script reads."""
    return json.loads(zlib.decompress(base64.b64decode(Parsed(html).script("trilens-data"))))


def codes_of(html: str) -> list[bytes]:
    return [
        zlib.decompress(base64.b64decode(text))
        for attributes, text in Parsed(html).scripts
        if attributes.get("class") == "trilens-codes"
    ]
