"""What the page's script reads: the tables behind every chart, tokens, and weights as bytes."""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Iterator
from typing import Any

from trilens.report.page import Block, Chart, Heads, LensGrid, Page, Profiles
from trilens.report.tables import Table
from trilens.report.words import token_text

__all__ = ["DATA_VERSION", "as_bytes", "blocks_of", "packed", "packed_codes", "page_data"]


DATA_VERSION = 1
"""Of what the page's script reads."""


def packed(data: bytes) -> str:
    """Bytes as text, compressed: base64 has no character that ends a script."""
    return base64.b64encode(zlib.compress(data, 6)).decode("ascii")


def page_data(page: Page) -> dict[str, Any]:
    """The page as JSON: blocks by number, in the order of the page."""
    return {
        "version": DATA_VERSION,
        "tokens": [token_text(token) for token in page.tokens],
        "blocks": [_block(block) for block in blocks_of(page)],
    }


def packed_codes(page: Page) -> list[str]:
    """The bytes of each block of heads."""
    return [
        packed(block.patterns.codes.tobytes())
        for block in blocks_of(page)
        if isinstance(block, Heads)
    ]


def as_bytes(data: Any) -> bytes:
    """JSON in ASCII: what turns the reading direction is an escape in it."""
    return json.dumps(data, separators=(",", ":"), allow_nan=False).encode("ascii")


def blocks_of(page: Page) -> Iterator[Block]:
    """All blocks in order."""
    for section in page.sections:
        yield from section.blocks


def _table(table: Table) -> dict[str, Any]:
    return {
        "title": table.title,
        "keys": table.keys,
        "columns": [
            {
                "name": column.name,
                "title": column.title,
                "unit": column.unit,
                "note": column.explanation,
                "left": column.left,
            }
            for column in table.columns
        ],
        "rows": table.values(),
    }


def _block(block: Block) -> dict[str, Any]:
    if isinstance(block, Table):
        return {"is": "table", "table": _table(block)}
    if isinstance(block, Chart):
        return {
            "is": "chart",
            "kind": block.kind,
            "x": block.x,
            "y": list(block.y),
            "row": block.row,
            "label": block.label,
            "until": block.until,
            "diverging": block.diverging,
            "log": block.log,
            "link": block.link,
            "marks": block.marks,
            "scale": block.scale,
            "title": block.title or block.table.title,
            "table": _table(block.table),
        }
    if isinstance(block, LensGrid):
        return {
            "is": "lens",
            "layers": block.layers,
            "positions": block.positions,
            "texts": block.texts,
            "top": block.top,
            "probabilities": block.probabilities,
            "table": _table(block.table),
        }
    if isinstance(block, Profiles):
        return {
            "is": "profiles",
            "columns": [
                {"name": each.name, "title": each.title, "unit": each.unit, "note": each.note}
                for each in block.columns
            ],
            "layers": block.layers,
            "values": block.values,
            "table": _table(block.table),
        }
    return _heads(block)


def _heads(block: Heads) -> dict[str, Any]:
    found = block.patterns
    return {
        "is": "heads",
        "kind": found.kind,
        "layers": found.layers,
        "heads": found.heads,
        "side": found.side,
        "pool": found.pool,
        "causal": found.causal,
        "signed": found.signed,
        "steps": found.steps,
        "scales": [float(f"{scale:.5g}") for scale in found.scales.tolist()],
        "table": _table(block.summary),
    }
