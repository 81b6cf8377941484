"""A store of activations as text."""

from __future__ import annotations

from collections import Counter

from rich.console import Console

from trilens.caches.storage import spell_layers
from trilens.corpus.store import Store
from trilens.report.text.tables import Cell, Column, print_line, print_table

__all__ = ["print_store", "store_sentences"]


def print_store(store: Store, console: Console) -> None:
    """Draw one row per site, and what the store is of."""
    print_line(console, *store_sentences(store)[:1])
    rows = store.table()
    if rows:
        console.print()
        columns: list[Column | str] = [
            Column("site", left=True), Column("layers", left=True, fold=14),
            Column("one token", left=True), Column("dtype", left=True), "relative error",
        ]  # fmt: skip
        print_table(console, columns, _cells(store))
    for sentence in store_sentences(store)[1:]:
        print_line(console, sentence)


def _cells(store: Store) -> list[tuple[Cell, ...]]:
    found: list[tuple[Cell, ...]] = []
    for name in dict.fromkeys(row["site"] for row in store.table()):
        rows = [row for row in store.table() if row["site"] == name]
        layers = [row["layer"] for row in rows if row["layer"] is not None]
        errors = [row["relative_error"] for row in rows if row["relative_error"] is not None]
        shape = ", ".join(
            f"{axis} {size}"
            for axis, size in zip(rows[0]["axes"][1:], rows[0]["shape"][1:], strict=True)
        )
        where = spell_layers(layers).partition(" ")[2] if layers else "–"
        error = f"{max(errors):.1e}" if errors else "–"
        found.append((name, where, shape, rows[0]["dtype"], error))
    return found


def store_sentences(store: Store) -> list[str]:
    """What a store is of, what was left out of its corpus, and what its reducers hold."""
    counts, model = store.manifest.counts, store.manifest.model
    sentences = [
        f"{counts.tokens:,} tokens of {counts.documents:,} documents through {model.model_class}: "
        f"{len(store.manifest.shards)} shards, {store.nbytes / 1e6:,.1f} MB; "
        f"{store.padding:.1%} of the passes was padding"
    ]
    if counts.windowed:
        sentences.append(
            f"{counts.windowed:,} documents are longer than {counts.longest} tokens: they are cut "
            "into windows that see nothing of each other"
        )
    if counts.bad or counts.empty:
        first = f"; the first: {counts.examples[0]}" if counts.examples else ""
        sentences.append(
            f"{counts.bad:,} entries could not be read and {counts.empty:,} are empty: they are "
            f"left out{first}"
        )
    if store.manifest.options.reduce:
        kinds = Counter(kind for kind, _, _ in store.reduced)
        sentences.append(
            "reducers: " + ", ".join(f"{kind} of {n}" for kind, n in sorted(kinds.items()))
        )
    return sentences
