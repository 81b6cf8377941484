"""Reports of real results: the parts of each, and what it says of what was not captured."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertModel

import tinymodels
import trilens
from page_cases import data_of
from trilens.analysis.patch_result import PatchSweep
from trilens.cli.run.inspect import inspect_page
from trilens.errors import IncomparableError, UsageError
from trilens.planning.sensitivity import Sensitivity, SensitivityRow
from trilens.report.html.report import Report, make_report

PROMPT = "def area(r):\n    return r"


@pytest.fixture(scope="module")
def transformer():
    return trilens.Lens.from_pretrained(trilens.demo_path("transformer"))


@pytest.fixture(scope="module")
def rwkv7():
    return trilens.Lens.from_pretrained(trilens.demo_path("rwkv7"))


@pytest.fixture(scope="module")
def cap(transformer):
    return transformer.capture(PROMPT, residual="all", attention=True, gates=True)


def kinds(report) -> dict[str, list[str]]:
    blocks = iter(data_of(report.html)["blocks"])
    return {
        section.title: [next(blocks)["is"] for _ in section.blocks]
        for section in report.page.sections
    }


def test_a_capture(cap, transformer) -> None:
    report = make_report(cap, lens=transformer, facts={"revision": "main"}, command="trilens x")
    assert kinds(report) == {
        "Next token": ["chart"],
        "Attention": ["heads"],
        "Layer by layer": ["profiles"],
        "Logit lens": ["lens"],
        "Gates": ["chart", "table"],
    }
    html = report.html
    for words in ("LlamaForCausalLM", "4 layers, d_model 256", "bfloat16", "revision", "trilens x"):
        assert words in html
    data = data_of(html)
    heads = data["blocks"][1]
    assert heads["layers"] == [0, 1, 2, 3] and not heads["signed"]
    profiles = data["blocks"][2]
    assert [len(grid) for grid in profiles["values"]] == [4] * len(profiles["columns"])
    assert "sink_mass" not in [column["name"] for column in profiles["columns"]]  # 0 everywhere
    lens = data["blocks"][3]
    assert len(lens["top"][0]) == len(data["tokens"]) == len(cap.tokens)
    top, share = cap.top_tokens(1)[0]
    assert lens["probabilities"][-1][-1][0] == pytest.approx(share, abs=2e-3)
    assert top in cap.logits[-1].topk(1).indices


def test_a_recurrence(rwkv7) -> None:
    cap = rwkv7.capture(PROMPT, residual="all", effective=True, gates=True, states=True)
    found = kinds(make_report(cap))
    assert found["Effective attention"] == ["heads"]
    assert found["Recurrent states"] == ["chart"] and "chart" in found["Gates"]
    report = make_report(cap)
    heads = next(block for block in data_of(report.html)["blocks"] if block["is"] == "heads")
    assert heads["signed"] and heads["kind"] == "effective"
    assert any(note.startswith("no logit lens: it needs the model") for note in report.page.notes)


def test_the_last_token_alone(transformer) -> None:
    report = make_report(transformer.capture(PROMPT, logits=None), lens=transformer)
    assert not [note for note in report.page.notes if "recurrent" in note]  # it has none
    assert kinds(report) == {"Layer by layer": ["profiles"], "Logit lens": ["lens"]}
    assert "no attention: capture with attention=True (trilens capture --attention)" in (
        report.page.notes
    )


def test_what_cannot_be_shown(transformer, rwkv7, cap) -> None:
    with pytest.raises(UsageError, match="capture with residual='all'"):
        make_report(transformer.capture(PROMPT, residual=None, logits=None))
    with pytest.raises(IncomparableError):
        make_report(cap, lens=rwkv7)
    with pytest.raises(UsageError, match="leave it out"):
        make_report(trilens.logit_lens(cap, transformer), lens=transformer)


def test_other_results(cap, transformer, tmp_path) -> None:
    lens = make_report(trilens.logit_lens(cap, transformer))
    assert kinds(lens) == {"Logit lens": ["lens"]}
    model = trilens.demo_path("transformer")
    written = trilens.ternarize(model, tmp_path / "ternary", dry_run=True)
    assert kinds(make_report(written))["Matrices"][-1] == "table"
    compared = trilens.compare(transformer, transformer, [PROMPT, "import os\n"])
    report = make_report(compared)
    assert report.page.lead.startswith("No difference")
    assert kinds(report)["Heads"].count("chart") >= 4
    families = trilens.load_families()
    assert kinds(make_report(families)) == {"Types": ["chart", "table"]}
    number = trilens.Perplexity(2.0, 10, 5)
    assert kinds(make_report(number)) == {"Table": ["table"]}


def test_sweeps_without_a_value_somewhere() -> None:
    found = PatchSweep(
        site="resid_pre",
        by="position",
        direction="denoise",
        method="exact",
        tokens=("a", "<b>"),
        layers=(0, 3),
        places=(0, 1),
        values=np.array([[0.5, np.nan], [1.0, 0.0]]),
        base=0.0,
        target=1.0,
        complete=False,
    )
    report = make_report(found)
    block = data_of(report.html)["blocks"][0]
    assert block["diverging"] and block["kind"] == "heatmap"
    assert block["table"]["rows"][1] == [0, 1, "<b>", None, None]
    assert "were not run" in report.page.lead
    assert report.page.sections[0].blocks[0].table.cells()[1][-2:] == ["–", "–"]


def test_sensitivity() -> None:
    rows = tuple(
        SensitivityRow(
            "matrix", f"model.layers.{i}.mlp.up.weight", 1, 9, 2.0, 0.1, 0.2, 0.3 + i, 0.4
        )
        for i in range(3)
    )
    report = make_report(Sensitivity("absmean", 100, 2.5, rows, "0" * 64, 32))
    first, second, _ = data_of(report.html)["blocks"]
    assert (first["kind"], second["kind"]) == ("heatmap", "scatter")
    assert first["table"]["rows"][0][:3] == [2, "mlp.up", 2.3]


@pytest.mark.filterwarnings("ignore::trilens.errors.BeyondPositionsWarning")
def test_a_long_prompt(transformer) -> None:
    ids = torch.arange(700) % 1000
    cap = transformer.capture(ids, residual="all", attention=True, logits=None, layers=[3])
    report = make_report(cap, lens=transformer)
    blocks = data_of(report.html)["blocks"]
    heads = next(block for block in blocks if block["is"] == "heads")
    assert heads["side"] == 350 and heads["pool"] == 2
    assert any("2 × 2 tokens" in words for s in report.page.sections for words in s.words)
    lens = next(block for block in blocks if block["is"] == "lens")
    assert lens["positions"] == [*range(188, 700)]
    assert any("Of the last 512 tokens." in section.words for section in report.page.sections)


def test_an_encoder_without_an_unembedding(transformer) -> None:
    config = BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        vocab_size=100,
    )  # fmt: skip
    torch.manual_seed(0)
    lens = trilens.Lens(BertModel(config).eval())
    report = make_report(lens.capture([1, 2, 3, 4], residual="all", attention=True), lens=lens)
    assert kinds(report) == {"Attention": ["heads"], "Layer by layer": ["profiles"]}
    assert "no logit lens: this model has no unembedding" in report.page.notes
    heads = data_of(report.html)["blocks"][0]
    assert not heads["causal"]


@pytest.mark.parametrize("model_type", ["recurrent_gemma", "falcon_h1", "mixtral"])
def test_hybrids_and_experts(model_type: str) -> None:
    lens = trilens.Lens(tinymodels.build(model_type))
    report = Report(inspect_page(lens, tinymodels.prompt_ids(model_type, 12), None))
    found = kinds(report)
    assert found["Attention"] == ["heads"] and "chart" in found["Gates"]
    assert ("Effective attention" in found) == bool(lens.effective_layers)


def test_ternary_weights_by_level(tmp_path) -> None:
    plan = trilens.TernaryPlan(rule="twn", group_size=128)
    written = trilens.ternarize(trilens.demo_path("transformer"), tmp_path / "ternary", plan=plan)
    report = make_report(written)
    section = next(each for each in report.page.sections if each.anchor == "histograms")
    worst = sorted(written.coded, key=lambda each: each.relative_error)[-6:][::-1]
    assert [chart.table.title for chart in section.blocks] == [each.name for each in worst]
    block = next(each for each in data_of(report.html)["blocks"] if each.get("marks"))
    assert block["kind"] == "histogram" and len(block["table"]["rows"]) == 64
    assert [column["title"] for column in block["table"]["columns"]][2:] == ["−1", "0", "+1"]
    low, high = block["marks"]
    assert -0.6 < low < -0.3 < 0.3 < high < 0.6
    chart = section.blocks[0]
    assert "thresholds at −0." in chart.words and "scale 0." in chart.words
    # Files say nothing of it: what is read back has no such section.
    # Every matrix has its scale, zeros, error and bits: as a picture, and in the table.
    matrices = next(each for each in report.page.sections if each.anchor == "matrices")
    charts = {each.y[0]: each for each in matrices.blocks[:-1]}
    assert {*charts} == {"relative_error", "scale", "zeros", "bits_per_weight"}
    scales = {row[3]: row[2] for row in charts["scale"].table.rows}
    assert scales == {each.name: each.histogram.scale[1] for each in written.coded}
    again = type(written).from_dict(json.loads(json.dumps(written.to_dict())))
    assert again == written and "histogram" not in written.to_dict()["tensors"][0]
    assert "histograms" not in [each.anchor for each in make_report(again).page.sections]
    grown = len(report.html) - len(make_report(again).html)
    assert grown < 120_000
