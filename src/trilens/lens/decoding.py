"""How the next token is chosen and when a text ends, through transformers' own `generate`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, SupportsIndex

import torch
from torch import Tensor
from transformers import (
    Cache,
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    PreTrainedModel,
    StoppingCriteria,
)
from transformers.generation import LogitsProcessorList, StoppingCriteriaList

from trilens.errors import UsageError, ValueRangeError
from trilens.models.forward_call import device_of, given_arguments, text_config
from trilens.numbers import at_least, whole_number
from trilens.taps.undo import run_undone

__all__ = [
    "Decoding",
    "Forced",
    "NewTokens",
    "Stream",
    "cache_of",
    "end_ids_of",
    "new_text",
    "read_decoding",
    "run_alone",
    "run_generate",
]

Stream = Callable[[str, int], object]
"""Called with each new piece of text and the id of its token."""

_CONTEXT = 4
"""Tokens of the prompt before the new ones when they are decoded: a tokenizer may drop the space
before the first."""


@dataclass(frozen=True, slots=True)
class Decoding:
    """How tokens are chosen: greedily at temperature 0, else drawn; and what ends the text.

    Attributes:
        stop_ids: token ids that end the text.
        stop_texts: texts that end it.
    """

    max_new_tokens: int
    temperature: float
    top_k: int | None
    top_p: float | None
    seed: int
    stop_ids: tuple[int, ...]
    stop_texts: tuple[str, ...]

    def config(self, extra: int) -> GenerationConfig:
        """For transformers: nothing but this.

        Args:
            extra: tokens more than the limit.
        """
        sample = self.temperature > 0
        chosen = {
            "temperature": self.temperature,
            "top_k": self.top_k or 0,
            "top_p": 1.0 if self.top_p is None else self.top_p,
        }
        return GenerationConfig(
            max_new_tokens=self.max_new_tokens + extra,
            do_sample=sample,
            num_beams=1,
            use_cache=True,
            **(chosen if sample else {}),
        )


def read_decoding(
    *,
    max_new_tokens: object,
    temperature: object,
    top_k: object,
    top_p: object,
    seed: object,
    stop: str | SupportsIndex | Iterable[str | SupportsIndex],
    vocab: int,
) -> Decoding:
    """The options of `Lens.generate`, read.

    Raises:
        ValueRangeError: a number outside its range.
        UsageError: an option that does nothing at temperature 0, or an empty stop.
    """
    heat = _number(temperature, "temperature", 0.0, math.inf)
    if top_k is not None:
        top_k = at_least(1, top_k, "top_k")
    if top_p is not None:
        top_p = _number(top_p, "top_p", 0.0, 1.0)
        if top_p == 0:
            raise ValueRangeError("top_p 0.0 is out of range: it is above 0 and at most 1")
    for name, value in (("top_k", top_k), ("top_p", top_p)):
        if value is not None and heat == 0:
            raise UsageError(
                f"{name} {value!r} does nothing at temperature 0, which takes the likeliest "
                "token: give a temperature above 0"
            )
    given = (stop,) if isinstance(stop, str | SupportsIndex) else tuple(stop)
    texts = tuple(each for each in given if isinstance(each, str))
    if "" in texts:
        raise UsageError("stop holds an empty text, which would end every text at once")
    ids = tuple(whole_number(each, "stop") for each in given if not isinstance(each, str))
    for each in ids:
        if not 0 <= each < vocab:
            raise ValueRangeError(
                f"stop {each} is out of range: this model has ids 0–{vocab - 1}; a text is given "
                "as a string"
            )
    return Decoding(
        max_new_tokens=at_least(1, max_new_tokens, "max_new_tokens"),
        temperature=heat,
        top_k=top_k,
        top_p=top_p,
        seed=at_least(0, seed, "seed"),
        stop_ids=ids,
        stop_texts=texts,
    )


def _number(value: object, noun: str, low: float, high: float) -> float:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    number = float(value) if isinstance(value, int | float) else math.nan
    if not is_number or not low <= number <= high or math.isinf(number):
        most = "any finite number" if math.isinf(high) else f"at most {high:g}"
        raise ValueRangeError(f"{noun} {value!r} is out of range: it is {low:g} or more, {most}")
    return number


def end_ids_of(model: PreTrainedModel, tokenizer: Any) -> tuple[int, ...]:
    """The ids that end a text: the generation config's, the config's, or the tokenizer's."""
    sources = (getattr(model, "generation_config", None), text_config(model), tokenizer)
    for source in sources:
        value = getattr(source, "eos_token_id", None)
        ids = value if isinstance(value, list | tuple) else [value]
        found = tuple(i for i in ids if isinstance(i, int) and not isinstance(i, bool))
        if found:
            return found
    return ()


def new_text(prompt: Sequence[int], new: Sequence[int], tokenizer: Any) -> str:
    """The text of the new tokens, with the space that belongs before the first."""
    if tokenizer is None or not new:
        return ""
    context = list(prompt[-_CONTEXT:])
    before, whole = (_decoded(ids, tokenizer) for ids in (context, [*context, *new]))
    return whole[len(before) :] if whole.startswith(before) else _decoded(new, tokenizer)


def _decoded(ids: Sequence[int], tokenizer: Any) -> str:
    options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    return str(tokenizer.decode(list(ids), **options))


