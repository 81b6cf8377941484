"""What results show in a notebook, as nbconvert renders it: pictures and tables, nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import tinymodels
import trilens

# What nbconvert reads when it is imported, it leaves open.
pytestmark = pytest.mark.filterwarnings(
    "ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
)


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    """A notebook whose cells end in one result each, as HTML; no kernel runs."""
    import nbformat
    from nbconvert import HTMLExporter

    lens = trilens.Lens(tinymodels.build("llama"))
    ids = tinymodels.prompt_ids("llama", 12)
    cap = lens.capture(ids, residual="all", attention=True, gates=True)

    def metric(logits: torch.Tensor) -> torch.Tensor:
        return logits[-1, 1] - logits[-1, 2]

    shown = {
        "lens": lens,
        "cap": cap,
        "cap.attention": cap.attention,
        "cap.gates": cap.gates,
        "logit_lens": trilens.logit_lens(cap, lens),
        "sweep": trilens.patch_sweep(lens, ids, ids.flip(-1), metric),
        "compared": trilens.compare(lens, lens, [ids]),
        "quant": trilens.PerLayerQuant.quantize(torch.randn(8, 8), "w"),
    }
    new = nbformat.v4
    cells = [
        new.new_code_cell(
            name,
            execution_count=i + 1,
            outputs=[
                new.new_output(
                    "execute_result",
                    data={"text/html": result._repr_html_(), "text/plain": repr(result)},
                    execution_count=i + 1,
                )
            ],
        )
        for i, (name, result) in enumerate(shown.items())
    ]
    python = {"language_info": {"name": "python", "pygments_lexer": "python"}}
    notebook = new.new_notebook(cells=cells, metadata=python)
    # Of a CDN by default: mathematics and widgets, of which there are none.
    exporter = HTMLExporter(mathjax_url="", require_js_url="", jquery_url="")
    html, _ = exporter.from_notebook_node(notebook)
    file = tmp_path_factory.mktemp("notebook") / "notebook.html"
    file.write_text(html.replace("<html", "<html data-ready='true'", 1), encoding="utf-8")
    return file


def test_results_in_a_notebook(opened, screenshot, page) -> None:
    found = opened(page)
    outputs = found.page.locator(".jp-OutputArea-output.jp-RenderedHTMLCommon")
    assert outputs.count() == 8
    for i in range(outputs.count()):
        table = outputs.nth(i).locator("table").first
        table.scroll_into_view_if_needed()
        assert table.is_visible() and table.bounding_box()["height"] > 20
    pictures = found.page.locator(".jp-OutputArea-output img")
    assert pictures.count() >= 3
    loaded = "each => each.complete && each.naturalWidth > 0"
    assert all(pictures.nth(i).evaluate(loaded) for i in range(pictures.count()))
    screenshot(found.page, "notebook")
    found.quiet()
