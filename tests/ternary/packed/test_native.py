"""The library built with the package against float64, and the ways around it."""

from __future__ import annotations

import ctypes
import mmap
import platform
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.functional import linear
from torch.nn.utils import prune

from packed_cases import RULES, biases, check, inputs, made, packed_matrices
from trilens.errors import ShapeError
from trilens.ternary.packed import multiply as subject
from trilens.ternary.packed.cpu import native
from trilens.ternary.packed.cpu import thread_pool as team
from trilens.ternary.packed.linear import Packed, TernaryLinear
from trilens.ternary.packed.multiply import multiply, multiply_back
from trilens.ternary.quantize import PerLayerQuant

ROOT = Path(__file__).parents[3]
LEVEL = native._level()
WAYS = ["without", "registers", "tiles"][: LEVEL + 1]


@pytest.fixture(autouse=True)
def small_is_worth_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subject, "_WORTH_PACKED", 0)


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """With the library as far as this processor can use it, and as if there were none."""
    if request.param == "without":
        monkeypatch.setattr(native, "_library", lambda: None)
    level = WAYS.index(request.param)
    monkeypatch.setattr(native, "_level", lambda: level)
    return request.param


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the library was asked for."""
    found: list[str] = []
    ask = native._function
    monkeypatch.setattr(native, "_function", lambda name: found.append(name) or ask(name))
    return found


@st.composite
def cases(draw: st.DrawFn) -> tuple[Packed, torch.Tensor, torch.Tensor | None]:
    packed = draw(packed_matrices((1, 150), (1, 700), [16, 32, 48, 128, 1024]))
    count = draw(st.integers(1, 17) | st.sampled_from([32, 40, 65]))
    x = inputs(count, packed.cols, torch.bfloat16)
    return packed, x, draw(biases(packed, x))


def test_it_is_built_where_a_compiler_is() -> None:
    compilers = [shutil.which(name) for name in ("cc", "gcc", "clang")]
    again = "build it (again): pip install -e ."
    assert (native._library() is not None) or not any(compilers), again


def test_it_computes_where_the_processor_can() -> None:
    flags = set()
    if sys.platform == "linux" and platform.machine() == "x86_64":
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
        line = next(line for line in text.splitlines() if line.startswith("flags"))
        flags = set(line.split())
    needed = "avx512f avx512bw avx512vl avx512dq avx512_bf16 avx512vbmi avx512_vnni gfni"
    able = {*needed.split()} <= flags and native._library() is not None
    assert (LEVEL > 0) == able
    if LEVEL < 2:  # tiles are also the system's to give
        assert not (able and {"amx_tile", "amx_bf16", "amx_int8"} <= flags and gives_tiles())


def gives_tiles() -> bool:
    """Whether the system gives a process of its own what tiles need, as torch asks for it."""
    asks = "import torch; raise SystemExit(not torch.cpu._init_amx())"
    return subprocess.run([sys.executable, "-c", asks], check=False).returncode == 0


def test_it_is_optional_and_its_source_is_shipped() -> None:
    tools = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]
    (module,) = tools["setuptools"]["ext-modules"]
    assert module["optional"] is True
    shipped = tools["setuptools"]["package-data"]["trilens"]
    package = ROOT / "src/trilens"
    files = {str(path.relative_to(ROOT)) for name in shipped for path in package.glob(name)}
    here = Path(native.__file__).parent
    assert {str(path.relative_to(ROOT)) for path in here.glob("*.c")} == set(module["sources"])
    assert {str(path.relative_to(ROOT)) for path in here.glob("*.h")} == set(module["depends"])
    assert {*module["sources"], *module["depends"]} <= files


def test_the_fields_of_a_job_are_those_of_the_source() -> None:
    source = (Path(native.__file__).parent / "native.h").read_text(encoding="utf-8")
    inside = source[source.index("#define FIELDS") + len("#define FIELDS") :].split("\n\n")[0]
    assert tuple(name.strip() for name in inside.replace("\\", "").split(",")) == native.JOB


@pytest.mark.skipif(native._library() is None, reason="there was no compiler to build the library")
def test_a_library_of_other_sources_is_not_called(monkeypatch: pytest.MonkeyPatch) -> None:
    look = native._library.__wrapped__  # what is found is kept for the process
    one, two, *others = native.JOB
    monkeypatch.setattr(native, "JOB", (two, one, *others))
    assert look() is None
    monkeypatch.setattr(native, "JOB", native.JOB[:-1])
    assert look() is None


@pytest.mark.skipif(native._library() is None, reason="there was no compiler to build the library")
def test_a_library_of_the_same_fields_but_other_bodies_is_not_called(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    look = native._library.__wrapped__
    here = Path(native.__file__).parent
    for file in (*here.glob("*.c"), *here.glob("*.h"), *here.glob("_native*")):
        shutil.copy(file, tmp_path)
    monkeypatch.setattr(native, "__file__", str(tmp_path / "native.py"))
    assert look() is not None
    source = tmp_path / "native_few.c"
    source.write_text(source.read_text(encoding="utf-8") + "\n", encoding="utf-8")
    assert look() is None
    for file in (*tmp_path.glob("*.c"), *tmp_path.glob("*.h")):
        file.unlink()
    assert look() is not None  # shipped without its sources


@settings(max_examples=60, deadline=None)
@given(cases())
def _holds(case: tuple[Packed, torch.Tensor, torch.Tensor | None]) -> None:
    packed, x, bias = case
    check(multiply(x, packed, bias), x, packed, bias)


def test_it_is_the_dense_layer(way: str, monkeypatch: pytest.MonkeyPatch, used: list[str]) -> None:
    monkeypatch.setattr(native, "_CHUNK_BYTES", 20_000)  # several chunks
    _holds()
    assert ("multiply" in used) == (way == "registers")
    assert ("multiply_tiles" in used) == (way == "tiles")


@pytest.mark.parametrize("options", [{}, {"per": "row"}, {"group_size": 32}, {"group_size": 48}])
@pytest.mark.parametrize("rule", [*RULES, "quad"])
def test_tiles_are_the_dense_weight_bit_for_bit(way: str, rule: str, options: dict) -> None:
    packed = made(70, 203, rule=rule, **options)
    dense = packed.dense(torch.bfloat16)
    tile = subject._unpacked(packed, 3, 68, torch.bfloat16, torch.bfloat16)
    assert torch.equal(tile, dense[3:68])
    wide = subject._unpacked(packed, 3, 68, torch.bfloat16, torch.float32)
    assert torch.equal(wide, dense[3:68].float())


@pytest.fixture
def shapes_of_tiles() -> Iterator[tuple[Any, Any]]:
    """`load` and `store` of how this thread's tiles are shaped: 64 bytes."""
    room = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    room.write(bytes.fromhex("c4e2784907c3 c4e2794907c3"))  # ldtilecfg, sttilecfg (%rdi); ret
    pinned = ctypes.c_char.from_buffer(room)
    begin = ctypes.addressof(pinned)
    call = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
    yield call(begin), call(begin + 6)
    del pinned
    room.close()


