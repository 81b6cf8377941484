"""Texts and tasks: each text apart, both models on the same tokens, lm-eval only where it is."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from page_cases import data_of
from trilens import Lens
from trilens.analysis.harness import run_tasks
from trilens.analysis.model_evaluation import ModelEvaluation, evaluate_texts
from trilens.checkpoint import Sample, TernaryPlan, ternarize
from trilens.cli.main import app
from trilens.demo import demo_path
from trilens.errors import TextError, UsageError
from trilens.evaluation.perplexity import measure_perplexity
from trilens.text.token_blocks import token_blocks

CODE = Sample("code", tuple(f"def f{i}(x):\n    return x + {i}\n" * 12 for i in range(4)))
WORDS = Sample(
    "words", ("the file is read once and closed when the caller is done with it\n" * 20,)
)


@pytest.fixture(scope="module")
def ternary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("evaluated") / "out"
    ternarize(demo_path(), out, plan=TernaryPlan("exact", group_size=128))
    return out


def test_alone(ternary: Path) -> None:
    lens = Lens.from_pretrained(str(ternary))
    found = evaluate_texts(lens, [CODE, WORDS], max_tokens=400)
    assert [text.name for text in found] == ["code", "words"]
    for text, sample in zip(found, (CODE, WORDS), strict=True):
        blocks = token_blocks(lens.tokenizer, sample.documents, length=512, limit_tokens=400)
        wanted = measure_perplexity(lens.model, blocks)
        assert text.perplexity == pytest.approx(wanted.value, rel=1e-4)
        assert text.n_tokens == wanted.n_tokens and text.change is None
        assert text.loops is not None and 0 <= text.loops <= 1
    with pytest.raises(TextError, match="too short"):
        evaluate_texts(lens, [Sample("short", ("import os\n",))])


def test_beside_the_model_that_it_was_made_from(ternary: Path) -> None:
    dense, lens = Lens.from_pretrained(str(demo_path())), Lens.from_pretrained(str(ternary))
    same = evaluate_texts(dense, [CODE], against=dense)[0].change
    assert same is not None and same.continuations is not None
    assert same.ratio == 1.0 and same.kl_nats == 0 and same.same_top1 == 1
    assert same.continuations.agreement == 1
    change = evaluate_texts(lens, [CODE], against=dense)[0].change
    assert change is not None and change.continuations is not None
    assert change.kl_nats is not None and change.kl_nats > 0.05
    assert change.same_top1 is not None and change.same_top1 < 1
    assert change.ratio > 1 and change.continuations.agreement < 1
    one, two = ModelEvaluation("a", None, ()), ModelEvaluation("a", "b", ())
    assert one.to_dict()["against"] is None and two.table() == []


def test_the_command(ternary: Path, tmp_path: Path) -> None:
    text = tmp_path / "code.jsonl"
    text.write_text("\n".join(json.dumps({"text": document}) for document in CODE.documents))
    base = ["evaluate", str(ternary)]
    given = ["--evaluate", f"mine={text}", "--evaluate", str(text), "--max-tokens", "300"]
    beside = ["--made-from", str(demo_path())]
    shown = CliRunner().invoke(app, [*base, *given, *beside])
    assert shown.exit_code == 0, shown.output
    for word in ("mine", "code.jsonl", "same top token", "loops"):
        assert word in shown.stdout
    as_json = CliRunner().invoke(app, [*base, *given, *beside, "--format", "json"])
    values = json.loads(as_json.stdout)
    assert values["format"] == "trilens.evaluation" and len(values["texts"]) == 2
    page = tmp_path / "page.html"
    written = CliRunner().invoke(app, [*base, *given, *beside, "-o", str(page)])
    assert written.exit_code == 0 and f"wrote {page}" in written.stderr
    assert [b["kind"] for b in data_of(page.read_text())["blocks"] if b["is"] == "chart"] == (
        ["bars"] * 3
    )
    one, two = values["texts"]
    assert one["change"]["ratio"] == two["change"]["ratio"] > 1
    for wrong, words in (
        ([], "--evaluate TEXT"),
        (["--made-from", str(demo_path()), "--task", "arc"], "--evaluate TEXT"),
        ([*given, "--limit", "3"], "--task"),
        ([*given, "-o", str(tmp_path / "x.html"), "--format", "json"], "which is a page"),
    ):
        refused = CliRunner().invoke(app, [*base, *wrong])
        assert refused.exit_code == 2 and words in refused.stderr
        assert refused.stderr.count("\n") == 1


def test_tasks_without_the_harness_are_refused(
    ternary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    refused = CliRunner().invoke(app, ["evaluate", str(ternary), "--task", "arc_easy"])
    assert refused.exit_code == 2 and "pip install lm-eval" in refused.stderr


def test_the_harness_gets_the_model_that_is_loaded(
    ternary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A harness of the same signature, which runs the model once."""
    seen: dict[str, Any] = {}

    class HFLM:
        def __init__(self, *, pretrained: Any, tokenizer: Any, batch_size: int) -> None:
            self.model, self.tokenizer = pretrained, tokenizer

    def simple_evaluate(*, model: Any, tasks: list[str], limit: int | None, **rest: Any) -> Any:
        seen.update(rest, limit=limit)
        if "unknown" in tasks:
            raise KeyError("unknown")
        ids = torch.tensor([model.tokenizer("import os")["input_ids"]])
        with torch.no_grad():
            best = int(model.model(ids).logits[0, -1].argmax())
        return {"results": {t: {"best,none": best, "alias": t, "flag": True} for t in tasks}}

    harness = types.ModuleType("lm_eval")
    harness.simple_evaluate = simple_evaluate  # type: ignore[attr-defined]
    huggingface = types.ModuleType("lm_eval.models.huggingface")
    huggingface.HFLM = HFLM  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "lm_eval", harness)
    monkeypatch.setitem(sys.modules, "lm_eval.models", types.ModuleType("lm_eval.models"))
    monkeypatch.setitem(sys.modules, "lm_eval.models.huggingface", huggingface)
    lens = Lens.from_pretrained(str(ternary))
    found = run_tasks(lens, ["one", "two"], limit=3, seed=5)
    ids = torch.tensor([lens.tokenizer("import os")["input_ids"]])
    with torch.no_grad():
        best = float(lens.model(ids).logits[0, -1].argmax())
    assert found == {"one": {"best": best}, "two": {"best": best}}
    assert seen["limit"] == 3 and seen["torch_random_seed"] == 5
    with pytest.raises(UsageError, match="cannot run unknown"):
        run_tasks(lens, ["unknown"])
    lens.tokenizer = None
    with pytest.raises(UsageError, match="without a tokenizer"):
        run_tasks(lens, ["one"])
