"""All blocks fitted together: the gradient is that of the whole model, and the divergence falls."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.func import functional_call

from checkpoint_cases import load, saved
from tolerances import assert_near, sum_error
from trilens.checkpoint.calibration import chain
from trilens.checkpoint.calibration import end_to_end as whole
from trilens.checkpoint.calibration.blocks import BlockRunner
from trilens.checkpoint.calibration.chain import Chain, FinishedBlock, MovingBlock
from trilens.checkpoint.calibration.fit import FitOptions
from trilens.checkpoint.calibration.streams import batches_of, write_stream
from trilens.checkpoint.calibration.trainable import TrainableMatrix
from trilens.checkpoint.format.plan import TernaryPlan
from trilens.lens.proof import prove
from trilens.models.stacks import only_stack
from trilens.ternary.quantize import PerLayerQuant
from trilens.ternary.rotation import rotate, rotate_back

PLAN = TernaryPlan("exact", per="row")


def model_of(model_type: str, folder: Path) -> Any:
    return load(saved(model_type, folder / "src"), dtype=torch.float32).eval().requires_grad_(False)


def coded(runner: BlockRunner, plan: TernaryPlan) -> list[FinishedBlock]:
    blocks = []
    for index in range(runner.n_blocks):
        block = runner.block(index)
        quants, vectors = {}, {}
        for path, module in block.named_modules():
            if isinstance(module, torch.nn.Linear) and "proj" in path:
                weight = rotate(module.weight.data) if plan.rotate else module.weight.data
                exact = PerLayerQuant.quantize(weight, path, rule="exact", per="row")
                # Scales that are too small by a third: what can be won holds for every text.
                quants[path] = PerLayerQuant.from_trits(
                    exact.trits, torch.as_tensor(exact.scale) / 1.5, path, per="row"
                )
        for name, parameter in block.named_parameters():
            if parameter.ndim == 1:
                vectors[name] = parameter.data
        dtypes = dict.fromkeys(vectors, torch.float32)
        blocks.append(FinishedBlock(lambda _: None, quants, vectors, dtypes, plan))
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
    ids = torch.randint(0, 100, (20, 24), generator=generator)
    batches = batches_of(list(ids), 4)

    def last(batch: Any) -> Any:
        carried: Any = {}
        with torch.no_grad():
            for i in range(runner.n_blocks):
                call = runner.call(i, batch.ids, carried)
                carried = runner.run(i, runner.block(i), call)
        return carried

    form = runner.form(runner.n_blocks)
    return model, runner, batches, write_stream(tmp_path / "dense.f32", form, batches, last)[0]


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
    text, held_out = whole.set_held_out(batches, options)
    assert len(text) == 4 and len(held_out) == 1
    assert held_out[0].start not in {batch.start for batch in text}
    assert found.kl_nats_before == pytest.approx(float(kl(model, before, held_out)), **close)
    assert found.kl_nats == pytest.approx(float(kl(model, after, held_out)), **close)
    assert found.trit_changes == 0
    assert found.kl_nats < 0.9 * found.kl_nats_before
    assert said == sorted(said) and said[0] == 0 and said[-1] < 1
    again = whole.fit_end_to_end(runner, blocks, batches, dense, options)
    assert again.kl_nats == found.kl_nats
    trits = {path: quant.trits for path, quant in blocks[0].quants.items()}
    for path, quant in found.quants[0].items():
        assert torch.equal(quant.trits.abs(), trits[path].abs())


@pytest.mark.parametrize("small", [False, True])
def test_the_gradient_is_that_of_the_whole_model(
    parts: Any, small: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Block by block, backward through one at a time, against one graph of everything."""
    monkeypatch.setattr(chain, "_SMALL", math.inf if small else 0)
    model, runner, batches, dense = parts
    blocks = coded(runner, PLAN)
    moving = [MovingBlock(block) for block in blocks]
    batch = batches[0]
    wanted = torch.log_softmax(runner.logits(batch.ids, dense.read(batch)), -1)
    Chain(runner, moving).learn(batch, wanted)
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


