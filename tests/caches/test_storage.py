from __future__ import annotations

import numpy as np
import pytest
import torch

from trilens.caches.storage import distinct_bytes, moved, spell_layers, whole_number
from trilens.errors import UsageError


def test_a_storage_counts_once_and_whole() -> None:
    base = torch.zeros(10, 4)
    assert distinct_bytes([]) == 0
    assert distinct_bytes([base[0], base[1], base]) == 160
    assert distinct_bytes([base[0], torch.zeros(3, dtype=torch.bfloat16)]) == 166


def test_moving_to_the_same_device_is_no_copy() -> None:
    tensor = torch.zeros(3)
    assert moved(tensor, "cpu") is tensor
    assert moved(tensor, torch.device("meta")).device.type == "meta"


@pytest.mark.parametrize("device", ["nowhere", "xpu:99", 3.5])
def test_a_device_that_cannot_be_used_is_named(device) -> None:
    with pytest.raises(UsageError, match=f"device {device!r} cannot be used"):
        moved(torch.zeros(3), device)


@pytest.mark.parametrize("value", [3, np.int64(3), np.uint8(3), torch.tensor(3)])
def test_whole_numbers_of_every_library(value) -> None:
    number = whole_number(value, "layer")
    assert number == 3
    assert type(number) is int


@pytest.mark.parametrize("value", [3.0, "3", None, True, torch.tensor(3.0)])
def test_everything_else_is_no_whole_number(value) -> None:
    with pytest.raises(UsageError, match=r"layer .* is not a whole number"):
        whole_number(value, "layer")


@pytest.mark.parametrize(
    ("layers", "words"),
    [
        ((), "no layers"),
        ((3,), "layer 3"),
        ((0, 1, 2), "layers 0–2"),
        ((4, 5), "layers 4–5"),
        ((0, 2, 5), "layers 0, 2, 5"),
    ],
)
def test_layers_in_words(layers, words) -> None:
    assert spell_layers(layers) == words
