"""Which architectures the engine knows, and what it needs to know about each.

This is one of the two places that name model families (the other is `models.gates`): a GGUF file
states its architecture by name, and the engine's code for that name fixes everything that the file
does not say. So each entry refuses every setting of a configuration that this code would ignore.
Names of tensors are the gguf package's own.

Source: llama.cpp, `src/models/*.cpp` (what is read) and `conversion/*.py` (what is written).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import numpy as np
from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, GGUFWriter
from numpy.typing import NDArray

from trilens.checkpoint.gguf import dense, moe, recurrent
from trilens.checkpoint.gguf.recurrent import Change
from trilens.checkpoint.gguf.rows import grouped_qkv, neighbours, per_head_qkv
from trilens.checkpoint.gguf.settings import Extra
from trilens.errors import UsageError

__all__ = ["FAMILIES", "Family", "find_family"]


@dataclass(frozen=True, slots=True)
class Family:
    """What the engine expects of one architecture.

    Attributes:
        arch: Its name in the gguf package.
        describe: Adds the architecture's settings to a writer; gives tensors that are to be
            written beside those of the checkpoint.
        rows: From a tensor's name in the file, its number of rows and the configuration to which
            row of the checkpoint each row is; None where none moved.
        norm_offset: What the model adds to its norm weights when it runs; the engine does not.
        values: From a tensor's name in the file to what becomes of its values; None for nothing.
        renamed: Expressions for names that the gguf package does not know → those it knows.
        split: Ends of names of tensors that the engine has in parts → the ends of theirs.
        place: From a tensor's name in the checkpoint to its place among those that the engine holds
            in one tensor; None for other tensors.
        own_head: The engine wants the head also where it is the embedding.
    """

    arch: MODEL_ARCH
    describe: Callable[[GGUFWriter, Any], Extra]
    rows: Callable[[str, int, Any], NDArray[np.int64] | None] | None = None
    norm_offset: float = 0.0
    values: Callable[[str, Any], Change | None] | None = None
    renamed: Mapping[str, str] = field(default_factory=dict)
    split: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    place: Callable[[str], int | None] | None = None
    own_head: bool = False

    def row_order(self, tensor: str, rows: int, config: Any) -> NDArray[np.int64] | None:
        """Which row of the checkpoint each row of a tensor in the file is; None where none moved.

        Shapes: → [rows]
        """
        return None if self.rows is None else self.rows(tensor, rows, config)

    def change(self, tensor: str, config: Any) -> Change | None:
        """What becomes of the values of a tensor that is not quantized."""
        return None if self.values is None else self.values(tensor, config)


def find_family(config: Any) -> Family:
    """The entry of a configuration.

    Raises:
        UsageError: the engine's mapping does not know the architecture.
    """
    name = str(getattr(config, "model_type", None))
    if name not in FAMILIES:
        known = name.replace("_", "") in {n.replace("-", "") for n in MODEL_ARCH_NAMES.values()}
        why = "the gguf package names it, but no file of it was proven here; " if known else ""
        raise UsageError(
            f"architecture {name!r} is not mapped to GGUF: {why}there are {', '.join(FAMILIES)}; "
            "write a checkpoint for transformers instead (without a gguf format)"
        )
    return FAMILIES[name]


_A = MODEL_ARCH
_DT_BIAS = {r"\.dt_bias$": ".dt_proj.bias"}
_INPUTS = {
    "block_sparse_moe.input_linear.weight": (
        "mlp.experts.gate_proj.weight",
        "mlp.experts.up_proj.weight",
    )
}

FAMILIES: MappingProxyType[str, Family] = MappingProxyType(
    {
        "llama": Family(_A.LLAMA, dense.llama, neighbours),
        "mistral": Family(_A.LLAMA, dense.llama, neighbours),
        "arcee": Family(_A.ARCEE, dense.arcee, neighbours),
        "qwen2": Family(_A.QWEN2, dense.qwen2),
        "qwen3": Family(_A.QWEN3, dense.qwen3),
        "seed_oss": Family(_A.SEED_OSS, dense.seed_oss),
        "hunyuan_v1_dense": Family(_A.HUNYUAN_DENSE, dense.hunyuan),
        "ernie4_5": Family(_A.ERNIE4_5, dense.ernie4_5),
        "exaone4": Family(_A.EXAONE4, dense.exaone4),
        "smollm3": Family(_A.SMOLLM3, dense.smollm3, neighbours),
        "granite": Family(_A.GRANITE, dense.granite, neighbours),
        "olmo": Family(_A.OLMO, dense.olmo, neighbours),
        "olmo2": Family(_A.OLMO2, dense.olmo2, own_head=True),
        "olmo3": Family(_A.OLMO2, dense.olmo3, own_head=True),
        "cohere": Family(_A.COMMAND_R, dense.cohere),
        "cohere2": Family(_A.COHERE2, dense.cohere2),
        "glm4": Family(_A.GLM4, dense.glm4),
        "stablelm": Family(_A.STABLELM, dense.stablelm, own_head=True),
        "starcoder2": Family(_A.STARCODER2, dense.starcoder2),
        "nemotron": Family(_A.NEMOTRON, dense.nemotron, norm_offset=1.0, own_head=True),
        "phi": Family(_A.PHI2, dense.phi, own_head=True),
        "phi3": Family(_A.PHI3, dense.phi3),
        "gpt_neox": Family(_A.GPTNEOX, dense.gpt_neox, per_head_qkv, own_head=True),
        "falcon": Family(_A.FALCON, dense.falcon, grouped_qkv),
        "bloom": Family(_A.BLOOM, dense.bloom, per_head_qkv, renamed={r"^transformer\.": ""}),
        "mpt": Family(_A.MPT, dense.mpt),
        "gemma": Family(_A.GEMMA, dense.gemma, norm_offset=1.0),
        "gemma2": Family(_A.GEMMA2, dense.gemma2, norm_offset=1.0),
        "gemma3_text": Family(_A.GEMMA3, dense.gemma3, norm_offset=1.0),
        "gpt2": Family(_A.GPT2, dense.gpt2),
        "gpt_bigcode": Family(_A.STARCODER, dense.gpt_bigcode),
        "mixtral": Family(_A.LLAMA, moe.mixtral, neighbours),
        "qwen2_moe": Family(_A.QWEN2MOE, moe.qwen2_moe, own_head=True),
        "qwen3_moe": Family(_A.QWEN3MOE, moe.qwen3_moe),
        "olmoe": Family(_A.OLMOE, moe.olmoe, own_head=True),
        "granitemoe": Family(_A.GRANITE_MOE, moe.granitemoe, neighbours, split=_INPUTS),
        "mamba": Family(_A.MAMBA, recurrent.mamba, values=recurrent.mamba_values),
        "falcon_mamba": Family(_A.MAMBA, recurrent.falcon_mamba, values=recurrent.mamba_values),
        "mamba2": Family(
            _A.MAMBA2, recurrent.mamba2, values=recurrent.mamba2_values, renamed=_DT_BIAS
        ),
        "rwkv7": Family(
            _A.RWKV7,
            recurrent.rwkv7,
            values=recurrent.rwkv7_values,
            renamed=recurrent.RWKV7_NAMES,
            place=recurrent.rwkv7_place,
            own_head=True,
        ),
    }
)
"""Every mapped architecture by transformers' name of its configuration."""
