"""All blocks fitted together: the gradient is that of the whole model, and the divergence falls."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.func import functional_call

from checkpoint_cases import load, saved
from tolerances import assert_near, sum_error
from trilens.checkpoint.calibration import end_to_end as whole
from trilens.checkpoint.calibration.blocks import BlockRunner
from trilens.checkpoint.calibration.fit import FitOptions
from trilens.checkpoint.calibration.streams import Stream, batches_of, write_stream
from trilens.checkpoint.calibration.trainable import TrainableMatrix
from trilens.checkpoint.format.plan import TernaryPlan
from trilens.lens.proof import prove
from trilens.models.stacks import only_stack
from trilens.ternary.quantize import PerLayerQuant
from trilens.ternary.rotation import rotate, rotate_back

PLAN = TernaryPlan("exact", per="row")


def model_of(model_type: str, folder: Path) -> Any:
    return load(saved(model_type, folder / "src"), dtype=torch.float32).eval().requires_grad_(False)


def coded(runner: BlockRunner, plan: TernaryPlan) -> list[whole.FinishedBlock]:
    blocks = []
    for index in range(runner.n_blocks):
        block = runner.block(index)
        quants, vectors = {}, {}
        for path, module in block.named_modules():
            if isinstance(module, torch.nn.Linear) and "proj" in path:
                weight = rotate(module.weight.data) if plan.rotate else module.weight.data
                quants[path] = PerLayerQuant.quantize(weight, path, rule="exact", per="row")
        for name, parameter in block.named_parameters():
            if parameter.ndim == 1:
                vectors[name] = parameter.data
        dtypes = dict.fromkeys(vectors, torch.float32)
        blocks.append(whole.FinishedBlock(lambda _: None, quants, vectors, dtypes, plan))
    return blocks


def with_values(runner: BlockRunner, blocks: Any, model: Any, plan: TernaryPlan) -> dict[str, Any]:
    """Parameters of the whole model, by the names that the model has."""
    given = {}
    for index, (quants, vectors) in enumerate(blocks):
        path = runner.path(index)
        for inside, quant in quants.items():
            weights = quant.reconstruct()
            given[f"{path}.{inside}.weight"] = rotate_back(weights) if plan.rotate else weights
        given |= {f"{path}.{name}": value for name, value in vectors.items()}
    return given


def kl(model: Any, given: dict[str, Any], batches: Any) -> torch.Tensor:
    total, count = torch.zeros(()), 0
    for batch in batches:
        dense = torch.log_softmax(model(batch.ids).logits, -1)
        found = torch.log_softmax(functional_call(model, given, (batch.ids,)).logits, -1)
        total = total + (dense.exp() * (dense - found)).sum()
        count += batch.ids.numel()
    return total / count


@pytest.fixture
def parts(tmp_path: Path) -> Any:
    model = model_of("llama", tmp_path)
    runner = BlockRunner(model, prove(model, only_stack(model)).anatomy)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 100, (6, 24), generator=generator)
    batches = batches_of(list(ids), 2)

    def last(batch: Any) -> torch.Tensor:
        hidden = runner.first(batch.ids)
        with torch.no_grad():
            for i in range(runner.n_blocks):
                hidden = runner.run(i, runner.block(i), runner.call(i, batch.ids), hidden)
        return hidden

    path, width, _ = write_stream(tmp_path / "dense.f32", batches, last)
    return model, runner, batches, Stream(path, width, ids.numel())


@pytest.mark.parametrize("rotate", [False, True])
def test_the_divergence_falls_by_what_is_told(parts: Any, rotate: bool) -> None:
    model, runner, batches, dense = parts
    plan = TernaryPlan("exact", per="row", rotate=rotate)
    blocks = coded(runner, plan)
    said: list[float] = []
    options = FitOptions(whole_passes=8)
    found = whole.fit_end_to_end(runner, blocks, batches, dense, options, said.append)
    before = with_values(runner, [(b.quants, b.vectors) for b in blocks], model, plan)
    after = with_values(runner, zip(found.quants, found.vectors, strict=True), model, plan)
    # Differences of losses of about ln(vocabulary), each with a float32 sum over it.
    vocab = model.config.vocab_size
    rounded = float(sum_error(vocab, math.log(vocab), torch.float32))
    close = {"rel": 1e-3, "abs": rounded}
    assert found.kl_nats_before == pytest.approx(float(kl(model, before, batches)), **close)
    assert found.kl_nats == pytest.approx(float(kl(model, after, batches)), **close)
    assert found.kl_nats < 0.8 * found.kl_nats_before
    assert said == sorted(said) and said[0] == 0 and said[-1] < 1
    again = whole.fit_end_to_end(runner, blocks, batches, dense, options)
    assert again.kl_nats == found.kl_nats
    trits = {path: quant.trits for path, quant in blocks[0].quants.items()}
    for path, quant in found.quants[0].items():
        assert torch.equal(quant.trits.abs(), trits[path].abs())


def test_the_gradient_is_that_of_the_whole_model(parts: Any) -> None:
    """Block by block, backward through one at a time, against one graph of everything."""
    model, runner, batches, dense = parts
    blocks = coded(runner, PLAN)
    moving = [whole._Block(block) for block in blocks]
    batch = batches[0]
    wanted = torch.log_softmax(runner.logits(batch.ids, dense.read(batch)), -1)
    whole._Model(runner, moving).learn(batch, wanted)
    given: dict[str, Any] = {}
    mine: list[TrainableMatrix] = []
    for index, block in enumerate(blocks):
        for inside, quant in block.quants.items():
            mine.append(TrainableMatrix(quant))
            given[f"{runner.path(index)}.{inside}.weight"] = mine[-1].weights()
    kl(model, given, [batch]).backward()  # type: ignore[no-untyped-call]
    theirs = [matrix for block in moving for matrix in block.matrices.values()]
    for one, other in zip(mine, theirs, strict=True):
        expected, found = one.factors[0].grad, other.factors[0].grad
        assert expected is not None and found is not None
        assert_near(found, expected, 1e-3)


def test_what_does_not_help_is_thrown_away(parts: Any) -> None:
    _, runner, batches, dense = parts
    blocks = coded(runner, PLAN)
    wild = whole.fit_end_to_end(runner, blocks, batches, dense, FitOptions(whole_rate=1e3))
    assert wild.kl_nats == wild.kl_nats_before
    assert not any(wild.quants) and not any(wild.vectors)
    none = whole.fit_end_to_end(runner, blocks, batches, dense, FitOptions(whole_passes=0))
    assert not any(none.quants)
