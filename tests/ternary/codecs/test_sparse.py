"""Sparse rows come back exactly, are taken only where they are smaller, and refuse damage."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from trilens.errors import CorruptFileError, DtypeError, ShapeError
from trilens.ternary.codecs.packing import Base3, TwoBit
from trilens.ternary.codecs.sparse import csr_size_bytes, decode_csr, encode_csr, encode_smallest


def trits(sparsity: float, *shape: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    signs = rng.choice(np.array([-1, 1], dtype=np.int8), shape)
    return np.where(rng.random(shape) < sparsity, np.int8(0), signs)


@settings(max_examples=80, deadline=None)
@given(
    hnp.arrays(
        np.int8,
        hnp.array_shapes(min_dims=1, max_dims=3, max_side=20),
        elements=st.integers(-1, 1),
    )
)
def test_there_and_back(original: np.ndarray) -> None:
    data = encode_csr(original)
    rows = original.size // original.shape[-1]
    assert data.size == csr_size_bytes(rows, original.shape[-1], np.count_nonzero(original))
    for given_as in (data, data.tobytes(), torch.from_numpy(data), memoryview(data)):
        assert np.array_equal(decode_csr(given_as, original.shape), original)


def test_bytes() -> None:
    original = np.array([[0, 0, -1, 0], [0, 0, 0, 0], [1, 0, 0, -1]], dtype=np.int8)
    ends, columns, signs = [1, 1, 3], [2, 0, 3], 0b101
    wanted = np.array(ends, "<u4").tobytes() + np.array(columns, "<u2").tobytes() + bytes([signs])
    assert encode_csr(original).tobytes() == wanted


@pytest.mark.parametrize(
    ("sparsity", "against_two_bit", "against_base3"),
    [
        (0.96, "csr", "csr"),
        (0.895, "csr", "base3"),
        (0.87, "two_bit", "base3"),
        (0.31, "two_bit", "base3"),
    ],
)
def test_the_smaller_one_is_taken(
    sparsity: float, against_two_bit: str, against_base3: str
) -> None:
    original = trits(sparsity, 64, 4096)
    for codec, wanted in ((TwoBit(), against_two_bit), (Base3(), against_base3)):
        found = encode_smallest(original, codec)
        assert found.layout == wanted
        both = (encode_csr(original).size, codec.size_bytes(original.shape))
        assert found.data.size == min(both)
        back = decode_csr if wanted == "csr" else lambda d, s, c=codec: c.decode(d, s).trits
        assert np.array_equal(back(found.data, original.shape), original)
    assert encode_smallest(original).layout == against_two_bit


def test_96_percent_zeros_take_a_third_of_two_bits() -> None:
    original = trits(0.96, 256, 4096)
    assert encode_smallest(original).data.size < 0.36 * TwoBit().size_bytes(original.shape)


def test_long_rows_have_wider_columns() -> None:
    original = np.zeros((2, 70_000), dtype=np.int8)
    original[0, 65_536], original[1, 69_999] = 1, -1
    data = encode_csr(original)
    assert data.size == 2 * 4 + 2 * 4 + 1
    assert np.array_equal(decode_csr(data, original.shape), original)


def test_damage_is_named() -> None:
    original = np.array([[0, 0, -1, 0], [0, 0, 0, 0], [1, 0, 0, -1]], dtype=np.int8)
    good = encode_csr(original)

    def changed(at: int, value: int) -> np.ndarray:
        raw = good.copy()
        raw[at] = value
        return raw

    cases = [
        (good[:-1], "cut off"),
        (good[:5], "cut off"),
        (np.append(good, np.uint8(0)), "something else"),
        (changed(0, 2), "row ends must rise"),  # falls afterwards
        (changed(0, 5), "row ends must rise"),  # more than a row holds
        (changed(11, 0xFF), "row ends must rise"),  # four thousand million trits
        (changed(12, 4), "columns must ascend"),
        (changed(14, 3), "columns must ascend"),
        (changed(18, 0b1101), "past the end"),
    ]
    for raw, words in cases:
        with pytest.raises(CorruptFileError, match=words):
            decode_csr(raw, original.shape)
    with pytest.raises(DtypeError):
        decode_csr(good.astype(np.int16), original.shape)
    with pytest.raises(ShapeError):
        decode_csr(good, (0, 4))


@settings(max_examples=200, deadline=None)
@given(st.binary(min_size=0, max_size=40), st.data())
def test_any_bytes_decode_to_what_encodes_to_them_or_are_refused(raw: bytes, data) -> None:
    shape = data.draw(st.sampled_from([(1, 5), (3, 4), (2, 2, 3), (9,)]))
    try:
        found = decode_csr(raw, shape)
    except CorruptFileError:
        return
    assert encode_csr(found).tobytes() == raw
