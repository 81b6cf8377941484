"""`PerLayerQuant`: the seed's semantics, its accuracy, and every input it must survive."""

from __future__ import annotations

import math
import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tolerances import sum_error
from trilens.errors import (
    DtypeError,
    NonFiniteError,
    ShapeError,
    UsageError,
    ValueRangeError,
)
from trilens.ternary.quantize import PerLayerQuant
from trilens.ternary.rules.rules import RULES

RULE_NAMES = sorted(RULES)


def gaussian(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def seed_trits(weights: torch.Tensor) -> tuple[float, torch.Tensor]:
    """α and trits from exact sums, one weight at a time."""
    flat = weights.double().flatten().tolist()
    alpha = math.fsum(abs(w) for w in flat) / len(flat)
    trits = [1 if w > 0.5 * alpha else -1 if w < -0.5 * alpha else 0 for w in flat]
    return alpha, torch.tensor(trits, dtype=torch.int8).reshape(weights.shape)


class TestTheSeed:
    def test_by_hand(self) -> None:
        quant = PerLayerQuant.quantize([[1.0, -2.0], [0.25, 0.75]], "w")
        assert quant.scale == 1.0
        assert quant.trits.tolist() == [[1, -1], [0, 1]]
        assert quant.trits.dtype == torch.int8
        assert quant.shape == (2, 2)
        assert quant.name == "w"
        assert quant.sparsity == 0.25
        assert quant.reconstruct().tolist() == [[1.0, -1.0], [0.0, 1.0]]
        assert quant.reconstruct().dtype == torch.float32
        error = 1.0 + 0.0625 + 0.0625
        assert quant.mse([[1.0, -2.0], [0.25, 0.75]]) == error / 4
        assert quant.relative_error([[1.0, -2.0], [0.25, 0.75]]) == error / 5.625

    def test_a_tie_at_half_the_scale_is_zero(self) -> None:
        quant = PerLayerQuant.quantize(torch.tensor([0.5, -0.5, 1.0, -2.0]), "w")
        assert quant.scale == 1.0
        assert quant.trits.tolist() == [0, 0, 1, -1]

    def test_just_beside_the_tie(self) -> None:
        above = float(np.nextafter(np.float32(0.5), np.float32(1)))
        below = float(np.nextafter(np.float32(0.5), np.float32(0)))
        weights = torch.tensor([above, -above, below, -below, 1.5, 1.5], dtype=torch.float32)
        quant = PerLayerQuant.quantize(weights, "w")
        alpha, trits = seed_trits(weights)
        assert quant.scale == alpha
        assert torch.equal(quant.trits, trits)

    @pytest.mark.parametrize("sign", [1, -1])
    def test_a_third_of_a_rounding_beside_the_tie(self, sign: int) -> None:
        # 0.5α is 1.25 ∓ a third of float32's spacing there, which float32 rounds to 1.25 itself
        for towards, trit in ((0, sign), (9, 0)):
            last = np.nextafter(np.float32(3.75), np.float32(towards))
            weights = np.array([1.25, 2.5, last], dtype=np.float32) * np.float32(sign)
            quant = PerLayerQuant.quantize(weights, "w")
            assert np.float32(0.5 * quant.scale) == np.float32(1.25)
            assert quant.trits.tolist() == [trit, sign, sign]

    @settings(max_examples=60, deadline=None)
    @given(
        st.lists(
            st.floats(-(2.0**99), 2.0**99, width=32, allow_nan=False), min_size=1, max_size=300
        ).filter(lambda ws: len({abs(w) for w in ws if w}) > 1)
    )
    def test_any_weights(self, weights: list[float]) -> None:
        tensor = torch.tensor(weights, dtype=torch.float32)
        quant = PerLayerQuant.quantize(tensor, "w")
        alpha, _ = seed_trits(tensor)
        # the threshold is checked with our own α
        assert quant.scale == pytest.approx(alpha, rel=float(sum_error(len(weights))))
        cut = 0.5 * quant.scale
        expected = [1 if w > cut else -1 if w < -cut else 0 for w in tensor.tolist()]
        assert quant.trits.tolist() == expected

    def test_typical_sparsity(self) -> None:
        assert PerLayerQuant.quantize(gaussian(512, 512), "w").sparsity == pytest.approx(
            0.310, abs=0.005
        )

    def test_scale_times_trits_is_the_reconstruction(self) -> None:
        quant = PerLayerQuant.quantize(gaussian(33, 77), "w")
        assert torch.equal(quant.reconstruct(), quant.scale * quant.trits.float())


class TestAccuracy:
    def test_scale_and_mse_against_exact_sums(self) -> None:
        # An offset makes a float32 sum drift; 1.5 million weights span two blocks.
        weights = (gaussian(1_500_007) * 0.02 + 0.3).numpy()
        quant = PerLayerQuant.quantize(weights, "w")
        alpha = math.fsum(np.abs(weights.astype(np.float64)).tolist()) / weights.size
        close = float(sum_error(weights.size))  # float64 sums, all terms of one sign
        assert quant.scale == pytest.approx(alpha, rel=close)
        truth = weights.astype(np.float64) - quant.reconstruct().double().numpy()
        exact = math.fsum((truth * truth).tolist()) / weights.size
        assert quant.mse(weights) == pytest.approx(exact, rel=close)
        energy = math.fsum((weights.astype(np.float64) ** 2).tolist()) / weights.size
        assert quant.relative_error(weights) == pytest.approx(exact / energy, rel=2 * close)

    def test_flat_original_is_read_too(self) -> None:
        weights = gaussian(6, 7)
        quant = PerLayerQuant.quantize(weights, "w")
        assert quant.mse(weights.flatten()) == quant.mse(weights)

    def test_original_of_another_shape_is_refused(self) -> None:
        quant = PerLayerQuant.quantize(gaussian(6, 7), "w")
        with pytest.raises(ShapeError, match=r"\(7, 6\)"):
            quant.mse(gaussian(7, 6))

    def test_original_with_nan_is_refused(self) -> None:
        weights = gaussian(6, 7)
        quant = PerLayerQuant.quantize(weights, "w")
        weights[2, 3] = math.nan
        with pytest.raises(NonFiniteError, match=r"index \(2, 3\)"):
            quant.mse(weights)

    def test_memory_stays_within_blocks(self) -> None:
        weights = gaussian(8, 1 << 20).numpy()  # 32 MB; two float64 copies would be 128 MB
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        tracemalloc.start()
        try:
            quant = PerLayerQuant.quantize(weights, "w")
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
            torch.set_num_threads(threads)
        assert peak < quant.trits.numel() + (50 << 20)


class TestShapes:
    def test_flat_weights_take_the_shape_given(self) -> None:
        quant = PerLayerQuant.quantize([1.0, -2.0, 0.25, 0.75], "w", (2, 2))
        assert quant.trits.shape == (2, 2)

    def test_shape_that_does_not_hold_them(self) -> None:
        with pytest.raises(ShapeError, match=r"shape \(2, 3\) of weights 'w' does not hold 4"):
            PerLayerQuant.quantize([1.0, -2.0, 0.25, 0.75], "w", (2, 3))

    def test_shape_with_negative_sizes(self) -> None:
        with pytest.raises(ShapeError, match="each 1 or more"):
            PerLayerQuant.quantize([1.0, -2.0, 0.25, 0.75], "w", (-2, -2))

    @pytest.mark.parametrize("shape", [4, (2.0, 2.0), "22"])
    def test_shape_that_is_none(self, shape: object) -> None:
        with pytest.raises(UsageError, match="no sequence of whole numbers"):
            PerLayerQuant.quantize([1.0, -2.0, 0.25, 0.75], "w", shape)

    def test_matrix_is_not_given_another_shape(self) -> None:
        with pytest.raises(ShapeError, match="only flat weights"):
            PerLayerQuant.quantize(gaussian(4, 8), "w", (8, 4))

    @pytest.mark.parametrize("shape", [(24,), (4, 6), (2, 3, 4), (1, 1, 1, 24)])
    @pytest.mark.parametrize("rule", RULE_NAMES)
    def test_any_rank_is_kept(self, shape: tuple[int, ...], rule: str) -> None:
        quant = PerLayerQuant.quantize(gaussian(*shape), "w", rule=rule, group_size=4)
        assert quant.shape == tuple(quant.trits.shape) == tuple(quant.reconstruct().shape) == shape

    def test_rank_0(self) -> None:
        with pytest.raises(ShapeError, match="0-D"):
            PerLayerQuant.quantize(torch.tensor(1.0), "w")

    @pytest.mark.parametrize("shape", [(0,), (0, 4), (4, 0)])
    def test_empty(self, shape: tuple[int, ...]) -> None:
        with pytest.raises(ShapeError, match="empty"):
            PerLayerQuant.quantize(torch.zeros(shape), "w")

    def test_ragged_list(self) -> None:
        with pytest.raises(ShapeError, match="nested list"):
            PerLayerQuant.quantize([[1.0, 2.0], [3.0]], "w")


class TestUnits:
    def test_per_row_is_each_row_alone(self) -> None:
        weights = gaussian(5, 40)
        for rule in RULE_NAMES:
            quant = PerLayerQuant.quantize(weights, "w", rule=rule, per="row")
            assert quant.scale.shape == (5,)
            for row in range(5):
                alone = PerLayerQuant.quantize(weights[row], "w", rule=rule)
                assert torch.equal(alone.trits, quant.trits[row])
                assert torch.equal(alone.reconstruct(), quant.reconstruct()[row])

    def test_groups_are_each_group_alone_and_the_last_may_be_shorter(self) -> None:
        weights = gaussian(3, 300)
        for rule in RULE_NAMES:
            quant = PerLayerQuant.quantize(weights, "w", rule=rule, group_size=128)
            assert quant.scale.shape == (3, 3)
            assert quant.last_group == 44
            for start in (0, 128, 256):
                part = weights[:, start : start + 128].contiguous()
                alone = PerLayerQuant.quantize(part, "w", rule=rule, per="row")
                assert torch.equal(alone.trits, quant.trits[:, start : start + 128])
                assert torch.equal(alone.reconstruct(), quant.reconstruct()[:, start : start + 128])

    def test_group_that_divides_the_row(self) -> None:
        assert PerLayerQuant.quantize(gaussian(3, 256), "w", group_size=128).last_group == 128

    def test_group_longer_than_the_row(self) -> None:
        quant = PerLayerQuant.quantize(gaussian(3, 40), "w", group_size=128)
        rows = PerLayerQuant.quantize(gaussian(3, 40), "w", per="row")
        assert quant.last_group == 40
        assert torch.equal(quant.reconstruct(), rows.reconstruct())

    @pytest.mark.parametrize("rule", ["absmean", "exact", "asymmetric"])
    def test_groups_longer_than_a_block(self, rule: str) -> None:
        weights = gaussian(1, 2_200_000)
        quant = PerLayerQuant.quantize(weights, "w", rule=rule, group_size=1_100_000)
        assert quant.last_group == 1_100_000
        uneven = PerLayerQuant.quantize(weights, "w", rule=rule, group_size=1_300_000)
        assert uneven.last_group == 900_000
        for result, start in ((quant, 1_100_000), (uneven, 1_300_000)):
            alone = PerLayerQuant.quantize(weights[0, start:], "w", rule=rule)
            assert torch.equal(result.trits[0, start:], alone.trits)
            assert torch.equal(result.reconstruct()[0, start:], alone.reconstruct())

    def test_groups_of_128_by_default(self) -> None:
        assert PerLayerQuant.quantize(gaussian(3, 256), "w", per="group").group_size == 128

    def test_one_scale_is_a_float(self) -> None:
        assert isinstance(PerLayerQuant.quantize(gaussian(3, 4), "w").scale, float)
        assert isinstance(PerLayerQuant.quantize(gaussian(4), "w", per="row").scale, float)

    def test_scales_are_flat_float32(self) -> None:
        quant = PerLayerQuant.quantize(gaussian(3, 256), "w", group_size=128)
        assert quant.scales.shape == (6,)
        assert quant.scales.dtype == np.float32
        assert PerLayerQuant.quantize(gaussian(3, 4), "w").scales.shape == (1,)

    @pytest.mark.parametrize("size", [0, -1])
    def test_group_size_out_of_range(self, size: int) -> None:
        with pytest.raises(ValueRangeError, match=f"group size {size} is out of range"):
            PerLayerQuant.quantize(gaussian(3, 4), "w", group_size=size)

    @pytest.mark.parametrize("size", [2.0, True, "128"])
    def test_group_size_of_another_type(self, size: object) -> None:
        with pytest.raises(UsageError, match="not a whole number"):
            PerLayerQuant.quantize(gaussian(3, 4), "w", group_size=size)

    def test_group_size_with_rows(self) -> None:
        with pytest.raises(UsageError, match="per row"):
            PerLayerQuant.quantize(gaussian(3, 4), "w", group_size=2, per="row")

    def test_unknown_options(self) -> None:
        with pytest.raises(UsageError, match="'median' is unknown: the rules are absmean"):
            PerLayerQuant.quantize(gaussian(3, 4), "w", rule="median")
        with pytest.raises(UsageError, match="'column' is unknown"):
            PerLayerQuant.quantize(gaussian(3, 4), "w", per="column")
        with pytest.raises(UsageError, match="'int8' is unknown"):
            PerLayerQuant.quantize(gaussian(3, 4), "w", scale_dtype="int8")


class TestValues:
    @pytest.mark.parametrize("rule", RULE_NAMES)
    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
    def test_non_finite(self, rule: str, value: float) -> None:
        weights = gaussian(6, 200)
        weights[2, 150] = value
        weights[4, 0] = value
        for options in ({}, {"per": "row"}, {"group_size": 64}):
            with pytest.raises(NonFiniteError, match=r"'w' hold 2 non-finite .*\(2, 150\)"):
                PerLayerQuant.quantize(weights, "w", rule=rule, **options)

    def test_one_non_finite_in_a_unit_that_looks_ternary(self) -> None:
        with pytest.raises(NonFiniteError, match="1 non-finite value of 4, the first is inf"):
            PerLayerQuant.quantize(torch.tensor([0.0, math.inf, 0.0, -0.0]), "w")

    @pytest.mark.parametrize("rule", RULE_NAMES)
    def test_all_zero(self, rule: str) -> None:
        quant = PerLayerQuant.quantize(torch.zeros(4, 8), "w", rule=rule)
        assert quant.scale == 0.0
        assert quant.sparsity == 1.0
        assert not quant.reconstruct().any()
        assert quant.relative_error(torch.zeros(4, 8)) == 0.0
        assert quant.relative_error(torch.ones(4, 8)) == 1.0

    @pytest.mark.parametrize("rule", RULE_NAMES)
    @pytest.mark.parametrize("options", [{"per": "row"}, {"group_size": 8}])
    def test_a_zero_row_among_others(self, rule: str, options: dict[str, object]) -> None:
        weights = gaussian(4, 20)
        weights[1] = 0.0
        quant = PerLayerQuant.quantize(weights, "w", rule=rule, **options)
        assert not quant.reconstruct()[1].any()
        assert not quant.trits[1].any()
        assert np.asarray(quant.scale)[1].max() == 0.0

    @pytest.mark.parametrize("rule", RULE_NAMES)
    def test_denormals(self, rule: str) -> None:
        weights = gaussian(4, 300) * 1e-40
        quant = PerLayerQuant.quantize(weights, "w", rule=rule)
        assert float(weights.abs().max()) < 1.2e-38
        # 20 bits are left of a denormal of 1e-40: the error is that of normal weights
        normal = PerLayerQuant.quantize(gaussian(4, 300), "w", rule=rule)
        assert quant.relative_error(weights) == pytest.approx(
            normal.relative_error(gaussian(4, 300)), rel=1e-2
        )

    @pytest.mark.parametrize("rule", RULE_NAMES)
    def test_constant_magnitude(self, rule: str) -> None:
        signs = torch.where(gaussian(5, 60) > 0, 1.0, -1.0)
        quant = PerLayerQuant.quantize(0.3 * signs, "w", rule=rule)
        assert quant.scale == float(np.float32(0.3))
        assert quant.relative_error(0.3 * signs) == 0.0
        assert quant.sparsity == (0.5 if rule == "planes" else 0.0)

    @pytest.mark.parametrize("rule", RULE_NAMES)
    @pytest.mark.parametrize("options", [{}, {"per": "row"}, {"group_size": 32}])
    def test_ternary_already(self, rule: str, options: dict[str, object]) -> None:
        weights = gaussian(6, 80)
        once = PerLayerQuant.quantize(weights, "w", **options)
        assert not once.was_ternary
        twice = PerLayerQuant.quantize(once.reconstruct(), "w", rule=rule, **options)
        assert twice.was_ternary
        assert torch.equal(twice.trits, once.trits)
        assert np.array_equal(twice.scales, once.scales)
        assert torch.equal(twice.reconstruct(), once.reconstruct())

    def test_ternary_that_begins_with_zeros(self) -> None:
        weights = torch.zeros(64)
        weights[40], weights[50] = 0.7, -0.7
        quant = PerLayerQuant.quantize(weights, "w")
        assert quant.was_ternary
        assert quant.scale == float(np.float32(0.7))

    def test_ternary_but_for_the_last_weight(self) -> None:
        weights = torch.full((64,), 0.7)
        weights[-1] = 0.6
        assert not PerLayerQuant.quantize(weights, "w").was_ternary

    def test_long_ternary_tensor(self) -> None:
        weights = torch.zeros(1 << 20, 2)
        weights[-1, 1] = -0.25
        quant = PerLayerQuant.quantize(weights, "w")
        assert quant.was_ternary
        assert quant.scale == 0.25
        assert quant.trits[-1].tolist() == [0, -1]
        weights[0, 0] = 0.5
        assert not PerLayerQuant.quantize(weights, "w").was_ternary

    @pytest.mark.parametrize("rule", RULE_NAMES)
    def test_zeros_have_no_sign(self, rule: str) -> None:
        quant = PerLayerQuant.quantize(torch.tensor([-0.0, 0.0, 1.0, -3.0, 0.2]), "w", rule=rule)
        assert quant.trits[0] == quant.trits[1]
        if rule != "asymmetric":  # whose middle level may be elsewhere
            assert quant.trits[0] == 0


class TestScaleDtype:
    @pytest.mark.parametrize("rule", RULE_NAMES)
    @pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
    def test_scales_survive_the_dtype(self, rule: str, dtype: str) -> None:
        weights = gaussian(8, 256)
        for options in ({}, {"per": "row"}, {"group_size": 64}):
            quant = PerLayerQuant.quantize(weights, "w", rule=rule, scale_dtype=dtype, **options)
            for values in (quant.scale, quant.offset, quant.second_scale):
                if values is not None:
                    stored = torch.as_tensor(values, dtype=torch.float64)
                    assert torch.equal(stored.to(getattr(torch, dtype)).double(), stored)

    def test_trits_do_not_depend_on_it(self) -> None:
        weights = gaussian(8, 256)
        half = PerLayerQuant.quantize(weights, "w", scale_dtype="float16")
        assert torch.equal(half.trits, PerLayerQuant.quantize(weights, "w").trits)
        assert half.scale == float(np.float16(PerLayerQuant.quantize(weights, "w").scale))

    @pytest.mark.parametrize("rule", RULE_NAMES)
    def test_scale_beyond_float16(self, rule: str) -> None:
        weights = gaussian(8, 256) * 1e6
        with pytest.raises(ValueRangeError, match=r"of weights 'w' is beyond float16.*65504"):
            PerLayerQuant.quantize(weights, "w", rule=rule, scale_dtype="float16")

    def test_the_unit_that_is_too_large_is_named(self) -> None:
        weights = gaussian(8, 256)
        weights[3, 128:] *= 1e6
        with pytest.raises(ValueRangeError, match="of unit 7 of weights 'w'"):
            PerLayerQuant.quantize(weights, "w", group_size=128, scale_dtype="float16")

    @pytest.mark.parametrize("rule", RULE_NAMES)
    def test_scales_below_float16(self, rule: str) -> None:
        with pytest.raises(ValueRangeError, match="all below the smallest float16"):
            PerLayerQuant.quantize(gaussian(8, 256) * 1e-9, "w", rule=rule, scale_dtype="float16")

    @pytest.mark.parametrize("rule", RULE_NAMES)
    def test_a_row_below_float16_becomes_zero_and_is_counted(self, rule: str) -> None:
        weights = gaussian(8, 256)
        weights[5] *= 1e-12
        quant = PerLayerQuant.quantize(weights, "w", rule=rule, per="row", scale_dtype="float16")
        assert quant.zeroed_units == 1
        assert np.asarray(quant.scale)[5] == 0
        assert not quant.trits[5].any()
        assert not quant.reconstruct()[5].any()
        assert quant.trits[4].any()

    def test_float64_beyond_float32(self) -> None:
        for rule in RULE_NAMES:
            with pytest.raises(ValueRangeError, match="beyond float32"):
                PerLayerQuant.quantize(gaussian(200, dtype=torch.float64) * 1e60, "w", rule=rule)
            with pytest.raises(ValueRangeError, match=r"more than float64 holds|beyond float32"):
                PerLayerQuant.quantize(gaussian(200, dtype=torch.float64) * 1e307, "w", rule=rule)
            with pytest.raises(ValueRangeError, match="below the smallest float32"):
                PerLayerQuant.quantize(gaussian(200, dtype=torch.float64) * 1e-60, "w", rule=rule)


class TestInputs:
    @pytest.mark.parametrize(
        "dtype",
        [torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2],
    )
    @pytest.mark.parametrize("rule", RULE_NAMES)
    def test_float_dtypes(self, dtype: torch.dtype, rule: str) -> None:
        weights = gaussian(9, 50).to(dtype)
        quant = PerLayerQuant.quantize(weights, "w", rule=rule, group_size=20)
        # every value is exact in float64, and so is what is made of it
        exact = PerLayerQuant.quantize(weights.double(), "w", rule=rule, group_size=20)
        assert torch.equal(quant.trits, exact.trits)
        assert torch.equal(quant.reconstruct(), exact.reconstruct())
        assert quant.mse(weights) == exact.mse(weights.double())

    @pytest.mark.parametrize(
        "dtype",
        [torch.int8, torch.int64, torch.uint8, torch.bool, torch.complex64],
    )
    def test_other_dtypes(self, dtype: torch.dtype) -> None:
        with pytest.raises(DtypeError, match=r"weights 'w' are torch\."):
            PerLayerQuant.quantize(torch.ones(3, 4).to(dtype), "w")
        if dtype not in {torch.int64}:
            with pytest.raises(DtypeError, match="weights 'w' are"):
                PerLayerQuant.quantize(np.ones((3, 4)).astype(str(dtype)[6:]), "w")

    @pytest.mark.parametrize("weights", [[True, False], ["a", "b"], [1 + 2j, 3.0], [None, 1.0]])
    def test_lists_of_something_else(self, weights: list[object]) -> None:
        with pytest.raises(DtypeError):
            PerLayerQuant.quantize(weights, "w")

    def test_whole_numbers_in_a_list_are_numbers(self) -> None:
        assert PerLayerQuant.quantize([3, -3, 1, 1], "w").trits.tolist() == [1, -1, 0, 0]

    @pytest.mark.parametrize("rule", RULE_NAMES)
    def test_not_contiguous(self, rule: str) -> None:
        plain = gaussian(12, 30)
        expected = PerLayerQuant.quantize(plain, "w", rule=rule)
        strided = [
            plain.T.contiguous().T,
            torch.stack([plain, plain], dim=-1)[..., 0],
            np.asfortranarray(plain.numpy()),
            plain.numpy()[::-1].copy()[::-1],
            plain.numpy().astype(">f4"),
        ]
        for weights in strided:
            quant = PerLayerQuant.quantize(weights, "w", rule=rule)
            assert torch.equal(quant.trits, expected.trits)
            assert quant.scale == expected.scale
            assert quant.mse(weights) == expected.mse(plain)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_long_and_not_contiguous(self, dtype: torch.dtype) -> None:
        plain = gaussian(700, 2001).to(dtype)
        expected = PerLayerQuant.quantize(plain, "w")
        quant = PerLayerQuant.quantize(plain.T.contiguous().T, "w")
        assert torch.equal(quant.trits, expected.trits)
        assert quant.scale == expected.scale

    def test_rank_3_not_contiguous(self) -> None:
        plain = gaussian(4, 5, 6)
        permuted = plain.permute(2, 0, 1).contiguous().permute(1, 2, 0)
        assert not permuted.is_contiguous()
        quant = PerLayerQuant.quantize(permuted, "w", per="row")
        assert torch.equal(quant.trits, PerLayerQuant.quantize(plain, "w", per="row").trits)

    def test_read_only_array(self) -> None:
        weights = gaussian(4, 5).numpy()
        weights.flags.writeable = False
        quant = PerLayerQuant.quantize(weights, "w")
        assert quant.relative_error(weights) < 0.5

    def test_memory_that_is_not_aligned(self) -> None:
        raw = b"x" + gaussian(1100, 1000).numpy().tobytes()
        weights = np.frombuffer(raw, dtype=np.float32, offset=1).reshape(1100, 1000)
        assert not weights.flags.aligned
        for rule in ("absmean", "exact"):
            quant = PerLayerQuant.quantize(weights, "w", rule=rule)
            expected = PerLayerQuant.quantize(gaussian(1100, 1000), "w", rule=rule)
            assert torch.equal(quant.trits, expected.trits)
            assert quant.scale == expected.scale

    def test_transposed_conv1d(self) -> None:
        # GPT-2 keeps its matrices as [in, out]; rows of the transposed one are output channels.
        stored = gaussian(32, 12)
        quant = PerLayerQuant.quantize(stored.T, "w", per="row")
        assert quant.shape == (12, 32)
        assert quant.scale.shape == (12,)
        assert quant.relative_error(stored.T) < 0.5

    def test_parameters_and_tied_weights_are_left_alone(self) -> None:
        embedding, head = nn.Embedding(20, 8), nn.Linear(8, 20, bias=False)
        head.weight = embedding.weight
        before = embedding.weight.detach().clone()
        first = PerLayerQuant.quantize(embedding.weight, "embedding", per="row")
        second = PerLayerQuant.quantize(head.weight, "head", per="row")
        assert torch.equal(first.trits, second.trits)
        assert torch.equal(embedding.weight, before)
        assert not first.reconstruct().requires_grad

    def test_meta(self) -> None:
        with pytest.raises(UsageError, match="meta device"):
            PerLayerQuant.quantize(torch.empty(3, 4, device="meta"), "w")

    def test_sparse(self) -> None:
        with pytest.raises(UsageError, match="dense"):
            PerLayerQuant.quantize(gaussian(3, 4).to_sparse(), "w")

    def test_expanded_memory(self) -> None:
        row = gaussian(1, 40)
        quant = PerLayerQuant.quantize(row.expand(7, 40), "w")
        assert torch.equal(quant.trits, PerLayerQuant.quantize(row.repeat(7, 1), "w").trits)


class TestFromTrits:
    @pytest.mark.parametrize("rule", RULE_NAMES)
    @pytest.mark.parametrize("options", [{}, {"per": "row"}, {"group_size": 32}])
    def test_is_the_same_again(self, rule: str, options: dict[str, object]) -> None:
        weights = gaussian(6, 80)
        quant = PerLayerQuant.quantize(weights, "w", rule=rule, **options)
        again = PerLayerQuant.from_trits(
            quant.trits,
            quant.scale,
            "w",
            offset=quant.offset,
            second_trits=quant.second_trits,
            second_scale=quant.second_scale,
            levels=quant.levels,
            **options,
        )
        assert torch.equal(again.reconstruct(), quant.reconstruct())
        assert again.mse(weights) == quant.mse(weights)

    def test_what_does_not_fit(self) -> None:
        trits = torch.zeros(4, 8, dtype=torch.int8)
        with pytest.raises(ShapeError, match="are 3, but per row there are 4"):
            PerLayerQuant.from_trits(trits, np.ones(3, dtype=np.float32), "w", per="row")
        with pytest.raises(ValueRangeError, match="NaN or Inf"):
            PerLayerQuant.from_trits(trits, math.nan, "w")
        with pytest.raises(DtypeError, match="pass int8"):
            PerLayerQuant.from_trits(trits.float(), 1.0, "w")
        with pytest.raises(ValueRangeError, match="from 0 to 2"):
            PerLayerQuant.from_trits(trits + torch.tensor([0, 2] * 4, dtype=torch.int8), 1.0, "w")
        with pytest.raises(ShapeError, match="every plane"):
            PerLayerQuant.from_trits(trits, 1.0, "w", second_trits=trits[0], second_scale=1.0)
        with pytest.raises(UsageError, match="incomplete"):
            PerLayerQuant.from_trits(trits, 1.0, "w", second_trits=trits)
