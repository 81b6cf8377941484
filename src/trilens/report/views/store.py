"""A store of activations as a table."""

from __future__ import annotations

from trilens.corpus.store import Store
from trilens.report.page import Section
from trilens.report.tables import Column, Table

__all__ = ["store_sections"]


def store_sections(store: Store) -> list[Section]:
    """One row per site and layer, and the documents, the first ones."""
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
    return [Section("Sites", (sites,), name="sites")]
