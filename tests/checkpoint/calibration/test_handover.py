"""Whatever blocks hand on: the blocks one after another give what the model gives."""

from __future__ import annotations

from collections import UserDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from calibration_cases import DOCUMENTS, SMALL, load_tokenizer, tiny
from checkpoint_cases import load
from tinymodels import build, forward, prompt_ids
from tolerances import assert_near
from trilens import Calibration, TernaryPlan, demo_path, ternarize
from trilens.checkpoint.calibration.blocks import BlockRunner
from trilens.checkpoint.calibration.handover import Form, axes_of
from trilens.checkpoint.calibration.nest import leaves, replaced
from trilens.checkpoint.calibration.options import draw
from trilens.checkpoint.calibration.streams import Batch, write_stream
from trilens.errors import AnatomyError
from trilens.evaluation.perplexity import measure_perplexity
from trilens.lens.proof import prove
from trilens.models.stacks import only_stack

pytestmark = pytest.mark.usefixtures("quiet")

# How many tensors stand between two blocks at most: the residual, and what else is needed later.
CARRIED = {
    "llama": 1,
    "bloom": 1,  # weights beside the residual, which nobody reads
    "xlnet": 1,  # the sequence first
    "deepseek_v4": 1,  # an axis of streams
    "gemma3n_text": 5,  # streams before the batch; shared keys and values
    "gemma4": 5,
    "hy_v4": 2,  # indices of one block that the next takes
    "hrm_text": 2,  # two states, blocks that run several times
    "zamba2": 1,
}


ONE_OF_EACH = {"gemma3n_text": "self_attn", "xlnet": "ff", "zamba2": "shared_transformer"}
"""And what of it is ternarized: of zamba2 what several of its blocks run."""


def runner_of(model: Any) -> BlockRunner:
    return BlockRunner(model, prove(model, only_stack(model)).anatomy)


def replayed(runner: BlockRunner, ids: Tensor, folder: Path) -> Tensor:
    """The logits by way of the disk, block after block."""
    batch = Batch(ids, 0)
    stream, _ = write_stream(folder / "0", runner.form(0), [batch], lambda _batch: {})
    for i in range(runner.n_blocks):
        call = runner.call(i, ids, stream.read(batch))
        with torch.no_grad():
            found = runner.run(i, runner.block(i), call)
        form = runner.form(i + 1)
        stream, _ = write_stream(folder / str(i + 1), form, [batch], lambda _b, f=found: f)  # type: ignore[misc]
    return runner.logits(ids, stream.read(batch))


@pytest.mark.parametrize("model_type", CARRIED)
def test_blocks_one_after_another_give_the_model_s_logits(model_type: str, tmp_path: Path) -> None:
    model = build(model_type)
    ids = torch.cat([prompt_ids(model_type, 15, seed) for seed in range(3)])
    expected = forward(model, ids)
    runner = runner_of(model)
    found = replayed(runner, ids, tmp_path)
    assert_near(found, expected, 1e-5)
    most = max(len(runner.form(i).axes) for i in range(runner.n_blocks + 1))
    assert most == CARRIED[model_type]


def test_some_rows_of_a_batch_are_read_alone(tmp_path: Path) -> None:
    """Also where the streams stand before the batch, or the tokens."""
    for model_type in ("gemma3n_text", "xlnet"):
        runner = runner_of(build(model_type))
        ids = torch.cat([prompt_ids(model_type, 9, seed) for seed in range(4)])
        call = runner.call(0, ids, {})
        with torch.no_grad():
            found = runner.run(0, runner.block(0), call)
        folder = tmp_path / model_type
        folder.mkdir()
        form, batches = runner.form(1), [Batch(ids[:1], 0), Batch(ids, 9)]
        first = Batch(ids[:1], 0)
        stream, _ = write_stream(
            folder / "s",
            form,
            batches,
            lambda b, f=form, v=found: f.from_rows(f.to_rows(v, 4, 9)[: len(b.ids)], 9),  # type: ignore[misc]
        )
        part = stream.read(Batch(ids[2:], 9 + 2 * 9))
        for (key, axes), row in zip(form.axes, [found[k] for k, _ in form.axes], strict=True):
            assert torch.equal(axes.to_rows(part[key]), axes.to_rows(row)[2:])
            assert torch.equal(axes.to_rows(stream.read(first)[key]), axes.to_rows(row)[:1])


