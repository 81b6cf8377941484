"""Compiled and plain loops give the same bits; threads change nothing."""

from __future__ import annotations

import importlib
import time
from collections.abc import Iterator
from threading import Barrier, get_ident

import numpy as np
import pytest
import torch

from tolerances import assert_close_sums, sum_error
from trilens.errors import UsageError
from trilens.ternary.codecs.packing import FourLevels
from trilens.ternary.granularity import resolve_units
from trilens.ternary.quantize import PerLayerQuant
from trilens.ternary.rules import kernels
from trilens.ternary.rules import numpy_kernels as plain
from trilens.ternary.rules.coder import code_units
from trilens.ternary.rules.kernels import kernels_for, numba_is_here, parallel_map
from trilens.ternary.rules.rules import RULES
from trilens.ternary.weights_view import as_floats, view_weights

needs_numba = pytest.mark.skipif(not numba_is_here(), reason="numba is an optional extra")

DTYPES = [np.float32, np.float64]
SHAPES = [(1, 1), (3, 5), (2, 63), (2, 64), (5, 65), (1, 1003), (40, 128)]


def weights(shape: tuple[int, ...], dtype: type, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    # scales differ by decades, so that another order of summation would show
    return (rng.standard_normal(shape) * 10 ** rng.uniform(-8, 8, shape)).astype(dtype)


@needs_numba
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_loops_are_bit_identical(shape: tuple[int, int], dtype: type) -> None:
    x = weights(shape, dtype)
    compiled, reference = kernels_for(0, "compiled"), kernels_for(0, "numpy")
    assert np.array_equal(compiled.abs_sums(x), reference.abs_sums(x))
    for n_cuts in (2, 8):
        cuts = np.sort(weights((shape[0], n_cuts), dtype, seed=1), axis=1)
        cuts[:, 0] = x[:, 0]  # a weight on a cut
        cuts.sort(axis=1)
        found = [np.empty(shape, dtype=np.int8) for _ in range(2)]
        compiled.codes(x, cuts, found[0])
        reference.codes(x, cuts, found[1])
        assert np.array_equal(*found)
        for ours, theirs in zip(compiled.cells(x, cuts), reference.cells(x, cuts), strict=True):
            assert np.array_equal(ours, theirs)
        ascending = np.sort(x, axis=1)
        prefix = np.append(np.zeros((len(x), 1)), np.cumsum(ascending, axis=1, dtype=float), axis=1)
        wide = cuts.astype(np.float64)
        ours, theirs = (
            k.sorted_cells(ascending, prefix, wide, n_cuts // 2) for k in (compiled, reference)
        )
        assert np.array_equal(ours[0], theirs[0])
        assert np.array_equal(ours[1], theirs[1])
        assert np.array_equal(ours[0], reference.cells(x, cuts)[0])
    ascending = np.sort(np.abs(x), axis=1)
    for ours, theirs in zip(
        compiled.best_prefix(ascending), reference.best_prefix(ascending), strict=True
    ):
        assert np.array_equal(ours, theirs)
    ordered = np.take_along_axis(x, np.argsort(np.abs(x), axis=1), axis=1)
    assert np.array_equal(compiled.best_quad(ordered), reference.best_quad(ordered))
    flat = x.reshape(-1)
    for base, shift in ((32000, 15), (0, 20)):
        ours, theirs = (k.histogram(flat, base, shift, 2048) for k in (compiled, reference))
        assert np.array_equal(ours[0], theirs[0])
        assert np.array_equal(ours[1], theirs[1])
        assert theirs[0].sum() == flat.size
    values = weights(shape, np.float32, seed=2).reshape(-1)
    assert compiled.squared_sums(flat, values) == reference.squared_sums(flat, values)
    for cut in (np.abs(flat[0]), dtype(0), dtype(np.inf)):
        packed = [np.empty(-(-flat.size // 4), dtype=np.uint8) for _ in range(2)]
        compiled.two_bit(flat, cut, packed[0])
        reference.two_bit(flat, cut, packed[1])
        assert np.array_equal(*packed)


@needs_numba
@pytest.mark.parametrize("shape", SHAPES)
def test_bits_of_bfloat16_are_the_numbers(shape: tuple[int, int]) -> None:
    tensor = torch.from_numpy(weights(shape, np.float32)).bfloat16()
    bits, x = tensor.view(torch.uint16).numpy(), tensor.float().numpy()
    cuts = np.stack([-np.abs(x[:, 0]), np.abs(x[:, 0])], axis=1)
    wanted = np.empty(shape, dtype=np.int8)
    kernels_for(0, "numpy").codes(x, cuts, wanted)
    packed = np.empty(-(-x.size // 4), dtype=np.uint8)
    plain.two_bit(x.reshape(-1), cuts[0, 1], packed)
    for backend in (kernels_for(0, "compiled"), kernels_for(0, "numpy")):
        assert np.array_equal(backend.abs_sums(bits), plain.abs_sums(x))
        found, codes = np.empty_like(wanted), np.empty_like(packed)
        backend.codes(bits, cuts, found)
        assert np.array_equal(found, wanted)
        backend.two_bit(bits.reshape(-1), cuts[0, 1], codes)
        assert np.array_equal(codes, packed)


@needs_numba
@pytest.mark.parametrize("dtype", [*DTYPES, np.uint16])
@pytest.mark.parametrize(("size", "length"), [(1, 1), (63, 63), (1003, 1003), (1152, 128)])
def test_sums_of_what_is_coded(size: int, length: int, dtype: type) -> None:
    rng = np.random.default_rng(3)
    x = weights((size,), np.float32 if dtype == np.uint16 else dtype)
    if dtype == np.uint16:
        x = torch.from_numpy(x).bfloat16().view(torch.uint16).numpy()
    trits = rng.integers(-1, 2, size).astype(np.int8)
    factors = rng.random(-(-size // length)).astype(np.float32)
    values = trits * factors.repeat(length)
    wanted = plain.squared_sums(as_floats(x), values)
    for backend in ("compiled", "numpy"):
        assert kernels_for(0, backend).coded_sums(x, trits, factors, length) == wanted


@needs_numba
def test_levels_to_two_bits_and_what_does_not_decode() -> None:
    every = np.array(np.meshgrid(*[[-1, 0, 1, 2]] * 4, indexing="ij"), dtype=np.int8)
    words = np.ascontiguousarray(every.reshape(4, -1).T).view(np.uint32).reshape(-1)
    for backend in (kernels_for(0, "compiled"), kernels_for(0, "numpy")):
        packed = np.empty(256, dtype=np.uint8)
        backend.fold(words, packed)
        assert np.array_equal(packed, FourLevels().encode(words.view(np.int8), None))
        assert backend.unfolds(packed, words, 4)
        no_trits = np.array(
            [not backend.unfolds(packed[i : i + 1], words[i : i + 1], 3) for i in range(256)]
        )
        assert np.array_equal(no_trits, (words.view(np.int8).reshape(-1, 4) == 2).any(axis=1))
        for bit in range(8):
            packed[17] ^= np.uint8(1 << bit)
            assert not backend.unfolds(packed, words, 4)
            packed[17] ^= np.uint8(1 << bit)
        for wrong in (-2, 3, 127, -128):  # what no two bits hold
            levels = words.view(np.int8).copy()
            levels[5] = wrong
            beyond = levels.view(np.uint32)
            backend.fold(beyond, packed)
            assert not backend.unfolds(packed, beyond, 4)


@pytest.mark.parametrize("dtype", DTYPES)
def test_sums_against_float64(dtype: type) -> None:
    x = weights((3, 1003), dtype)
    exact = np.abs(x.astype(np.float64)).sum(axis=1)
    assert plain.abs_sums(x) == pytest.approx(exact, rel=float(sum_error(1003)))
    values = weights((3, 1003), np.float32, seed=4)
    truth = x.astype(np.longdouble)
    assert plain.squared_sums(x.reshape(-1), values.reshape(-1)) == pytest.approx(
        [float(((truth - values) ** 2).sum()), float((truth**2).sum())], rel=float(sum_error(3009))
    )
    cuts = np.array([[-1.0, 2.0]] * 3, dtype=dtype)
    counts, sums = plain.cells(x, cuts)
    inside = (x >= -1) & (x <= 2)
    for cell, mask in enumerate((x < -1, inside, x > 2)):
        assert np.array_equal(counts[:, cell], mask.sum(axis=1))
        kept = np.where(mask, x, 0).astype(np.float64)
        assert_close_sums(sums[:, cell], kept.sum(axis=1), np.abs(kept).sum(axis=1), 1003)


@needs_numba
@pytest.mark.parametrize("rule", sorted(RULES))
@pytest.mark.parametrize(
    ("shape", "options"),
    [((1_060_001,), {}), ((900, 701), {"per": "row"}), ((90, 301), {"group_size": 128})],
)
def test_rules_are_bit_identical(
    rule: str, shape: tuple[int, ...], options: dict[str, object]
) -> None:
    tensor = torch.from_numpy(np.random.default_rng(1).laplace(size=shape).astype(np.float32))
    view = view_weights(tensor, "w")
    units = resolve_units(view.rows, view.cols, **options)
    coded = [
        code_units(
            view,
            units,
            RULES[rule],
            n_planes=2 if rule == "planes" else 1,
            has_offset=rule == "asymmetric",
            backend=backend,
        )
        for backend in ("numpy", "compiled")
    ]
    assert np.array_equal(coded[0].trits, coded[1].trits)
    assert np.array_equal(coded[0].scales, coded[1].scales)
    if rule == "asymmetric":
        assert np.array_equal(coded[0].offsets, coded[1].offsets)


def test_threads_change_nothing() -> None:
    tensor = torch.from_numpy(
        np.random.default_rng(2).standard_normal((1100, 1000)).astype(np.float32)
    )
    threads = torch.get_num_threads()
    try:
        found = []
        for n in (1, 3):
            torch.set_num_threads(n)
            found.append(PerLayerQuant.quantize(tensor, "w"))
            found.append(PerLayerQuant.quantize(tensor, "w", rule="exact"))
    finally:
        torch.set_num_threads(threads)
    for one, three in zip(found[:2], found[2:], strict=True):
        assert one.scale == three.scale
        assert torch.equal(one.trits, three.trits)
        assert one.mse(tensor) == three.mse(tensor)


def test_without_numba(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "numba_is_here", lambda: False)
    assert kernels_for(1 << 30) is not None
    assert kernels_for(1 << 30).abs_sums is plain.abs_sums
    with pytest.raises(UsageError, match="pip install"):
        kernels_for(1, "compiled")


@needs_numba
def test_numba_that_cannot_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> None:
        raise ImportError(f"{name} needs another NumPy")

    kernels._compiled.cache_clear()
    monkeypatch.setattr(importlib, "import_module", fail)
    try:
        assert kernels_for(1 << 30).abs_sums is plain.abs_sums
        with pytest.raises(UsageError, match="cannot be used"):
            kernels_for(1, "compiled")
    finally:
        kernels._compiled.cache_clear()


@needs_numba
def test_no_place_for_the_compilers_cache() -> None:
    class Numba:
        @staticmethod
        def njit(loop: object, *, nogil: bool, cache: bool = False) -> object:
            if cache:
                raise RuntimeError("cannot cache function: no locator available")
            return loop

    assert kernels._compile(Numba, plain.codes) is plain.codes


def test_small_tensors_do_not_wait_for_the_compiler() -> None:
    assert kernels_for(1000).abs_sums is plain.abs_sums


def test_unknown_backend() -> None:
    with pytest.raises(UsageError, match="'cuda' is unknown"):
        kernels_for(1, "cuda")


def test_parallel_map_keeps_order_and_raises() -> None:
    assert parallel_map(lambda i: i * i, range(50)) == [i * i for i in range(50)]

    def fail(i: int) -> int:
        raise UsageError(f"item {i}")

    with pytest.raises(UsageError, match="item 0"):
        parallel_map(fail, range(5))


@pytest.fixture
def three_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def test_a_thread_that_never_begins_is_not_waited_for(
    three_threads: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr(kernels, "start_new_thread", lambda *given: asked.append(given))
    assert parallel_map(lambda i: -i, range(9)) == [-i for i in range(9)]
    assert len(asked) == 2

    def none(*_: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(kernels, "start_new_thread", none)
    assert parallel_map(lambda i: -i, range(9)) == [-i for i in range(9)]


def test_items_of_other_threads_are_waited_for(three_threads: None) -> None:
    together = Barrier(3)

    def slow(i: int) -> int:
        together.wait(timeout=60)  # three threads are at three items
        if get_ident() != caller:
            time.sleep(0.05)
        return -i

    caller = get_ident()
    for _ in range(5):
        assert parallel_map(slow, range(3)) == [0, -1, -2]

    def fail(i: int) -> int:
        together.wait(timeout=60)
        raise UsageError(f"item {i}")

    with pytest.raises(UsageError, match="item 0"):
        parallel_map(fail, range(3))
