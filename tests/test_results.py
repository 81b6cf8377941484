"""Every result gives its table as rows, itself as JSON, the table to pandas."""

from __future__ import annotations

import json

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
    trilens.Inspection,
    trilens.LogitLens,
    trilens.Perplexity,
    trilens.Planned,
    trilens.Sensitivity,
    trilens.TernaryReport,
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
