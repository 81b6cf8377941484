"""Figures for a paper: what stands on their axes, and that they draw the results' numbers."""

from __future__ import annotations

import re
import sys
import xml.etree.ElementTree as ET
from io import BytesIO

import matplotlib as mpl
import numpy as np
import pytest

import trilens
from page_cases import HOSTILE, attention, heads_page
from trilens.analysis.patch_result import PatchSweep
from trilens.edits import parse_edit
from trilens.errors import OutOfRangeError, UsageError
from trilens.planning.sensitivity import Sensitivity, SensitivityRow
from trilens.report import registration
from trilens.report.page import Chart, Page, Section
from trilens.report.plots import figures
from trilens.report.plots.charts import chart_figure
from trilens.report.plots.style import plain, styled
from trilens.report.plots.views import pattern_figure
from trilens.report.tables import Column, Table

PROMPT = "def area(r):\n    return r"


@pytest.fixture(scope="module")
def lens():
    return trilens.Lens.from_pretrained(trilens.demo_path("transformer"))


@pytest.fixture(scope="module")
def cap(lens):
    return lens.capture(PROMPT, residual="all", attention=True, gates=True)


def saved(figure, kind: str) -> bytes:
    out = BytesIO()
    figure.savefig(out, format=kind)
    return out.getvalue()


def words(figure) -> list[str]:
    """Texts of the figure as SVG, after it was saved as PDF, too."""
    pdf = saved(figure, "pdf")
    assert pdf.startswith(b"%PDF-") and pdf.rstrip().endswith(b"%%EOF")
    assert b"/Subtype /Type3" not in pdf  # a font that journals refuse
    root = ET.fromstring(saved(figure, "svg"))
    return [
        "".join(each.itertext()).strip() for each in root.iter("{http://www.w3.org/2000/svg}text")
    ]


def labels(figure) -> tuple[str, str]:
    return figure.axes[0].get_xlabel(), figure.axes[0].get_ylabel()


def mesh(figure):
    """The values of a heatmap's cells."""
    return figure.axes[0].collections[0].get_array()


def test_attention_of_all_heads_and_of_one(cap) -> None:
    found = cap.attention.plot()
    assert labels(found) == ("head", "layer")
    assert {
        "attention weights of all heads",
        "0",
        "7",
        "attention weight / largest of its head",
    } <= {*words(found)}
    # A tile of the picture: the square roots of the shares of the head's largest weight.
    grid = np.asarray(found.axes[0].images[0].get_array())
    n = len(cap.tokens)
    tile = grid[2 * (n + 1) + 1 : 3 * (n + 1), 5 * (n + 1) + 1 : 6 * (n + 1)]
    weights = cap.attention.get_layer(2)[0, 5].float().numpy()
    assert tile == pytest.approx(np.sqrt(weights / weights.max()), abs=0.01)

    one = cap.plot(layer=2, head=5)
    assert np.asarray(one.axes[0].images[0].get_array()) == pytest.approx(weights, abs=0.01)
    assert labels(one) == ("key", "query")
    assert {"layer 2, head 5", "0 def", "7 ␣return", "attention weight"} <= {*words(one)}


def test_effective_attention_has_signs(quiet) -> None:
    rwkv7 = trilens.Lens.from_pretrained(trilens.demo_path("rwkv7"))
    cap = rwkv7.capture(PROMPT, effective=True, states=True)
    found = cap.effective.plot(layer=1, head=2)
    image = found.axes[0].images[0]
    low, high = image.get_clim()
    assert low == -high and image.get_array().min() < 0
    # Orange for one sign, blue for the other, white between: each kind of colour vision parts them.
    red, _, blue = image.cmap(0.0)[:3]
    assert red > blue and image.cmap(1.0)[2] > image.cmap(1.0)[0]
    assert image.cmap(0.5)[:3] == pytest.approx((1, 1, 1), abs=0.02)

    states = cap.states.plot()
    assert labels(states) == ("head", "layer") and "norm" in words(states)
    norm = cap.states.get(1, -1, cap.states.spec(1).parts[0].name).float()[2].norm()
    assert float(mesh(states)[1, 2]) == pytest.approx(float(norm), rel=1e-4)


def test_layers_and_their_tokens(cap) -> None:
    found = cap.plot("Layer by layer", token=3)
    assert labels(found) == ("layer", "residual norm")
    assert {"attention entropy (nats)", "residual norm"} <= {*words(found)}
    norms = [float(cap.residual[i][3].float().norm()) for i in range(4)]
    assert found.axes[0].lines[0].get_ydata() == pytest.approx(norms, rel=1e-3)
    with pytest.raises(OutOfRangeError, match=f"token 99 .* 0–{len(cap.tokens) - 1}"):
        cap.plot("layer by layer", token=99)
    mean = [float(cap.residual[i].float().norm(dim=-1).mean()) for i in range(4)]
    lines = cap.residual.plot().axes[0].lines
    assert lines[1].get_ydata() == pytest.approx(mean, rel=1e-5)
    # Two lines part without colour, too.
    assert lines[0].get_linestyle() != lines[1].get_linestyle()
    assert lines[0].get_marker() != lines[1].get_marker()


