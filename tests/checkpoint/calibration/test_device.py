"""Calibration on another device takes the way that it takes on the processor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from calibration_cases import DOCUMENTS, SMALL, tiny
from corpus_cases import contents
from trilens.checkpoint import Calibration, TernaryPlan, ternarize
from trilens.checkpoint.calibration.device import PlacedRunner, find_device
from trilens.checkpoint.calibration.run import run_calibration
from trilens.checkpoint.job import read_job
from trilens.errors import UsageError
from trilens.lens.proof import prove
from trilens.models.loading import load
from trilens.models.stacks import only_stack
from trilens.ternary.calibrated import descent
from trilens.ternary.calibrated.hessian import Hessian, Moments, MomentSums, upper_factor
from trilens.ternary.granularity import resolve_units


def test_torch_s_loops_carry_a_whole_calibration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tiny("llama", tmp_path / "src")
    job = read_job(source, TernaryPlan("best", group_size=16))
    text = Calibration(DOCUMENTS, **SMALL, device="cpu:0", effort="fast")
    stores = [run_calibration(job, text, tmp_path / "plain")]
    plain = descent._loops
    monkeypatch.setattr(descent, "_loops", lambda like, _backend: plain(like, "torch"))
    stores.append(run_calibration(job, text, tmp_path / "torch"))
    (one, damage), (other, again) = stores
    assert again.ratio == pytest.approx(damage.ratio, rel=1e-3)
    for before, after in zip(one.records, other.records, strict=True):
        assert [m.changes for m in before.matrices] == [m.changes for m in after.matrices]


def test_nothing_leaves_the_device_while_a_matrix_is_coded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """No array of NumPy's, which only the processor has, on the way of a matrix."""

    def refuse(*_args: Any, **_kwargs: Any) -> None:
        raise AssertionError("a tensor became an array")

    torch.manual_seed(0)
    x, dense = torch.randn(200, 24), torch.randn(9, 24).double()
    y = x @ dense.float().T + torch.randn(200, 9)
    scales = np.full((9 * 3, 1), 0.5)
    grid = descent.Grid.empty(resolve_units(9, 24, "group", 8), scales, device=x.device)
    for name in ("numpy", "__array__", "cpu", "tolist"):
        monkeypatch.setattr(Tensor, name, refuse)
    sums = MomentSums("x", 24, {"w": 9}, device=x.device)
    sums.add(x, {"w": y})
    moments = sums.result()["w"]
    target, hessian = moments.best_weights(dense), moments.hessian
    order = descent.coding_order(hessian)
    upper = upper_factor(hessian, order, 0.01)
    coded = descent.code_in_order(grid, target, hessian, damping=0.01, upper=upper, backend="torch")
    better, changes = descent.improve_trits(grid, target, hessian, backend="torch")
    assert changes > 0
    for each in (coded, better):
        refitted = descent.refit_scales(each, target, hessian)
        losses = [descent.loss(at, target, hessian) for at in (grid, each, refitted)]
        assert losses[0] > losses[1] > losses[2]
    assert Moments.of(dense, hessian).rotated().output_error(dense) >= 0
    assert Hessian(hessian.matrix, 3).matrix is hessian.matrix


def test_what_a_block_is_called_with_is_moved_to_it(tmp_path: Path) -> None:
    """Tensors in nests too; what is there already stays the same tensor."""
    model = load(tiny("llama", tmp_path / "src"), dtype="float32").model
    anatomy = prove(model, only_stack(model)).anatomy
    runner = PlacedRunner(model, anatomy, device=torch.device("cpu"))
    ids = torch.arange(8)[None]
    seen: list[tuple[Any, Any]] = []
    block = runner.block(0)

    def look(_module: nn.Module, args: Any, kwargs: Any) -> None:
        seen.append((args, kwargs))

    block.register_forward_pre_hook(look, with_kwargs=True)
    call = runner.call(0, ids, {})
    runner.run(0, block, call)
    args, kwargs = seen[0]
    given = [*args, *kwargs.values()]
    assert any(each is call.hidden for each in given)
    assert any(isinstance(each, tuple) for each in given)  # cosines and sines
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits
        carried: Any = {}
        for index in range(runner.n_blocks):
            call = runner.call(index, ids, carried)
            carried = runner.run(index, runner.block(index), call)
    assert torch.equal(runner.logits(ids, carried), logits)


def test_auto_is_the_accelerator_that_can(monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_device("auto") == find_device("cpu")  # of the machines that tests run on
    assert Calibration(DOCUMENTS, device="auto").to_dict() == Calibration(DOCUMENTS).to_dict()
    monkeypatch.setattr(
        torch.accelerator, "current_accelerator", lambda **_options: torch.device("meta")
    )
    assert find_device("auto") == torch.device("cpu")  # there is one, and it computes nothing


def test_auto_gives_the_same_bytes_without_an_accelerator(tmp_path: Path) -> None:
    source = tiny("llama", tmp_path / "src")
    for name, given in (("plain", {}), ("auto", {"device": "auto"})):
        few = {**SMALL, "tokens": 256, "evaluation_tokens": 128}
        text = Calibration(DOCUMENTS, **few, **given, effort="fast")
        plan = TernaryPlan("gptq", group_size=16, keep=["mlp"])
        ternarize(source, tmp_path / name, plan=plan, calibration=text)
    assert contents(tmp_path / "auto") == contents(tmp_path / "plain")


@pytest.mark.parametrize("name", ["meta", "cuda:99", "nowhere", 3.5, "hpu", "mkldnn", ""])
def test_devices_that_compute_nothing_are_refused(name: Any) -> None:
    with pytest.raises(UsageError, match=r"device .*: give 'cpu'|'cuda'"):
        find_device(name)
    with pytest.raises(UsageError):
        Calibration(DOCUMENTS, device=name)
    assert find_device("cpu") == find_device("cpu:3") == torch.device("cpu")
    assert "device" not in Calibration(DOCUMENTS, device="cpu:0").to_dict()
