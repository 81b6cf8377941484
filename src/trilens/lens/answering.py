"""How a decoder writes an answer to a source, through transformers' own loop."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    EncoderDecoderCache,
    GenerationMixin,
    LogitsProcessor,
    PreTrainedModel,
)
from transformers.generation import (
    ForcedBOSTokenLogitsProcessor,
    ForcedEOSTokenLogitsProcessor,
    LogitsProcessorList,
    NoBadWordsLogitsProcessor,
    StoppingCriteriaList,
    SuppressTokensAtBeginLogitsProcessor,
    SuppressTokensLogitsProcessor,
)

from trilens.lens.decoding import Decoding, NewTokens, run_alone
from trilens.models.forward_call import device_of, given_arguments, text_config

__all__ = ["run_answer", "writing_rules"]

_TARGET_IDS = "decoder_input_ids"


def writing_rules(
    model: PreTrainedModel, start: int, new: int, end_ids: Sequence[int]
) -> list[LogitsProcessor]:
    """Which tokens a generation config forces and which it forbids.

    They belong to what a decoder was trained to write: the language of a translation, no text for
    silence. Nothing else of the configuration counts.

    Args:
        model: whose generation config is read.
        start: tokens that the decoder begins with.
        new: the most tokens to add.
        end_ids: ids that end a text.
    """
    config, device = model.generation_config, device_of(model)
    first, last = config.forced_bos_token_id, config.forced_eos_token_id
    rules: list[LogitsProcessor] = []
    if config.bad_words_ids is not None:
        ends = torch.tensor(list(end_ids), dtype=torch.long, device=device) if end_ids else None
        rules.append(NoBadWordsLogitsProcessor(config.bad_words_ids, ends))
    if first is not None:
        rules.append(ForcedBOSTokenLogitsProcessor(first))
    if last is not None:
        rules.append(ForcedEOSTokenLogitsProcessor(start + new, last, device=str(device)))
    if config.suppress_tokens is not None:
        rules.append(SuppressTokensLogitsProcessor(config.suppress_tokens, device=str(device)))
    if config.begin_suppress_tokens is not None:
        at = start + (start == 1 and first is not None)
        tokens = config.begin_suppress_tokens
        rules.append(SuppressTokensAtBeginLogitsProcessor(tokens, at, device=str(device)))
    return rules


def run_answer(
    model: PreTrainedModel,
    ids: Tensor,
    decoding: Decoding,
    tokens: NewTokens,
    processors: Sequence[LogitsProcessor],
    *,
    source: Mapping[str, Any],
    n_layers: int,
) -> None:
    """Write an answer to a source with transformers' own loop; `tokens` sees what comes.

    Some classes wrap the loop: Whisper's cuts sound into pieces and joins what it heard. Here one
    source is answered once, by the loop itself.

    Args:
        model: in eval mode, hooked as it shall be.
        ids: [seq] that the decoder begins with, on any device.
        decoding: how tokens are chosen.
        tokens: the one that ends the text.
        processors: further ones that choose.
        source: what the forward pass is given for the encoder.
        n_layers: blocks of the decoder.
    """
    there = ids.reshape(1, -1).to(device_of(model))
    given = given_arguments(model, source)
    config = decoding.config(int(tokens.extra))
    config.decoder_start_token_id = int(ids[0])

    def generate() -> None:
        GenerationMixin.generate(
            model,
            generation_config=config,
            logits_processor=LogitsProcessorList(processors),
            stopping_criteria=StoppingCriteriaList([tokens]),
            **{name: given[name] for name in source},
            **{_TARGET_IDS: there},
            **_cache(model, n_layers),
        )

    run_alone(model, there.device, decoding, generate)


def _cache(model: PreTrainedModel, n_layers: int) -> dict[str, Any]:
    """A cache for the decoder's blocks, where transformers counts those of the encoder.

    T5's configuration names both, and the loop makes a cache of as many layers as its encoder has.
    """
    counted = getattr(text_config(model), "num_hidden_layers", None)
    if not isinstance(counted, int) or counted >= n_layers:
        return {}
    return {"past_key_values": EncoderDecoderCache(DynamicCache(), DynamicCache())}
