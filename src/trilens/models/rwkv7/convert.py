"""Published RWKV-7 weights → a transformers checkpoint directory.

Two layouts are read: the `.pth` files of the authors (`blocks.0.att.receptance.weight`) and
safetensors in the layout of flash-linear-attention (`model.layers.0.attn.r_proj.weight`), whose
names are also ours. Values are copied bit for bit; low-rank matrices of a `.pth` are transposed.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers.initialization import no_init_weights

from trilens.errors import (
    ConfigError,
    CorruptFileError,
    ModelNotFoundError,
    UnsafeFormatError,
    UsageError,
)
from trilens.io.guarded import open_regular
from trilens.io.json import read_json
from trilens.io.messages import listed
from trilens.io.paths import as_path
from trilens.io.safetensors_header import read_header
from trilens.io.torch_archive import read_torch_archive
from trilens.models.rwkv7.config import RWKV7Config
from trilens.models.rwkv7.conversion import write_conversion
from trilens.models.rwkv7.model import RWKV7ForCausalLM

__all__ = ["Conversion", "convert_rwkv7"]

_NAMES_SHOWN = 5
_PICKLES = (".pth", ".pt", ".bin", ".ckpt")
_TOP = {
    "emb.weight": "model.embeddings.weight",
    "ln_out.weight": "model.norm.weight",
    "ln_out.bias": "model.norm.bias",
    "head.weight": "lm_head.weight",
}
_PARTS = {"ln0": "pre_norm", "ln1": "attn_norm", "ln2": "ffn_norm", "att": "attn", "ffn": "ffn"}
_PROJECTIONS = {
    "receptance": "r_proj",
    "key": "k_proj",
    "value": "v_proj",
    "output": "o_proj",
    "ln_x": "g_norm",
}
_LOW_RANK = {"0": "2.bias", "1": "0.weight", "2": "2.weight"}
_BLOCK = re.compile(r"blocks\.(\d+)\.(ln0|ln1|ln2|att|ffn)\.(.+)")
_GATE_TENSOR = re.compile(r"([wavg])([012])")
# Block 0 has no values to mix in, yet published files carry these tensors for it.
_UNUSED = re.compile(r"model\.layers\.0\.attn\.v_lora\..*")
_STACKED_SHIFT = re.compile(r"(model\.layers\.\d+\.attn\.)x_x")
# The first four refuse what is not RWKV-7; the rest is what tensors cannot say.
_FROM_CONFIG = (
    "attn",
    "norm_first",
    "norm_bias",
    "hidden_act",
    "norm_eps",
    "group_norm_eps",
    "use_cache",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)
_GROUP_NORM_EPS = 64e-5
_SHIFTS = ("x_r", "x_w", "x_k", "x_v", "x_a", "x_g")


@dataclass(frozen=True, slots=True)
class Conversion:
    """What was written: the directory, the sizes read from the tensors, and the counts."""

    path: Path
    config: dict[str, Any]
    n_tensors: int
    size_bytes: int


def convert_rwkv7(
    src: str | os.PathLike[str], dst: str | os.PathLike[str], *, tokenizer: Any = None
) -> Conversion:
    """Write published RWKV-7 weights as `config.json` and `model.safetensors`, with their hashes.

    Args:
        src: a `.pth` file, a `.safetensors` file, or a directory of safetensors files. A
            `config.json` beside safetensors gives what tensors cannot: epsilons and special tokens.
        dst: the directory to write; it must not exist or be empty. It appears when all is written.
        tokenizer: a tokenizer of transformers to write beside the weights.

    Returns:
        What was written.

    Raises:
        ModelNotFoundError: src does not exist or holds no weights.
        UnsafeFormatError: a pickle that holds anything but tensors by name; nothing in it is run.
            A directory with pickled weights only is refused likewise.
        CorruptFileError: an unreadable file, or tensors that are missing, not known or misshapen.
        ConfigError: a `config.json` that asks for another architecture.
        UsageError: dst holds something already, or the tokenizer has more tokens than the model.
        WriteError: dst cannot be written, or another run writes it; nothing is left of it.

    Memory: the checkpoint once; a `.pth` is mapped, not read whole.
    """
    source, target = as_path(src, "source"), as_path(dst, "output")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UsageError(f"{target} exists and is not empty: name a new directory")
    tensors = dict(_translate(_read(source)))
    config = _infer_config(tensors, _read_config(source), source)
    _check(tensors, config, source)
    if tokenizer is not None and len(tokenizer) > config.vocab_size:
        raise UsageError(
            f"tokenizer has {len(tokenizer)} tokens, and {source} {config.vocab_size}: give the "
            "one that the model was trained with"
        )
    write_conversion(tensors, config, target, tokenizer)
    size_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    return Conversion(target, config.to_dict(), len(tensors), size_bytes)


def _read(source: Path) -> dict[str, Tensor]:
    if not source.exists():
        raise ModelNotFoundError(f"{source} does not exist")
    if not source.is_dir():
        open_regular(source).close()  # a pipe or a device is refused before anything waits for it
        return (
            read_torch_archive(source) if source.suffix in _PICKLES else _read_safetensors(source)
        )
    shards = sorted(source.glob("*.safetensors"))
    if not shards:
        pickles = sorted(path.name for path in source.iterdir() if path.suffix in _PICKLES)
        if pickles:
            raise UnsafeFormatError(
                f"{source} holds pickled weights only ({listed(pickles, _NAMES_SHOWN)}): name "
                "a .pth file itself to have its tensors read without running it"
            )
        raise ModelNotFoundError(f"{source} holds no .safetensors file")
    return {name: tensor for shard in shards for name, tensor in _read_safetensors(shard).items()}


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    read_header(path)
    try:
        return load_file(path)  # type: ignore[no-any-return]
    except SafetensorError as error:
        raise CorruptFileError(f"{path} is no readable safetensors file: {error}") from error


def _translate(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Our names and shapes; a name in neither layout stays, to be refused by name later."""
    for name, tensor in tensors.items():
        new_name, transposed = _rename(name)
        if _UNUSED.fullmatch(new_name):
            continue
        stacked = _STACKED_SHIFT.fullmatch(new_name)
        if stacked and tensor.dim() > 1 and tensor.shape[0] == len(_SHIFTS):
            for shift, row in zip(_SHIFTS, tensor, strict=True):
                yield stacked[1] + shift, row.reshape(1, 1, -1).clone()
        else:
            matrix = tensor.t() if transposed and tensor.dim() == 2 else tensor
            yield new_name, _reshape(new_name, matrix.detach()).contiguous()


