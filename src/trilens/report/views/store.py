"""A store of activations as tables and charts."""

from __future__ import annotations

import numpy as np

from trilens.corpus.store import Store
from trilens.report.page import Block, Chart, Section
from trilens.report.tables import Column, Table

__all__ = ["store_sections"]

_BINS = 40


def store_sections(store: Store) -> list[Section]:
    """One row per site and layer, and how long the documents are."""
    sites = Table(
        (
            Column("site", left=True),
            Column("layer"),
            Column("axes", left=True),
            Column("shape"),
            Column("dtype", left=True),
            Column(
                "relative error",
                better="smaller",
                note="of what is stored, against what was captured; none where no digit is lost",
                spell="{:.1e}".format,
            ),
        ),
        tuple(
            (
                row["site"],
                row["layer"],
                ", ".join(row["axes"]),
                "×".join(map(str, row["shape"])),
                row["dtype"],
                row["relative_error"],
            )
            for row in store.table()
        ),
        title="what is stored",
        keys=2,
    )
    lossy = tuple(
        (row["site"], row["layer"], row["relative_error"])
        for row in store.table()
        if row["relative_error"] is not None and row["layer"] is not None
    )
    blocks: list[Block] = [sites]
    if lossy:
        errors = Table(
            (sites.columns[0], sites.columns[1], sites.columns[5]),
            lossy,
            title="relative error of what is stored",
            keys=2,
        )
        blocks.append(
            Chart(kind="heatmap", table=errors, x="layer", row="site", y=("relative_error",))
        )
    found = [Section("Sites", tuple(blocks), name="sites")] if sites.rows else []
    return [*found, Section("Documents", (_lengths(store),), name="documents")]


def _lengths(store: Store) -> Chart:
    """How long the documents are."""
    lengths = store.token_counts
    shortest, longest = int(lengths.min()), int(lengths.max())
    width = max(1, -(-(longest + 1 - shortest) // _BINS))
    edges = np.arange(shortest, longest + width + 1, width)
    counts, _ = np.histogram(lengths, edges)
    table = Table(
        (
            Column("from", key="from_tokens", unit="tokens"),
            Column("to", key="to_tokens", unit="tokens", note="not included"),
            Column("documents"),
        ),
        tuple(zip(edges[:-1].tolist(), edges[1:].tolist(), counts.tolist(), strict=True)),
        title="tokens of a document",
        keys=2,
    )
    return Chart(
        kind="histogram", table=table, x="from_tokens", until="to_tokens", y=("documents",)
    )
