"""Published layouts of RWKV-7 in, one transformers checkpoint out, bit for bit."""

from __future__ import annotations

import json
import os
import pickle
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from rwkv7_published import published_tensors
from trilens.errors import (
    ConfigError,
    CorruptFileError,
    ModelNotFoundError,
    UnsafeFormatError,
    UsageError,
)
from trilens.models.rwkv7.config import RWKV7Config
from trilens.models.rwkv7.conversion import validate_conversion
from trilens.models.rwkv7.convert import convert_rwkv7
from trilens.models.rwkv7.model import RWKV7ForCausalLM

SIZES = {"layers": 2, "width": 48, "vocab": 37, "head_size": 16}


@pytest.fixture
def tensors():
    return published_tensors(**SIZES)


def rename_for_transformers(tensors):
    """The published rule of names for transformers, written a second time and another way."""
    renamed = {}
    for name, tensor in tensors.items():
        new = name
        for old, ours in [
            (r"^blocks\.", "model.layers."),
            (r"^emb\.", "model.embeddings."),
            (r"^ln_out\.", "model.norm."),
            (r"^head\.", "lm_head."),
            (r"\.ln0\.", ".pre_norm."),
            (r"\.ln1\.", ".attn_norm."),
            (r"\.ln2\.", ".ffn_norm."),
            (r"\.att\.receptance", ".attn.r_proj"),
            (r"\.att\.key", ".attn.k_proj"),
            (r"\.att\.value", ".attn.v_proj"),
            (r"\.att\.output", ".attn.o_proj"),
            (r"\.att\.ln_x", ".attn.g_norm"),
            (r"\.att\.([wavg])0$", r".attn.\1_lora.lora.2.bias"),
            (r"\.att\.([wavg])1$", r".attn.\1_lora.lora.0.weight"),
            (r"\.att\.([wavg])2$", r".attn.\1_lora.lora.2.weight"),
            (r"\.att\.", ".attn."),
        ]:
            new = re.sub(old, ours, new)
        if ".layers.0.attn.v_lora." in new:
            continue
        if re.search(r"lora\.[02]\.weight$", new):
            renamed[new] = tensor.t().contiguous()
        elif tensor.dim() == 3 and ".attn.x_" not in new:
            renamed[new] = tensor.flatten()
        else:
            renamed[new] = tensor
    return renamed


def save_pth(tensors, folder):
    path = folder / "model.pth"
    torch.save(tensors, path)
    return path


def test_a_pth_is_copied_bit_for_bit(tmp_path, tensors):
    before = os.umask(0o027)
    try:
        result = convert_rwkv7(save_pth(tensors, tmp_path), tmp_path / "out")
    finally:
        os.umask(before)
    assert sorted(path.name for path in result.path.iterdir()) == [
        "config.json",
        "model.safetensors",
        "trilens-conversion.json",
    ]
    assert {path.stat().st_mode & 0o777 for path in result.path.iterdir()} == {0o640}
    assert set(validate_conversion(result.path)) == {p.name for p in result.path.iterdir()}
    written, expected = (
        load_file(result.path / "model.safetensors"),
        rename_for_transformers(tensors),
    )
    assert written.keys() == expected.keys()
    assert all(torch.equal(written[name], expected[name]) for name in expected)
    assert result.n_tensors == len(expected)
    assert result.size_bytes == sum(t.nbytes for t in expected.values())


def test_sizes_are_read_from_the_tensors(tmp_path, tensors):
    for name in ("w1", "w2", "g1", "g2", "v1", "v2"):
        for layer in range(2):
            key = f"blocks.{layer}.att.{name}"
            cut = {"w": 24, "g": 40, "v": 8}[name[0]]
            tensors[key] = torch.randn(*((48, cut) if name[1] == "1" else (cut, 48)))
    for layer in range(2):
        tensors[f"blocks.{layer}.ffn.key.weight"] = torch.randn(168, 48)
        tensors[f"blocks.{layer}.ffn.value.weight"] = torch.randn(48, 168)
    result = convert_rwkv7(save_pth(tensors, tmp_path), tmp_path / "out")
    model, info = AutoModelForCausalLM.from_pretrained(result.path, output_loading_info=True)
    assert not info["unexpected_keys"]
    config = model.config
    assert (config.hidden_size, config.head_size, config.num_hidden_layers) == (48, 16, 2)
    assert (config.vocab_size, config.intermediate_size) == (37, 168)
    assert (config.decay_low_rank_dim, config.gate_low_rank_dim, config.v_low_rank_dim) == (
        24,
        40,
        8,
    )
    assert config.architectures == ["RWKV7ForCausalLM"]
    assert torch.isfinite(model(torch.tensor([[1, 2, 3]])).logits).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_dtype_stays(tmp_path, tensors, dtype):
    halves = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    result = convert_rwkv7(save_pth(halves, tmp_path), tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(result.path)
    assert model.dtype == dtype
    expected = rename_for_transformers(halves)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())