@pytest.mark.skipif(LEVEL < 2, reason="this processor has no tiles, or the system gives none")
@pytest.mark.parametrize("shaped", [True, False])
@pytest.mark.parametrize("n_inputs", [5, 12, 40])
def test_tiles_are_left_as_another_library_shaped_them(
    shapes_of_tiles: tuple[Any, Any], used: list[str], n_inputs: int, shaped: bool
) -> None:
    load, store = shapes_of_tiles
    threads = torch.get_num_threads()
    before, after = (ctypes.create_string_buffer(64) for _ in range(2))
    packed, x = made(70, 256, rule="exact"), inputs(n_inputs, 256, torch.bfloat16)
    torch.set_num_threads(1)  # this one
    try:
        if shaped:
            before[0], before[16], before[48] = 1, 32, 5  # the first tile: 5 rows of 32 bytes
        load(before)
        multiply(x, packed)
        store(after)
    finally:
        load(ctypes.create_string_buffer(64))
        torch.set_num_threads(threads)
    assert ("multiply_limbs" if n_inputs == 5 else "multiply_tiles") in used
    assert after.raw == before.raw


@pytest.mark.parametrize("n_inputs", [1, 2, 7, 20])
def test_four_levels_and_negative_scales(way: str, n_inputs: int) -> None:
    packed = made(100, 256, rule="quad", group_size=128)
    x = inputs(n_inputs, 256, torch.bfloat16)
    check(multiply(x, packed), x, packed, None)
    with torch.no_grad():
        packed.scale.mul_(-1)
    check(multiply(x, packed), x, packed, None)


