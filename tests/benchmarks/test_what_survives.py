"""The page of what survives: its tables are the results', and its pieces run on tiny models."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from benchmarks import plan, what_survives
from benchmarks.common import RESULTS
from benchmarks.pages import shown_tables
from benchmarks.plan import Subject
from benchmarks.what_survives import Bench, Sizes, gates, measure, variant
from benchmarks.what_survives_page import PAGE, tables, write_page
from sensitivity_cases import WORDS, blocks, opened, text_model
from trilens.analysis.comparison.run import compare
from trilens.checkpoint import TernaryPlan
from trilens.demo import DEMO_MODELS
from trilens.io.weight_files import read_headers
from trilens.lens.lens import Lens
from trilens.ternary.calibrated.rules import CALIBRATED_RULES
from trilens.ternary.rules.rules import RULES

SMALL = Sizes(outside=160, inside=96, parts=96, costs=96, calibration=256, length=32)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    folder = text_model(tmp_path_factory.mktemp("text") / "model")
    texts = tuple(f"# part {i}\n{WORDS}" for i in range(6))
    lens = Lens.from_pretrained(str(folder), dtype="float32")
    subject = Subject("tiny", lens, read_headers(folder), texts[:4], texts[4:])
    return Bench.of(subject, folder, SMALL)


@pytest.fixture(scope="module")
def measured(bench: Bench) -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(what_survives, "RULES", ("exact", "planes"))
        patch.setattr(what_survives, "CALIBRATED_RULES", {"gptq": CALIBRATED_RULES["gptq"]})
        patch.setattr(what_survives, "SCALES", {"row": {"per": "row"}, "g128": {"group_size": 8}})
        return measure(bench)


def test_every_part_of_a_model_is_measured(bench: Bench, measured: dict[str, Any]) -> None:
    assert [row["layer"] for row in measured["layers"]] == [0, 1]
    assert {row["kind"] for row in measured["kinds"]} == {
        f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")
    }
    assert math.isclose(sum(row["share_of_weights"] for row in measured["kinds"]), 1, abs_tol=1e-3)
    costs = [row["kl_nats"] for row in measured["kinds"]]
    assert costs == sorted(costs, reverse=True)
    assert [row["layer"] for row in measured["heads"]] != []
    assert sorted((row["layer"], row["head"]) for row in measured["heads"]) == [
        (0, 0), (0, 1), (1, 0), (1, 1),
    ]  # fmt: skip
    assert [row["units"] for row in measured["gates"]] == [72, 72]
    rules = measured["rules"]
    assert list(rules) == ["exact row", "exact g128", "planes row", "planes g128", "gptq g128"]
    assert rules["planes row"]["kl_nats"] < rules["exact row"]["kl_nats"]
    assert rules["gptq g128"]["bits_per_weight"] == rules["exact g128"]["bits_per_weight"]
    for budget, row in measured["plans"].items():
        assert row["bits_per_weight"] <= float(budget)
        assert len(row["choices"]) == 14
    assert measured["plans"]["3.0"]["kl_nats"] < measured["plans"]["2.0"]["kl_nats"]


def test_a_variant_is_a_whole_comparison(bench: Bench) -> None:
    found = variant(bench, TernaryPlan("exact", per="row"))
    same = [row.after for row in found.comparison.select("cosine")]
    assert len(same) == 2
    assert all(0 < cosine < 1 for cosine in same)
    assert found.damage.kl_nats > 0
    # Two bits for a trit, a float32 scale for a row: 32 bits for 40 or 72 weights.
    assert 2 + 32 / 72 < found.bits_per_weight < 2 + 32 / 40


def test_gates_of_a_recurrent_model_have_horizons(tmp_path: Path) -> None:
    lens = opened("mamba", tmp_path)
    rows = gates(compare(lens, lens, blocks("mamba", 2, 12)))
    decays = [row for row in rows if row["gate"] == "mixer.decay"]
    assert decays
    assert all(row["horizon_before"] == row["horizon_after"] > 1 for row in decays)
    assert {row["openness_abs_change"] for row in rows} == {0}


def test_tables_go_between_their_marks_and_nowhere_else(
    measured: dict[str, Any], tmp_path: Path
) -> None:
    measured["rules"]["best g128"] = {"refused": "no"}
    results = {"models": {"tiny": measured}}
    page = tmp_path / "page.md"
    marks = "".join(
        f"words\n<!-- {name}: begin -->\n<!-- {name}: end -->\n" for name in tables(results)
    )
    page.write_text(marks + "last")
    write_page(results, page)
    once = page.read_text()
    assert once.count("words\n") == len(tables(results))
    assert once.endswith("last")
    assert "| `best g128` | refused | – |" in once
    for table in tables(results).values():
        assert table in once
        assert len({line.count("|") for line in table.splitlines()}) == 1
    write_page(results, page)
    assert page.read_text() == once
    page.write_text(once.replace("tiny gates:", "tiny doors:"))
    with pytest.raises(SystemExit, match="tiny doors, tiny gates"):
        write_page(results, page)


def results(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return found


def test_the_pages_tables_are_the_results() -> None:
    assert shown_tables(PAGE.read_text(encoding="utf-8")) == tables(results("what_survives"))
    found = results("plan")
    wanted = {"figures": plan.figures_table(found), "trust": plan.trust_table(found)}
    assert shown_tables(plan.PAGE.read_text(encoding="utf-8")) == wanted


def test_the_results_hold_every_model_and_rule() -> None:
    assert list(results("plan")["models"]) == list(DEMO_MODELS)
    models = results("what_survives")["models"]
    assert list(models) == list(DEMO_MODELS)
    for model in models.values():
        tried = {name.rpartition(" ")[0] for name in model["rules"]}
        assert tried == set(what_survives.ternary((*RULES, *CALIBRATED_RULES)))


def test_what_the_page_says_in_short_is_so() -> None:
    for model in results("what_survives")["models"].values():
        first, *others = [row["alone_kl_nats"] for row in model["layers"]]
        assert first > sum(sorted(others)[-2:])
        found = {
            name: row["perplexity_ratio"]
            for name, row in model["rules"].items()
            if "refused" not in row
        }
        for scale in what_survives.SCALES:
            plain = {rule: found[f"{rule} {scale}"] for rule in what_survives.ternary(RULES)}
            assert max(plain, key=plain.__getitem__) == "absmean"
            assert min(plain, key=plain.__getitem__) == "planes"
            assert plain["planes"] < 1.22
        closer = math.log(found["exact g128"]) / math.log(model["plans"]["2.5"]["perplexity_ratio"])
        assert 2.95 < closer < 5.35