def test_gates(cap) -> None:
    found = cap.gates.plot()
    assert labels(found) == ("mean openness", "layer") and "share of units" in words(found)
    assert np.asarray(mesh(found)).sum(1) == pytest.approx(1, abs=1e-3)


def test_the_logit_lens(cap, lens) -> None:
    result = trilens.logit_lens(cap, lens)
    found = result.plot()
    assert labels(found) == ("token", "layer")
    assert np.asarray(mesh(found)) == pytest.approx(
        result.top_probabilities[..., 0].numpy(), abs=1e-4
    )
    said = words(found)
    assert "0 def" in said and "probability" in said and len(said) > 4 * len(cap.tokens)


def test_edits_heads_and_attribution(cap, lens) -> None:
    effect = trilens.edit_effect(lens, PROMPT, parse_edit("ablate:attn.z@2#5"))
    bars = effect.plot()
    widths = [each.get_width() for each in bars.axes[0].patches]
    assert widths == pytest.approx([each.after - each.before for each in effect.moved])
    colours = {each.get_facecolor() for each in bars.axes[0].patches}
    assert len(colours) == 2  # what falls has the other colour
    kl = effect.plot("KL divergence after each token")
    assert labels(kl) == ("position", "KL divergence (nats)")
    assert kl.axes[0].lines[0].get_ydata() == pytest.approx(effect.kl_nats, abs=1e-9)

    scores = trilens.head_scores([cap])
    found = scores.plot("induction")
    i = scores.roles.index("induction")
    expected = np.stack([scores.means[layer][i].numpy() for layer in scores.layers])
    assert mesh(found).filled(np.nan) == pytest.approx(expected, nan_ok=True)
    assert "induction" in words(found)

    target = int(cap.logits[-1].argmax())
    sites = trilens.attribution_sites(lens, by="head")
    whole = lens.capture(PROMPT, residual="all", sites=sites)
    result = trilens.attribute(whole, lens, target, by="head")
    grid = mesh(result.plot())
    one = next(p for p in result.parts if (p.component, p.layer, p.index) == ("attn.head", 2, 5))
    assert float(grid[2, 5]) == pytest.approx(one.value)


def sweep() -> PatchSweep:
    values = np.array([[0.5, np.nan, 1.0], [0.0, -0.5, 0.25]])
    return PatchSweep(
        site="resid_post", by="position", layers=(0, 1), places=(0, 1, 2), values=values,
        base=0.0, target=1.0, direction="denoise", method="exact", tokens=("a", "$x$", "$"),
    )  # fmt: skip


def test_a_sweep_with_a_hole_and_tokens_that_look_like_formulas() -> None:
    found = sweep().plot()
    grid = mesh(found)
    assert grid.mask.tolist() == [[False, True, False], [False] * 3]
    assert float(grid[1, 1]) == -0.5
    assert labels(found) == ("position", "layer")
    assert {"effect", "1 $x$", "2 $", "effect of each patch"} <= {*words(found)}


def test_sensitivity_and_comparison(lens) -> None:
    rows = tuple(
        SensitivityRow(
            "matrix", f"model.layers.{i}.{kind}.weight", 1, 9, 2.0, 0.1, 0.2, i + 0.5, None
        )
        for i in range(2)
        for kind in ("mlp.up", "attn.q")
    )
    found = Sensitivity("absmean", 5, 1.0, rows, "0" * 64).plot()
    assert labels(found) == ("block", "kind")
    assert {"mlp.up", "attn.q", "KL divergence (nats)"} <= {*words(found)}
    assert sorted(mesh(found).ravel()) == [0.5, 0.5, 1.5, 1.5]
    comparison = trilens.compare(lens, lens, [PROMPT])
    lines = comparison.plot("direction kept")
    assert lines.axes[0].lines[0].get_ydata() == pytest.approx(1, abs=1e-5)
    assert labels(lines)[0] == "layer"


def chart(kind: str, **options) -> Chart:
    columns = tuple(Column(name, unit="nats" if name == "b" else "") for name in "abc")
    rows = ((1, 2.0, "x"), (2, 3.5, "y"), (4, None, "z"))
    return Chart(kind=kind, table=Table(columns, rows, title="t"), x="a", y=("b",), **options)


