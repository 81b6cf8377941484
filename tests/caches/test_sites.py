from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor

from tolerances import sum_error
from trilens.axes import SITES, site_name
from trilens.caches.derived import HeadOut, PatternValue
from trilens.caches.patterns.protocol import DensePattern
from trilens.caches.patterns.softmax.pattern import SoftmaxPattern
from trilens.caches.sites import SiteCache
from trilens.errors import (
    AbsentLayerError,
    ModifiedInPlaceError,
    NotStoredError,
    OutOfRangeError,
    ShapeError,
    TooLargeError,
    UnknownSiteError,
    UsageError,
)

SEQ, HEADS, D_HEAD, D_MODEL = 5, 2, 3, 8


def pattern(**options: Any) -> SoftmaxPattern:
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, HEADS, SEQ, D_HEAD).unbind(0)
    return SoftmaxPattern(q, k, scaling=0.5, causal=True, **options)


def values() -> dict[tuple[str, int | None], Any]:
    torch.manual_seed(0)
    return {
        ("resid_post", 4): torch.randn(SEQ, D_MODEL),
        ("attn.z", 4): torch.randn(SEQ, HEADS, D_HEAD),
        ("resid_post", 1): torch.randn(SEQ, D_MODEL),
        ("embed", None): torch.randn(SEQ, D_MODEL),
        ("attn.head_out", 4): HeadOut(
            torch.randn(SEQ, HEADS, D_HEAD), torch.randn(HEADS * D_HEAD, D_MODEL)
        ),
        ("attn.pattern", 4): PatternValue(pattern()),
        ("attn.scores", 4): PatternValue(pattern(), "scores"),
    }


@pytest.fixture
def cache() -> SiteCache:
    return SiteCache.from_values(values(), {("attn.z", 0): "the layer is recurrent"})


def test_a_mapping_from_names_and_layers(cache: SiteCache) -> None:
    given = values()
    assert torch.equal(cache["resid_post", 4], given["resid_post", 4])
    assert torch.equal(cache["embed"], given["embed", None])
    assert torch.equal(cache["embed", None], given["embed", None])
    assert torch.equal(cache["blocks.4.attn.hook_z"], given["attn.z", 4])
    assert torch.equal(cache["hook_resid_post", 1], given["resid_post", 1])
    assert torch.equal(cache["layers_output[1]"], given["resid_post", 1])
    # In the order in which a block passes them, whatever order they came in.
    assert cache.names == (
        "embed", "attn.scores", "attn.pattern", "attn.z", "attn.head_out", "resid_post",
    )  # fmt: skip
    assert cache.layers("resid_post") == (1, 4)
    assert cache.layers("embed") == ()
    assert cache.axes("attn.hook_z") == "[seq, heads, d_head]"
    assert len(cache) == 7
    assert next(iter(cache)) == ("embed", None)
    assert ("resid_post", 4) in cache
    assert ("resid_post", 2) not in cache
    assert ("mlp.out", 4) not in cache
    assert "resid_post: layers 1, 4" in repr(cache)


@pytest.mark.parametrize(
    ("key", "error", "words"),
    [
        (("resid_post", 2), AbsentLayerError, r"layers=\[…, 2\].*layers 1, 4"),
        (("attn.z", 0), AbsentLayerError, "the layer is recurrent"),
        (("mlp.out", 0), NotStoredError, r"capture with sites=\['mlp.out'\]"),
        (("resid_pots", 1), UnknownSiteError, "did you mean resid_post"),
        ("resid_post", UsageError, "needs a layer"),
        (("embed", 0), UsageError, "has no layers"),
        (("resid_post", 1.5), OutOfRangeError, "whole number"),
        (("blocks.1.hook_resid_post", 1), UsageError, "names layer 1 too"),
        (5, UsageError, "names no site"),
        (("mixer.rate", 1), UsageError, "is a gate"),
        (("state", 1), UsageError, "read in cap.states"),
    ],
)
def test_what_is_not_there(cache: SiteCache, key: Any, error: type, words: str) -> None:
    with pytest.raises(error, match=words):
        cache[key]


@pytest.mark.parametrize("key", [("nowhere", 0), ("embed", 0), ("resid_post", None)])
def test_keys_that_are_none(key: Any) -> None:
    with pytest.raises(UsageError):
        SiteCache.from_values({key: torch.zeros(1, 1)})


def test_derived_values_are_computed_not_stored(cache: SiteCache) -> None:
    given = values()
    head_out: HeadOut = given["attn.head_out", 4]
    found = cache["attn.head_out", 4]
    assert found.shape == (SEQ, HEADS, D_MODEL)
    whole = head_out.z.flatten(1) @ head_out.weight
    terms = head_out.z.flatten(1).abs() @ head_out.weight.abs()
    close = torch.as_tensor(sum_error(HEADS * D_HEAD, terms, torch.float32))
    assert bool(((found.sum(1) - whole).abs() <= close).all())
    assert not cache.is_stored("attn.head_out", 4)
    assert cache.is_stored("attn.z", 4)
    assert cache["attn.head_out", 4] is not found


