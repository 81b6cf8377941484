"""A capture as charts and tables: layers, heads, gates, recurrent states, logit lens."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from trilens.analysis.lenses.logit_lens import LogitLens
from trilens.caches.activation import FullActivationCache
from trilens.caches.attention import AttentionCache
from trilens.caches.states import StateCache
from trilens.lens.capture import Capture
from trilens.report.page import Chart, Heads, LensGrid, Profiles, Section
from trilens.report.patterns import head_patterns
from trilens.report.tables import Column, Table
from trilens.report.views.logit_lens import lens_rows
from trilens.report.words import four_digits, token_text

__all__ = [
    "drawn_layers",
    "head_section",
    "layer_section",
    "lens_grid",
    "lens_section",
    "state_norms",
    "state_section",
]

Values = NDArray[np.float32]
_LONG = 1024
_WORDS = {
    "softmax": "Attention",
    "effective": "Effective attention",
}


def lens_grid(found: LogitLens) -> LensGrid:
    """The most probable tokens of each layer and position."""
    ids = {token: i for i, token in enumerate(found.texts)}
    numbers = [[[ids[token] for token in row] for row in each] for each in found.top_ids.tolist()]
    return LensGrid(
        layers=found.layers,
        positions=found.positions,
        texts=tuple(token_text(text) for text in found.texts.values()),
        top=numbers,
        probabilities=[
            [[round(share, 4) for share in row] for row in each]
            for each in found.top_probabilities.tolist()
        ],
        table=lens_rows(found),
    )


def lens_section(found: LogitLens, limits: tuple[str, ...] = ()) -> Section:
    """The grid, with what it says."""
    words = (
        "Each cell is what the layer would predict next: the residual stream through the model's "
        "own final norm and unembedding"
        + (", translated by a tuned lens first. " if found.translated else ". ")
        + "The stronger the colour, the more probable the token.",
        *limits,
    )
    return Section("Logit lens", (lens_grid(found),), words, name="logit-lens")


def layer_section(capture: Capture, found: LogitLens | None = None) -> Section | None:
    """Norm, attention entropy, sink mass and logit lens by layer; None where nothing was captured.

    A capture of the last token's residual stream gives that token alone.
    """
    seq = len(capture.tokens)
    columns: list[Column] = []
    layers: list[tuple[int, ...]] = []
    values: list[Values] = []

    def add(column: Column, rows: dict[int, Values]) -> None:
        # A quantity that is 0 everywhere, as the mass of sinks that a model has not, says nothing.
        if any(bool(row.any()) for row in rows.values()):
            columns.append(column)
            layers.append(tuple(rows))
            values.append(np.stack([_all_tokens(row, seq) for row in rows.values()]))

    residual = capture.parts.residual
    if residual is not None:
        norms = {}
        for layer in residual.layers:
            # PROMOTE: a norm in half precision overflows where the residual is large.
            tensor = residual[layer].float()
            rows = tensor if isinstance(residual, FullActivationCache) else tensor[None]
            norms[layer] = rows.norm(dim=-1).cpu().numpy()
        column = Column(
            "norm",
            words="residual norm",
            key="residual_norm",
            note="‖resid_post‖₂: the length of the residual stream after the layer",
            spell=four_digits,
        )
        add(column, norms)
    for cache, layer_numbers in _caches(capture):
        for column, ask in _STATISTICS:
            asked = (ask(cache, layer).mean(0) for layer in layer_numbers)
            add(column, dict(zip(layer_numbers, asked, strict=True)))
    if found is not None:
        columns_of = zip(_LENS, (found.entropy_nats, found.kl_nats), strict=True)
        for column, tensor in ((c, t) for c, t in columns_of if t is not None):
            spread = np.full((len(found.layers), seq), np.nan, np.float32)
            spread[:, list(found.positions)] = tensor.float().numpy()
            add(column, dict(zip(found.layers, spread, strict=True)))
    if not columns:
        return None
    profiles = Profiles(
        tuple(columns),
        tuple(layers),
        tuple(_plain(each) for each in values),
        _profile_table(columns, layers, values),
    )
    words = (
        "Lines are of the chosen token; the pale band runs from the smallest to the largest value "
        "of all tokens.",
    )
    return Section("Layer by layer", (profiles,), words, name="layers")


_STATISTICS: tuple[tuple[Column, Callable[[AttentionCache, int], Values]], ...] = (
    (
        Column(
            "entropy",
            words="attention entropy",
            key="attention_entropy_nats",
            unit="nats",
            note="of the rows renormalised over their keys, the mean over heads",
            spell=four_digits,
        ),
        AttentionCache.entropy,
    ),
    (
        Column(
            "first",
            words="attention to the first token",
            key="first_token_mass",
            note="mean over heads of the weight on the first token",
            spell=four_digits,
        ),
        lambda cache, layer: cache.pattern(layer).columns([0])[..., 0].cpu().numpy(),
    ),
    (
        Column(
            "sink",
            words="sink mass",
            key="sink_mass",
            note="share of a row that no token got, because a sink took it; the mean over heads",
            spell=four_digits,
        ),
        AttentionCache.sink_mass,
    ),
)
_LENS = (
    Column(
        "lens entropy",
        words="logit lens: entropy",
        key="lens_entropy_nats",
        unit="nats",
        note="of what the layer would predict next",
        spell=four_digits,
    ),
    Column(
        "lens KL",
        words="logit lens: KL from the last layer",
        key="lens_kl_nats",
        unit="nats",
        note="how far the layer's prediction is from the model's own",
        spell=four_digits,
    ),
)


def _caches(capture: Capture) -> list[tuple[AttentionCache, tuple[int, ...]]]:
    """Softmax attention alone: entropy and the like have no meaning for signed weights."""
    cache = capture.parts.attention
    if cache is None:
        return []
    layers = tuple(i for i in _square(capture, cache) if not cache.pattern(i).signed)
    return [(cache, tuple(i for i in layers if not capture.shares_pattern(i)))]


def _square(capture: Capture, cache: AttentionCache) -> tuple[int, ...]:
    """Layers whose queries and keys are the prompt's tokens."""
    seq, shapes = len(capture.tokens), {i: cache.pattern(i) for i in cache.layers}
    return tuple(i for i, each in shapes.items() if each.seq_q == each.seq_k == seq)