def test_many_inputs_go_to_torch(
    way: str, monkeypatch: pytest.MonkeyPatch, used: list[str]
) -> None:
    packed = made(300, 128, group_size=32)
    monkeypatch.setattr(subject, "_TILE_BYTES", 10_000)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    x = inputs(native._MOST_INPUTS + 1, 128, torch.bfloat16)
    check(multiply(x, packed), x, packed, None)
    assert [name for name in used if name.startswith("multiply")] == {
        "registers": ["multiply"],  # threads would meet after each tile
        "tiles": ["multiply_tiles"],
        "without": [],
    }[way]
    used.clear()
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    x = inputs(native._MOST_INPUTS + 1, 128, torch.bfloat16)
    check(multiply(x, packed), x, packed, None)
    assert "multiply" not in used
    assert ("multiply_tiles" in used) == (way == "tiles")
    assert ("unpack" in used) == (way == "registers")


def test_other_dtypes_and_odd_groups_do_without(used: list[str]) -> None:
    packed, odd = made(100, 128), made(100, 128, group_size=20)
    for matrix, dtype in ((packed, torch.float32), (packed, torch.half), (odd, torch.bfloat16)):
        x = inputs(3, 128, dtype)
        check(multiply(x, matrix), x, matrix, None)
    assert used == []


def even(n: int, cols: int) -> torch.Tensor:
    """Inputs of like sizes, which 14 bits hold."""
    generator = torch.Generator().manual_seed(n)
    return (2 * torch.rand(n, cols, generator=generator) - 1).bfloat16()


@pytest.mark.parametrize("rule", [*RULES, "quad"])
def test_every_rule_is_computed_by_the_library(way: str, rule: str, used: list[str]) -> None:
    packed = made(100, 600, rule=rule, group_size=64)
    for n_inputs in (1, 4, 5, 30):
        x = even(n_inputs, 600)
        check(multiply(x, packed), x, packed, None)
    has_offset = packed.offset is not None
    n_few = {
        "without": 0,
        "registers": 1 if rule in ("absmean", "planes") else 0,
        "tiles": 0 if has_offset else 1,
    }[way]
    n_one = int(way != "without" and not has_offset)
    few, many = {"tiles": ("_limbs", "_tiles")}.get(way, ("_few", ""))
    asked = ["prepare_one", "multiply_one"] * n_one
    asked += [f"prepare{few}", f"multiply{few}"] * n_few
    asked += [f"prepare{many}", f"multiply{many}"] * (4 - n_one - n_few)
    assert used == ([] if way == "without" else asked)


@pytest.mark.parametrize("group_size", [32, 96, 128, None])
@pytest.mark.parametrize("rule", ["absmean", "planes", "quad"])
def test_groups_beyond_those_at_hand(way: str, rule: str, group_size: int | None) -> None:
    per = {} if group_size else {"per": "row"}
    packed = made(70, 9000, rule=rule, group_size=group_size, **per)
    for n_inputs in (1, 3, 16, 37):
        x = inputs(n_inputs, 9000, torch.bfloat16)
        check(multiply(x, packed), x, packed, None)


