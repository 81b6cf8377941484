"""RWKV-7 "Goose" (arXiv 2503.14456) as a transformers model, in plain torch.

Importing this file registers the model type `rwkv7` with `AutoConfig`, `AutoModel` and
`AutoModelForCausalLM`. Tensors bear the names of the checkpoints that are published for
transformers (`model.layers.3.attn.w_lora.lora.0.weight`), so those load as they are; a published
`.pth` file goes through `trilens.convert_rwkv7`.

`trilens.models.rwkv7.layers` says where the gates and the recurrence can be reached.
"""

from __future__ import annotations

from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    GenerationMixin,
    PreTrainedModel,
)
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from trilens.errors import CorruptFileError, ShapeError, UsageError
from trilens.models.rwkv7 import init as rwkv7_init
from trilens.models.rwkv7.config import RWKV7Config
from trilens.models.rwkv7.layers import RWKV7Block, RWKV7ChannelMix, RWKV7TimeMix
from trilens.models.rwkv7.state import Padding, RWKV7State

__all__ = ["RWKV7ForCausalLM", "RWKV7Model", "RWKV7PreTrainedModel", "register"]

_NAMES_SHOWN = 5


class RWKV7PreTrainedModel(PreTrainedModel):  # type: ignore[misc]
    """What all RWKV-7 models share: initialisation and loading."""

    config_class = RWKV7Config
    base_model_prefix = "model"
    _input_embed_layer = "embeddings"
    supports_gradient_checkpointing = True
    _no_split_modules: ClassVar[list[str]] = ["RWKV7Block"]
    _skip_keys_device_placement: ClassVar[list[str]] = ["past_key_values"]
    _is_stateful = True

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """Load as transformers does, but refuse a checkpoint that lacks tensors.

        Raises:
            CorruptFileError: tensors are missing; transformers would make them up at random.
        """
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        missing = sorted(info["missing_keys"])
        if missing:
            raise CorruptFileError(
                f"the checkpoint lacks {len(missing)} tensors of {cls.__name__}, among them "
                f"{missing[:_NAMES_SHOWN]}: a checkpoint in another layout must go through "
                "trilens.convert_rwkv7 first"
            )
        return (model, info) if output_loading_info else model

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, RWKV7TimeMix):
            rwkv7_init.init_time_mix(module)
        elif isinstance(module, RWKV7ChannelMix):
            rwkv7_init.init_channel_mix(module)
        elif isinstance(module, nn.LayerNorm):
            rwkv7_init.init_norm(module)
        elif isinstance(module, nn.Embedding):
            tied_std = self.config.initializer_range if self.config.tie_word_embeddings else None
            rwkv7_init.init_embedding(module, tied_std)
        elif module is getattr(self, "lm_head", None) and not self.config.tie_word_embeddings:
            rwkv7_init.init_unembedding(cast(nn.Linear, module))


