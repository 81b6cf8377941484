"""Every codec gives back what it got, refuses what it never wrote, and writes the bytes it says."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from trilens.errors import (
    CorruptFileError,
    DtypeError,
    ShapeError,
    UsageError,
    ValueRangeError,
)
from trilens.ternary.codecs.gguf_blocks import CODECS, find_codec
from trilens.ternary.quantize import PerLayerQuant

NAMES = sorted(CODECS)
WITH_SCALES = [name for name in NAMES if CODECS[name].scale_block]
CODES_ALONE = [name for name in NAMES if not CODECS[name].scale_block]


def trits(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(-1, 2, shape).astype(np.int8)


def halves(*shape: int) -> np.ndarray:
    values = np.random.default_rng(1).standard_normal(shape)
    return values.astype(np.float16).astype(np.float32)


def encoded(name: str, rows: int = 4, cols: int = 512) -> np.ndarray:
    block = CODECS[name].scale_block
    return CODECS[name].encode(trits(rows, cols), halves(rows, cols // block) if block else None)


class TestThereAndBack:
    @settings(max_examples=80, deadline=None)
    @given(
        st.sampled_from(NAMES),
        st.integers(1, 3),
        st.integers(1, 3),
        st.integers(1, 40),
        st.data(),
    )
    def test_any_trits(self, name: str, rows: int, blocks: int, odd: int, data) -> None:
        codec = CODECS[name]
        cols = blocks * codec.col_multiple if codec.col_multiple > 1 else odd
        shape = (rows * codec.row_multiple, cols)
        original = data.draw(hnp.arrays(np.int8, shape, elements=st.integers(-1, 1)))
        scales = None
        if codec.scale_block:
            scales = data.draw(
                hnp.arrays(
                    np.float16,
                    (shape[0], blocks),
                    elements=st.floats(-60000, 60000, width=16),
                )
            ).astype(np.float32)
        packed = codec.encode(original, scales)
        assert packed.dtype == np.uint8
        assert packed.size == codec.size_bytes(shape)
        back = codec.decode(packed, shape)
        assert back.trits.dtype == np.int8
        assert np.array_equal(back.trits, original)
        if scales is None:
            assert back.scales is None
        else:
            assert np.array_equal(back.scales, scales)
        assert np.array_equal(codec.decode(packed.tobytes(), shape).trits, original)

    @pytest.mark.parametrize("name", NAMES)
    def test_bits_per_weight_are_what_is_stored(self, name: str) -> None:
        # 512 columns leave base3 two digits of its last byte
        assert encoded(name, 4, 1280).size * 8 == CODECS[name].bits_per_weight * 4 * 1280

    @pytest.mark.parametrize("name", sorted(set(NAMES) - {"bitnet"}))
    def test_any_rank(self, name: str) -> None:
        codec = CODECS[name]
        for shape in ((512,), (2, 3, 256)):
            original = trits(*shape)
            scales = 0.5 if codec.scale_block else None
            assert np.array_equal(
                codec.decode(codec.encode(original, scales), shape).trits, original
            )

    @pytest.mark.parametrize("name", NAMES)
    def test_tensors_strides_and_input_left_alone(self, name: str) -> None:
        codec = CODECS[name]
        original = trits(512, 8).T
        before = original.copy()
        scales = 0.5 if codec.scale_block else None
        packed = codec.encode(torch.from_numpy(original), scales)
        assert np.array_equal(packed, codec.encode(before, scales))
        assert np.array_equal(original, before)
        assert np.array_equal(codec.decode(torch.from_numpy(packed), (8, 512)).trits, original)


class TestBytes:
    def test_two_bit(self) -> None:
        # codes 2 1 0 1 | 2 and three times the code of zero
        packed = CODECS["two_bit"].encode(np.array([1, 0, -1, 0, 1], dtype=np.int8))
        assert packed.tolist() == [0b01_00_01_10, 0b01_01_01_10]

    def test_base3(self) -> None:
        packed = CODECS["base3"].encode(np.array([1, 0, -1, 0, 1, -1], dtype=np.int8))
        assert packed.tolist() == [2 + 3 + 0 + 27 + 2 * 81, 0 + 3 + 9 + 27 + 81]

    def test_bitnet(self) -> None:
        packed = CODECS["bitnet"].encode(np.array([[1], [0], [-1], [1]], dtype=np.int8))
        assert packed.tolist() == [[0b10_00_01_10]]

    def test_bitnet_against_transformers(self) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # torch.jit, on import
            from transformers.integrations.bitnet import pack_weights, unpack_weights

        original = trits(24, 36)
        packed = CODECS["bitnet"].encode(original)
        theirs = pack_weights(torch.from_numpy(original.copy()))  # it changes its input
        assert np.array_equal(packed, theirs.numpy())
        unpack = getattr(unpack_weights, "_torchdynamo_orig_callable", unpack_weights)
        back = unpack(torch.from_numpy(packed), torch.float32)
        assert np.array_equal(back.numpy(), original)

    def test_tq2_0(self) -> None:
        original = np.zeros((1, 256), dtype=np.int8)
        original[0, [0, 32, 64, 96]] = [1, -1, 1, 0]
        original[0, 128 + 5] = -1
        packed = CODECS["TQ2_0"].encode(original, 1.0)[0]
        assert packed[0] == 0b01_10_00_10
        assert packed[32 + 5] == 0b01_01_01_00
        assert packed[64:].tobytes() == np.float16(1.0).tobytes()
        assert np.count_nonzero(packed[:64] != 0b01_01_01_01) == 2

    def test_tq1_0(self) -> None:
        original = np.zeros((1, 256), dtype=np.int8)
        original[0, [0, 32, 64, 96, 128]] = [1, -1, 1, 0, 1]  # the five trits of byte 0
        original[0, [240, 244, 248, 252]] = [1, 0, -1, 1]  # the four of the first of qh
        packed = CODECS["TQ1_0"].encode(original, -2.5)[0]
        first = 2 * 81 + 0 * 27 + 2 * 9 + 1 * 3 + 2
        last = (2 * 27 + 1 * 9 + 0 * 3 + 2) * 3
        assert packed[0] == -(-first * 256 // 243)
        assert packed[48] == -(-last * 256 // 243)
        assert packed[52:].tobytes() == np.float16(-2.5).tobytes()
        zeros = -(-121 * 256 // 243), -(-120 * 256 // 243)
        assert np.count_nonzero(packed[:48] != zeros[0]) == 1
        assert np.count_nonzero(packed[48:52] != zeros[1]) == 1

    def test_q2_0(self) -> None:
        original = np.zeros((1, 128), dtype=np.int8)
        original[0, [0, 1, 2, 3, 64]] = [1, 0, -1, 1, -1]
        packed = CODECS["Q2_0"].encode(original, [[0.5, 3.0]])[0]
        assert packed.size == 36
        assert packed[:2].tobytes() == np.float16(0.5).tobytes()
        assert packed[2] == 0b10_00_01_10
        assert packed[18:20].tobytes() == np.float16(3.0).tobytes()
        assert packed[20] == 0b01_01_01_00

    @pytest.mark.parametrize("name", ["TQ1_0", "TQ2_0"])
    def test_against_gguf(self, name: str) -> None:
        gguf = pytest.importorskip("gguf", reason="gguf is an optional extra")
        original, scales = trits(6, 1024), halves(6, 4)
        packed = CODECS[name].encode(original, scales)
        theirs = gguf.quants.dequantize(packed, gguf.GGMLQuantizationType[name])
        ours = original.reshape(6, 4, 256) * scales[:, :, None]
        assert np.array_equal(theirs, ours.reshape(6, 1024))
        # and its own encoder, given exact ternary weights whose scale is positive
        exact = np.abs(ours).reshape(6, 1024) * original
        again = gguf.quants.quantize(exact, gguf.GGMLQuantizationType[name])
        assert np.array_equal(again, CODECS[name].encode(original, np.abs(scales)))


class TestDamage:
    @pytest.mark.parametrize("name", NAMES)
    @pytest.mark.parametrize("change", [-1, 1])
    def test_wrong_length(self, name: str, change: int) -> None:
        raw = encoded(name).tobytes()
        raw = raw[:-1] if change < 0 else raw + b"\0"
        with pytest.raises(CorruptFileError, match="cut off" if change < 0 else "something else"):
            CODECS[name].decode(raw, (4, 512))

    @pytest.mark.parametrize("name", ["two_bit", "bitnet", "TQ2_0"])
    def test_code_3(self, name: str) -> None:
        raw = encoded(name).copy()
        raw.reshape(-1)[7] |= 0b00_11_00_00
        with pytest.raises(CorruptFileError, match="code"):
            CODECS[name].decode(raw, (4, 512))

    @pytest.mark.parametrize("name", ["quad", "Q2_0"])
    def test_code_3_is_the_fourth_level(self, name: str) -> None:
        levels = np.random.default_rng(0).integers(-1, 3, (4, 128)).astype(np.int8)
        scales = -halves(4, 2) if CODECS[name].scale_block else None
        found = CODECS[name].decode(CODECS[name].encode(levels, scales), (4, 128))
        assert np.array_equal(found.trits, levels)
        with pytest.raises(ValueRangeError, match=r"levels are −1, 0, 1 or 2"):
            CODECS[name].encode(levels + np.int8(1), scales)
        with pytest.raises(ValueRangeError, match=r"trits are −1, 0 or 1"):
            CODECS["two_bit"].encode(levels)

    @pytest.mark.parametrize("byte", [243, 255])
    def test_base3_byte_too_large(self, byte: int) -> None:
        raw = encoded("base3").copy()
        raw[11] = byte
        with pytest.raises(CorruptFileError, match=rf"byte 11 \({byte}\)"):
            CODECS["base3"].decode(raw, (4, 512))

    def test_base3_every_smaller_byte_is_fine(self) -> None:
        back = CODECS["base3"].decode(np.arange(243, dtype=np.uint8), (243, 5))
        assert len({tuple(row) for row in back.trits.tolist()}) == 243

    @pytest.mark.parametrize("name", ["two_bit", "base3"])
    def test_trits_past_the_end(self, name: str) -> None:
        raw = CODECS[name].encode(np.ones(8, dtype=np.int8))
        assert raw.size == CODECS[name].size_bytes((7,))
        with pytest.raises(CorruptFileError, match="last byte holds trits past the end"):
            CODECS[name].decode(raw, (7,))

    def test_tq1_0_bytes_that_are_no_trits(self) -> None:
        valid = {-(-number * 256 // 243) for number in range(243)}
        valid_of_four = {-(-number * 256 // 243) for number in range(0, 243, 3)}
        good = encoded("TQ1_0", 1, 256)[0]
        for byte in range(256):
            for place, allowed in ((3, valid), (40, valid), (50, valid_of_four)):
                raw = good.copy()
                raw[place] = byte
                if byte in allowed:
                    back = CODECS["TQ1_0"].decode(raw, (1, 256))
                    again = CODECS["TQ1_0"].encode(back.trits, back.scales)
                    assert np.array_equal(again[0], raw)
                else:
                    with pytest.raises(CorruptFileError, match="block 0 holds a code"):
                        CODECS["TQ1_0"].decode(raw, (1, 256))

    @pytest.mark.parametrize("name", WITH_SCALES)
    @pytest.mark.parametrize("value", [np.nan, np.inf])
    def test_scale_that_is_not_finite(self, name: str, value: float) -> None:
        codec = CODECS[name]
        raw = encoded(name).copy().reshape(-1, codec.block_bytes)
        at = codec.scale_at
        raw[5, at : at + 2] = np.frombuffer(np.float16(value).tobytes(), dtype=np.uint8)
        with pytest.raises(CorruptFileError, match="block 5 has a scale that is NaN or Inf"):
            codec.decode(raw, (4, 512))

    @pytest.mark.parametrize("name", NAMES)
    @settings(max_examples=60, deadline=None)
    @given(st.data())
    def test_any_bytes_decode_to_what_encodes_to_them_or_are_refused(self, name: str, data) -> None:
        codec = CODECS[name]
        shape = (codec.row_multiple, max(codec.col_multiple, 13))
        raw = data.draw(
            st.binary(min_size=codec.size_bytes(shape), max_size=codec.size_bytes(shape))
        )
        try:
            back = codec.decode(raw, shape)
        except CorruptFileError:
            return
        assert codec.encode(back.trits, back.scales).tobytes() == raw


class TestRefusals:
    @pytest.mark.parametrize("name", NAMES)
    def test_what_is_no_trit(self, name: str) -> None:
        scales = 0.5 if CODECS[name].scale_block else None
        for value in (CODECS[name].levels - 1, -2, 127, -128):
            wrong = trits(4, 512)
            wrong[2, 100] = value
            with pytest.raises(ValueRangeError, match=rf"trit {value} at index \(2, 100\)"):
                CODECS[name].encode(wrong, scales)
        with pytest.raises(DtypeError, match="float32"):
            CODECS[name].encode(trits(4, 512).astype(np.float32), scales)
        with pytest.raises(ShapeError):
            CODECS[name].encode(np.zeros((0, 256), dtype=np.int8), scales)

    @pytest.mark.parametrize("name", NAMES)
    def test_data_of_another_dtype(self, name: str) -> None:
        with pytest.raises(DtypeError, match="pass bytes or uint8"):
            CODECS[name].decode(encoded(name).astype(np.int16), (4, 512))
        with pytest.raises(DtypeError, match="pass bytes or uint8"):
            CODECS[name].decode(torch.zeros(4, 512), (4, 512))

    @pytest.mark.parametrize("name", WITH_SCALES)
    def test_columns_that_do_not_fit(self, name: str) -> None:
        cols = CODECS[name].col_multiple + 4
        with pytest.raises(ShapeError, match=f"multiple of {CODECS[name].col_multiple}"):
            CODECS[name].encode(trits(4, cols), 0.5)
        with pytest.raises(ShapeError, match=f"multiple of {CODECS[name].col_multiple}"):
            CODECS[name].decode(b"", (4, cols))

    def test_bitnet_wants_a_matrix_of_four_times_rows(self) -> None:
        with pytest.raises(ShapeError, match="6 rows do not fit bitnet"):
            CODECS["bitnet"].encode(trits(6, 8))
        with pytest.raises(ShapeError, match="holds matrices"):
            CODECS["bitnet"].encode(trits(4, 2, 2))

    @pytest.mark.parametrize("name", WITH_SCALES)
    def test_scales_that_do_not_fit(self, name: str) -> None:
        codec = CODECS[name]
        with pytest.raises(UsageError, match="pass the scales"):
            codec.encode(trits(4, 512))
        with pytest.raises(ShapeError, match="scales of shape"):
            codec.encode(trits(4, 512), np.ones((3, 1)))
        for scale in (0.1, 1e6, 1e-9, np.nan, np.inf):
            with pytest.raises(ValueRangeError, match="scale_dtype='float16'"):
                codec.encode(trits(4, 512), scale)

    @pytest.mark.parametrize("name", CODES_ALONE)
    def test_scales_that_are_not_stored(self, name: str) -> None:
        with pytest.raises(UsageError, match="codes alone"):
            CODECS[name].encode(trits(4, 512), 0.5)

    def test_unknown_codec(self) -> None:
        with pytest.raises(UsageError, match="'Q4_0' is unknown: there are two_bit, quad, base3"):
            find_codec("Q4_0")
        assert find_codec("TQ1_0") is CODECS["TQ1_0"]


class TestWithQuants:
    @pytest.mark.parametrize("name", WITH_SCALES)
    @pytest.mark.parametrize("options", [{}, {"per": "row"}, {"group_size": 256}])
    def test_file_and_memory_agree_bit_for_bit(self, name: str, options: dict) -> None:
        weights = torch.randn(6, 768, generator=torch.Generator().manual_seed(0))
        quant = PerLayerQuant.quantize(weights, "w", scale_dtype="float16", **options)
        codec = CODECS[name]
        block = codec.scale_block
        packed = codec.encode(quant.trits, quant.units.per_block(quant.scales, block))
        back = codec.decode(packed, quant.shape)
        values = back.trits.reshape(6, -1, block) * back.scales[:, :, None]
        assert np.array_equal(values.reshape(6, 768), quant.reconstruct().numpy())

    def test_groups_that_reach_over_blocks(self) -> None:
        quant = PerLayerQuant.quantize(torch.randn(2, 768), "w", group_size=128)
        with pytest.raises(ShapeError, match="groups of 128 weights do not fit blocks of 256"):
            quant.units.per_block(quant.scales, 256)
        with pytest.raises(ShapeError, match="no whole number of blocks of 500"):
            quant.units.per_block(quant.scales, 500)