def test_kinds_of_charts() -> None:
    with styled():
        lines = chart_figure(chart("lines", log=True))
        scatter = chart_figure(chart("scatter", label="c"))
        edges = Table(
            tuple(map(Column, ("low", "high", "n"))), ((0, 1, 5), (1, 2, 7)), title="spread"
        )
        bins = Chart(kind="histogram", table=edges, x="low", until="high", y=("n",))
        histogram = chart_figure(bins)
        levels = Table(
            tuple(map(Column, ("low", "high", "0", "+1"))), ((0, 1, 5, 1), (1, 2, 7, None))
        )
        stacked = chart_figure(
            Chart(kind="histogram", table=levels, x="low", until="high", y=("0", "+1"),
                  marks=(0.5,), title="w")
        )  # fmt: skip
        many = Table((Column("name"), Column("n")), tuple((f"n{i}", i) for i in range(500)))
        bars = chart_figure(Chart(kind="bars", table=many, x="name", y=("n",)))
    assert lines.axes[0].get_yscale() == "log" and labels(lines) == ("a", "b (nats)")
    assert lines.axes[0].lines[0].get_ydata() == pytest.approx([2, 3.5, np.nan], nan_ok=True)
    assert scatter.axes[0].collections[0].get_offsets().tolist()[:2] == [[1, 2], [2, 3.5]]
    stairs = histogram.axes[0].patches[0].get_data()
    assert stairs.values.tolist() == [5, 7] and stairs.edges.tolist() == [0, 1, 2]
    assert labels(histogram) == ("spread", "n")
    first, second = (each.get_data() for each in stacked.axes[0].patches)
    assert first.values.tolist() == [5, 7] == second.baseline.tolist()
    assert second.values.tolist() == [6, 7]
    assert stacked.axes[0].lines[0].get_xdata() == [0.5, 0.5]
    assert {"0", "+1", "w"} <= {*words(stacked)}
    # Levels part without colour, too.
    assert len({each.get_hatch() for each in stacked.axes[0].patches}) == 2
    assert len(bars.axes[0].patches) == 120 and "the first 120 of 500" in labels(bars)[1]
    for figure in (lines, histogram):
        assert words(figure)


def test_a_token_is_text_whatever_it_says() -> None:
    tokens = (*HOSTILE, r"$\frac{1}{0$", r"\$5", "$$", "_^{}%&#~\\")
    page = heads_page(attention(len(tokens), layers=1, heads=1), tokens)
    with styled():
        found = pattern_figure(page.sections[0].blocks[0].patterns, 0, 0, page.tokens)
    said = " ".join(words(found))
    for text in ("alert(1)</script>", r"$\frac{1}{0$", r"\$5", "$$", "_^{}%&#~\\", "{{␣7*7␣}}"):
        assert text in said, text
    assert not set("\x1b\u202e\u2028") & set(said)
    assert plain("a" * 100) == "a" * 8 + "…" + "a" * 17


def test_what_is_not_there_is_refused_with_what_is(cap) -> None:
    for call, error, text in (
        (lambda: cap.plot("atention"), UsageError, "did you mean 'attention'"),
        (lambda: cap.plot(3), UsageError, "is no name"),
        (lambda: cap.plot(layer=2), UsageError, "go together"),
        (lambda: cap.plot(layer=9, head=0), OutOfRangeError, "layers are 0, 1, 2, 3"),
        (lambda: cap.plot(layer=0, head=8), OutOfRangeError, "layer 0 has 0–7"),
        (lambda: cap.gates.plot(layer=0, head=0), UsageError, "no attention here"),
        (lambda: cap.plot("logit lens"), UsageError, "pictures are 'most probable"),
        (trilens.Perplexity(2.0, 10, 5).plot, UsageError, "Perplexity has no picture"),
    ):
        with pytest.raises(error, match=text):
            call()


def test_without_matplotlib_it_says_what_to_install(cap, monkeypatch) -> None:
    monkeypatch.setattr(registration, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=re.escape("pip install 'trilens[plot]'")):
        cap.plot()


def test_nothing_of_matplotlibs_own_state_changes(cap, tmp_path) -> None:
    before = dict(mpl.rcParams)
    had = "matplotlib.pyplot" in sys.modules
    figure = cap.plot()
    figure.savefig(tmp_path / "x.svg")
    figure.savefig(tmp_path / "x.pdf")
    assert dict(mpl.rcParams) == before
    assert ("matplotlib.pyplot" in sys.modules) == had
    assert figure._repr_png_().startswith(b"\x89PNG")
    assert saved(figure, "svg").count(b"<text") > 10


def test_pictures_of_one_name_are_numbered() -> None:
    page = Page(title="p", sections=(Section("s", (chart("lines"), chart("scatter"))),))
    assert [name for name, _ in figures._pictures(page)] == ["t", "t 2"]