def test_rwkv7_hands_on_its_first_values(tmp_path: Path) -> None:
    """The value residual of the first block, which all later ones mix in."""
    model = load(demo_path("rwkv7"))
    ids = torch.randint(0, 400, (2, 12), generator=torch.Generator().manual_seed(0))
    expected = model.float()(ids).logits
    runner = runner_of(model)
    assert_near(replayed(runner, ids, tmp_path), expected, 1e-5)
    assert [len(runner.form(i).axes) for i in range(runner.n_blocks + 1)] == [0, 2, 2, 2, 1]
    assert runner.changed(1) == ((1, 0),)  # the first values are handed on as they are


@pytest.mark.parametrize("model_type", ONE_OF_EACH)
def test_what_is_written_does_what_was_measured(model_type: str, tmp_path: Path) -> None:
    """The ternary model as it is loaded predicts the held-out text as the report says."""
    source = tiny(model_type, tmp_path / "src")
    text = Calibration(DOCUMENTS[:10], DOCUMENTS[10:], **SMALL)
    plan = TernaryPlan("gptq", per="row", only=(ONE_OF_EACH[model_type],))
    report = ternarize(source, tmp_path / "out", plan=plan, calibration=text)
    assert report.damage is not None
    blocks = draw(text, load_tokenizer(source), longest=512).evaluation
    for folder, found in (
        (source, report.damage.perplexity_before),
        (tmp_path / "out", report.damage.perplexity_after),
    ):
        wanted = measure_perplexity(load(folder, dtype=torch.float32), blocks).value
        assert found == pytest.approx(wanted, rel=1e-4)
    assert report.damage.perplexity_before != report.damage.perplexity_after


class Rest(UserDict):  # type: ignore[type-arg]
    """A mapping that is no dict."""


def test_tensors_of_a_nest_are_replaced_in_new_containers() -> None:
    one, two = torch.zeros(2), torch.ones(2)
    nest: Any = (one, {"a": [one, None], "b": Rest(x=(two, 3))})
    found = replaced(nest, {(1, "b", "x", 0): one})
    assert [path for path, _ in leaves(found)] == [(0,), (1, "a", 0), (1, "b", "x", 0)]
    assert found[1]["b"]["x"] == (one, 3) and nest[1]["b"]["x"][0] is two
    found[1]["a"].append(two)
    assert len(nest[1]["a"]) == 2


def test_axes_are_read_off_two_runs() -> None:
    sizes = ((1, 12), (2, 13))

    def axes(one: tuple[int, ...], other: tuple[int, ...]) -> Any:
        return axes_of(
            "block", list(zip(sizes, (torch.zeros(one), torch.zeros(other)), strict=True))
        )

    assert axes((4, 1, 12, 8), (4, 2, 13, 8)).shape(3, 5) == (4, 3, 5, 8)
    assert axes((12, 1, 8), (13, 2, 8)).shape(3, 5) == (5, 3, 8)
    assert axes((1, 12, 24), (2, 13, 26)).shape(3, 5) == (3, 5, 10)
    for one, other in (((12, 8), (26, 8)), ((1, 7), (2, 9)), ((1, 3), (2, 3, 1))):
        with pytest.raises(AnatomyError, match="its rows are no axis"):
            axes(one, other)
    form = Form((((0, 0), axes((1, 12, 8), (2, 13, 8))),))
    with pytest.raises(AnatomyError, match="calibrate with another length"):
        form.to_rows({(0, 0): torch.zeros(3, 5, 7)}, 3, 5)
