"""The file: one piece, no request, no markup from a token, small, and every number in a table."""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import re
from pathlib import Path

import numpy as np
import pytest

from page_cases import HOSTILE, Parsed, attention, codes_of, data_of, heads_page, rendered
from trilens.errors import UsageError
from trilens.report import html as report_html
from trilens.report.html.report import Report, make_report
from trilens.report.page import Chart, Page, Section
from trilens.report.tables import Column, Table
from trilens.report.words import token_text


@pytest.fixture(scope="module")
def hostile() -> str:
    rows = tuple((i, text) for i, text in enumerate(HOSTILE))
    table = Table((Column("n"), Column(HOSTILE[0], left=True)), rows, title=HOSTILE[1])
    page = heads_page(attention(len(HOSTILE), layers=1, heads=2), HOSTILE)
    extra = Section(HOSTILE[1], (table,), (HOSTILE[0],), name="extra")
    return rendered(
        Page(
            title=HOSTILE[0],
            sections=(*page.sections, extra),
            tokens=HOSTILE,
            facts={HOSTILE[0]: HOSTILE[1]},
            command=HOSTILE[1],
            lead=HOSTILE[3],
            notes=HOSTILE[:4],
        )
    )


def test_nothing_is_fetched(hostile: str) -> None:
    parsed = Parsed(hostile)
    for tag, attributes in parsed.tags:
        assert (
            tag not in {"link", "iframe", "img", "object", "embed", "base", "form"} or tag == "form"
        )
        assert "src" not in attributes and "srcset" not in attributes
        assert (attributes.get("href") or "#").startswith("#")
        assert not [name for name in attributes if name.startswith("on")]
    style = hostile[hostile.index("<style>") : hostile.index("</style>")]
    assert "url(" not in style and "@import" not in style


def test_the_policy_lets_two_scripts_run_and_no_other(hostile: str) -> None:
    parsed = Parsed(hostile)
    policy = next(
        attributes["content"]
        for tag, attributes in parsed.tags
        if tag == "meta" and attributes.get("http-equiv") == "Content-Security-Policy"
    )
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == "'none'"
    assert "unsafe" not in rules["script-src"] and "http" not in policy
    running = [text for attributes, text in parsed.scripts if "type" not in attributes]
    digests = [
        base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in running
    ]
    assert len(digests) == 1 and f"'sha256-{digests[0]}'" in rules["script-src"]
    assert len(rules["script-src"].split()) == 2


def test_no_text_becomes_markup(hostile: str) -> None:
    parsed = Parsed(hostile)
    assert not [tag for tag, _ in parsed.tags if tag == "img"]
    assert len(parsed.scripts) == 4  # library, data, codes, and the page's own
    assert "49" not in "".join(parsed.text).split()
    # What turns the reading direction or a terminal's colour is an escape, wherever it stands.
    assert not re.search(
        "[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069]", hostile
    )
    assert r"\u202e" in "".join(parsed.text)
    tokens = data_of(hostile)["tokens"]
    assert tokens == [token_text(token) for token in HOSTILE]
    assert r"\x1b[31mred" in tokens[2] and r"\u202eevil" in tokens[3]
    assert all(len(token) <= 48 for token in tokens)
    hostile.encode()  # a lone surrogate would not


def test_every_picture_has_its_numbers() -> None:
    table = Table(
        (Column("layer"), Column("value", key="v", unit="nats", better="smaller", note="what")),
        ((0, 0.1234567), (1, float("nan")), (2, 3.0)),
        title="title",
    )
    html = rendered(Page(title="x", sections=(Section("s", (
        Chart(kind="lines", table=table, x="layer", y=("v",)),)),)))  # fmt: skip
    block = data_of(html)["blocks"][0]
    assert block["table"]["rows"] == [[0, 0.1234567], [1, None], [2, 3.0]]
    assert {*block["y"], block["x"]} <= {column["name"] for column in block["table"]["columns"]}
    parsed = Parsed(html)
    assert sum(tag == "tr" for tag, _ in parsed.tags) == 4
    assert ("button", "csv") in {(tag, a.get("class")) for tag, a in parsed.tags}
    assert any(a.get("title") == "what; unit: nats; smaller is better" for _, a in parsed.tags)


