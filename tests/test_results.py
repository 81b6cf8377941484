"""Every result gives its table as rows, itself as JSON, the table to pandas."""

from __future__ import annotations

import json

import pyarrow as pa
import pytest
import torch

import trilens
from tinymodels import build, prompt_ids
from trilens.results import Tabular

RESULTS = [
    trilens.Comparison,
    trilens.FamilyTable,
    trilens.GatingAnalysis,
    trilens.GgufReport,
    trilens.HeadScores,
    trilens.Inspection,
    trilens.LogitLens,
    trilens.Perplexity,
    trilens.Planned,
    trilens.Sensitivity,
    trilens.TernaryReport,
    trilens.TunedLens,
]


def inspection() -> trilens.Inspection:
    lens = trilens.Lens(build("llama"))
    cap = lens.capture(prompt_ids("llama"), attention=True, gates=True)
    return trilens.inspect_capture(cap, name="tiny", top_k=2, token_text=str)


MADE = {
    "families": trilens.load_families,
    "gating": lambda: trilens.GatingAnalysis.from_activations(torch.rand(9, 5), 0.1),
    "inspection": inspection,
    "perplexity": lambda: trilens.Perplexity(nll_nats=2.0, n_tokens=7, block_length=8),
    "sensitivity": lambda: trilens.Sensitivity("absmean", 5, 1.0, (), "0"),
}


@pytest.mark.parametrize("result", RESULTS, ids=lambda result: result.__name__)
def test_every_result_is_a_table(result: type) -> None:
    assert issubclass(result, Tabular)
    assert result.table is not Tabular.table and result.to_dict is not Tabular.to_dict


@pytest.mark.parametrize("make", MADE.values(), ids=MADE)
def test_rows_json_and_pandas_agree(make) -> None:
    result = make()
    rows, frame = result.table(), result.to_pandas()
    assert len({tuple(row) for row in rows}) <= 1
    assert len(frame) == len(rows) and list(frame.columns) == list(rows[0] if rows else ())
    assert json.loads(json.dumps(result.to_dict(), allow_nan=False))


def test_whole_numbers_stay_whole_where_one_is_missing() -> None:
    class Two(Tabular):
        def table(self):
            return [{"layer": 3, "name": "a", "x": 1.5}, {"layer": None, "name": None, "x": 2.0}]

    frame = Two().to_pandas()
    assert [str(dtype) for dtype in frame.dtypes][::2] == ["Int64", "float64"]
    assert frame["layer"].isna().tolist() == [False, True]


def caches() -> dict[str, object]:
    lens = trilens.Lens.from_pretrained(trilens.demo_path("rwkv7"))
    cap = lens.capture("x = 1", residual="all", effective=True, gates=True, states=True)
    parts = {name: getattr(cap, name) for name in ("residual", "effective", "gates", "states")}
    quant = trilens.PerLayerQuant.quantize(torch.randn(4, 8), "w")
    return {"lens": lens, "capture": cap, "quant": quant, **parts}


def test_whatever_shows_a_table_gives_it_to_pandas_and_arrow(quiet) -> None:
    for name, result in caches().items():
        shown = result._repr_html_()
        frame = result.to_pandas()
        assert shown.count("<tr>") - 1 == min(len(frame), 12), name
        assert len(frame.columns) == shown.partition("</thead>")[0].count("</th>"), name
        # Through the protocol that polars and others read.
        stream = pa.RecordBatchReader.from_stream(result)
        assert stream.read_all().num_rows == len(frame), name


def test_columns_keep_their_kinds() -> None:
    class Odd(Tabular):
        def table(self):
            return [
                {"i": 1, "f": 1, "t": "\ud800", "m": "a", "l": ("x", "y"), "n": None, "b": True},
                {"i": 2**62, "f": 0.5, "t": "é", "m": 3, "l": (), "n": None, "b": None},
            ]

    table = Odd().to_arrow()
    kinds = {
        name: str(kind) for name, kind in zip(table.column_names, table.schema.types, strict=True)
    }
    assert kinds == {
        "i": "int64", "f": "double", "t": "string", "m": "string", "l": "list<item: string>",
        "n": "null", "b": "bool",
    }  # fmt: skip
    assert table["t"].to_pylist() == ["\\ud800", "é"] and table["m"].to_pylist() == ["a", "3"]
    assert table["f"].to_pylist() == [1.0, 0.5] and table["i"].to_pylist() == [1, 2**62]
    assert Odd().to_pandas()["i"].tolist() == [1, 2**62]