@pytest.mark.parametrize(
    "options",
    [{}, {"softcap": 2.0}, {"bias": torch.linspace(-1, 1, SEQ).expand(1, HEADS, SEQ, SEQ)}],
    ids=["plain", "soft cap", "bias"],
)
def test_scores_by_hand(options: dict[str, Any]) -> None:
    made = pattern(**options)
    scores = PatternValue(made, "scores").value()
    expected = made.q[0] @ made.k[0].mT * 0.5
    if "softcap" in options:
        expected = 2.0 * torch.tanh(expected / 2.0)
    expected = expected + options["bias"][0] if "bias" in options else expected
    later = torch.ones(SEQ, SEQ, dtype=torch.bool).triu(1)
    assert bool((scores[:, later] == -torch.inf).all())
    close = float(sum_error(D_HEAD + 2, expected.abs().max() + 1, torch.float32))
    assert float((scores - expected)[:, ~later].abs().max()) <= close
    weights = PatternValue(made).value()
    assert float((scores.softmax(-1) - weights).abs().max()) <= close


def test_values_that_cannot_be_derived() -> None:
    with pytest.raises(UsageError, match="weights were kept"):
        PatternValue(DensePattern(torch.ones(1, 1, 1, 1)), "scores")
    with pytest.raises(ShapeError, match="heads · d_head"):
        HeadOut(torch.zeros(2, 2, 3), torch.zeros(5, 4))
    q = torch.zeros(1, 1, 1, 1).expand(1, 16, 4096, 1)
    with pytest.raises(TooLargeError, match="rows, columns or statistics"):
        PatternValue(SoftmaxPattern(q, q, scaling=1.0)).value()


def test_a_weight_that_changed_is_told() -> None:
    weight = torch.nn.Parameter(torch.zeros(6, 4))
    made = HeadOut(torch.zeros(2, 2, 3), weight)
    assert not made.value().requires_grad
    with torch.no_grad():
        weight.add_(1)
    with pytest.raises(ModifiedInPlaceError, match="capture again"):
        made.value()


def test_saved_and_rebuilt(cache: SiteCache) -> None:
    tensors = {name: tensor.clone() for name, tensor in cache.tensors()}
    back = SiteCache.rebuild(tensors, json.loads(json.dumps(cache.params())))
    assert list(back) == list(cache)
    assert back.reasons == cache.reasons
    for key in cache:
        assert torch.equal(back[key], cache[key])
    assert [back.is_stored(*key) for key in back] == [cache.is_stored(*key) for key in cache]
    with pytest.raises(UsageError, match="unknown"):
        params = {"sites": [["attn.z", 0, {"kind": "odd"}]], "reasons": []}
        SiteCache.rebuild({"0.z": torch.zeros(1)}, params)


def test_bytes_and_devices(cache: SiteCache) -> None:
    held: dict[int, Tensor] = {t.untyped_storage().data_ptr(): t for _, t in cache.tensors()}
    assert cache.nbytes == sum(t.untyped_storage().nbytes() for t in held.values())
    there = cache.to("meta")
    assert there["resid_post", 4].device.type == "meta"
    assert there["attn.head_out", 4].device.type == "meta"
    assert cache["resid_post", 4].device.type == "cpu"
    assert SiteCache().is_empty
    assert repr(SiteCache()) == "SiteCache(empty)"


def test_every_alias_is_one_site() -> None:
    seen: set[str] = set(SITES)
    for name, spec in SITES.items():
        assert site_name(name) == (name, None)
        for alias in spec.aliases:
            assert alias not in seen
            seen.add(alias)
            assert site_name(alias) == (name, None)
            if spec.per_layer:
                assert site_name(f"blocks.12.{alias}") == (name, 12)
                assert site_name(f"{alias}[0]") == (name, 0)
            else:
                with pytest.raises(UnknownSiteError):
                    site_name(f"blocks.12.{alias}")


@pytest.mark.parametrize(
    ("text", "near"),
    [
        ("resid_pst", "resid_post"),
        ("hook_z", "attn.z"),
        ("blocks.3.hook_resid_pots", "resid_post"),
        ("attn_out", "attn.out"),
        ("", "embed"),
        ("x" * 5000, "embed"),
        (None, "resid_post"),
        (f"blocks.{'9' * 40}.hook_resid_post", "resid_post"),
    ],
)
def test_unknown_names_offer_the_nearest(text: Any, near: str) -> None:
    with pytest.raises(UnknownSiteError, match=near) as caught:
        site_name(text)
    assert len(str(caught.value)) < 600
