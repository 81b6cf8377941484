"""A series of checkpoints, each against the first; recurrent states among the metrics."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from tinymodels import build, prompt_ids
from trilens import ComparisonSeries, Lens, compare, compare_series
from trilens.analysis.comparison.states import StateAccumulator
from trilens.cli.main import app
from trilens.demo import demo_path
from trilens.errors import CorruptFileError, ModelNotFoundError, UsageError
from trilens.report.text.comparison import comparison_sentence, render_comparison

TEXT = "def add(a, b):\n    return a + b\n" * 30


def prompts(kind: str) -> list[torch.Tensor]:
    return [prompt_ids(kind, n, seed=n)[0] for n in (12, 9)]


@pytest.fixture(scope="module")
def run() -> list[Lens]:
    return [Lens(build("rwkv", seed=seed)) for seed in (0, 0, 1)]


@pytest.fixture(scope="module")
def series(run: list[Lens]) -> ComparisonSeries:
    return compare_series(run, iter(prompts("rwkv")))


def test_each_step_is_the_comparison_with_the_first(
    run: list[Lens], series: ComparisonSeries
) -> None:
    alone = compare(run[0], run[2], prompts("rwkv"))
    assert series.comparisons[1].to_dict() == alone.to_dict()
    same, other = series.table()
    assert (same["step"], other["step"]) == (1, 2)
    assert same["kl_nats_mean"] == same["state_relative_error"] == 0
    assert other["kl_nats_mean"] == alone.row("kl_nats_mean").after > 0
    cosines = [row.after for row in alone.select("state_cosine")]
    assert other["state_cosine"] == pytest.approx(np.mean(cosines))


def test_states_are_those_of_the_captures(run: list[Lens], series: ComparisonSeries) -> None:
    found = series.comparisons[1]
    for layer in run[0].state_layers:
        caps = [[lens.capture(ids, states=True) for lens in run[::2]] for ids in prompts("rwkv")]
        part = caps[0][0].states.spec(layer).parts[0].name
        pairs = [[cap.states.get(layer).double().flatten() for cap in both] for both in caps]
        errors = [float(((a - b).norm() / a.norm()) ** 2) for a, b in pairs]
        angles = [float(torch.dot(a, b) / a.norm() / b.norm()) for a, b in pairs]
        for metric, values in (("state_relative_error", errors), ("state_cosine", angles)):
            (row,) = found.select(metric, layer=layer, module=f"state.{part}")
            # Batches are summed in another order than prompts alone.
            assert row.after == pytest.approx(np.mean(values), rel=1e-3, abs=1e-5)
    (norm, *_) = found.select("state_norm", layer=run[0].state_layers[0])
    assert norm.before > 0 < norm.after


def test_states_of_no_prompt_have_no_rows() -> None:
    assert StateAccumulator().rows() == []


def test_saved_and_loaded_it_is_the_same(series: ComparisonSeries, tmp_path: Path) -> None:
    folder = series.save(tmp_path / "run")
    assert ComparisonSeries.load(folder).to_dict() == series.to_dict()
    with pytest.raises(ModelNotFoundError, match=r"no saved series"):
        ComparisonSeries.load(folder / "1")
    manifest = json.loads((folder / "series.json").read_text())
    for change in ({"folders": ["../1"]}, {"folders": []}, {"version": 9}):
        (folder / "series.json").write_text(json.dumps({**manifest, **change}))
        with pytest.raises(CorruptFileError, match=r"series.json"):
            ComparisonSeries.load(folder)


def test_progress_counts_all_steps(run: list[Lens]) -> None:
    steps: list[Any] = []
    compare_series(run, prompts("rwkv"), progress=steps.append)
    assert [step.done for step in steps] == [1, 2, 3, 4]
    assert {step.total for step in steps} == {4}
    assert steps[-1].what.startswith("checkpoint 2 of 2")


@pytest.mark.parametrize("models", ["one", [], ["one"]])
def test_a_series_needs_two(models: Any) -> None:
    with pytest.raises(UsageError, match="models"):
        compare_series(models, prompts("rwkv"))


def test_the_sentence_says_what_differs(series: ComparisonSeries) -> None:
    same, other = series.comparisons
    assert comparison_sentence(same) == "No difference: every delta is exactly 0."
    sentence = comparison_sentence(other)
    assert sentence.startswith("Perplexity × ")
    for words in ("95 % interval", "KL ", "same top token", "residual stream least alike after"):
        assert words in sentence
    assert "state cos" in render_comparison(other, 200)
    assert sentence in render_comparison(other, 400)


def test_the_command_takes_a_run(tmp_path: Path) -> None:
    demo = demo_path("rwkv7")
    copy = tmp_path / "step2"
    shutil.copytree(demo, copy)
    (tmp_path / "text.txt").write_text(TEXT)
    arguments = ["compare", str(demo), str(demo), str(copy), "--data", str(tmp_path / "text.txt")]
    arguments += ["--seq-length", "32", "--max-tokens", "64"]
    runner = CliRunner(env={"COLUMNS": "80"})
    shown = runner.invoke(app, [*arguments, "-o", str(tmp_path / "out")])
    assert shown.exit_code == 0, shown.output
    assert max(map(len, shown.stdout.splitlines())) <= 80
    assert "step2" in shown.stdout and "step 2" in shown.stdout
    assert "recurrent state: cosine with the first" in shown.stdout
    assert len(ComparisonSeries.load(tmp_path / "out").comparisons) == 2
    failed = runner.invoke(app, [*arguments, "--format", "json", "--fail-if", "cosine>0.9"])
    assert failed.exit_code == 3
    assert "step2: cosine>0.9 holds" in failed.stderr
    assert json.loads(failed.stdout)["format"] == "trilens.comparison_series"
