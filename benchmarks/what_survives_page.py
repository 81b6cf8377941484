"""The tables of docs/what-survives.md, from results/what_survives.json."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.pages import replace_tables, table

__all__ = ["PAGE", "tables", "write_page"]

PAGE = Path(__file__).parents[1] / "docs" / "what-survives.md"
SHOWN_HEADS = 6
SHOWN_GATES = 6
SHOWN_MATRICES = 6
HAS_ROLE = 0.4
ROLES = ("previous_token", "duplicate_token", "induction")


def tables(results: dict[str, Any]) -> dict[str, str]:
    """Every table by the name of its marks: "transformer layers"."""
    found = {}
    for name, model in results["models"].items():
        for what, make in _TABLES.items():
            found[f"{name} {what}"] = make(model)
    return found


def write_page(results: dict[str, Any], page: Path = PAGE) -> None:
    """Put each table between its two marks; see `replace_tables`."""
    replace_tables(page, tables(results))


def _table(columns: Mapping[str, str], rows: Iterable[Mapping[str, Any]]) -> str:
    """A table whose every column is a format of the row's values."""
    cells = [[cell.format(**row) for cell in columns.values()] for row in rows]
    return table(tuple(columns), cells)


def _layers(model: dict[str, Any]) -> str:
    columns = {
        "layer": "{layer}",
        "KL, alone": "{alone_kl_nats:.3f}",
        "KL, layers 0 to this": "{together_kl_nats:.3f}",
        "residual cosine": "{cosine:.3f}",
        "residual error": "{relative_error:.2f}",
        "attention JS": "{js_nats:.3f}",
        "settled before": "{settled_before:.0%}",
        "after": "{settled_after:.0%}",
    }
    return _table(columns, model["layers"])


_PREDICTED = {
    "output error": "{output_error:.2f}",
    "KL, alone": "{kl_nats:.3f}",
    "predicted": "{predicted_kl_nats:.3f}",
}


def _kinds(model: dict[str, Any]) -> str:
    columns = {"kind of matrix": "`{kind}`", "share of weights": "{share_of_weights:.0%}"}
    return _table(columns | _PREDICTED, model["kinds"])


def _matrices(model: dict[str, Any]) -> str:
    return _table({"matrix": "`{matrix}`"} | _PREDICTED, model["matrices"][:SHOWN_MATRICES])


def _heads(model: dict[str, Any]) -> str:
    """The most changed heads, and all that had a role."""
    columns = ("layer.head", "JS", "entropy", "distance", "role before → after")
    rows = []
    for place, row in enumerate(model["heads"]):
        role = max(ROLES, key=lambda role: row[f"{role}_score_before"])
        before, after = (row[f"{role}_score_{side}"] for side in ("before", "after"))
        if place >= SHOWN_HEADS and before < HAS_ROLE:
            continue
        rows.append(
            (
                f"{row['layer']}.{row['head']}",
                f"{row['js_nats']:.3f}",
                f"{row['entropy_nats_before']:.2f} → {row['entropy_nats_after']:.2f}",
                f"{row['distance_tokens_before']:.1f} → {row['distance_tokens_after']:.1f}",
                f"{role.replace('_', '-')} {before:.2f} → {after:.2f}"
                if before >= HAS_ROLE
                else "–",
            )
        )
    return table(columns, rows)


def _gates(model: dict[str, Any]) -> str:
    columns = {
        "gate": "`{gate}`",
        "layer": "{layer}",
        "openness": "{openness_before:.3f} → {openness_after:.3f}",
        "moved": "{openness_abs_change:.3f}",
        "newly dead": "{newly_dead:.0f} of {units}",
        "newly saturated": "{newly_saturated:.0f}",
        "horizon": "{horizon}",
    }
    ranked = sorted(model["gates"], key=lambda row: -row["openness_abs_change"])
    return _table(columns, ({**row, "horizon": _horizon(row)} for row in ranked[:SHOWN_GATES]))


def _horizon(row: dict[str, Any]) -> str:
    if "horizon_before" not in row:
        return "–"
    return f"{row['horizon_before']:.1f} → {row['horizon_after']:.1f}"


_SUMMARY = (
    "bits",
    "perplexity ×",
    "KL",
    "residual cosine",
    "attention JS",
    "gates moved",
    "roles lost",
)


def _summary(row: dict[str, Any]) -> tuple[str, ...]:
    if "refused" in row:
        return ("refused", *["–"] * (len(_SUMMARY) - 1))
    ratio = row["perplexity_ratio"]
    return (
        f"{row['bits_per_weight']:.2f}",
        f"{ratio:.2f}" if ratio < 100 else f"{ratio:.0f}",
        f"{row['kl_nats']:.3f}",
        f"{row['cosine']:.3f}",
        f"{row['js_nats']:.3f}",
        f"{row['openness_abs_change']:.3f}",
        str(row["roles_lost"]),
    )


def _rules(model: dict[str, Any]) -> str:
    rows = [(f"`{name}`", *_summary(row)) for name, row in model["rules"].items()]
    return table(("rule", *_SUMMARY), rows)


def _plans(model: dict[str, Any]) -> str:
    rows = []
    for budget, row in model["plans"].items():
        most = list(row["bits_by_kind"].items())[:3]
        spent = ", ".join(f"`{kind}` {bits:.1f}" for kind, bits in most)
        rows.append((budget, *_summary(row), spent))
    return table(("budget", *_SUMMARY, "most bits to"), rows)


_TABLES = {
    "layers": _layers,
    "kinds": _kinds,
    "matrices": _matrices,
    "heads": _heads,
    "gates": _gates,
    "rules": _rules,
    "plans": _plans,
}