class RWKV7Model(RWKV7PreTrainedModel):
    """The blocks and the final norm, without the unembedding."""

    def __init__(self, config: RWKV7Config) -> None:
        super().__init__(config)
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            RWKV7Block(config, layer) for layer in range(config.num_hidden_layers)
        )
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values: RWKV7State | None = None,
        *,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Run the model.

        Shapes
            input_ids [batch, seq]; attention_mask [batch, at least seq]; inputs_embeds
            [batch, seq, d_model]; last_hidden_state [batch, seq, d_model].

        Args:
            input_ids: token ids; this or inputs_embeds.
            attention_mask: nonzero for real tokens. A masked token, wherever it stands, is as if
                it were not there: it changes neither the state nor any other token's output.
            inputs_embeds: embeddings in the place of ids, before `pre_norm`.
            past_key_values: the state to continue from; the new state is left in it.
            use_cache: whether to return a state, by default as the config says in eval mode.
            output_attentions: must be false, since there are no attention weights to return.
            output_hidden_states: whether to return the embedding and the residual stream after
                every block, the last one normed.
            return_dict: False for a tuple.
            **kwargs: ignored; transformers passes some to every model.

        Raises:
            UsageError: not exactly one input, a state of another kind or during activation
                checkpointing, or attention weights asked.
            ShapeError: an input without tokens, or a mask or state that does not fit.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise UsageError("RWKV-7 takes exactly one of input_ids and inputs_embeds")
        if output_attentions:
            raise UsageError(
                "RWKV-7 has no attention weights: capture its effective attention instead"
            )
        embeds = self.embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if self.gradient_checkpointing and self.training:
            if past_key_values is not None:
                raise UsageError(
                    "training with activation checkpointing cannot continue from past_key_values: "
                    "a recomputed block would write its state twice"
                )
            use_cache = False
        if use_cache and past_key_values is None:
            past_key_values = RWKV7State(self.config.num_hidden_layers)
        self._check(embeds, past_key_values)
        padding = Padding.from_mask(attention_mask, embeds.shape[0], embeds.shape[1])
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states

        stream, v_first = embeds, None
        streams = [embeds]
        for block in self.layers:
            stream, v_first = block(
                stream, v_first, past_key_values=past_key_values, padding=padding
            )
            if output_hidden_states:
                streams.append(stream)
        stream = self.norm(stream)
        if past_key_values is not None:
            past_key_values.add_tokens(embeds.shape[1])
        output = BaseModelOutputWithPast(
            last_hidden_state=stream,
            past_key_values=past_key_values if use_cache else None,
            hidden_states=(*streams[:-1], stream) if output_hidden_states else None,
        )
        return output.to_tuple() if return_dict is False else output

    def _check(self, embeds: Tensor, state: RWKV7State | None) -> None:
        if embeds.dim() != 3 or 0 in embeds.shape:
            raise ShapeError(
                f"the embedded input has shape {tuple(embeds.shape)}: RWKV-7 takes "
                "[batch, seq, d_model] with at least one token"
            )
        if state is None:
            return
        if not isinstance(state, RWKV7State) or len(state) != self.config.num_hidden_layers:
            raise UsageError(
                f"past_key_values is a {type(state).__name__} of {len(state)} layers: RWKV-7 "
                f"continues from an RWKV7State of {self.config.num_hidden_layers}"
            )
        if state.batch_size not in (-1, embeds.shape[0]):
            raise ShapeError(
                f"past_key_values holds {state.batch_size} rows: the input has {embeds.shape[0]}"
            )


class RWKV7ForCausalLM(RWKV7PreTrainedModel, GenerationMixin):  # type: ignore[misc]
    """RWKV-7 with its unembedding `lm_head`."""

    _tied_weights_keys: ClassVar[dict[str, str]] = {"lm_head.weight": "model.embeddings.weight"}

    def __init__(self, config: RWKV7Config) -> None:
        super().__init__(config)
        self.model = RWKV7Model(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values: RWKV7State | None = None,
        *,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> Any:
        """Run the model and unembed; arguments and errors as in `RWKV7Model.forward`.

        Shapes
            logits [batch, seq, vocab]; labels [batch, seq].

        Args:
            input_ids: token ids; this or inputs_embeds.
            attention_mask: nonzero for real tokens.
            inputs_embeds: embeddings in the place of ids.
            past_key_values: the state to continue from.
            labels: the ids themselves, −100 where no loss is wanted; shifted by the loss.
            use_cache: whether to return a state.
            output_attentions: must be false.
            output_hidden_states: whether to return the residual stream after every block.
            return_dict: False for a tuple.
            logits_to_keep: how many last positions to unembed, 0 for all, or their indices.
            **kwargs: passed to the loss.
        """
        outputs = self.model(
            input_ids,
            attention_mask,
            inputs_embeds,
            past_key_values,
            use_cache=use_cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
        )
        hidden = outputs.last_hidden_state
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(hidden[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=self.config.vocab_size, **kwargs)
        output = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
        )
        return output.to_tuple() if return_dict is False else output


def register() -> None:
    """Make transformers' Auto classes know the model type `rwkv7`; again is harmless."""
    AutoConfig.register(RWKV7Config.model_type, RWKV7Config, exist_ok=True)
    AutoModel.register(RWKV7Config, RWKV7Model, exist_ok=True)
    AutoModelForCausalLM.register(RWKV7Config, RWKV7ForCausalLM, exist_ok=True)


register()