def test_one_block_and_tensors_that_share_memory(tmp_path):
    tensors = published_tensors(**{**SIZES, "layers": 1})
    tensors["head.weight"] = tensors["emb.weight"]
    result = convert_rwkv7(save_pth(tensors, tmp_path), tmp_path / "out")
    written = load_file(result.path / "model.safetensors")
    assert torch.equal(written["lm_head.weight"], tensors["emb.weight"])


@pytest.mark.parametrize("stacked", [False, True])
def test_safetensors_for_transformers_keep_names_and_special_tokens(tmp_path, tensors, stacked):
    expected = rename_for_transformers(tensors)
    source = dict(expected)
    if stacked:  # how the first published files held the six token shifts
        for layer in range(2):
            prefix = f"model.layers.{layer}.attn."
            rows = [source.pop(f"{prefix}x_{kind}").flatten() for kind in "rwkvag"]
            source[f"{prefix}x_x"] = torch.stack(rows)
    folder = tmp_path / "in"
    folder.mkdir()
    names = sorted(source)
    halves = {"a": names[::2], "b": names[1::2]}
    for part, chosen in halves.items():
        save_file({name: source[name] for name in chosen}, folder / f"model-{part}.safetensors")
    fields = {"model_type": "rwkv7", "norm_eps": 1e-6, "eos_token_id": 9, "fuse_norm": True}
    (folder / "config.json").write_text(json.dumps(fields))
    result = convert_rwkv7(folder, tmp_path / "out")
    written = load_file(result.path / "model.safetensors")
    assert written.keys() == expected.keys()
    assert all(torch.equal(written[name], expected[name]) for name in expected)
    config = RWKV7Config.from_pretrained(result.path)
    assert (config.norm_eps, config.eos_token_id, config.bos_token_id) == (1e-6, 9, 0)


def test_a_checkpoint_published_for_transformers_loads_as_it_is(tmp_path, tensors):
    """With every field that such a configuration has, and no code from the checkpoint."""
    save_file(rename_for_transformers(tensors), tmp_path / "model.safetensors", {"format": "pt"})
    fields = {
        "architectures": ["RWKV7ForCausalLM"],
        "attn": None,
        "attn_mode": "chunk",
        "a_low_rank_dim": 32,
        "auto_map": {"AutoConfig": "modeling_rwkv7.RWKV7Config"},
        "bos_token_id": 1,
        "decay_low_rank_dim": 32,
        "eos_token_id": 2,
        "fuse_cross_entropy": True,
        "fuse_norm": False,
        "gate_low_rank_dim": 32,
        "head_dim": 16,
        "hidden_act": "sqrelu",
        "hidden_ratio": 4.0,
        "hidden_size": 48,
        "initializer_range": 0.006,
        "intermediate_size": 192,
        "max_position_embeddings": 2048,
        "model_type": "rwkv7",
        "norm_bias": True,
        "norm_eps": 1e-05,
        "norm_first": True,
        "num_heads": 3,
        "num_hidden_layers": 2,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "use_cache": True,
        "v_low_rank_dim": 32,
        "value_dim": [48, 48],
        "vocab_size": 37,
    }
    (tmp_path / "config.json").write_text(json.dumps(fields))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is RWKV7ForCausalLM
    converted = convert_rwkv7(save_pth(tensors, tmp_path), tmp_path / "out").path
    ids = torch.arange(1, 30).unsqueeze(0)
    same = AutoModelForCausalLM.from_pretrained(converted)
    # Such a configuration means head_dim · norm_eps, the reference code 64e-5.
    for block in same.model.layers:
        assert block.attn.g_norm.eps == 64e-5
        block.attn.g_norm.eps = 16 * 1e-5
    assert torch.equal(loaded(ids).logits, same(ids).logits)


# --- refusals -------------------------------------------------------------------------------------