@pytest.mark.parametrize(
    ("group_size", "most"),
    [(64, 4), (96, 4), (128, 8), (256, 16), (384, 8), (1024, 16), (None, 16)],
)
@pytest.mark.parametrize("rule", ["absmean", "planes", "quad"])
def test_few_inputs_in_whole_numbers(
    way: str, rule: str, group_size: int | None, most: int, used: list[str]
) -> None:
    per = {} if group_size else {"per": "row"}
    packed = made(75, 2500, rule=rule, group_size=group_size, **per)
    bias = torch.randn(75)
    for n_inputs in (1, 2, 3, most, most + 1):
        x = even(n_inputs, 2500)
        used.clear()
        check(multiply(x, packed, bias.bfloat16()), x, packed, bias.bfloat16())
        if way == "tiles":
            assert ("multiply_limbs" in used) == (1 < n_inputs <= most)
        assert ("multiply_one" in used) == (n_inputs == 1 and way != "without")


@pytest.mark.parametrize("n_inputs", [1, 3])
@pytest.mark.parametrize(("largest", "asked"), [(1, 1), (30, 2), (10_000, 2)])
def test_numbers_have_the_bits_that_they_need(
    way: str, n_inputs: int, largest: int, asked: int, used: list[str]
) -> None:
    packed = made(100, 1000, group_size=128)
    x = even(n_inputs, 1000)
    x[-1, 7] = largest
    check(multiply(x, packed), x, packed, None)
    if way == "without" or (way == "registers" and n_inputs > 1):
        return
    assert used.count("prepare_one" if n_inputs == 1 else "prepare_limbs") == asked
    otherwise = "multiply_tiles" if way == "tiles" else "multiply_few"
    assert (otherwise in used) == (largest == 10_000)


def test_small_numbers_count_where_large_ones_do_not(way: str) -> None:
    """A row whose trits are 0 at the large numbers shows what 14 bits lost of the others."""
    packed = made(64, 1024, group_size=128)
    with torch.no_grad():
        packed.codes[:, :192] = 0x55  # zeros in three quarters of the columns
    weights = packed.dense(torch.bfloat16).double()
    for size, n_inputs in product((2.0**-6, 2.0**-10, 2.0**-12), (1, 2)):
        x = even(n_inputs, 1024)
        x[:, 768:] *= size
        expected = x[:, 768:].double() @ weights[:, 768:].T
        terms = x[:, 768:].double().abs() @ weights[:, 768:].abs().T
        # terms cancel to less than half of their size, of which bfloat16 rounds off 2^-8
        assert float(((multiply(x, packed).double() - expected).abs() / terms).max()) < 2.0**-9
    two = torch.zeros(1, 1024, dtype=torch.bfloat16)
    two[0, 0], two[0, 800] = 30, 5e-4
    expected = two[0, 800].double() * weights[:, 800]
    # 5e-4 is 65.5 units of 22 bits beside 30: half a unit of it, and half a unit of bfloat16
    rtol = 2.0**-7 + 2.0**-8
    assert torch.allclose(multiply(two, packed)[0].double(), expected, rtol=rtol, atol=0)


def test_one_input_whose_numbers_differ_much_in_size(way: str, used: list[str]) -> None:
    """Whole numbers of 22 bits would lose the small ones, which alone count where trits are 0."""
    packed = made(100, 512, group_size=128)
    with torch.no_grad():
        packed.codes[:, 1] = 0x55  # zeros
    x = inputs(1, 512, torch.bfloat16) / 64
    x[0, 5] = 2.0**20
    found = multiply(x, packed)
    without = x.clone()
    without[0, 5] = 0
    check(found, without, packed, None)
    assert not {"multiply_one", "multiply_limbs"} & {*used}
    assert ("multiply_tiles" in used) == (way == "tiles")
    check(multiply(0 * x, packed), 0 * x, packed, None)
    check(multiply(without * 1e-30, packed), without * 1e-30, packed, None)
    check(multiply(without * 1e30, packed), without * 1e30, packed, None)


def test_inputs_that_are_views(way: str) -> None:
    packed = made(100, 96, per="row")
    wide = inputs(8, 300, torch.bfloat16)
    for x in (wide[:, 7:103], wide[::2, 0:288:3], wide[:1].expand(5, -1)[:, :96], wide[0, :96]):
        flat = x.reshape(-1, 96).clone()
        assert torch.equal(multiply(x, packed).reshape(-1, 100), multiply(flat, packed))
    assert multiply(wide[:0, :96], packed).shape == (0, 100)