class NewTokens(StoppingCriteria):  # type: ignore[misc]
    """Sees each new token: hands it on and says whether it ends the text.

    Args:
        prompt: ids of the prompt.
        decoding: what ends the text.
        end_ids: what the model ends a text with.
        tokenizer: for texts that end it, and for `stream`.
        stream: called for each token.
        grown: called with the text's tokens after each one, and whether it was the last.
        extra: let the last token be read too: one more step, whose own token is dropped.
        forced: the last token that the limit allows is no choice of the model.
    """

    def __init__(
        self,
        prompt: Sequence[int],
        decoding: Decoding,
        end_ids: Sequence[int],
        tokenizer: Any,
        stream: Stream | None,
        grown: Callable[[int, bool], None] | None,
        *,
        extra: bool,
        forced: bool = False,
    ) -> None:
        self.prompt = list(prompt)
        self.decoding = decoding
        self.end_ids = frozenset(end_ids)
        self.tokenizer = tokenizer
        self.stream = stream
        self.grown = grown
        self.extra = extra
        self.forced = forced
        self.new: list[int] = []
        self.shown = ""
        self.stopped_by: str | int | None = None
        self.failure: Exception | None = None

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        """One more token is there."""
        if self.stopped_by is not None:
            return self._answer(input_ids, stop=True)
        token = int(input_ids[0, -1])
        self.new.append(token)
        self.stopped_by = self._reason(token)
        ended = self.stopped_by is not None
        if self.stream is not None:
            self._show(self._piece(ended), token, self.stream)
        if self.grown is not None:
            self.grown(len(self.prompt) + len(self.new), ended)
        return self._answer(input_ids, stop=ended and not self.extra)

    def _show(self, piece: str, token: int, stream: Stream) -> None:
        try:
            stream(piece, token)
        except Exception as error:
            self.failure = error
            raise

    def _answer(self, input_ids: Tensor, *, stop: bool) -> Tensor:
        return torch.full((input_ids.shape[0],), stop, dtype=torch.bool, device=input_ids.device)

    def _reason(self, token: int) -> str | int | None:
        at_limit = len(self.new) >= self.decoding.max_new_tokens
        if at_limit and self.forced:
            return "length"
        if token in self.decoding.stop_ids:
            return token
        if token in self.end_ids:
            return "end"
        if self.decoding.stop_texts:
            text = new_text(self.prompt, self.new, self.tokenizer)
            for each in self.decoding.stop_texts:
                if each in text:
                    return each
        return "length" if at_limit else None

    def _piece(self, ended: bool) -> str:
        """What this token adds to the text; nothing yet where a character is not whole."""
        text = new_text(self.prompt, self.new, self.tokenizer)
        if text.endswith("\ufffd") and not ended:
            return ""
        piece, self.shown = text[len(self.shown) :], text
        return piece


class Forced(LogitsProcessor):  # type: ignore[misc]
    """Chooses given tokens, one after the other.

    Args:
        ids: the whole text's, prompt included.
    """

    def __init__(self, ids: Sequence[int]) -> None:
        self.ids = list(ids)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores that leave one choice."""
        place = min(input_ids.shape[1], len(self.ids) - 1)
        forced = torch.full_like(scores, -math.inf)
        forced[:, self.ids[place]] = 0
        return forced


def run_generate(
    model: PreTrainedModel,
    ids: Tensor,
    decoding: Decoding,
    tokens: NewTokens,
    processors: Sequence[LogitsProcessor] = (),
    *,
    arguments: Mapping[str, Any] | None = None,
) -> None:
    """Generate from one prompt with transformers' own loop; `tokens` sees what comes.

    Of the model's generation config nothing counts: no penalty, no length, no forced token and no
    cache of a static size. It is put back, as torch's random state is.

    Args:
        model: in eval mode, hooked as it shall be.
        ids: [seq], on any device.
        decoding: how tokens are chosen.
        tokens: the one that ends the text.
        processors: further ones that choose.
        arguments: what the first pass is given in place of the ids alone.
    """
    there = ids.reshape(1, -1).to(device_of(model))
    given = given_arguments(model, arguments or {})
    beside = {name: given[name] for name in arguments or {} if name != "input_ids"}

    def generate() -> None:
        model.generate(
            there,
            generation_config=decoding.config(int(tokens.extra)),
            **cache_of(model),
            logits_processor=LogitsProcessorList(processors),
            stopping_criteria=StoppingCriteriaList([tokens]),
            **beside,
        )

    run_alone(model, there.device, decoding, generate)


def cache_of(model: PreTrainedModel) -> dict[str, Cache]:
    """A cache that grows, where transformers' own would have too few layers.

    It counts `num_hidden_layers`, which for a decoder that is run without its encoder are those of
    the encoder.
    """
    config = model.config.get_text_config(decoder=True)
    n_layers = getattr(config, "decoder_layers", None)
    counted = getattr(config, "num_hidden_layers", None)
    alone = not getattr(model.config, "is_encoder_decoder", False)
    if alone and isinstance(n_layers, int) and isinstance(counted, int) and n_layers > counted:
        return {"past_key_values": DynamicCache()}
    return {}


def run_alone(
    model: PreTrainedModel, device: torch.device, decoding: Decoding, generate: Callable[[], None]
) -> None:
    """Generate without the model's generation config; it and torch's random state are put back."""
    held, put_back_random = model.generation_config, _random_state(device)

    def put_back() -> None:
        model.generation_config = held
        put_back_random()

    def alone() -> None:
        # What a caller leaves open, transformers takes from here.
        model.generation_config = GenerationConfig()
        if decoding.temperature > 0:
            torch.manual_seed(decoding.seed)
        generate()

    run_undone(alone, put_back)


def _random_state(device: torch.device) -> Callable[[], None]:
    """Puts torch's random state back to what it is now."""
    here = torch.get_rng_state()
    there = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    def put_back() -> None:
        torch.set_rng_state(here)
        if there is not None:
            torch.cuda.set_rng_state(there, device)

    return put_back
