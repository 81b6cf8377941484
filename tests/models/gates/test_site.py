"""How what is read in a running model becomes [batch, seq, units]."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trilens.errors import SilentSiteError
from trilens.models.gates.site import Layout, find_columns, layout_of, rows_of


def numbered(*shape: int) -> torch.Tensor:
    size = torch.Size(shape).numel()
    return torch.arange(size, dtype=torch.float32).reshape(shape)


@settings(deadline=None, max_examples=50)
@given(st.permutations(range(12)), st.integers(1, 12))
def test_columns_are_found_wherever_they_stand(order: list[int], n: int) -> None:
    held = torch.randn(5, 12, generator=torch.Generator().manual_seed(4))
    wanted = held[:, order[:n]]
    found = find_columns(wanted, held)
    assert found is not None
    columns = list(range(12))[found] if isinstance(found, slice) else list(found)
    assert columns == order[:n]


def test_halves_interleaving_and_heads() -> None:
    held = torch.randn(7, 24, generator=torch.Generator().manual_seed(5))
    assert find_columns(held[:, 12:], held) == slice(12, 24)
    assert find_columns(held, held) == slice(0, 24)
    assert find_columns(held[:, 1::2], held) == tuple(range(1, 24, 2))
    heads = held.reshape(7, 3, 2, 4)
    assert find_columns(heads[:, :, 1].reshape(7, 12), held) == (
        *range(4, 8), *range(12, 16), *range(20, 24),
    )  # fmt: skip


def test_one_differing_number_is_no_match() -> None:
    held = torch.randn(7, 6, generator=torch.Generator().manual_seed(6))
    wanted = held[:, :3].clone()
    wanted[6, 2] = torch.nextafter(wanted[6, 2], torch.tensor(9.0))
    assert find_columns(wanted, held) is None
    assert find_columns(torch.zeros(7, 9), held) is None
    assert find_columns(torch.zeros(7, 0), held) is None


def test_zeros_of_either_sign_and_wider_dtypes_match() -> None:
    held = torch.tensor([[0.0, 1.0], [2.0, -0.0]]).bfloat16()
    assert find_columns(torch.tensor([[1.0, -0.0], [0.0, 2.0]]), held) == (1, 0)


@pytest.mark.parametrize(
    ("shape", "form", "axis"),
    [
        ((1, 11, 6), "batched", 1),
        ((1, 6, 11), "batched", 2),
        ((1, 11, 2, 3), "batched", 1),
        ((11, 1, 6), "seq_first", 0),
        ((11, 6), "flat", 0),
        ((22, 3), "flat", 0),
    ],
)
def test_layouts_give_tokens_then_units(shape, form: str, axis: int) -> None:
    probe = numbered(*shape)
    layout = layout_of(probe, 11)
    assert layout is not None
    assert (layout.form, layout.axis) == (form, axis)
    assert rows_of(probe, layout, 1, 11, "it").shape == (1, 11, 6)


def test_a_batch_is_read_as_its_rows_are_alone() -> None:
    for shape, place in (((1, 5, 11), 0), ((11, 1, 5), 1), ((1, 11, 5), 0)):
        layout = layout_of(torch.zeros(shape), 11)
        rows = [torch.randn(shape) for _ in range(3)]
        batch = rows_of(torch.cat(rows, dim=place), layout, 3, 11, "it")
        for row, alone in zip(batch, rows, strict=True):
            assert torch.equal(row, rows_of(alone, layout, 1, 11, "it")[0])


def test_columns_and_dtype_of_a_layout() -> None:
    tensor = numbered(2, 3, 4).bfloat16()
    picked = rows_of(tensor, Layout("batched", 1, (3, 0), torch.float32), 2, 3, "it")
    assert picked.dtype == torch.float32
    assert torch.equal(picked, tensor[..., [3, 0]].float())
    half = rows_of(tensor, Layout("batched", 1, slice(2, 4)), 2, 3, "it")
    assert half.data_ptr() == tensor[..., 2:].data_ptr(), "a slice is a view"
    assert rows_of(torch.ones(4, 2), Layout("static"), 2, 3, "it").shape == (1, 1, 8)


@pytest.mark.parametrize("form", ["batched", "flat", "seq_first"])
def test_rows_that_are_not_the_tokens_are_refused(form: str) -> None:
    with pytest.raises(SilentSiteError, match="router of layer 2 gave a tensor"):
        rows_of(torch.zeros(5, 7, 3), Layout(form), 2, 3, "router of layer 2")


def test_no_layout_without_tokens() -> None:
    assert layout_of(torch.zeros(64, 16), 11) is None
    assert layout_of(torch.zeros(16), 11) is None