def test_infinite_inputs_are_not_hidden(way: str) -> None:
    packed = made(100, 64, per="row")
    x = inputs(1, 64, torch.bfloat16)
    x[0, 5] = float("inf")
    expected = (x.float() @ packed.dense(torch.bfloat16).float().T).bfloat16()
    found = multiply(x, packed)
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found[found.isinf()], expected[expected.isinf()])
    x[0, 5] = float("nan")
    assert multiply(x, packed).isnan().all()


@pytest.mark.parametrize("rule", ["absmean", "planes"])
@pytest.mark.parametrize("n_inputs", [1, 4, 7])
def test_inputs_near_the_end_of_their_range(way: str, rule: str, n_inputs: int) -> None:
    packed = made(100, 512, rule=rule, group_size=128)
    with torch.no_grad():  # a product of one input alone stays within the range
        packed.scale.div_(1024)
        if packed.second_scale is not None:
            packed.second_scale.div_(1024)
    x = inputs(n_inputs, 512, torch.bfloat16).sign() * 3e38
    found = multiply(x, packed)
    assert found.isfinite().all()
    check(found, x, packed, None)
    x[-1, 7] = 1.0  # one alone is enough
    check(multiply(x, packed), x, packed, None)


@pytest.mark.parametrize("n_inputs", [1, 3, 20])
@pytest.mark.parametrize("openmp", [True, False])
def test_threads_share_the_rows(
    way: str, openmp: bool, n_inputs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not openmp:
        monkeypatch.setattr(team, "_openmp", lambda: None)
    packed, x = made(1000, 300, group_size=32), inputs(n_inputs, 300, torch.bfloat16)
    alone = multiply(x, packed)
    monkeypatch.setattr(subject, "_WORTH_A_THREAD", 1)
    monkeypatch.setattr(native, "_WORTH_A_THREAD", 1)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        for _ in range(5):
            found = multiply(x, packed)
            assert torch.equal(found, alone) or way == "without"
            check(found, x, packed, None)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("n_inputs", [1, 2])
def test_a_product_within_a_product_has_memory_of_its_own(
    way: str, n_inputs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between two steps of a product Python may run handlers of signals, or another thread."""
    outer, inner = made(100, 512, group_size=128), made(60, 300, rule="planes", group_size=32)
    x, y = inputs(n_inputs, 512, torch.bfloat16), inputs(1, 300, torch.bfloat16)
    alone = multiply(x, outer)
    run, within = native.run_job, []

    def interrupted(*args: Any) -> None:
        run(*args)
        monkeypatch.setattr(native, "run_job", run)
        within.append(multiply(y, inner))
        monkeypatch.setattr(native, "run_job", interrupted)

    monkeypatch.setattr(native, "run_job", interrupted)
    found = multiply(x, outer)
    monkeypatch.undo()
    assert torch.equal(found, alone)
    assert bool(within) == (way != "without")
    for one in within:
        check(one, y, inner, None)


@pytest.mark.parametrize("n_inputs", [1, 3, 40])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_memory_is_where_codes_are_whatever_the_default_device_is(
    way: str, dtype: torch.dtype, n_inputs: int
) -> None:
    """Compiled code writes there; tensors of another device have no address that it knows."""
    layer = TernaryLinear.from_quant(PerLayerQuant.quantize(torch.randn(100, 512), "w"))
    x = inputs(n_inputs, 512, dtype)
    for bits in (None, 8):
        layer.activation_bits = bits
        expected = layer(x)
        native._scratch.clear()
        with torch.device("meta"):
            assert torch.equal(layer(x), expected)
            back = multiply_back(expected, layer.packed)
        assert torch.equal(back, multiply_back(expected, layer.packed))


def test_a_matrix_that_moved_is_read_where_it_is_now(way: str) -> None:
    """Jobs are kept from call to call."""
    layer = TernaryLinear.from_quant(PerLayerQuant.quantize(torch.randn(100, 512), "w"))
    other = TernaryLinear.from_quant(PerLayerQuant.quantize(torch.randn(100, 512), "w"))
    x = inputs(1, 512, torch.bfloat16)
    before = layer(x)
    layer.codes.data = other.codes.data.clone()
    layer.scale.data = other.scale.data.clone()
    assert torch.equal(layer(x), other(x)) and not torch.equal(layer(x), before)
    layer.scale.data.mul_(2)
    assert torch.equal(layer(x), 2 * other(x))


@pytest.mark.parametrize("shape", [(513,), (2, 256), (512, 1), ()])
def test_inputs_of_another_width_are_refused(way: str, shape: tuple[int, ...]) -> None:
    layer = TernaryLinear.from_quant(PerLayerQuant.quantize(torch.randn(100, 512), "w"))
    x = torch.zeros(shape, dtype=torch.bfloat16)
    with pytest.raises(ShapeError, match=re.escape(f"inputs have shape {shape}: the layer takes")):
        layer(x)
    layer.activation_bits = 8
    with pytest.raises(ShapeError, match="512"):
        layer(x)
    layer.rotated = True
    with pytest.raises(ShapeError, match="512"):
        layer(x)
    with pytest.raises(ShapeError, match="gradients have shape"):
        multiply_back(torch.zeros(3, 101), layer.packed)


@pytest.mark.parametrize("n_inputs", [1, 3, 40])
def test_a_bias_is_read_only_where_it_is_one(way: str, n_inputs: int) -> None:
    """Another shape or device means what it means to torch."""
    packed, x = made(100, 512, group_size=128), inputs(n_inputs, 512, torch.bfloat16)
    one = torch.ones(1, dtype=torch.bfloat16)
    assert torch.equal(multiply(x, packed, one), linear(x, packed.dense(x.dtype), one))
    for wrong in (torch.zeros(50), torch.zeros(100, device="meta")):
        with pytest.raises((RuntimeError, NotImplementedError)):
            multiply(x, packed, wrong.bfloat16())


def test_a_bias_may_be_made_anew_at_each_call(way: str) -> None:
    layer = TernaryLinear.from_quant(
        PerLayerQuant.quantize(torch.randn(100, 512), "w"), torch.randn(100), dtype=torch.bfloat16
    )
    x = inputs(1, 512, torch.bfloat16)
    expected = layer(x)
    prune.random_unstructured(layer, "bias", 0.0)  # no parameter any more
    assert torch.equal(layer(x), expected)


def test_modes_that_watch_see_operations_of_torch(way: str) -> None:
    layer = TernaryLinear.from_quant(PerLayerQuant.quantize(torch.randn(100, 512), "w"))
    x = inputs(1, 512, torch.bfloat16)
    expected = linear(x, layer.packed.dense(x.dtype))
    assert torch.equal(make_fx(layer)(x)(x), expected)
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert layer(x).shape == (1, 100)


def test_large_scales_of_small_inputs(way: str) -> None:
    packed = made(100, 512, group_size=128)
    with torch.no_grad():
        packed.scale.mul_(1e33 / packed.scale.max())
    for n_inputs in (1, 2, 20):
        x = even(n_inputs, 512) * 1e-20
        assert multiply(x, packed).isfinite().all()
        check(multiply(x, packed), x, packed, None)


def test_gradients_and_bias_of_a_layer(way: str) -> None:
    weights = torch.randn(70, 96, generator=torch.Generator().manual_seed(3))
    quant = PerLayerQuant.quantize(weights, "w", rule="exact", group_size=32)
    layer = TernaryLinear.from_quant(quant, torch.linspace(-1, 1, 70), dtype=torch.bfloat16)
    x = inputs(9, 96, torch.bfloat16).requires_grad_()
    y = layer(x)
    y.backward(torch.ones_like(y))
    check(y.detach(), x.detach(), layer.packed, layer.bias.detach())
    assert torch.equal(x.grad, multiply_back(torch.ones_like(y), layer.packed))
    assert torch.equal(layer.bias.grad, torch.full((70,), 9.0, dtype=torch.bfloat16))
