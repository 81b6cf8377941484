"""Files as the gguf package reads them, and what stays when something goes wrong."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader
from gguf.quants import dequantize
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import trilens
from checkpoint_cases import tensors
from gguf_cases import saved_with_tokenizer
from trilens.checkpoint.format.matrix_plan import MatrixPlan
from trilens.checkpoint.gguf import FORMATS, validate_gguf
from trilens.checkpoint.gguf import writer as writing
from trilens.checkpoint.gguf.families import FAMILIES
from trilens.checkpoint.gguf.reader import read_gguf
from trilens.errors import CorruptFileError, NonFiniteError, UsageError, WriteError
from trilens.ternary.codecs.gguf_blocks import Q2
from trilens.ternary.quantize import PerLayerQuant

PLAN = trilens.TernaryPlan(rule="exact", per="row", scale_dtype="float16")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_with_tokenizer(tmp_path_factory.mktemp("gguf") / "src")


def halves_to_neighbours(values: torch.Tensor, heads: int) -> torch.Tensor:
    """llama.cpp's own way to write it: conversion/llama.py, `permute`."""
    shaped = values.reshape(heads, 2, values.shape[0] // heads // 2, *values.shape[1:])
    return shaped.swapaxes(1, 2).reshape(values.shape)


@pytest.mark.parametrize("name", FORMATS)
def test_a_format_knows_its_own_bytes_from_others(name: str) -> None:
    form = FORMATS[name]
    trits = np.random.default_rng(0).integers(-1, 2, (3, 2 * form.block)).astype(np.int8)
    scales = np.array([[0.5, 1], [0.25, 2], [1, 1]], dtype=np.float32)
    found = form.encode(trits, scales)
    assert form.holds(found, trits, scales)
    other = trits.copy()
    other[2, 5] = (other[2, 5] + 2) % 3 - 1
    assert not form.holds(found, other, scales)
    assert not form.holds(found, trits, scales[::-1])


def coded(weights: torch.Tensor, **options: Any) -> torch.Tensor:
    quant = PerLayerQuant.quantize(weights, "w", rule="exact", scale_dtype="float16", **options)
    return quant.reconstruct()


@pytest.mark.parametrize("name", ["gguf-tq1_0", "gguf-tq2_0"])
def test_the_packages_reader_finds_the_ternary_weights(
    source: Path, tmp_path: Path, name: Any
) -> None:
    path = tmp_path / "model.gguf"
    report = trilens.ternarize(source, path, plan=PLAN, format=name)
    reader = GGUFReader(path)
    found = {tensor.name: tensor for tensor in reader.tensors}
    stored = load_file(source / "model.safetensors")
    heads = {"blk.0.attn_q.weight": 4, "blk.0.attn_k.weight": 2}
    assert {tensor.packed_as for tensor in report.tensors} == set(found)
    for tensor in report.tensors:
        entry = found[tensor.packed_as]
        wanted = stored[tensor.name]
        if tensor.outcome == "ternary":
            assert entry.tensor_type.name == FORMATS[name].codec.name
            wanted = coded(wanted, per="row")
        if tensor.packed_as in heads:
            wanted = halves_to_neighbours(wanted, heads[tensor.packed_as])
        values = dequantize(np.asarray(entry.data), entry.tensor_type)
        assert np.array_equal(values.view(np.uint32), wanted.numpy().view(np.uint32)), tensor.name
        assert tensor.decoded_exactly
        assert tensor.size_bytes == entry.n_bytes
    assert reader.get_field("general.architecture").contents() == "llama"
    assert len(report.coded) == 7


def test_q2_0_is_read_back_by_its_own_codec(source: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    plan = trilens.TernaryPlan(rule="exact", group_size=64)
    trilens.ternarize(source, path, plan=plan, format="gguf-q2_0")
    file = read_gguf(path)
    entry = file.tensors["blk.0.ffn_down.weight"]
    assert entry.type_id == 42
    raw = file.content.bytes(entry.begin, entry.end)
    found = FORMATS["gguf-q2_0"].codec.decode(raw, entry.shape)
    weights = np.repeat(found.scales, 64, axis=1) * found.trits
    wanted = coded(
        load_file(source / "model.safetensors")["model.layers.0.mlp.down_proj.weight"],
        group_size=64,
    )
    assert np.array_equal(weights, wanted.numpy())


def test_the_same_bytes_each_time(source: Path, tmp_path: Path) -> None:
    hashes = set()
    for name in ("a", "b"):
        path = tmp_path / name / "model.gguf"
        path.parent.mkdir()
        trilens.ternarize(source, path, plan=PLAN, format="gguf-tq2_0")
        hashes.add(hashlib.sha256(path.read_bytes()).hexdigest())
    assert len(hashes) == 1


def test_golden_metadata(source: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    trilens.ternarize(source, path, plan=PLAN, format="gguf-tq2_0")
    found = read_gguf(path).metadata
    assert len(found.pop("trilens.tensor_data.sha256")) == 64
    assert len(found.pop("trilens.metadata.sha256")) == 64
    assert found.pop("trilens.n_hashes") == 2
    assert found.pop("trilens.version") == trilens.__version__
    assert trilens.TernaryPlan.from_json(found.pop("trilens.plan")) == PLAN
    tokens = found.pop("tokenizer.ggml.tokens")
    assert len(tokens) == len(found.pop("tokenizer.ggml.token_type")) == 320
    assert tokens[:2] == ["<s>", "</s>"]
    assert tokens[-1] == "[PAD319]"
    assert found.pop("tokenizer.ggml.merges")[0] == "h e"
    assert found.pop("llama.attention.layer_norm_rms_epsilon") == pytest.approx(1e-6)
    assert found == {
        "general.architecture": "llama",
        "general.type": "model",
        "general.name": "src",
        "general.file_type": 37,
        "general.quantization_version": 2,
        "llama.context_length": 64,
        "llama.embedding_length": 256,
        "llama.block_count": 1,
        "llama.feed_forward_length": 256,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.attention.key_length": 64,
        "llama.attention.value_length": 64,
        "llama.rope.dimension_count": 64,
        "llama.rope.freq_base": 10000.0,
        "llama.vocab_size": 320,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.ggml.add_eos_token": False,
    }


def test_a_ternary_checkpoint_keeps_every_trit(source: Path, tmp_path: Path) -> None:
    at_once, through = tmp_path / "a.gguf", tmp_path / "b.gguf"
    trilens.ternarize(source, at_once, plan=PLAN, format="gguf-tq2_0")
    trilens.ternarize(source, tmp_path / "src", plan=PLAN)
    report = trilens.ternarize(tmp_path / "src", through, format="gguf-tq2_0")
    assert through.read_bytes() == at_once.read_bytes()
    assert {tensor.outcome for tensor in report.coded} == {"already ternary"}
    assert {tensor.relative_error for tensor in report.coded} == {0.0}


def test_a_mixed_compact_checkpoint_keeps_every_trit(source: Path, tmp_path: Path) -> None:
    names = [tensor.name for tensor in trilens.ternarize(source, tmp_path, dry_run=True).coded]
    entries = {
        names[0]: MatrixPlan("keep"),
        names[1]: MatrixPlan("exact", group_size=256),
        names[2]: MatrixPlan("twn", per="tensor"),
    }
    plan = replace(PLAN, storage="compact", matrices=entries)
    at_once, through = tmp_path / "a.gguf", tmp_path / "b.gguf"
    trilens.ternarize(source, at_once, plan=plan, format="gguf-tq2_0")
    trilens.ternarize(source, tmp_path / "src", plan=plan)
    report = trilens.ternarize(tmp_path / "src", through, format="gguf-tq2_0")
    found, wanted = ([tensor.data for tensor in GGUFReader(p).tensors] for p in (through, at_once))
    assert all(np.array_equal(a, b) for a, b in zip(found, wanted, strict=True))
    assert len(report.coded) == len(names) - 1
    assert {tensor.relative_error for tensor in report.coded} == {0.0}


def test_scales_beyond_float16s_digits_are_rounded_and_told(source: Path, tmp_path: Path) -> None:
    trilens.ternarize(source, tmp_path / "ternary")
    report = trilens.ternarize(tmp_path / "ternary", tmp_path / "m.gguf", format="gguf-tq2_0")
    for tensor in report.coded:
        assert tensor.outcome == "ternary"
        assert "trits are kept" in tensor.reason
        assert 0 < (tensor.relative_error or 0) < 1e-6
    codes = tensors(tmp_path / "ternary")["model.layers.0.mlp.up_proj.codes"]
    entry = read_gguf(tmp_path / "m.gguf").tensors["blk.0.ffn_up.weight"]
    raw = read_gguf(tmp_path / "m.gguf").content.bytes(entry.begin, entry.end)
    found = FORMATS["gguf-tq2_0"].codec.decode(raw, entry.shape).trits
    wanted = torch.stack([(codes >> shift & 3).to(torch.int8) - 1 for shift in (0, 2, 4, 6)], 2)
    assert np.array_equal(found, wanted.flatten(1).numpy())


def test_what_is_kept_is_kept_exactly(tmp_path: Path) -> None:
    """bfloat16 matrices stay; vectors become float32, with 1 added where the model adds it."""
    source = saved_with_tokenizer(
        tmp_path / "src", "gemma", dtype=torch.bfloat16, head_dim=64, tie_word_embeddings=True
    )
    report = trilens.ternarize(
        source, tmp_path / "m.gguf", plan=trilens.TernaryPlan(keep=("o_proj",)), format="gguf-tq2_0"
    )
    stored = load_file(source / "model.safetensors")
    found = {tensor.name: tensor for tensor in GGUFReader(tmp_path / "m.gguf").tensors}
    embedding = np.asarray(found["token_embd.weight"].data).reshape(-1)
    wanted = stored["model.embed_tokens.weight"].view(torch.uint8).reshape(-1).numpy()
    assert np.array_equal(embedding, wanted)
    norm = stored["model.norm.weight"].float() + 1
    assert np.array_equal(found["output_norm.weight"].data, norm.numpy())
    (kept,) = report.fallbacks
    assert kept.name == "model.layers.0.self_attn.o_proj.weight"
    assert "o_proj" in kept.reason
    assert found["blk.0.attn_output.weight"].tensor_type.name == "BF16"
    assert "1 added" in next(t.reason for t in report.tensors if t.name == "model.norm.weight")


def test_transposed_layers_and_rows_that_are_no_whole_blocks(tmp_path: Path) -> None:
    changes = {"n_embd": 256, "n_layer": 1, "n_head": 4, "n_positions": 64, "n_inner": 320}
    source = saved_with_tokenizer(tmp_path / "src", "gpt2", **changes)
    report = trilens.ternarize(source, tmp_path / "m.gguf", plan=PLAN, format="gguf-tq2_0")
    stored = load_file(source / "model.safetensors")
    found = {tensor.name: tensor for tensor in GGUFReader(tmp_path / "m.gguf").tensors}
    fused = stored["transformer.h.0.attn.c_attn.weight"]
    entry = found["blk.0.attn_qkv.weight"]
    values = dequantize(np.asarray(entry.data), entry.tensor_type)
    assert np.array_equal(values, coded(fused.T.contiguous(), per="row").numpy())
    (kept,) = report.fallbacks
    assert kept.name == "transformer.h.0.mlp.c_proj.weight"
    assert "rows of 320 weights are no multiple of 256" in kept.reason
    down = stored["transformer.h.0.mlp.c_proj.weight"].T
    assert np.array_equal(found["blk.0.ffn_down.weight"].data, down.numpy())
    with pytest.raises(UsageError, match="nothing is left"):
        trilens.ternarize(
            source,
            tmp_path / "n.gguf",
            plan=trilens.TernaryPlan(only=("mlp.c_proj",)),
            format="gguf-tq2_0",
        )


def test_a_tied_head_is_left_out_and_told(tmp_path: Path) -> None:
    source = saved_with_tokenizer(tmp_path / "src", tie_word_embeddings=True)
    report = trilens.ternarize(source, tmp_path / "m.gguf", plan=PLAN, format="gguf-tq2_0")
    assert "output.weight" not in read_gguf(tmp_path / "m.gguf").tensors
    assert all(tensor.outcome != "left out" for tensor in report.tensors)
    weights = load_file(source / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, source / "model.safetensors", {"format": "pt"})
    report = trilens.ternarize(source, tmp_path / "n.gguf", plan=PLAN, format="gguf-tq2_0")
    (absent,) = [tensor for tensor in report.tensors if tensor.outcome == "left out"]
    assert absent.name == "lm_head.weight"
    assert absent.reason == "the same as model.embed_tokens.weight"


def test_a_dry_run_tells_the_sizes_and_writes_nothing(source: Path, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    dry = trilens.ternarize(source, path, plan=PLAN, format="gguf-tq1_0", dry_run=True)
    assert list(tmp_path.iterdir()) == []
    wet = trilens.ternarize(source, path, plan=PLAN, format="gguf-tq1_0")
    sizes = {tensor.packed_as: tensor.size_bytes for tensor in dry.tensors}
    assert sizes == {tensor.name: tensor.size_bytes for tensor in validate_gguf(path).tensors}
    assert dry.size_bytes == wet.size_bytes


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rule": "planes"}, "'planes' does not fit gguf-tq2_0"),
        ({"rule": "asymmetric"}, "no offsets"),
        (
            {"matrices": {"model.layers.0.mlp.up_proj.weight": MatrixPlan("planes")}},
            "'planes' does not fit gguf-tq2_0",
        ),
        ({"group_size": 128}, "group size 128 does not fit gguf-tq2_0"),
        ({"scale_dtype": "bfloat16"}, "'bfloat16' does not fit"),
        ({"keep": ("nothing_like_it",)}, "matches no tensor name"),
    ],
)
def test_plans_that_do_not_fit(source: Path, tmp_path: Path, options: Any, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        trilens.ternarize(
            source, tmp_path / "m.gguf", plan=trilens.TernaryPlan(**options), format="gguf-tq2_0"
        )
    assert list(tmp_path.iterdir()) == []


def test_four_levels_are_what_q2_0_holds(source: Path, tmp_path: Path) -> None:
    plan = trilens.TernaryPlan(rule="quad", group_size=128, scale_dtype="float16")
    report = trilens.ternarize(source, tmp_path / "m.gguf", plan=plan, format="gguf-q2_0")
    assert {tensor.outcome for tensor in report.coded} == {"four levels"}
    name = "model.layers.0.mlp.up_proj.weight"
    dense = load_file(source / "model.safetensors")[name]
    quant = PerLayerQuant.quantize(dense, name, rule="quad", group_size=128, scale_dtype="float16")
    file = read_gguf(tmp_path / "m.gguf")
    entry = file.tensors["blk.0.ffn_up.weight"]
    found = Q2().decode(file.content.bytes(entry.begin, entry.end), quant.shape)
    assert np.array_equal(found.trits, quant.trits.numpy())
    assert found.scales is not None
    assert np.array_equal(found.scales[:, ::2], quant.scales.reshape(len(found.scales), -1))
    assert (found.scales < 0).any()
    assert (found.trits == 2).any()
    assert [t.levels for t in validate_gguf(tmp_path / "m.gguf").coded] == 7 * [4]
    # The same through a checkpoint, and nowhere else.
    trilens.ternarize(source, tmp_path / "four", plan=plan)
    again = trilens.ternarize(tmp_path / "four", tmp_path / "n.gguf", format="gguf-q2_0")
    assert {tensor.reason for tensor in again.coded} == {"its codes and scales are kept"}
    other = read_gguf(tmp_path / "n.gguf").tensors["blk.0.ffn_up.weight"]
    assert (tmp_path / "n.gguf").read_bytes()[other.begin : other.end] == (
        tmp_path / "m.gguf"
    ).read_bytes()[entry.begin : entry.end]
    for format in ("gguf-tq1_0", "gguf-tq2_0"):
        for src, options in ((source, {"plan": plan}), (tmp_path / "four", {})):
            with pytest.raises(UsageError, match=f"four levels, and {format} holds three"):
                trilens.ternarize(src, tmp_path / "no.gguf", format=format, **options)


@pytest.mark.parametrize(("name", "bits", "most"), [("q8_0", 8.5, 1e-4), ("q4_0", 4.5, 2e-2)])
def test_embeddings_in_fewer_bits(
    source: Path, tmp_path: Path, name: Any, bits: float, most: float
) -> None:
    plan = replace(PLAN, embeddings=name)
    planned = trilens.ternarize(
        source, tmp_path / "m.gguf", plan=plan, format="gguf-tq2_0", dry_run=True
    )
    report = trilens.ternarize(source, tmp_path / "m.gguf", plan=plan, format="gguf-tq2_0")
    assert planned.size_bytes == report.size_bytes
    weights = load_file(source / "model.safetensors")
    file = read_gguf(tmp_path / "m.gguf")
    rounded = {t.packed_as: t for t in report.tensors if t.outcome == "rounded"}
    assert {*rounded} == {"token_embd.weight", "output.weight"}
    for tensor in rounded.values():
        entry = file.tensors[tensor.packed_as]
        raw = file.content.bytes(entry.begin, entry.end).reshape(entry.shape[0], -1)
        kind = GGMLQuantizationType[name.upper()]
        found, dense = dequantize(raw, kind), weights[tensor.name].numpy()
        error = float(((found - dense) ** 2).sum() / (dense**2).sum())
        assert tensor.relative_error == pytest.approx(error, rel=1e-4)
        assert 0 < error < most
        assert tensor.bits_per_weight == bits
    types = {t.name: t.type for t in validate_gguf(tmp_path / "m.gguf").tensors}
    assert types["token_embd.weight"] == types["output.weight"] == name.upper()
    # The same from a ternary checkpoint, which takes no other option.
    trilens.ternarize(source, tmp_path / "ternary", plan=PLAN)
    trilens.ternarize(
        tmp_path / "ternary",
        tmp_path / "n.gguf",
        plan=trilens.TernaryPlan(embeddings=name),
        format="gguf-tq2_0",
    )
    entry = read_gguf(tmp_path / "n.gguf").tensors["token_embd.weight"]
    assert entry.type_id == kind
    for format in ("trilens", "dense"):
        with pytest.raises(UsageError, match=f"'{name}' is for GGUF files, and format '{format}'"):
            trilens.ternarize(source, tmp_path / "no", plan=plan, format=format)


def test_a_damaged_scale_of_an_embedding_is_named(source: Path, tmp_path: Path) -> None:
    plan = replace(PLAN, embeddings="q8_0")
    path = tmp_path / "m.gguf"
    trilens.ternarize(source, path, plan=plan, format="gguf-tq2_0")
    begin = read_gguf(path).tensors["token_embd.weight"].begin
    data = bytearray(path.read_bytes())
    data[begin + 34 : begin + 36] = b"\x00\x7c"
    path.write_bytes(data)
    with pytest.raises(CorruptFileError, match=r"token_embd.weight.* a scale that is NaN or Inf"):
        validate_gguf(path)
    with pytest.raises(UsageError, match="embeddings 'q2_k' is unknown: pass keep, q8_0, q4_0"):
        trilens.TernaryPlan(embeddings="q2_k")  # type: ignore[arg-type]


def test_places_that_are_refused(source: Path, tmp_path: Path) -> None:
    there = tmp_path / "there.gguf"
    there.write_bytes(b"mine")
    for place, words in (
        (there, "exists"),
        (tmp_path / "model.bin", "end in .gguf"),
        (tmp_path / "nowhere" / "m.gguf", "make it first"),
    ):
        with pytest.raises(UsageError, match=words):
            trilens.ternarize(source, place, plan=PLAN, format="gguf-tq2_0")
    with pytest.raises(UsageError, match="pass a gguf format"):
        trilens.ternarize(source, tmp_path / "m.gguf", plan=PLAN)
    with pytest.raises(UsageError, match="gguf-q4_0"):
        trilens.ternarize(source, tmp_path / "m.gguf", format="gguf-q4_0")  # type: ignore[arg-type]
    assert there.read_bytes() == b"mine"
    assert list(tmp_path.iterdir()) == [there]


def test_sources_that_are_refused(source: Path, tmp_path: Path) -> None:
    other = saved_with_tokenizer(tmp_path / "other", "helium")
    with pytest.raises(UsageError, match=f"'helium' is not mapped to GGUF.*{', '.join(FAMILIES)}"):
        trilens.ternarize(other, tmp_path / "m.gguf", format="gguf-tq2_0")
    for rule in ("planes", "exact"):
        options: Any = {"rule": rule, "group_size": 128}
        plan = trilens.TernaryPlan(**options)
        trilens.ternarize(source, tmp_path / rule, plan=plan)
        with pytest.raises(UsageError, match="does not fit gguf-tq2_0"):
            trilens.ternarize(tmp_path / rule, tmp_path / "m.gguf", format="gguf-tq2_0")
    with pytest.raises(UsageError, match="is ternary already"):
        trilens.ternarize(tmp_path / "exact", tmp_path / "m.gguf", plan=PLAN, format="gguf-tq2_0")
    assert not (tmp_path / "m.gguf").exists()


def test_a_failure_in_the_middle_leaves_nothing(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = saved_with_tokenizer(tmp_path / "bad")
    weights = load_file(bad / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"][3, 5] = float("nan")
    save_file(weights, bad / "model.safetensors", {"format": "pt"})
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(NonFiniteError, match="up_proj"):
        trilens.ternarize(bad, out / "m.gguf", plan=PLAN, format="gguf-tq2_0")

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(writing, "_kept_bytes", full)
        with pytest.raises(WriteError, match="No space left"):
            trilens.ternarize(source, out / "m.gguf", plan=PLAN, format="gguf-tq2_0")
    assert list(out.iterdir()) == []


def test_a_disk_that_writes_something_else_is_noticed(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    true_put = writing._put

    for at, value, words in ((0, 3, "does not decode"), (65, 0, "decodes to other weights")):

        def damaged(*arguments: Any, at: int = at, value: int = value) -> Any:
            found = true_put(*arguments).copy()
            found[at] = value
            return found

        with monkeypatch.context() as patch:
            patch.setattr(writing, "_put", damaged)
            with pytest.raises(WriteError, match=words):
                trilens.ternarize(source, tmp_path / "m.gguf", plan=PLAN, format="gguf-tq2_0")
    assert list(tmp_path.iterdir()) == []


@given(heads=st.integers(1, 6), half=st.integers(1, 8), kv=st.integers(1, 3))
def test_the_row_order_is_llama_cpps_permutation(heads: int, half: int, kv: int) -> None:
    class Config:
        num_attention_heads = heads * kv
        num_key_value_heads = kv

    for name, n_heads in (("blk.0.attn_q.weight", heads * kv), ("blk.0.attn_k.bias", kv)):
        rows = n_heads * 2 * half
        order = FAMILIES["llama"].row_order(name, rows, Config)
        wanted = halves_to_neighbours(torch.arange(rows), n_heads)
        assert order is not None
        assert order.tolist() == wanted.tolist()
        assert FAMILIES["qwen3"].row_order(name, rows, Config) is None
    assert FAMILIES["llama"].row_order("blk.0.attn_v.weight", rows, Config) is None
