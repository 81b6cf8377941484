from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tolerances import sum_error
from trilens.axes import SITES
from trilens.caches.sites import SiteCache
from trilens.demo import demo_path
from trilens.errors import OutOfRangeError, ShapeError, UnknownSiteError, UsageError
from trilens.lens.capture import Capture
from trilens.lens.lens import Lens
from trilens.lens.stack import stack
from trilens.progress import Step

PROMPTS = ["import os", "def area(r):\n    return r", "class A:", "x = 1"]


@pytest.fixture(scope="module")
def lens() -> Lens:
    return Lens.from_pretrained(demo_path("transformer"))


@pytest.fixture(scope="module")
def captures(lens: Lens) -> list[Capture]:
    return [lens.capture(prompt, residual="all", logits=None) for prompt in PROMPTS]


@pytest.mark.parametrize("position", [-1, "last", 0, 1, -2, "mean"])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_stack_is_what_captures_hold(
    lens: Lens, captures: list[Capture], position: Any, batch_size: int
) -> None:
    steps: list[Step] = []
    found = stack(
        lens,
        iter(PROMPTS),
        layers=[3, 1],
        position=position,
        batch_size=batch_size,
        progress=steps.append,
    )
    assert found.shape == (4, 2, lens.d_model)
    assert steps[-1].done == steps[-1].total == 4
    for row, cap in zip(found, captures, strict=True):
        # Layers ascend, whatever order they were asked in.
        for value, layer in zip(row, (1, 3), strict=True):
            stream = cap.residual[layer]
            at = -1 if position == "last" else position
            expected = stream.mean(0) if position == "mean" else stream[at]
            # A padded batch adds the same terms up in another order.
            close = sum_error(4 * lens.d_model, stream.abs().max() * 8, torch.float32)
            assert float((value - expected).abs().max()) <= float(close)


def test_a_stack_is_a_copy_in_the_models_dtype(lens: Lens) -> None:
    found = lens.stack([[1, 2], [3, 4, 5]], position="mean")
    assert found.shape == (2, lens.n_layers, lens.d_model)
    assert found.dtype == lens.model.dtype
    assert found.untyped_storage().nbytes() == found.nbytes
    assert not found.requires_grad


class WithSites:
    """Captures whose sites are made of their residuals, to count what was asked."""

    def __init__(self, lens: Lens, widths: tuple[int, ...] = (8, 8)) -> None:
        self.lens, self.widths, self.asked = lens, widths, dict[str, Any]()

    def capture_many(self, prompts: Any, **options: Any) -> Iterator[Capture]:
        self.asked = options
        for cap in self.lens.capture_many(prompts, residual="all", logits=None):
            values: dict[tuple[str, int | None], Any] = {
                ("attn.z", layer): cap.residual[layer][:, : width * 4].unflatten(1, (width, 4))
                for layer, width in enumerate(self.widths)
            }
            values["embed", None] = cap.residual[0]
            yield replace(cap, parts=replace(cap.parts, sites=SiteCache.from_values(values)))


def test_other_sites(lens: Lens, captures: list[Capture]) -> None:
    double = WithSites(lens)
    found = stack(double, PROMPTS, site="attn.hook_z", position=1)
    assert double.asked["sites"] == ["attn.z"]
    assert double.asked["residual"] is None
    assert found.shape == (4, 2, 8, 4)
    stream = captures[1].residual[1]
    close = float(sum_error(4 * lens.d_model, stream.abs().max() * 8, torch.float32))
    assert float((found[1, 1].flatten() - stream[1, :32]).abs().max()) <= close
    assert stack(double, PROMPTS, site="embed").shape == (4, 1, lens.d_model)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"site": "resid_pots"}, UnknownSiteError, "resid_post"),
        ({"site": "attn.pattern"}, UsageError, "one value per token"),
        ({"site": "blocks.1.hook_resid_post"}, UsageError, "names layer 1 too"),
        ({"site": "mixer.rate"}, UsageError, "is a gate"),
        ({"position": "first"}, UsageError, "'last' or 'mean'"),
        ({"position": 2}, OutOfRangeError, "prompt 0 of 2 tokens has positions"),
        ({"position": 1.5}, OutOfRangeError, "whole number"),
        ({"layers": [9]}, OutOfRangeError, "layer 9"),
        ({"prompts": []}, UsageError, "prompts is empty"),
        ({"prompts": "one"}, UsageError, "give a list"),
        ({"prompts": 5}, UsageError, "give a list"),
    ],
)
def test_bad_input(lens: Lens, options: dict[str, Any], error: type, words: str) -> None:
    given = {"prompts": PROMPTS, **options}
    with pytest.raises(error, match=words):
        stack(lens, given.pop("prompts"), **given)


def test_layers_of_several_shapes(lens: Lens) -> None:
    with pytest.raises(ShapeError, match="layers of one shape"):
        stack(WithSites(lens, (8, 4)), PROMPTS, site="attn.z")


def test_sites_of_a_model(lens: Lens) -> None:
    """Every site with a value per token: what captures of single prompts hold of it."""
    names = [name for name in lens.site_layers if SITES[name].axes.startswith("[seq, ")]
    assert {"embed", "attn.z", "attn.head_out", "mlp.post"} <= set(names)
    captures = [lens.capture(prompt, sites=names, logits=None) for prompt in PROMPTS]
    for name in names:
        found = stack(lens, PROMPTS, site=name, position=-1, batch_size=4)
        layers = lens.site_layers[name] or (None,)
        assert found.shape[:2] == (4, len(layers))
        for row, cap in zip(found, captures, strict=True):
            for value, layer in zip(row, layers, strict=True):
                whole = cap.sites[name, layer]
                close = sum_error(8 * lens.d_model, whole.abs().max() * 8, torch.float32)
                assert float((value - whole[-1]).abs().max()) <= float(close)


def test_sites_of_a_model_saved(lens: Lens, tmp_path: Path) -> None:
    cap = lens.capture("def area(r):", sites=list(lens.site_layers), logits=None)
    back = Capture.load(cap.save(tmp_path / "a.tlc"))
    assert list(back.sites) == list(cap.sites)
    for key in cap.sites:
        seen = cap.sites[key]
        close = sum_error(8 * lens.d_model, seen[seen.isfinite()].abs().max() * 8, torch.float32)
        torch.testing.assert_close(back.sites[key], seen, rtol=0, atol=float(close))
