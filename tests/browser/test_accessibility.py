"""Every kind of report in both colour schemes: nothing serious for a screen reader, the keyboard or
weak eyes, by the rules of axe-core; a picture of each is kept."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import tinymodels
import trilens
from measure_cases import measures
from page_cases import heads_page, rendered
from trilens.analysis.effect_sweeps import ablation_sweep
from trilens.caches.attention import AttentionCache
from trilens.caches.patterns.protocol import DensePattern
from trilens.edits import Ablate
from trilens.lens.capture import Capture
from trilens.report.html.report import Report, make_report
from trilens.report.making import joined, page_of
from trilens.results import Tabular

PROMPT = "def factorial(n):\n    if n == 0:\n        return 1\n    return n * factorial("


class Other(Tabular):
    """A result whose page is its table."""

    def table(self) -> list[dict[str, object]]:
        return [
            {"name": "a", "share": 0.5, "reason": None},
            {"name": "<b>", "share": 1e-9, "reason": "none"},
        ]


def results(folder: Path) -> dict[str, object]:
    """One result of every kind that has a page of its own."""
    demo = trilens.demo_path("transformer")
    plan = trilens.TernaryPlan(rule="twn", group_size=128)
    written = trilens.ternarize(demo, folder / "ternary", plan=plan)
    gguf = trilens.ternarize(demo, folder / "model.gguf", plan=trilens.TernaryPlan(
        rule="absmean", group_size=256), format="gguf-tq2_0")  # fmt: skip
    lens = trilens.Lens.from_pretrained(demo)
    after = trilens.Lens.from_pretrained(folder / "ternary")
    sites = trilens.attribution_sites(lens)
    cap = lens.capture(PROMPT, residual="all", attention=True, gates=True, sites=sites)
    tiny = trilens.Lens(tinymodels.build("llama"))
    prompt, other = tinymodels.prompt_ids("llama", 9), tinymodels.prompt_ids("llama", 9).flip(-1)
    blocks = [torch.arange(40) % 50 + first for first in range(4)]
    comparison = trilens.compare(lens, after, [PROMPT, "import os\n"])
    options = trilens.PlanOptions(budget_bits=6.0, costs="predicted")

    def metric(logits: torch.Tensor) -> torch.Tensor:
        return logits[-1, 1] - logits[-1, 2]

    assert gguf.tensors
    return {
        "ternary": written,
        "gguf": trilens.validate_gguf(folder / "model.gguf"),
        "inspection": trilens.inspect_capture(
            cap, name="demo", top_k=5, token_text=lambda i: lens.tokenizer.decode([i])
        ),
        "gates": cap.gates,
        "lens": trilens.logit_lens(cap, lens),
        "compare": comparison,
        "series": trilens.ComparisonSeries((comparison, comparison)),
        "sensitivity": trilens.measure_sensitivity(tiny, blocks, each_matrix=True),
        "plan": trilens.make_plan(tiny, blocks[:2], blocks[2:], options=options),
        "patch": trilens.patch_sweep(tiny, prompt, other, metric),
        "effects": ablation_sweep(tiny, [prompt, other], metric),
        "attribution": trilens.attribute(cap, lens, " n"),
        "heads": trilens.head_scores(cap),
        "edit_effect": trilens.edit_effect(tiny, prompt, Ablate("attn.z", layers=0)),
        "store": trilens.capture_corpus(lens, ["def f(x):\n    return x\n" * 4], folder / "store"),
        "table": Other(),
        **{f"measure {name}": each for name, each in measures().items()},
    }


@pytest.fixture(scope="module")
def reports(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("reports")
    found = results(folder)
    kinds = {kind for kind in page_of.registry if kind not in {object, Capture}}
    missing = [each for each in kinds if not any(isinstance(one, each) for one in found.values())]
    assert not missing
    pages = {name: make_report(result).page for name, result in found.items()}
    small = {name: pages.pop(name) for name in found if name.startswith("measure ")}
    pages["measures"] = joined("measures", small)
    files = {name: Report(page).save(folder / f"{name}.html") for name, page in pages.items()}
    pages = {}
    for name, options in {
        "transformer": {"attention": True},
        "rwkv7": {"effective": True, "states": True},
    }.items():
        lens = trilens.Lens.from_pretrained(trilens.demo_path(name))
        cap = lens.capture(PROMPT, residual="all", gates=True, **options)
        report = make_report(
            cap, lens=lens, command="trilens inspect x", facts={"revision": "main"}
        )
        files[name] = report.save(folder / f"{name}.html")
        pages[name] = report.page
    files["demo"] = Report(joined("demo models", pages)).save(folder / "demo.html")
    return files


KINDS = (
    "transformer", "rwkv7", "demo", "inspection", "gates", "lens", "attribution", "patch",
    "effects", "compare", "series", "ternary", "gguf", "sensitivity", "plan", "table",
    "heads", "edit_effect", "store", "measures",
)  # fmt: skip


def test_every_kind_is_looked_at(reports) -> None:
    assert set(KINDS) == set(reports)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_serious(opened, reports, screenshot, serious, kind: str) -> None:
    found = opened(reports[kind], color_scheme="light")
    page = found.page
    page.evaluate("for (const each of document.querySelectorAll('details')) each.open = true")
    for scheme, rules in (("light", ()), ("dark", ("color-contrast",))):
        page.emulate_media(color_scheme=scheme)
        page.wait_for_timeout(300)
        assert not serious(page, *rules), scheme
        screenshot(page, f"{kind}-{scheme}")
    found.quiet()


@pytest.mark.parametrize("sign", [1, -1])
def test_words_can_be_read_on_every_tint(opened, tmp_path, serious, sign: int) -> None:
    n = 64
    weights = torch.zeros(1, 1, n, n)
    weights[..., -1, :] = sign * (torch.arange(1, n + 1) / n) ** 2  # tints go by the root
    cache = AttentionCache.from_layers({0: DensePattern(weights)}, n_model_layers=1)
    file = tmp_path / "tints.html"
    kind = "softmax" if sign > 0 else "effective"
    file.write_text(rendered(heads_page(cache, [f"t{i}" for i in range(n)], kind)))
    page = opened(file, color_scheme="light").page
    shares = [float(each.get_attribute("style").split("--w:")[1].split(";")[0])
              for each in page.locator(".chip").all()]  # fmt: skip
    assert max(shares) == 0.95 and len(set(shares)) > n // 2
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        page.wait_for_timeout(200)
        assert not serious(page, "color-contrast"), scheme


def test_it_finds_what_is_wrong(opened, tmp_path, serious) -> None:
    file = tmp_path / "wrong.html"
    file.write_text(
        "<!doctype html><html data-ready='true'><body><img src='data:,'>"
        "<p style='color:#ccc;background:#fff'>pale</p>"
    )
    found = " ".join(serious(opened(file).page))
    assert "image-alt" in found and "color-contrast" in found and "html-has-lang" in found


def test_thresholds_stand_in_the_histograms(opened, reports) -> None:
    page = opened(reports["ternary"]).page
    chart = page.locator("#histograms figure").first
    chart.scroll_into_view_if_needed()
    assert chart.locator(".plot canvas").count() >= 1
    assert [each.strip() for each in chart.locator(".key span").all_inner_texts()] == [
        "−1",
        "0",
        "+1",
    ]
    box = chart.locator(".bk-CartesianFrame").first.bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2 - 4, box["y"] + box["height"] / 2)
    page.mouse.move(box["x"] + box["width"] / 2 + 2, box["y"] + box["height"] / 2, steps=3)
    page.wait_for_selector("#tip:not([hidden])")
    tip = page.locator("#tip").inner_text().splitlines()
    assert tip[0].startswith("0 … ") and tip[2].startswith("0: ")