def test_products_are_rounded_where_gradients_stay(
    parts: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Measured on each model, on a machine that gains by it; values that are told are not."""
    _, runner, batches, dense = parts
    moving = [MovingBlock(block) for block in coded(runner, PLAN)]
    batch = batches[0]
    target = torch.log_softmax(runner.logits(batch.ids, dense.read(batch)), -1)
    model = Chain(runner, moving)
    told = model.measure([batch], lambda _: target)

    monkeypatch.setattr(chain, "multiplies_bfloat16", lambda _: False)
    model.round_products(batch, target)
    assert not model.rounds
    monkeypatch.setattr(chain, "multiplies_bfloat16", lambda _: True)
    model.round_products(batch, target)
    assert model.rounds and model.measure([batch], lambda _: target) == told
    assert all(t.grad is None for block in moving for t in block.trainable)
    wide, seen = runner.run, list[torch.dtype]()

    def run(index: int, block: Any, call: Any) -> Any:
        if torch.is_autocast_enabled("cpu"):
            seen.append(torch.get_autocast_dtype("cpu"))
        return wide(index, block, call)

    monkeypatch.setattr(runner, "run", run)
    model.learn(batch, target)
    assert seen and set(seen) == {torch.bfloat16}
    seen.clear()
    model.measure([batch], lambda _: target)
    assert not seen

    monkeypatch.setattr(chain, "_NEAR", 0.0)
    model.round_products(batch, target)
    assert not model.rounds
    monkeypatch.setattr(chain, "_NEAR", math.inf)

    def refuse(index: int, block: Any, call: Any) -> Any:
        if torch.is_autocast_enabled("cpu"):
            raise RuntimeError("expected m1 and m2 to have the same dtype")
        return wide(index, block, call)

    monkeypatch.setattr(runner, "run", refuse)
    model.round_products(batch, target)
    assert not model.rounds
    model.learn(batch, target)


def test_what_does_not_help_is_thrown_away(parts: Any) -> None:
    _, runner, batches, dense = parts
    blocks = coded(runner, PLAN)
    wild = whole.fit_end_to_end(runner, blocks, batches, dense, FitOptions(whole_rate=1e3))
    assert wild.kl_nats == wild.kl_nats_before
    assert not any(wild.quants) and not any(wild.vectors)
    none = whole.fit_end_to_end(runner, blocks, batches, dense, FitOptions(whole_passes=0))
    assert not any(none.quants)


@pytest.mark.parametrize("rotate", [False, True])
def test_trits_move_where_that_helps(parts: Any, rotate: bool) -> None:
    """More than scales alone can do, by what is told; the trits of the dense model come back."""
    model, runner, batches, dense = parts
    plan = TernaryPlan("exact", per="row", rotate=rotate)
    blocks = coded(runner, plan)
    # Every fifth trit is another one than the weights say.
    generator = torch.Generator().manual_seed(1)
    for block in blocks:
        for path, quant in block.quants.items():
            wrong = torch.randint(-1, 2, quant.trits.shape, generator=generator)
            swap = torch.rand(quant.trits.shape, generator=generator) < 0.2
            trits = torch.where(swap, wrong.to(torch.int8), quant.trits)
            block.quants[path] = PerLayerQuant.from_trits(trits, quant.scale, path, per="row")
    few = FitOptions(whole_passes=6)
    scales = whole.fit_end_to_end(runner, blocks, batches, dense, few)
    said: list[float] = []
    freed = replace(few, trit_passes=12, trit_rate=0.025)
    found = whole.fit_end_to_end(runner, blocks, batches, dense, freed, said.append)
    assert found.kl_nats < 0.9 * scales.kl_nats
    assert said == sorted(said) and said[0] >= 0 and said[-1] < 1
    changed = sum(
        int((quant.trits != block.quants[path].trits).sum())
        for block, quants in zip(blocks, found.quants, strict=True)
        for path, quant in quants.items()
    )
    assert found.trit_changes == changed > 0
    after = with_values(runner, zip(found.quants, found.vectors, strict=True), model, plan)
    _, held_out = whole.set_held_out(batches, freed)
    assert found.kl_nats == pytest.approx(float(kl(model, after, held_out)), rel=1e-3)


@pytest.mark.parametrize(("small", "steps"), [(True, 18), (False, 4)])
def test_steps_are_larger_where_each_brings_the_blocks(
    parts: Any, monkeypatch: pytest.MonkeyPatch, small: bool, steps: int
) -> None:
    """Steps of one row of 20, two held out; of four rows, one step held out."""
    _, runner, batches, dense = parts
    monkeypatch.setattr(chain, "_SMALL", math.inf if small else 0)
    monkeypatch.setattr(whole, "_STREAMED", 4 * 24)
    options = FitOptions(whole_passes=1, step_tokens=24)
    seen: list[float] = []
    whole.fit_end_to_end(runner, coded(runner, PLAN), batches, dense, options, seen.append)
    assert seen == [n / steps for n in range(steps)]


def test_the_rate_of_trits_goes_with_the_root_of_a_step(
    parts: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, runner, batches, dense = parts
    rates: list[float] = []
    adam = torch.optim.Adam

    def kept(groups: Any, **options: Any) -> torch.optim.Adam:
        rates.append(groups[-1]["lr"])
        return adam(groups, **options)

    monkeypatch.setattr(torch.optim, "Adam", kept)
    for tokens in (512, 2048):
        options = FitOptions(whole_passes=0, trit_passes=1, trit_rate=0.01, step_tokens=tokens)
        whole.fit_end_to_end(runner, coded(runner, PLAN), batches, dense, options)
    assert rates == pytest.approx([0.01, 0.02])


def test_wild_latents_are_thrown_away(parts: Any) -> None:
    """What the scales gained stays."""
    _, runner, batches, dense = parts
    blocks = coded(runner, PLAN)
    few = FitOptions(whole_passes=4)
    scales = whole.fit_end_to_end(runner, blocks, batches, dense, few)
    wild = replace(few, trit_passes=5, trit_rate=1.0)
    seen: list[float] = []
    found = whole.fit_end_to_end(runner, blocks, batches, dense, wild, seen.append)
    assert found.kl_nats == scales.kl_nats and found.trit_changes == 0
    for one, other in zip(found.quants, scales.quants, strict=True):
        assert all(torch.equal(one[path].trits, other[path].trits) for path in one)
    assert len(seen) == 4 * 4 + 1 + 5 * 4  # its rate falls: no pass without a gain is the last


def test_latents_begin_at_their_trits_on_the_weights_side() -> None:
    weights = torch.randn(6, 32, generator=torch.Generator().manual_seed(0))
    quant = PerLayerQuant.quantize(weights, "w", rule="exact", group_size=8)
    matrix = TrainableMatrix(quant)
    still = matrix.weights()
    matrix.free_trits(weights)
    latent = matrix.latent
    assert latent is not None
    assert torch.equal(latent.detach().round().clamp(-1, 1).to(torch.int8), quant.trits)
    near = latent.detach() - quant.trits
    scale = torch.as_tensor(quant.scale).reshape(6, 4).repeat_interleave(8, 1)
    assert torch.all(near * (weights / scale - quant.trits) >= 0)
    assert torch.equal(matrix.weights(), still)
    (matrix.weights() * torch.arange(32.0)).sum().backward()  # type: ignore[no-untyped-call]
    assert latent.grad is not None
    assert_near(latent.grad, scale * torch.arange(32.0), 1e-5)
    with torch.no_grad():
        latent += 5.0
    matrix.settle()
    assert float(latent.detach().max()) <= 1.25
    assert int(matrix.result().trits.min()) == 1


@pytest.mark.parametrize("rule", ["exact", "planes", "quad"])
def test_a_pull_shortens_the_way_to_the_level_and_turns_no_trit(rule: Any) -> None:
    weights = torch.randn(6, 32, generator=torch.Generator().manual_seed(0))
    matrix = TrainableMatrix(PerLayerQuant.quantize(weights, "w", rule=rule, group_size=8))
    matrix.free_trits(weights)
    assert matrix.latent is not None
    matrix.settle()  # none beyond the ends
    before, still = matrix.latent.detach().clone(), matrix.weights().detach()
    unit = matrix._unit().detach()
    matrix.settle(0.25)
    after = matrix.latent.detach()
    assert torch.equal(matrix.weights(), still)
    assert_near(unit * after, unit * before + 0.25 * (still - unit * before), 1e-6)
    assert float((after - before).abs().max()) > 0.05


def test_noise_alone_turns_trits_that_nothing_draws_back() -> None:
    """Noise in half of the rows; in the others what agrees a little, beside the same noise."""
    turned = {}
    for pull in (0.0, 0.15):
        generator = torch.Generator().manual_seed(0)
        quant = PerLayerQuant.quantize(torch.randn(8, 64, generator=generator), "w", rule="exact")
        matrix = TrainableMatrix(quant)
        matrix.free_trits(quant.reconstruct())
        assert matrix.latent is not None
        adam = torch.optim.Adam([matrix.latent], lr=0.01, betas=(0.9, 0.99))
        for _ in range(3000):
            noise = torch.randn(8, 64, generator=generator)
            # Up where a trit is 0 or less: there it can turn that way.
            agree = 0.4 * (quant.trits <= 0)
            agree[4:] = 0
            matrix.latent.grad = noise - agree
            adam.step()
            matrix.settle(pull * 0.01)
        others = matrix.result().trits != quant.trits
        turned[pull] = (
            float(others[:4][quant.trits[:4] <= 0].float().mean()),
            float(others[4:].float().mean()),
        )
    assert turned[0.0][1] > 0.2  # what noise does
    assert turned[0.15][1] < 0.05
    assert turned[0.15][0] > 0.9


@pytest.mark.parametrize("rotated", [False, True])
def test_latents_of_two_planes_stand_behind_nine_levels(rotated: bool) -> None:
    weights = torch.randn(6, 32, generator=torch.Generator().manual_seed(0))
    weights[0, :8] = 0  # both scales are 0
    weights[1, :8] = weights[1, :8].sign()  # the second one is, and the first one is 1
    dense = rotate_back(weights) if rotated else weights
    quant = PerLayerQuant.quantize(weights, "w", rule="planes", group_size=8)
    matrix = TrainableMatrix(quant, rotate=rotated)
    still = matrix.weights()
    matrix.free_trits(dense)
    assert matrix.latent is not None
    # Trits may be others where two pairs of them give one value; values are the same.
    assert torch.equal(matrix.weights(), still)
    matrix.weights().square().sum().backward()  # type: ignore[no-untyped-call]
    assert matrix.latent.grad is not None and matrix.factors[0].grad is not None
    assert torch.isfinite(matrix.latent.grad).all()
    with torch.no_grad():
        matrix.latent += 50.0
    matrix.settle()
    highest = matrix.result().reconstruct()
    first, second = (torch.as_tensor(s).reshape(6, 4) for s in (quant.scale, quant.second_scale))
    high = (first.abs() + second.abs()).repeat_interleave(8, 1)
    assert_near(highest[2:].abs(), high[2:], 1e-6)
    assert not highest[0, :8].any()
    assert_near(highest[1, :8].abs(), torch.ones(8), 1e-6)


def test_trits_of_two_planes_move(parts: Any) -> None:
    _, runner, batches, dense = parts
    blocks = coded(runner, PLAN)
    generator = torch.Generator().manual_seed(1)
    for index, block in enumerate(blocks):
        for path in block.quants:
            weights = runner.block(index).get_submodule(path).weight.data
            two = PerLayerQuant.quantize(weights, path, rule="planes", per="row")
            swap = torch.rand(two.trits.shape, generator=generator) < 0.2
            wrong = torch.randint(-1, 2, two.trits.shape, generator=generator).to(torch.int8)
            block.quants[path] = replace(two, trits=torch.where(swap, wrong, two.trits))
    few = FitOptions(whole_passes=4)
    scales = whole.fit_end_to_end(runner, blocks, batches, dense, few)
    freed = replace(few, trit_passes=8, trit_rate=0.0375)
    found = whole.fit_end_to_end(runner, blocks, batches, dense, freed)
    assert found.kl_nats < 0.9 * scales.kl_nats
    assert found.trit_changes > 0
