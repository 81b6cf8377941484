"""Packed multiplication against float64, and against the dense layer that it stands in for."""

from __future__ import annotations

import importlib
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from packed_cases import DTYPES, RULES, biases, check, inputs, made, packed_matrices
from tolerances import assert_close_sums, sum_error
from trilens.errors import UsageError
from trilens.ternary.packed import multiply as subject
from trilens.ternary.packed.cpu import native
from trilens.ternary.packed.cpu import thread_pool as team
from trilens.ternary.packed.linear import Packed, TernaryLinear
from trilens.ternary.packed.multiply import multiply, multiply_back
from trilens.ternary.quantize import PerLayerQuant

loops = importlib.import_module("trilens.ternary.packed.cpu.loops")


@pytest.fixture(autouse=True)
def small_is_worth_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subject, "_WORTH_PACKED", 0)
    # what is used where the library was not built; test_native.py has the library
    monkeypatch.setattr(native, "_level", lambda: 0)


@st.composite
def cases(draw: st.DrawFn) -> tuple[Packed, torch.Tensor, torch.Tensor | None]:
    packed = draw(packed_matrices((64, 150), (1, 700), [16, 48, 128, 1024]))
    x = inputs(draw(st.sampled_from([1, 2, 3])), packed.cols, draw(st.sampled_from(DTYPES)))
    return packed, x, draw(biases(packed, x))


@pytest.mark.parametrize("method", loops.methods_here())
def test_looked_up_is_the_dense_layer(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subject, "methods", lambda: (method,))
    used = []
    run = subject.run_job
    monkeypatch.setattr(subject, "run_job", lambda *a: used.append(a[0]) or run(*a))

    @settings(max_examples=25, deadline=None)
    @given(cases())
    def holds(case: tuple[Packed, torch.Tensor, torch.Tensor | None]) -> None:
        packed, x, bias = case
        used.clear()
        y = multiply(x, packed, bias)
        check(y, x, packed, bias)
        assert team.find_loop(f"multiply_{method}") in used

    holds()


@settings(max_examples=25, deadline=None)
@given(cases(), st.sampled_from([13, 40]))
def test_tiled_is_the_dense_layer(
    case: tuple[Packed, torch.Tensor, torch.Tensor | None], n_inputs: int
) -> None:
    packed, x, bias = case
    x = inputs(n_inputs, packed.cols, x.dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subject, "_TILE_BYTES", 40_000)  # several tiles
        check(multiply(x, packed, bias), x, packed, bias)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("options", [{}, {"per": "row"}, {"group_size": 48}, {"group_size": 5}])
def test_tiles_are_the_dense_weight_bit_for_bit(rule, options, dtype) -> None:
    packed = made(70, 203, rule=rule, **options)
    tile = subject._unpacked(packed, 3, 68, dtype, dtype)
    assert torch.equal(tile, packed.dense(dtype)[3:68])
    wide = subject._unpacked(packed, 3, 68, dtype, torch.float32)
    assert torch.equal(wide, packed.dense(dtype)[3:68].float())


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("options", [{"group_size": 5}, {"per": "row"}])
@pytest.mark.parametrize("rows", [3, 100])
def test_what_the_loops_do_not_read_is_right_too(rows, options, dtype) -> None:
    packed = made(rows, 90, **options)
    for n in (1, 20):
        x = inputs(n, 90, dtype)
        y = multiply(x, packed)
        expected = x.double() @ packed.dense(dtype).double().T
        size = x.double().abs() @ packed.dense(dtype).double().abs().T
        # Half precision is summed up in float32 and rounded once.
        summed = torch.promote_types(dtype, torch.float32)
        bound = torch.from_numpy(sum_error(90, size, summed))
        bound += torch.finfo(dtype).eps * expected.abs()
        assert ((y.double() - expected).abs() <= bound).all()


def test_without_numba(monkeypatch: pytest.MonkeyPatch) -> None:
    packed = made(100, 300, group_size=32)
    monkeypatch.setattr(subject, "methods", lambda: ())
    monkeypatch.setattr(team, "_loops", lambda: None)
    with pytest.raises(UsageError, match="numba"):
        team.find_loop("not asked for before")
    for n in (1, 20):
        x = inputs(n, 300, torch.bfloat16)
        check(multiply(x, packed), x, packed, None)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rule", RULES)
