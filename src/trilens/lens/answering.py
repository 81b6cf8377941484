"""How a decoder writes an answer to a source, through transformers' own loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

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

from trilens.errors import GenerationError
from trilens.io.messages import clip, reason
from trilens.lens.decoding import Decoding, NewTokens, run_alone
from trilens.models.forward_call import device_of, given_arguments, text_config

__all__ = ["forces_end", "run_answer", "writing_rules"]

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

    Raises:
        GenerationError: a value that makes no rule.
    """
    config, device = model.generation_config, str(device_of(model))
    # The first token is not begun with where it is forced.
    begun = start + (start == 1 and config.forced_bos_token_id is not None)

    makers: dict[str, Callable[[Any], LogitsProcessor]] = {
        "bad_words_ids": lambda ids: NoBadWordsLogitsProcessor(ids, list(end_ids) or None),
        "forced_bos_token_id": ForcedBOSTokenLogitsProcessor,
        "forced_eos_token_id": lambda ids: ForcedEOSTokenLogitsProcessor(start + new, ids, device),
        "suppress_tokens": lambda ids: SuppressTokensLogitsProcessor(ids, device),
        "begin_suppress_tokens": lambda ids: SuppressTokensAtBeginLogitsProcessor(
            ids, begun, device
        ),
    }
    given = {name: getattr(config, name) for name in makers}
    return [
        _Rule(f"generation_config.{name} {clip(value)}", partial(makers[name], value))
        for name, value in given.items()
        if value is not None and value != []
    ]


def forces_end(model: PreTrainedModel) -> bool:
    """Whether a generation config writes the last token that the limit allows."""
    return model.generation_config.forced_eos_token_id not in (None, [])


class _Rule(LogitsProcessor):  # type: ignore[misc]
    """One rule of a configuration, of which a failure is told as its own.

    Args:
        named: what the configuration says.
        make: the rule, made.
    """

    def __init__(self, named: str, make: Callable[[], LogitsProcessor]) -> None:
        self.named = named
        with self._telling():
            self.rule = make()

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores that obey the rule."""
        with self._telling():
            return cast(Tensor, self.rule(input_ids, scores))

    @contextmanager
    def _telling(self) -> Iterator[None]:
        try:
            yield
        except (TypeError, ValueError, IndexError, RuntimeError) as error:
            raise GenerationError(
                f"{self.named} makes no rule for what is written ({reason(error)}): give ids of "
                "this model, or None"
            ) from error


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