class Runs:
    """A pickle that would write a file when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_a_pickle_that_runs_something_is_refused_and_not_run(tmp_path, tensors):
    trap = tmp_path / "trap"
    tensors["emb.weight"] = Runs(trap)
    for path in (tmp_path / "zip.pth", tmp_path / "bare.pth"):
        if path.name == "zip.pth":
            torch.save(tensors, path)
        else:
            path.write_bytes(pickle.dumps(Runs(trap)))
        with pytest.raises(UnsafeFormatError, match=path.name):
            convert_rwkv7(path, tmp_path / "out")
    assert not trap.exists()
    assert not (tmp_path / "out").exists()


def test_a_pickle_of_something_else_is_refused(tmp_path, tensors):
    with pytest.raises(UnsafeFormatError, match="holds a list, not tensors by name"):
        convert_rwkv7(save_pth([torch.zeros(1)], tmp_path), tmp_path / "out")
    for strange in (3, "text", torch.eye(3).to_sparse()):
        with pytest.raises(UnsafeFormatError, match=r"not plain tensors: \['step'\]"):
            convert_rwkv7(save_pth({**tensors, "step": strange}, tmp_path), tmp_path / "out")
    folder = tmp_path / "bins"
    folder.mkdir()
    (folder / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(UnsafeFormatError, match=r"pickled weights only \(pytorch_model\.bin\)"):
        convert_rwkv7(folder, tmp_path / "out")


@pytest.mark.parametrize("kept", [0, 100, 0.5, -1])
@pytest.mark.parametrize("kind", ["pth", "safetensors"])
def test_a_truncated_file_is_refused(tmp_path, tensors, kind, kept):
    path = tmp_path / f"model.{kind}"
    if kind == "pth":
        torch.save(tensors, path)
    else:
        save_file(rename_for_transformers(tensors), path)
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content)) if isinstance(kept, float) else kept])
    with pytest.raises(CorruptFileError, match=f"model.{kind} is (no readable|truncated)"):
        convert_rwkv7(path, tmp_path / "out")


def test_tensors_that_do_not_fit_are_named(tmp_path, tensors):
    def refused(changes, message):
        changed = {**tensors, **changes}
        changed = {name: tensor for name, tensor in changed.items() if tensor is not None}
        with pytest.raises(CorruptFileError, match=message):
            convert_rwkv7(save_pth(changed, tmp_path), tmp_path / "out")

    refused({"blocks.1.att.k_k": None}, r"1 missing: model\.layers\.1\.attn\.k_k")
    refused({"head.weight": None}, r"1 missing: lm_head\.weight")
    refused({"emb.weight": None}, r"model\.embeddings\.weight is missing")
    refused({"blocks.0.att.w1": torch.zeros(())}, r"w_lora\.lora\.0\.weight is missing or has no")
    refused(
        {"blocks.1.ffn.s_emb.weight": torch.zeros(3)},
        r"1 not known: model\.layers\.1\.ffn\.s_emb\.weight",
    )
    refused({"extra": torch.zeros(())}, "1 not known: extra")
    refused(
        {"blocks.1.att.key.weight": torch.zeros(48, 47)},
        r"1 misshapen: model\.layers\.1\.attn\.k_proj\.weight \(48, 47\), not \(48, 48\)",
    )
    refused({"emb.weight": torch.ones(37, 48).char()}, r"1 not floating point: .*\(torch\.int8\)")
    refused({"blocks.0.att.w1": torch.zeros(1, 48, 32)}, r"w_lora\.lora\.0\.weight \(1, 48, 32\)")
    refused({"blocks.3.ln1.weight": torch.zeros(48)}, r"has blocks \[0, 1, 3\]")
    assert not (tmp_path / "out").exists()


def test_another_architecture_is_refused(tmp_path, tensors):
    folder = tmp_path / "in"
    folder.mkdir()
    save_file(rename_for_transformers(tensors), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"attn": {"layers": [1]}}))
    with pytest.raises(ConfigError, match="is not RWKV-7"):
        convert_rwkv7(folder, tmp_path / "out")
    (folder / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"config\.json is not valid JSON"):
        convert_rwkv7(folder, tmp_path / "out")
    (folder / "config.json").write_text("[]")
    with pytest.raises(ConfigError, match="no JSON object but a list"):
        convert_rwkv7(folder, tmp_path / "out")


def test_places_that_are_wrong(tmp_path, tensors):
    with pytest.raises(ModelNotFoundError, match=r"nothing\.pth does not exist"):
        convert_rwkv7(tmp_path / "nothing.pth", tmp_path / "out")
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ModelNotFoundError, match=r"holds no \.safetensors file"):
        convert_rwkv7(empty, tmp_path / "out")
    with pytest.raises(UsageError, match="exists and is not empty"):
        convert_rwkv7(save_pth(tensors, tmp_path), tmp_path)
    assert convert_rwkv7(tmp_path / "model.pth", empty).path == empty
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == ["empty", "model.pth"]


@pytest.mark.parametrize("head_size", [16, 24])
def test_the_group_norm_is_that_of_the_reference_code(tmp_path, head_size):
    tensors = published_tensors(**{**SIZES, "head_size": head_size})
    converted = convert_rwkv7(save_pth(tensors, tmp_path), tmp_path / "out").path
    config = RWKV7Config.from_pretrained(converted)
    assert config.group_norm_eps == 64e-5
    model = AutoModelForCausalLM.from_pretrained(converted)
    assert {block.attn.g_norm.eps for block in model.model.layers} == {64e-5}


def test_a_configuration_of_before_keeps_its_epsilon():
    assert RWKV7Config(head_size=32, hidden_size=64, norm_eps=1e-6).group_norm_eps == 32e-6
