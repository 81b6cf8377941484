"""Another order's output: what differs, never a hash."""

from __future__ import annotations

from pathlib import Path

import pytest

from trilens.checkpoint.format.manifest import Order
from trilens.checkpoint.format.plan import TernaryPlan
from trilens.errors import UsageError

_HASH = "0123456789abcdef" * 4
_SOURCE = {"model.safetensors": {"size_bytes": 3, "sha256": _HASH}}


def order(**changes: object) -> Order:
    fields = {"source": _SOURCE, "plan": TernaryPlan(), "code_version": "1", **changes}
    return Order(**fields)


@pytest.mark.parametrize(
    ("before", "now", "words"),
    [
        ({}, {"calibration": {"texts": _HASH}}, "calibration text (none before, one now)"),
        ({"calibration": {"texts": _HASH}}, {}, "calibration text (one before, none now)"),
        ({"sample": _HASH}, {"sample": _HASH[::-1]}, "evaluation text: take"),
        ({}, {"source": {"other.safetensors": {}}}, "source files (model.safetensors, other"),
        ({}, {"code_version": "2"}, "code_version ('1', now '2')"),
    ],
)
def test_the_difference_is_said_in_words(before: dict, now: dict, words: str) -> None:
    with pytest.raises(UsageError, match=r"was begun with another") as caught:
        order(**now).check_same(order(**before).to_dict(), Path("out/journal.json"))
    assert words in str(caught.value)
    assert _HASH not in str(caught.value) and "{" not in str(caught.value)