def test_heads_are_in_the_file_whole() -> None:
    cache = attention(20, layers=2, heads=3)
    html = rendered(heads_page(cache, ["t"] * 20))
    block, codes = data_of(html)["blocks"][0], codes_of(html)[0]
    assert len(codes) == 2 * 3 * 20 * 21 // 2 and len(block["scales"]) == 6
    at = 4 * 210 + 19 * 20 // 2 + 7  # layer 1, head 1, query 19, key 7
    weight = block["scales"][4] * (codes[at] / block["steps"]) ** 2
    assert weight == pytest.approx(float(cache.get_layer(1)[0, 1, 19, 7]), abs=0.01)


@pytest.mark.parametrize(("tokens", "megabytes"), [(64, 2.5), (256, 4.0)])
def test_size(tokens: int, megabytes: float) -> None:
    html = rendered(heads_page(attention(tokens), [f"token {i}" for i in range(tokens)]))
    assert len(html.encode()) <= megabytes * 1e6


def test_a_long_table_has_its_first_rows_in_the_file_and_all_in_the_data() -> None:
    rows = tuple((i, i / 7) for i in range(1000))
    html = rendered(
        Page(title="x", sections=(Section("s", (Table((Column("i"), Column("v")), rows),)),))
    )
    assert len(data_of(html)["blocks"][0]["table"]["rows"]) == 1000
    assert sum(tag == "tr" for tag, _ in Parsed(html).tags) == 301
    assert "Show all 1,000 rows" in html


def test_a_table_alone_needs_no_library() -> None:
    html = rendered(Page(title="x", sections=(Section("s", (Table((Column("i"),), ((1,),)),)),)))
    assert not Parsed(html).script("trilens-library").strip()
    assert len(html) < 100_000


def test_csv_has_no_formula() -> None:
    table = Table((Column("token", left=True), Column("x")), (("=1+1", -2.5), ('a"b,c', None)))
    rows = list(csv.reader(io.StringIO(table.csv())))
    assert rows == [["token", "x"], ["'=1+1", "-2.5"], ['a"b,c', ""]]


def test_a_chart_of_no_column_is_refused() -> None:
    table = Table((Column("x"),), ())
    with pytest.raises(UsageError, match="'y': the table has x"):
        Chart(kind="lines", table=table, x="x", y=("y",))
    with pytest.raises(UsageError, match="row of 2 values for 1"):
        Table((Column("x"),), ((1, 2),))


def test_it_is_written_whole_or_not_at_all(tmp_path) -> None:
    report = Report(heads_page(attention(4, layers=1, heads=1), ["a"] * 4))
    file = report.save(tmp_path / "x.html")
    assert file.read_text() == report.html
    assert [each.name for each in tmp_path.iterdir()] == ["x.html"]


def test_the_same_result_gives_the_same_bytes() -> None:
    page = heads_page(attention(8, layers=1, heads=2), ["a"] * 8)
    assert rendered(page) == rendered(page)


def test_what_no_report_is_made_of() -> None:
    with pytest.raises(UsageError, match="ndarray is nothing that a report is made of"):
        make_report(np.zeros(3))


def test_the_scripts_tints_are_those_of_the_styles() -> None:
    folder = Path(report_html.__file__).parent / "templates"
    script = (folder / "core.js").read_text()
    tints = script[script.index("const TINTS") : script.index("};", script.index("const TINTS"))]
    for name in ("light", "dark"):
        style = dict(re.findall(r"--([\w-]+): ([^;]+);", (folder / f"{name}.css").read_text()))
        found = re.search(rf"{name}: {{(.+)}},", tints)[1]
        assert f'card: "{style["card"]}"' in found and f'ink: "{style["ink"]}"' in found
        for key, own in (("plus", "tint"), ("minus", "tint-negative")):
            assert f"{key}: [{', '.join(style[own].split())}]" in found
