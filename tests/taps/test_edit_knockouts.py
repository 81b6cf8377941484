"""Which edges a knockout cuts in a pass, and whose writes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from edit_cases import compiled, prefill
from trilens.edits import Knockout, PerPrompt
from trilens.errors import UntouchedEditError
from trilens.taps.span import Span

SPAN = prefill(4)


def edges(edit: Knockout, span: Span = SPAN, new: int = 0) -> list[list[int]]:
    (cut,) = compiled(edit, span.prompts, new).cuts[0]
    found = cut.edges(span)
    return [] if found is None else np.argwhere(found).tolist()


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({"queries": -1, "keys": [0, 1]}, [[0, 3, 0], [0, 3, 1]]),
        ({"queries": -1, "keys": [-1]}, [[0, 3, 3]]),
        # None stands for all other tokens: the token's own edge stays.
        ({"keys": [1]}, [[0, 0, 1], [0, 2, 1], [0, 3, 1]]),
        ({"queries": 2}, [[0, 2, 0], [0, 2, 1], [0, 2, 3]]),
    ],
)
def test_edges(options: dict[str, Any], wanted: list[list[int]]) -> None:
    assert edges(Knockout(layer=0, **options)) == wanted


def test_edges_of_a_batch_name_no_padding() -> None:
    span = prefill(4, 2)
    assert edges(Knockout(layer=0, queries=-1, keys=0), span) == [[0, 3, 0], [1, 1, 0]]
    each = PerPrompt([[], "last"])
    assert edges(Knockout(layer=0, queries=each, keys=0), span) == [[1, 1, 0]]


def test_edges_of_a_step() -> None:
    step = Span(5, 1, (1,), (4,))
    edit = Knockout(layer=0, queries="generated", keys=[0, 4])
    (cut,) = compiled(edit, [4], 3).cuts[0]
    assert cut.edges(SPAN) is None
    found = cut.edges(step)
    assert found is not None
    assert found.shape == (1, 1, 6)
    assert np.argwhere(found).tolist() == [[0, 0, 0], [0, 0, 4]]
    own = compiled(Knockout(layer=0, keys="generated"), [4], 3).cuts[0][0].edges(step, 8)
    assert own is not None
    assert np.argwhere(own).tolist() == [[0, 0, 4], [0, 0, 6], [0, 0, 7]]


def test_layers_and_heads() -> None:
    made = compiled(Knockout(keys=0, heads=[3, 1]), [4])
    assert sorted(made.cuts) == [0, 2]
    assert made.cuts[2][0].heads == (3, 1)
    assert sorted(compiled(Knockout(keys=0), [4]).cuts) == [0, 1, 2]


def test_writes_of_recurrent_layers() -> None:
    span = prefill(4, 2)
    (cut,) = compiled(Knockout(layer=1, keys=[0, -1]), span.prompts).cuts[1]
    found = cut.writes(span)
    assert found is not None
    assert found.tolist() == [[True, False, False, True], [True, True, False, False]]
    assert cut.writes(Span(4, 1, (1, 1), (4, 2))) is None


def test_a_knockout_that_was_not_applied_is_refused() -> None:
    made = compiled(Knockout(layers=[0, 2], keys=0), [4])
    made.touched.add(0, 0, 3)
    with pytest.raises(UntouchedEditError, match=r"edit 0 \(knockout@0,2 keys=0\) .* layers 2"):
        made.check_touched()
    made.touched.add(0, 2, 3)
    made.check_touched()