def _rename(name: str) -> tuple[str, bool]:
    """Our name for a tensor of a `.pth`, and whether its matrix is the other way round."""
    match = _BLOCK.fullmatch(name)
    if match is None:
        return _TOP.get(name, name), False
    layer, part, rest = match.groups()
    prefix = f"model.layers.{layer}.{_PARTS[part]}."
    if part != "att":
        return prefix + rest, False
    gate = _GATE_TENSOR.fullmatch(rest)
    if gate:
        return f"{prefix}{gate[1]}_lora.lora.{_LOW_RANK[gate[2]]}", gate[2] != "0"
    module, dot, leaf = rest.partition(".")
    return prefix + _PROJECTIONS.get(module, module) + dot + leaf, False


def _reshape(name: str, tensor: Tensor) -> Tensor:
    """Vectors are published as [1, 1, d_model] or [d_model], not always as ours are."""
    if tensor.dim() == 0 or tensor.numel() != tensor.shape[-1]:
        return tensor
    if re.search(r"\.attn\.x_[rwkvag]$", name):
        return tensor.reshape(1, 1, -1)
    return tensor.reshape(-1) if tensor.dim() == 3 else tensor


def _read_config(source: Path) -> dict[str, Any]:
    """The `config.json` beside safetensors, empty where there is none."""
    path = source / "config.json" if source.is_dir() else source.parent / "config.json"
    if source.suffix in _PICKLES or not path.exists():
        return {}
    return read_json(path, ConfigError, non_finite=True)


def _infer_config(
    tensors: Mapping[str, Tensor], published: Mapping[str, Any], source: Path
) -> RWKV7Config:
    """Sizes from the tensors; what they cannot say from the published configuration."""

    def size(name: str, axis: int) -> int:
        tensor = tensors.get(name)
        if tensor is None or tensor.dim() <= axis:
            raise CorruptFileError(
                f"{source} is no RWKV-7 checkpoint: {name} is missing or has no axis {axis}"
            )
        return int(tensor.shape[axis])

    numbers = [re.match(r"model\.layers\.(\d+)\.", name) for name in tensors]
    layers = {int(match[1]) for match in numbers if match}
    if layers != set(range(len(layers))):
        raise CorruptFileError(f"{source} has blocks {sorted(layers)}: some in between are missing")
    attn = "model.layers.0.attn"
    inferred: dict[str, Any] = {
        "vocab_size": size("model.embeddings.weight", 0),
        "hidden_size": size("model.embeddings.weight", 1),
        "num_hidden_layers": len(layers),
        "head_size": size(f"{attn}.r_k", 1),
        "intermediate_size": size("model.layers.0.ffn.key.weight", 0),
        "decay_low_rank_dim": size(f"{attn}.w_lora.lora.0.weight", 0),
        "a_low_rank_dim": size(f"{attn}.a_lora.lora.0.weight", 0),
        "gate_low_rank_dim": size(f"{attn}.g_lora.lora.0.weight", 0),
        "tie_word_embeddings": bool(published.get("tie_word_embeddings", False)),
        "dtype": str(tensors["model.embeddings.weight"].dtype).removeprefix("torch."),
    }
    if inferred["num_hidden_layers"] > 1:
        inferred["v_low_rank_dim"] = size("model.layers.1.attn.v_lora.lora.0.weight", 0)
    # Without a configuration the weights are those of the reference code.
    if not published:
        inferred["group_norm_eps"] = _GROUP_NORM_EPS
    extra = {name: published[name] for name in _FROM_CONFIG if name in published}
    return RWKV7Config(**inferred, **extra, architectures=[RWKV7ForCausalLM.__name__])


def _check(tensors: dict[str, Tensor], config: RWKV7Config, source: Path) -> None:
    """Compare names and shapes with those of the model that this configuration builds."""
    with no_init_weights(), torch.device("meta"):
        expected = RWKV7ForCausalLM(config).state_dict()
    if config.tie_word_embeddings:
        expected.pop("lm_head.weight", None)
        tensors.pop("lm_head.weight", None)
    problems = {
        "missing": sorted(expected.keys() - tensors.keys()),
        "not known": sorted(tensors.keys() - expected.keys()),
        "misshapen": [
            f"{name} {tuple(tensors[name].shape)}, not {tuple(expected[name].shape)}"
            for name in sorted(expected.keys() & tensors.keys())
            if tensors[name].shape != expected[name].shape
        ],
        "not floating point": [
            f"{name} ({tensor.dtype})"
            for name, tensor in sorted(tensors.items())
            if not tensor.is_floating_point()
        ],
    }
    told = [
        f"{len(names)} {kind}: {listed(names, _NAMES_SHOWN)}"
        for kind, names in problems.items()
        if names
    ]
    if told:
        raise CorruptFileError(f"tensors of {source} are not those of RWKV-7: {'; '.join(told)}")
