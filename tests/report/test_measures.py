"""Every result with a table has a picture, or a reason why not; pictures hold the numbers."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import numpy as np
import pytest

import trilens
from measure_cases import HELD_OUT, measures
from page_cases import data_of
from trilens.checkpoint.gguf.report import GgufReport, GgufTensor
from trilens.report.html.report import make_report
from trilens.report.making import page_of
from trilens.report.page import Chart
from trilens.results import Tabular

# One row of a few numbers, which says all at a glance: a picture of it would say less.
ALONE = {"Perplexity", "StoreCheck"}


@pytest.fixture(scope="module")
def found() -> dict[str, Tabular]:
    return measures()


def kinds(kind: type) -> Iterator[type]:
    for each in kind.__subclasses__():
        yield each
        yield from kinds(each)


def is_public(kind: type) -> bool:
    """Not a test's, and not what a slotted dataclass leaves behind."""
    module = sys.modules[kind.__module__]
    return kind.__module__.startswith("trilens.") and vars(module).get(kind.__name__) is kind


def test_every_result_with_a_table_has_a_page_of_its_own() -> None:
    assert all(hasattr(trilens, name) for name in trilens.__all__)  # which loads them
    plain = page_of.dispatch(Tabular)
    ours = [each for each in kinds(Tabular) if is_public(each)]
    assert len(ours) > 20
    alone = {each.__name__ for each in ours if page_of.dispatch(each) is plain}
    assert alone == ALONE | {"Points"}  # `Points` is what two of them share


def drawn(result: Tabular) -> dict[str, Chart]:
    blocks = (block for section in page_of(result).sections for block in section.blocks)
    return {block.title or block.table.title: block for block in blocks if isinstance(block, Chart)}


def column(chart: Chart, name: str) -> list[object]:
    at = [each.name for each in chart.table.columns].index(name)
    return [row[at] for row in chart.table.rows]


def test_each_is_drawn_everywhere(found) -> None:
    for name, result in found.items():
        assert drawn(result), name
        picture = result._repr_html_()
        assert "<svg" in picture or "<img" in picture, name
        assert result.plot()._repr_png_().startswith(b"\x89PNG"), name
        kinds_of = {block["is"] for block in data_of(make_report(result).html)["blocks"]}
        assert "chart" in kinds_of, name


def test_a_gate(found) -> None:
    gate = found["gate"]
    (chart,) = drawn(gate).values()
    assert chart.marks == (0.2, 0.8)
    counts = {name: sum(column(chart, name)) for name in ("dead", "active", "saturated")}
    assert counts == {
        "dead": len(gate.dead_gates),
        "active": 10 - len(gate.dead_gates) - len(gate.saturated_gates),
        "saturated": len(gate.saturated_gates),
    }
    values = np.array([[-1.0, 3.0], [-3.0, 1.0]])  # beyond 0 … 1
    (chart,) = drawn(trilens.GatingAnalysis.from_activations(values, 0.1)).values()
    assert (column(chart, "from")[0], column(chart, "to")[-1]) == (-2.0, 2.0)


def test_an_alignment(found) -> None:
    (chart,) = drawn(found["alignment"]).values()
    assert column(chart, "equal") == [0, None, 2, 3]
    assert column(chart, "replaced") == [None, 1, None, None]


def test_lines_and_bars(found) -> None:
    (errors,) = drawn(found["tuned lens"]).values()
    assert column(errors, "held_out_error") == list(HELD_OUT)
    (moved,) = drawn(found["path"]).values()
    assert column(moved, "receiver") == ["attn.q layer 1 head 0", "attn.v layer 1 head 1"]
    assert column(moved, "moved") == list(found["path"].moved)
    charts = drawn(found["evaluation"])
    assert column(charts["perplexity"], "perplexity") == [12.0, 30.0]
    assert column(charts["perplexity, as a multiple of before's"], "ratio") == [1.5, 1.5]
    assert column(charts["tasks"], "metric") == ["arc acc", "arc norm"]
    (cost,) = drawn(found["cost"]).values()
    assert column(cost, "operations") == [1.0, 3.0]


def test_sweeps_of_types(found) -> None:
    (chart,) = drawn(found["families"]).values()
    counts = zip(column(chart, "outcome"), column(chart, "types"), strict=True)
    assert dict(counts) == found["families"].count()
    (chart,) = drawn(found["mappings"]).values()
    assert sum(column(chart, "types")) == len(found["mappings"].rows)


def test_a_gguf_file() -> None:
    tensors = (
        GgufTensor("blk.0.attn_q.weight", "TQ2_0", (256, 256), 16_896, 0.4, 3),
        GgufTensor("blk.1.attn_q.weight", "TQ2_0", (256, 256), 16_896, 0.5, 3),
        GgufTensor("blk.0.attn_norm.weight", "F32", (256,), 1024),
        GgufTensor("output.weight", "F16", (512, 256), 262_144),
    )
    charts = drawn(GgufReport("llama", tensors, hash_checked=True))
    zeros = charts["share of zeros"]
    assert (column(zeros, "block"), column(zeros, "kind")) == ([0, 1], ["attn_q"] * 2)
    assert column(zeros, "zeros") == [0.4, 0.5]
    sizes = charts["what each type of tensor takes"]
    assert dict(zip(column(sizes, "type"), column(sizes, "size"), strict=True)) == {
        "F16": 0.262144, "TQ2_0": 0.033792, "F32": 0.001024,
    }  # fmt: skip


def test_an_inspection_and_a_store(tmp_path) -> None:
    lens = trilens.Lens.from_pretrained(trilens.demo_path("transformer"))
    cap = lens.capture("def f(x):", attention=True, gates=True)
    inspection = trilens.inspect_capture(cap, name="demo", top_k=3, token_text=str)
    charts = drawn(inspection)
    assert column(charts["norm of the residual stream"], "residual_norm") == [
        row.residual_norm for row in inspection.layers
    ]
    assert column(charts["mean openness of gates"], "mean_openness") == [
        gate.mean for row in inspection.layers for gate in row.gates
    ]
    assert {"attention entropy", "most probable next tokens"} <= {*charts}
    texts = ["x = 1\n" * n for n in (1, 2, 9)]
    store = trilens.capture_corpus(lens, texts, tmp_path / "store")
    lengths = drawn(store)["tokens of a document"]
    assert sum(column(lengths, "documents")) == 3
    ends = zip(*(column(lengths, name) for name in ("from_tokens", "to_tokens", "documents")),
               strict=True)  # fmt: skip
    for low, high, count in ends:
        assert count == sum(low <= n < high for n in store.token_counts)