def test_gradient(rule: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subject, "_TILE_BYTES", 40_000)
    packed = made(130, 203, rule=rule, group_size=48)
    grad = inputs(5, 130, dtype).reshape(5, 1, 130)
    found = multiply_back(grad, packed)
    weights = packed.dense(dtype).double()
    expected, size = grad.double() @ weights, grad.double().abs() @ weights.abs()
    assert found.dtype == dtype
    bound = torch.from_numpy(sum_error(130, size, torch.float32))
    bound += torch.finfo(dtype).eps * expected.abs()
    assert ((found.double() - expected).abs() <= bound).all()


def test_infinite_inputs_are_not_hidden() -> None:
    packed = made(100, 64, per="row")
    x = inputs(1, 64, torch.float32)
    x[0, 5] = float("inf")
    expected = x @ packed.dense().T
    found = multiply(x, packed)
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found[~found.isnan()], expected[~expected.isnan()])
    x[0, 5] = float("nan")
    assert multiply(x, packed).isnan().all()


def test_sums_beyond_half_precision_are_scaled_first() -> None:
    packed = made(100, 512, per="row")
    trits = packed.dense().sign()
    quiet = Packed(packed.codes, torch.full_like(packed.scale, 2.0**-12), 512)
    x = (trits[:1] * 1000).half()  # row 0 adds up to several hundred thousand before its scale
    assert float((x.double() @ trits[0].double())[0]) > 65504
    for n in (1, 20):
        assert multiply(x.expand(n, -1), quiet).isfinite().all()


@pytest.mark.parametrize("openmp", [True, False])
def test_threads_share_the_rows(openmp: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not openmp:
        monkeypatch.setattr(team, "_openmp", lambda: None)
    monkeypatch.setattr(subject, "_WORTH_A_THREAD", 1)
    packed, x = made(1000, 300, group_size=32), inputs(2, 300, torch.float32)
    alone = multiply(x, packed)
    many = inputs(40, 300, torch.float32)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        for _ in range(5):
            assert torch.equal(multiply(x, packed), alone)
        check(multiply(many, packed), many, packed, None)
    finally:
        torch.set_num_threads(before)


def test_callers_do_not_meet() -> None:
    packed = made(300, 256)
    xs = [inputs(1, 256, torch.float32, seed) for seed in range(4)]
    expected = [multiply(x, packed) for x in xs]
    found = [[] for _ in xs]

    def call(i: int) -> None:
        for _ in range(20):
            found[i].append(torch.equal(multiply(xs[i], packed), expected[i]))

    callers = [threading.Thread(target=call, args=(i,)) for i in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert all(len(one) == 20 and all(one) for one in found)


def test_traced_and_batched_tensors_take_the_plain_way() -> None:
    layer = TernaryLinear.from_quant(PerLayerQuant.quantize(torch.randn(64, 64), "w", per="row"))
    x = torch.randn(3, 64)
    weights = layer.reconstruct()
    terms = x.abs() @ weights.abs().T
    assert_close_sums(torch.func.vmap(layer)(x), x @ weights.T, terms, 64, torch.float32)
    assert layer.to("meta")(x.to("meta")).shape == (3, 64)


def test_loops_and_callers_agree() -> None:
    stripe = importlib.import_module("trilens.ternary.packed.cpu.multiply").STRIPE
    assert stripe == subject._SMALLEST
    assert set(subject._LOOKUP_INPUTS) == {"pairs", "singles", "any"} >= set(team.methods())
    assert loops.methods_here()[-1] == "any"


def test_layer_keeps_its_shape() -> None:
    layer = TernaryLinear.from_quant(PerLayerQuant.quantize(torch.randn(64, 64), "w"))
    assert layer(torch.zeros(0, 64)).shape == (0, 64)
    assert layer(torch.zeros(64)).shape == (64,)
    assert layer(torch.zeros(2, 1, 64).transpose(0, 1)).shape == (1, 2, 64)


def test_a_processor_without_f16c_has_no_loops(monkeypatch: pytest.MonkeyPatch) -> None:
    """LLVM would call a function that numba does not have, and the process would end."""
    monkeypatch.setattr(loops.config, "CPU_FEATURES", "+sse2,+avx,+avx2,-f16c")
    monkeypatch.setattr(loops.binding, "get_process_triple", lambda: "x86_64-unknown-linux-gnu")
    assert loops.methods_here() == ()
    monkeypatch.setattr(loops.config, "CPU_FEATURES", "+sse2,+avx,+f16c")
    assert loops.methods_here() == ("singles", "any")
    monkeypatch.setattr(loops.config, "CPU_FEATURES", "+neon")
    monkeypatch.setattr(loops.binding, "get_process_triple", lambda: "aarch64-unknown-linux-gnu")
    assert loops.methods_here() == ("any",)