def _all_tokens(row: Values, seq: int) -> Values:
    if len(row) == seq:
        return row
    spread = np.full(seq, np.nan, np.float32)
    spread[seq - len(row) :] = row
    return spread


def _plain(values: Values) -> list[list[float | None]]:
    digits = 4 if values.shape[1] <= _LONG else 3  # a long prompt has many
    return [
        [None if not np.isfinite(x) else float(f"{x:.{digits}g}") for x in row]
        for row in values.tolist()
    ]


def _profile_table(
    columns: list[Column], layers: list[tuple[int, ...]], values: list[Values]
) -> Table:
    numbers = sorted({layer for each in layers for layer in each})
    heads, rows = [Column("layer")], [[layer] for layer in numbers]
    for column, there, found in zip(columns, layers, values, strict=True):
        for words, picked in (
            ("last token", found[:, -1]),
            ("mean over tokens", _means(found)),
        ):
            heads.append(
                Column(
                    f"{column.heading}, {words}",
                    words=f"{column.title}, {words}",
                    key=f"{column.name}_{words.split()[0]}",
                    unit=column.unit,
                    note=column.note,
                    spell=column.spell,
                )
            )
            by_layer = dict(zip(there, picked.tolist(), strict=True))
            for row, layer in zip(rows, numbers, strict=True):
                row.append(by_layer.get(layer))  # type: ignore[arg-type]
    return Table(tuple(heads), tuple(map(tuple, rows)), title="layer by layer")


def _means(values: Values) -> Values:
    there = np.isfinite(values)
    total = np.where(there, values, 0).sum(1, dtype=np.float64)
    count = there.sum(1)
    found: Values = np.where(count > 0, total / np.maximum(count, 1), np.nan).astype(np.float32)
    return found


