"""Results in a notebook: small, without scripts; the report in a frame of its own."""

from __future__ import annotations

import base64
import re
import subprocess
import sys
import zlib
from types import SimpleNamespace

import numpy as np
import pytest

import trilens
from page_cases import HOSTILE, Parsed, attention
from trilens.analysis.patch_result import PatchSweep
from trilens.errors import UsageError
from trilens.report.notebook.pictures import chart_picture, png
from trilens.report.notebook.views import MOST_BYTES, framed, static_html
from trilens.report.page import Chart
from trilens.report.registration import register_views
from trilens.report.tables import Column, Table
from trilens.results import Shown

PROMPT = "def area(r):\n    return r"


@pytest.fixture(scope="module")
def lens():
    return trilens.Lens.from_pretrained(trilens.demo_path("transformer"))


@pytest.fixture(scope="module")
def cap(lens):
    return lens.capture(PROMPT, residual="all", attention=True, gates=True)


def checked(html: str) -> str:
    parsed = Parsed(html)
    assert len(html.encode()) < MOST_BYTES
    assert not parsed.scripts
    for tag, attributes in parsed.tags:
        assert tag not in {"iframe", "link", "style", "object"}
        assert not [name for name in attributes if name.startswith("on")]
        assert (
            str(attributes.get("src", "data:")).startswith("data:image/png;base64,") or tag != "img"
        )
    return html


@pytest.mark.parametrize("part", ["", "attention", "gates", "residual"])
def test_a_capture_and_its_caches(cap, part: str) -> None:
    html = checked((getattr(cap, part) if part else cap)._repr_html_())
    assert "<table" in html and ("<img" in html or "<svg" in html)


def test_a_model(lens) -> None:
    html = checked(lens._repr_html_())
    assert "layers 0–3" in html and "gate mlp.gate" in html


def test_results(cap, lens) -> None:
    assert "prediction" not in checked(trilens.logit_lens(cap, lens)._repr_html_())
    quant = trilens.PerLayerQuant.quantize(np.random.default_rng(0).normal(size=(8, 8)), "w")
    assert "trit" in checked(quant._repr_html_())
    compared = trilens.compare(lens, lens, [PROMPT])
    assert "No difference" in checked(compared._repr_html_())


def test_states() -> None:
    mamba = trilens.Lens.from_pretrained(trilens.demo_path("mamba"))
    found = mamba.capture(PROMPT, effective=True, states=True)
    assert "<table" in checked(found.states._repr_html_())
    assert "effective, signed" in checked(found.effective._repr_html_())


def test_many_heads_stay_small() -> None:
    checked(attention(64, layers=24, heads=16)._repr_html_())


def test_hostile_text() -> None:
    n = len(HOSTILE)
    found = PatchSweep(
        site=HOSTILE[0], by="position", direction="noise", method=HOSTILE[1], tokens=HOSTILE,
        layers=(0,), places=tuple(range(n)), values=np.zeros((1, n)), base=0.0, target=1.0,
    )  # fmt: skip
    html = checked(found._repr_html_())
    assert not re.search("[\x00-\x1f\x7f-\x9f\u202a-\u202e]", html)


def test_nothing_to_draw_is_text() -> None:
    assert checked(trilens.AttentionCache()._repr_html_()) == "<pre>AttentionCache(empty)</pre>"
    assert static_html(object()).startswith("<pre>&lt;object")


def test_a_picture_is_a_png_of_its_numbers() -> None:
    codes = np.arange(12, dtype=np.uint8).reshape(3, 4)
    data = png(codes)
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    at = data.index(b"IDAT")
    size = int.from_bytes(data[at - 4 : at], "big")
    rows = zlib.decompress(data[at + 4 : at + 4 + size])
    assert rows == b"".join(b"\0" + bytes(row) for row in codes.tolist())
    crc = int.from_bytes(data[at + 4 + size : at + 8 + size], "big")
    assert crc == zlib.crc32(data[at : at + 4 + size])
    assert base64.b64encode(data)


def test_a_histogram_has_every_bin_and_what_is_in_it() -> None:
    counts = {"0": [2, 0, 3] * 10, "+1": [1, 4, 0] * 10}
    columns = tuple(map(Column, ("from", "to", *counts)))
    rows = tuple((i, i + 1, a, b) for i, (a, b) in enumerate(zip(*counts.values(), strict=True)))
    table = Table(columns, rows, title="weights")
    chart = Chart(kind="histogram", table=table, x="from", until="to", y=("0", "+1"), marks=(9.5,))
    html = checked(chart_picture(chart))
    found = [each for tag, each in Parsed(html).tags if tag == "rect"]
    by_colour: dict[str, list[float]] = {}
    for each in found:
        by_colour.setdefault(each["fill"], []).append(float(each["height"]))
    assert [len(heights) for heights in by_colour.values()] == [20, 20]
    first, second = by_colour.values()
    assert sum(first) / sum(second) == pytest.approx(1.0, rel=0.01)  # 50 of each
    # On top of one another: nothing is hidden behind another.
    assert sum("stroke-dasharray" in each for _, each in Parsed(html).tags) == 1
    assert len({(each["x"], each["y"]) for each in found}) == len(found)


def test_a_series_of_one_point_is_a_mark() -> None:
    rows = ((1.0, 3.0, None), (2.0, 2.0, 2.5), (3.0, 1.0, None))
    table = Table(tuple(map(Column, ("bits", "damage", "chosen"))), rows, title="plans")
    chart = Chart(kind="lines", table=table, x="bits", y=("damage", "chosen"))
    tags = [tag for tag, _ in Parsed(checked(chart_picture(chart))).tags]
    assert (tags.count("polyline"), tags.count("circle")) == (1, 1)


def test_the_frame_holds_the_page_and_no_more() -> None:
    html = '<p title="a&b">"x"</p>'
    (found,) = [attributes for tag, attributes in Parsed(framed(html)).tags if tag == "iframe"]
    assert found["srcdoc"] == html
    assert found["sandbox"] == "allow-scripts allow-downloads"


def test_show(cap, lens, monkeypatch) -> None:
    shown = []
    fake = SimpleNamespace(display=lambda data, raw: shown.append((data, raw)))
    monkeypatch.setitem(sys.modules, "IPython.display", fake)
    cap.show(lens=lens, title="mine")
    ((data, raw),) = shown
    assert raw and "mine" in data["text/html"] and "Logit lens" in data["text/html"]


def test_show_outside_a_notebook(cap, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "IPython.display", None)
    with pytest.raises(UsageError, match="show\\(\\) is for a notebook"):
        cap.show()


def test_it_is_loaded_when_it_is_asked_for() -> None:
    loaded = "{'trilens.report.notebook', 'jinja2', 'bokeh'} & set(sys.modules)"
    code = f"import sys, trilens; assert not {loaded}"
    subprocess.run([sys.executable, "-c", code], check=True)
    register_views()
    assert Shown._static is not None
