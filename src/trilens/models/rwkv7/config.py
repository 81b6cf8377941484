"""The configuration of an RWKV-7 model, in the field names of published checkpoints."""

from __future__ import annotations

import math
from typing import Any, ClassVar

from transformers import PreTrainedConfig

from trilens.errors import ConfigError

__all__ = ["RWKV7Config", "low_rank_dim"]

_RANK_STEP = 32
# The rule behind the published 0.1B, 1.5B and 2.9B models: factor · hidden_size ^ power, in steps.
_RANK_RULES = {
    "decay_low_rank_dim": (1.8, 0.5),
    "a_low_rank_dim": (1.8, 0.5),
    "v_low_rank_dim": (1.3, 0.5),
    "gate_low_rank_dim": (0.6, 0.8),
}
# Fields of other RWKV-7 configurations that choose a different model: only these values are known.
_FIXED_FIELDS: dict[str, tuple[Any, ...]] = {
    "attn": (None,),
    "norm_first": (True,),
    "norm_bias": (True,),
    "hidden_act": ("sqrelu", "relu2"),
}
# Fields that speak of kernels or of training length and change nothing here. RWKV-7 has no
# positions, so a `max_position_embeddings` would only refuse prompts that the model can read.
_IDLE_FIELDS = (
    "attn_mode",
    "fuse_cross_entropy",
    "fuse_linear_cross_entropy",
    "fuse_norm",
    "hidden_ratio",
    "max_position_embeddings",
    "use_l2warp",
)


def low_rank_dim(name: str, hidden_size: int) -> int:
    """The published rank of a low-rank projection, e.g. `decay_low_rank_dim` → 64 at width 768."""
    factor, power = _RANK_RULES[name]
    steps = round(factor * math.pow(hidden_size, power) / _RANK_STEP)
    return max(1, steps) * _RANK_STEP


class RWKV7Config(PreTrainedConfig):  # type: ignore[misc]
    """Sizes and constants of one RWKV-7 "Goose" model.

    Args:
        vocab_size: number of token ids.
        hidden_size: width of the residual stream, d_model.
        num_hidden_layers: number of blocks.
        head_size: width of one head; `head_dim` is another name for it.
        intermediate_size: width of the channel mix; 4 · hidden_size unless given.
        decay_low_rank_dim: rank of the decay's projection; published rule unless given, as below.
        a_low_rank_dim: rank of the in-context learning rate's projection.
        v_low_rank_dim: rank of the value residual's projection (every block but the first).
        gate_low_rank_dim: rank of the output gate's projection.
        norm_eps: epsilon of the layer norms.
        group_norm_eps: epsilon of the per-head norm; head_size · norm_eps unless given, as
            configurations published for transformers mean it. The reference code has 64e-5,
            whatever the head size.
        chunk_size: tokens that the prefill kernel takes at once; a matter of speed alone.
        tie_word_embeddings: whether the unembedding is the embedding; published models say no.
        use_cache: whether a forward pass returns the recurrent state by default.
        initializer_range: standard deviation of a tied embedding in a new model.
        bos_token_id: token that begins a text.
        eos_token_id: token that ends one.
        pad_token_id: token that fills a batch; never seen by the model where it is masked.

    Raises:
        ConfigError: a size or an epsilon that is not positive, a hidden_size that heads do not
            divide, or a field that asks for a variant of the architecture which is not RWKV-7 as
            published.

    Source:
        arXiv 2503.14456.
    """

    model_type = "rwkv7"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]
    attribute_map: ClassVar[dict[str, str]] = {"head_dim": "head_size"}

    def __init__(
        self,
        *,
        vocab_size: int = 65536,
        hidden_size: int = 768,
        num_hidden_layers: int = 12,
        head_size: int = 64,
        intermediate_size: int | None = None,
        decay_low_rank_dim: int | None = None,
        a_low_rank_dim: int | None = None,
        v_low_rank_dim: int | None = None,
        gate_low_rank_dim: int | None = None,
        norm_eps: float = 1e-5,
        group_norm_eps: float | None = None,
        chunk_size: int = 16,
        tie_word_embeddings: bool = False,
        use_cache: bool = True,
        initializer_range: float = 0.02,
        bos_token_id: int | None = 0,
        eos_token_id: int | list[int] | None = 0,
        pad_token_id: int | None = 0,
        **kwargs: Any,
    ) -> None:
        head_size = kwargs.pop("head_dim", None) or head_size
        asked_heads = kwargs.pop("num_heads", None)
        asked_widths = kwargs.pop("value_dim", None)
        for name in _IDLE_FIELDS:
            kwargs.pop(name, None)
        for name, known in _FIXED_FIELDS.items():
            value = kwargs.pop(name, known[0])
            if value not in known:
                raise ConfigError(f"{name}={value!r} is not RWKV-7: known values are {known}")
        ranks = {
            "decay_low_rank_dim": decay_low_rank_dim,
            "a_low_rank_dim": a_low_rank_dim,
            "v_low_rank_dim": v_low_rank_dim,
            "gate_low_rank_dim": gate_low_rank_dim,
        }
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.head_size = head_size
        self.intermediate_size = 4 * hidden_size if intermediate_size is None else intermediate_size
        self._check_sizes(("vocab_size", "hidden_size", "num_hidden_layers", "head_size"))
        for name, rank in ranks.items():
            setattr(self, name, low_rank_dim(name, hidden_size) if rank is None else rank)
        self.norm_eps = norm_eps
        self.chunk_size = chunk_size
        self._check_sizes((*ranks, "intermediate_size", "chunk_size"))
        self._check_heads(asked_heads, asked_widths)
        _check_constant("norm_eps", norm_eps)
        self.group_norm_eps = head_size * norm_eps if group_norm_eps is None else group_norm_eps
        _check_constant("initializer_range", initializer_range)
        self.use_cache = use_cache
        self.initializer_range = initializer_range
        self.bos_token_id = bos_token_id
        self.eos_token_id = eos_token_id
        self.pad_token_id = pad_token_id

    @property
    def num_attention_heads(self) -> int:
        """Heads of the matrix-valued state."""
        return int(self.hidden_size // self.head_size)

    def _check_sizes(self, names: tuple[str, ...]) -> None:
        for name in names:
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ConfigError(f"{name} is {value!r}: it must be a whole number of at least 1")

    def _check_heads(self, asked_heads: int | None, asked_widths: int | list[int] | None) -> None:
        if self.hidden_size % self.head_size:
            raise ConfigError(
                f"hidden_size {self.hidden_size} is not a multiple of head_size {self.head_size}"
            )
        if asked_heads not in (None, self.num_attention_heads):
            raise ConfigError(
                f"num_heads is {asked_heads}: hidden_size {self.hidden_size} with head_size "
                f"{self.head_size} has {self.num_attention_heads} heads"
            )
        widths = asked_widths if isinstance(asked_widths, list) else [asked_widths]
        if any(width not in (None, self.hidden_size) for width in widths):
            raise ConfigError(
                f"value_dim is {asked_widths}: RWKV-7 has values of hidden_size {self.hidden_size}"
            )


def _check_constant(name: str, value: Any) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0 < value < math.inf:
        raise ConfigError(f"{name} is {value!r}: it must be a finite number above 0")