def drawn_layers(capture: Capture, part: str) -> tuple[int, ...]:
    """Layers of "attention" or "effective" whose patterns are drawn."""
    cache = capture.parts.attention if part == "attention" else capture.parts.effective
    if cache is None:
        return ()
    layers = _square(capture, cache)
    if part == "effective":
        return layers
    return tuple(i for i in layers if not capture.shares_pattern(i))


def head_section(capture: Capture, kind: str) -> Section | None:
    """The mosaic of all heads and the pattern of one; None where it was not captured."""
    softmax = kind == "softmax"
    cache = capture.parts.attention if softmax else capture.parts.effective
    layers = drawn_layers(capture, "attention" if softmax else "effective")
    if cache is None or not layers:
        return None
    patterns = head_patterns(cache, "softmax" if softmax else "effective", layers)
    words: tuple[str, ...] = (
        "One tile per head, queries downwards, keys to the right. Choose a head to see its "
        "pattern, a row of the pattern to see where its token attends to.",
    )
    if not softmax:
        words += (
            "What a recurrence gives each value, written as if it attended: weights have signs, "
            "and rows do not sum to 1.",
        )
    block = Heads(patterns, _head_table(cache, layers))
    return Section(_WORDS[kind], (block,), (*words, patterns.note), name=f"heads-{kind}")


def _head_table(cache: AttentionCache, layers: tuple[int, ...]) -> Table:
    # Weights that may have signs are not asked as others, also where none happens to be negative.
    signed = any(cache.pattern(layer).signed for layer in layers)
    asked = cache.relu_l1() if signed else cache
    note = "of its positive weights, scaled to sum 1" if signed else "mean over the prompt's tokens"
    rows = []
    for layer in layers:
        statistics = [
            asked.entropy(layer).mean(1),
            asked.mean_distance(layer).mean(1),
            asked.pattern(layer).columns([0])[..., 0].cpu().numpy().mean(1),
        ]
        if not signed:
            statistics.append(asked.sink_mass(layer).mean(1))
        for head in range(len(statistics[0])):
            rows.append((layer, head, *(float(each[head]) for each in statistics)))
    columns = [
        Column("layer"),
        Column("head"),
        Column("entropy", key="entropy_nats", unit="nats", note=note, spell=four_digits),
        Column("distance", key="distance_tokens", unit="tokens", note=note, spell=four_digits),
        Column(
            "first token", key="first_token_mass", note=f"weight on it, {note}", spell=four_digits
        ),
    ]
    if not signed:
        words = "share of a row that no token got"
        columns.append(Column("sink mass", key="sink_mass", note=words, spell=four_digits))
    return Table(tuple(columns), tuple(rows), title="heads", keys=2)


def state_section(capture: Capture) -> Section | None:
    """Norms of recurrent states after the last token that is stored; None where there are none."""
    return state_norms(capture.states) if capture.has("states") else None


def state_norms(states: StateCache) -> Section:
    """Norms after the last token that is stored, by layer and head."""
    position = states.positions[-1]
    rows = []
    for layer in states.layers:
        for part in states.spec(layer).parts:
            state = states.get(layer, position, part.name).float()
            first = part.axes[0]
            norms = state.reshape(part.shape[0], -1).norm(dim=-1).cpu().numpy()
            few = first == "heads" or len(norms) <= 64
            values = enumerate(norms) if few else [(0, np.linalg.norm(norms))]
            rows += [(layer, part.name, i, float(norm)) for i, norm in values]
    columns = (
        Column("layer"),
        Column("state", left=True),
        Column("head", note="0 where the state is not split into heads"),
        Column("norm", note=f"Frobenius norm after token {position}", spell=four_digits),
    )
    table = Table(columns, tuple(rows), title="norms of recurrent states", keys=3)
    charts = []
    for name in dict.fromkeys(row[1] for row in rows):
        part_rows = tuple(row for row in rows if row[1] == name)
        charts.append(
            Chart(
                kind="heatmap",
                table=Table(
                    columns, part_rows, title=f"state {name}: norm by layer and head", keys=3
                ),
                x="head",
                row="layer",
                y=("norm",),
            )
        )
    spec = states.spec(states.layers[0])
    words = (f"{spec.kind}: {spec.formula}. {spec.read}",)
    return Section("Recurrent states", (*charts,) if charts else (table,), words, name="states")
