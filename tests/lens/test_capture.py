"""A capture survives saving and loading, answer for answer."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tinymodels import build, prompt_ids
from tolerances import sum_error
from trilens.caches.derived import PatternValue
from trilens.caches.patterns.protocol import Pattern
from trilens.caches.sites import SiteCache
from trilens.demo import demo_path
from trilens.errors import CorruptFileError, NotStoredError, TextNotFoundError, UsageError
from trilens.lens.capture import Capture
from trilens.lens.lens import Lens


def score_error(pattern: Pattern) -> float:
    """What a score of the pattern may be off by, for the sizes that its q and k have."""
    q, k = (pattern.tensors()[name].double().abs() for name in ("q", "k"))
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    terms = (q @ k.mT).max() * abs(pattern.params()["scaling"])
    return float(sum_error(q.shape[-1], terms, torch.float32))


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "gpt_oss", "deepseek_v32", "qwen3_next"])
@pytest.mark.parametrize("residual", ["last", "all"])
def test_save_and_load(model_type: str, residual: str, tmp_path: Path) -> None:
    lens = Lens(build(model_type))
    gates = bool(lens.gate_layers)
    cap = lens.capture(prompt_ids(model_type), residual=residual, attention=True, gates=gates)
    back = Capture.load(cap.save(tmp_path / "a.tlc"))
    assert back.tokens == cap.tokens
    assert back.model == cap.model
    assert torch.equal(back.logits, cap.logits)
    assert torch.equal(back.token_ids, cap.token_ids)
    assert type(back.residual) is type(cap.residual)
    for layer in cap.residual.layers:
        assert torch.equal(back.residual.get_layer(layer), cap.residual.get_layer(layer))
    assert back.attention.layers == cap.attention.layers
    for layer in cap.attention.layers:
        ours, theirs = cap.attention.pattern(layer), back.attention.pattern(layer)
        assert all(torch.equal(t, theirs.tensors()[name]) for name, t in ours.tensors().items())
        assert ours.params() == theirs.params()
        # A saved q is contiguous, and the sums of another layout round differently.
        pattern = cap.attention.pattern(layer)
        score = score_error(pattern)
        assert score < 1e-4
        # The derivative of a weight by scores is 1/4 at most; the row is then added up to 1.
        weight = score / 4 + float(sum_error(pattern.seq_k, 1, torch.float32))
        difference = back.attention.get_layer(layer) - cap.attention.get_layer(layer)
        assert difference.abs().max() <= weight
        ours, theirs = back.attention.entropy(layer), cap.attention.entropy(layer)
        assert np.abs(ours - theirs).max() <= weight * (1 + math.log(pattern.seq_k))
    if gates:
        assert back.gates.names == cap.gates.names
        for name in cap.gates.names:
            for layer in cap.gates.layers(name):
                assert torch.equal(back.gates.get(name, layer), cap.gates.get(name, layer))
                assert back.gates.spec(name, layer) == cap.gates.spec(name, layer)


def test_a_mask_shared_by_all_layers_is_stored_once(tmp_path: Path) -> None:
    lens = Lens(build("deepseek_v3"))
    cap = lens.capture(prompt_ids("deepseek_v3"), attention=True)
    path = cap.save(tmp_path / "a.tlc")
    names = [name for name in load_file(path) if name.endswith(".mask")]
    assert len(names) <= 1


def test_empty_capture_and_repr(tmp_path: Path) -> None:
    lens = Lens(build("llama"))
    cap = lens.capture(prompt_ids("llama"), residual=None, logits=None)
    back = Capture.load(cap.save(tmp_path / "a.tlc"))
    assert back.parts.names == ()
    assert "nothing" in repr(cap)
    assert "residual" in repr(lens.capture(prompt_ids("llama")))


def test_nbytes_counts_each_storage_once() -> None:
    lens = Lens(build("llama"))
    cap = lens.capture(prompt_ids("llama"), residual=None, logits=None, attention=True)
    seen = {}
    for layer in cap.attention.layers:
        for tensor in cap.attention.pattern(layer).tensors().values():
            storage = tensor.untyped_storage()
            seen[storage.data_ptr()] = storage.nbytes()
    assert cap.nbytes == sum(seen.values()) + cap.token_ids.untyped_storage().nbytes()


def test_to_moves_everything() -> None:
    lens = Lens(build("llama"))
    cap = lens.capture(prompt_ids("llama"), attention=True, gates=True).to("meta")
    assert cap.logits.device.type == "meta"
    assert cap.residual.get_layer(0).device.type == "meta"
    assert cap.attention.pattern(0).tensors()["q"].device.type == "meta"
    assert cap.gates.pre("mlp.gate", 0).device.type == "meta"


def test_top_tokens() -> None:
    lens = Lens(build("llama"))
    cap = lens.capture(prompt_ids("llama"))
    top = cap.top_tokens(4)
    expected = cap.logits[-1].softmax(-1)
    assert [t for t, _ in top] == expected.topk(4).indices.tolist()
    close = float(sum_error(cap.logits.shape[1], 1, torch.float32))
    assert all(p == pytest.approx(float(expected[t]), rel=close) for t, p in top)
    with pytest.raises(NotStoredError, match="logits"):
        lens.capture(prompt_ids("llama"), logits=None).top_tokens()


def test_damaged_files(tmp_path: Path) -> None:
    lens = Lens(build("llama"))
    path = lens.capture(prompt_ids("llama"), attention=True).save(tmp_path / "a.tlc")
    tensors = load_file(path)
    save_file(tensors, tmp_path / "plain.safetensors")
    with pytest.raises(CorruptFileError, match=r"not a trilens\.capture"):
        Capture.load(tmp_path / "plain.safetensors")
    body = {"format": "trilens.capture", "version": 1, "tokens": [], "aliases": {}}
    save_file(tensors, tmp_path / "part.tlc", metadata={"trilens": json.dumps(body)})
    with pytest.raises(CorruptFileError, match="not a whole capture"):
        Capture.load(tmp_path / "part.tlc")


def test_a_part_that_was_not_captured_says_what_to_pass() -> None:
    cap = Lens(build("llama")).capture(prompt_ids("llama"), residual=None, logits="last")
    assert cap.has("logits") and cap.parts.names == ("logits",)
    for part in ("residual", "attention", "effective", "gates", "states", "sites"):
        assert not cap.has(part)
        with pytest.raises(NotStoredError, match=rf"{part} was not captured: .*logits; .*{part}="):
            getattr(cap, part)
    with pytest.raises(
        UsageError, match="part 'residuals' is unknown: the parts are logits, resid"
    ):
        cap.has("residuals")


def test_sites_are_saved_with_a_capture(tmp_path: Path) -> None:
    cap = Lens(build("llama")).capture(prompt_ids("llama"), residual="all", attention=True)
    sites = SiteCache.from_values(
        {
            ("resid_post", 1): cap.residual[1],
            ("attn.pattern", 0): PatternValue(cap.attention.pattern(0)),
        },
        {("attn.z", 0): "it was not asked"},
    )
    held = replace(cap, parts=replace(cap.parts, sites=sites))
    assert held.has("sites")
    assert held.nbytes == cap.nbytes
    back = Capture.load(held.save(tmp_path / "a.tlc"))
    assert back.sites.reasons == sites.reasons
    for key in sites:
        # A pattern is computed again, of queries and keys that lie elsewhere in memory.
        assert torch.allclose(back.sites[key], sites[key], rtol=1e-5)
    assert held.to("meta").sites["resid_post", 1].device.type == "meta"


def change_manifest(path: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """A file with another manifest, without a hash, as files were before there were any."""
    with safe_open(path, "pt") as file:
        manifest = json.loads(file.metadata()["trilens"])
    manifest.pop("hashed")
    change(manifest)
    save_file(load_file(path), path, metadata={"trilens": json.dumps(manifest)})
    return path


@pytest.fixture(scope="module")
def demo() -> Lens:
    return Lens.from_pretrained(demo_path("transformer"))


def test_find_in_a_capture_that_was_saved(demo: Lens, tmp_path: Path) -> None:
    cap = demo.capture("def é😀 area(r): return area", logits=None)
    back = Capture.load(cap.save(tmp_path / "a.tlc"))
    assert back.text == cap.text == "def é😀 area(r): return area"
    assert back.spans == cap.spans
    for text in ("area", "é", "😀", "re", "): ret"):
        for occurrence in (None, 0, -1):
            found = back.find(text, occurrence)
            assert found == cap.find(text, occurrence)
            start, stop = cap.spans[found[0]][0], cap.spans[found[-1]][1]
            assert text in cap.text[start:stop]
    with pytest.raises(TextNotFoundError, match="nearest is"):
        back.find("Area")
    assert [c.find("a")[0] for c in demo.capture_many(["a b", "b a"])] == [0, 1]


def test_the_text_of_a_prompt_that_is_not_known(demo: Lens, tmp_path: Path) -> None:
    without = Lens(demo.model).capture([1, 2, 3], logits=None)
    with pytest.raises(NotStoredError, match="without a tokenizer"):
        without.find("a")
    path = demo.capture("def f", logits=None).save(tmp_path / "a.tlc")
    older = change_manifest(path, lambda manifest: manifest.pop("text"))
    with pytest.raises(NotStoredError, match="from before texts were kept"):
        Capture.load(older).spans
    odd = demo.capture("def f", logits=None).save(tmp_path / "b.tlc")
    with pytest.raises(CorruptFileError, match="outside the text"):
        Capture.load(change_manifest(odd, lambda held: held["text"].update(text="")))


@pytest.mark.parametrize(
    "text",
    [5, {}, {"text": "a"}, {"text": "ab", "spans": [[0, 1]]}, {"text": "ab", "spans": 3}]
    + [{"text": "ab", "spans": [[0, 1], odd]} for odd in ([], [0], [1, 0], [math.inf, 2], "ab")],
)
def test_a_damaged_text(demo: Lens, text: Any, tmp_path: Path) -> None:
    path = demo.capture([1, 2], logits=None).save(tmp_path / "a.tlc")
    with pytest.raises(CorruptFileError, match="not a whole capture"):
        Capture.load(change_manifest(path, lambda held: held.update(text=text)))


def test_align_two_captures(demo: Lens) -> None:
    clean = demo.capture("def area(r): return r", logits=None)
    same = clean.align(clean)
    assert same.is_equal_length
    assert same.replaced == ()
    longer = demo.capture("def area(r, height): return r", logits=None)
    found = clean.align(longer)
    assert found.map(-1) == len(longer.tokens) - 1
    assert all(clean.tokens[i] == longer.tokens[j] for i, j in found.equal)
    other = Lens(build("llama")).capture([1, 2], logits=None)
    assert clean.align(other).equal == ()
