from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trilens.errors import ValueRangeError
from trilens.ternary.codecs.rows import compact_rows, expand_rows, is_compact


@given(st.integers(1, 7), st.integers(1, 23), st.integers(0, 10**6))
def test_what_is_packed_comes_back(rows: int, cols: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    trits = torch.randint(-1, 2, (2, rows, cols), generator=generator, dtype=torch.int8)
    codes = compact_rows(trits)
    assert codes.dtype == torch.uint8
    assert codes.shape == (2, rows, -(-cols // 5))
    assert is_compact(codes)
    assert torch.equal(expand_rows(codes, cols), trits)
    # What fills up a row is zeros.
    assert not expand_rows(codes, 5 * codes.shape[-1])[..., cols:].any()


def test_the_bytes_themselves() -> None:
    trits = torch.tensor([[1, 0, -1, 0, 1, 1]], dtype=torch.int8)
    digits = 2 + 1 * 3 + 0 * 9 + 1 * 27 + 2 * 81
    assert compact_rows(trits).tolist() == [[digits, 2 + 3 + 9 + 27 + 81]]


def test_bytes_that_are_no_trits() -> None:
    assert is_compact(torch.tensor([0, 242], dtype=torch.uint8))
    assert not is_compact(torch.tensor([0, 243], dtype=torch.uint8))
    with pytest.raises(ValueRangeError):
        compact_rows(torch.tensor([[2]], dtype=torch.int8))
