"""Model factories by architecture name: the only part of training that knows an architecture."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from importlib import import_module
from typing import TypeVar

from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)

from trilens.errors import UsageError
from trilens.models.rwkv7.config import RWKV7Config
from trilens.models.rwkv7.model import RWKV7ForCausalLM

__all__ = ["ARCHITECTURES", "Architecture", "ModelOptions", "build_model", "has_attention_heads"]

Config = TypeVar("Config", bound=PreTrainedConfig)


@dataclass(frozen=True)
class ModelOptions:
    """What every architecture has in common.

    Attributes:
        vocab_size: number of token ids.
        context: longest training sequence, in tokens.
        end_of_text_id: id of the token that opens and ends documents.
    """

    vocab_size: int
    context: int
    end_of_text_id: int


@dataclass(frozen=True)
class Architecture:
    """One way of building a demo model.

    Attributes:
        model_type: the ``model_type`` of its configuration, by which a saved one is recognised.
        build: makes the untrained model; its weights come from torch's global generator, which
            the caller seeds.
        has_attention_heads: whether per-head attention scores can be measured.
        training: what must hold while it trains; nothing unless given.
    """

    model_type: str
    build: Callable[[ModelOptions], PreTrainedModel]
    has_attention_heads: bool
    training: Callable[[], AbstractContextManager[None]] = nullcontext


def _config(kind: type[Config], options: ModelOptions, **shape: int) -> Config:
    """As wide as every demo model, with tied embeddings and one special token."""
    special = dict.fromkeys(
        ("bos_token_id", "eos_token_id", "pad_token_id"), options.end_of_text_id
    )
    config: Config = kind(
        vocab_size=options.vocab_size, hidden_size=256, tie_word_embeddings=True, **special, **shape
    )
    return config


def _build_transformer(options: ModelOptions) -> PreTrainedModel:
    """A 4-layer Llama; every linear's input width is a multiple of 256 (256, 256, 512)."""
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 32}
    shape = {"intermediate_size": 512, "num_hidden_layers": 4, **heads}
    config = _config(LlamaConfig, options, max_position_embeddings=options.context, **shape)
    return LlamaForCausalLM(config)


def _build_mamba(options: ModelOptions) -> PreTrainedModel:
    """A 5-layer Mamba with 512 channels of 16 states each."""
    return MambaForCausalLM(_config(MambaConfig, options, num_hidden_layers=5, state_size=16))


def _build_rwkv7(options: ModelOptions) -> PreTrainedModel:
    """A 4-layer RWKV-7 with 4 heads of the published width."""
    shape = {"intermediate_size": 384, "num_hidden_layers": 4, "head_size": 64}
    return RWKV7ForCausalLM(_config(RWKV7Config, options, **shape))


def _trainable_scan() -> AbstractContextManager[None]:
    """The scan that Mamba is trained with; it needs numba, which only looking at a model does not.

    Raises:
        UsageError: numba is not installed.
    """
    try:
        scan = import_module("training.scan")
    except ModuleNotFoundError as error:
        raise UsageError(
            f"training a Mamba needs {error.name}: pip install trilens[fast]"
        ) from None
    context: AbstractContextManager[None] = scan.trainable_scan()
    return context


ARCHITECTURES: dict[str, Architecture] = {
    "transformer": Architecture(
        model_type="llama", build=_build_transformer, has_attention_heads=True
    ),
    "mamba": Architecture(
        model_type="mamba",
        build=_build_mamba,
        has_attention_heads=False,
        training=_trainable_scan,
    ),
    "rwkv7": Architecture(model_type="rwkv7", build=_build_rwkv7, has_attention_heads=False),
}
"""Every architecture ``--arch`` accepts."""


def build_model(arch: str, options: ModelOptions) -> PreTrainedModel:
    """Build an untrained model in fp32.

    Raises:
        UsageError: no architecture has that name.
    """
    if arch not in ARCHITECTURES:
        raise UsageError(f"unknown architecture {arch!r}; known: {', '.join(ARCHITECTURES)}")
    return ARCHITECTURES[arch].build(options).float()


def has_attention_heads(model: PreTrainedModel) -> bool:
    """Whether a loaded model is of an architecture whose heads can be scored."""
    scored = {arch.model_type for arch in ARCHITECTURES.values() if arch.has_attention_heads}
    return model.config.model_type in scored
