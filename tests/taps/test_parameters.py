from __future__ import annotations

import pytest
import torch
from torch import nn

from trilens.errors import RestoreError, ShapeError, UsageError
from trilens.taps.parameters import checksum, swapped


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2)).to(torch.bfloat16)


def test_other_weights_inside_and_the_own_ones_afterwards(model: nn.Module) -> None:
    before = checksum(dict(model.named_parameters()))
    parameter, address = model[0].weight, model[0].weight.data_ptr()
    with swapped(model, {"0.weight": torch.full((6, 4), 1 / 3)}):
        assert torch.equal(model[0].weight, torch.full((6, 4), 1 / 3, dtype=torch.bfloat16))
        assert checksum(dict(model.named_parameters())) != before
    assert model[0].weight is parameter
    assert parameter.data_ptr() == address
    assert checksum(dict(model.named_parameters())) == before


def test_they_come_back_after_an_exception(model: nn.Module) -> None:
    before = checksum(dict(model.named_parameters()))
    with pytest.raises(KeyError), swapped(model, {"0.weight": torch.zeros(6, 4)}):
        raise KeyError
    assert checksum(dict(model.named_parameters())) == before


def test_values_that_do_not_fit_change_nothing(model: nn.Module) -> None:
    before = checksum(dict(model.named_parameters()))
    wrong = {"0.weight": torch.zeros(6, 4), "1.weight": torch.zeros(6, 2)}
    with pytest.raises(ShapeError, match=r"'1\.weight' have shape \(6, 2\)"), swapped(model, wrong):
        pass
    absent = {"2.weight": torch.zeros(1)}
    with pytest.raises(UsageError, match="is not in the model"), swapped(model, absent):
        pass
    assert checksum(dict(model.named_parameters())) == before


def test_weights_without_values_are_refused() -> None:
    with torch.device("meta"):
        model = nn.Linear(2, 2)
    with pytest.raises(UsageError, match="offloaded"), swapped(model, {"weight": torch.ones(2, 2)}):
        pass


def test_bits_that_do_not_come_back_are_an_error(model: nn.Module) -> None:
    message = r"parameter 0\.weight did not get its own bits back"
    own = model[0].weight.data
    with (
        pytest.raises(RestoreError, match=message),
        swapped(model, {"0.weight": torch.zeros(6, 4)}),
    ):
        own.fill_(1.0)  # somebody writes to the memory that it gets back


def test_values_are_used_where_they_lie_and_shared_memory_is_written_to() -> None:
    """Weights that are mapped from a file take no memory by being replaced for a while."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    model[2].weight = nn.Parameter(model[0].weight.data)  # another parameter, the same memory
    before = checksum(dict(model.named_parameters()))
    values, address = torch.full((4, 4), 0.5), model[0].weight.data_ptr()
    with swapped(model, {"1.weight": values, "0.weight": values}):
        assert model[1].weight.data_ptr() == values.data_ptr()
        assert torch.equal(model[2].weight, values)
        assert model[0].weight.data_ptr() == address
    assert checksum(dict(model.named_parameters())) == before


def test_a_checksum_sees_every_bit_and_name() -> None:
    zero, minus = torch.zeros(3), -torch.zeros(3)
    assert checksum({"a": zero}) != checksum({"a": minus})
    assert checksum({"a": zero}) != checksum({"b": zero})
    assert checksum({"a": zero}) != checksum({"a": zero.reshape(3, 1)})
    assert checksum({"a": torch.arange(6.0).reshape(2, 3).T}) == checksum(
        {"a": torch.arange(6.0).reshape(2, 3).T.contiguous()}
    )
