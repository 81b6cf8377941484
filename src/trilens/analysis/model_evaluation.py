"""What a model makes of texts and tasks, alone or beside the model that it was made from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from trilens.checkpoint.evaluate import Blocks, Sample, blocks_of, compare_on, free_prompts
from trilens.checkpoint.format.sample import SampleReport
from trilens.errors import GenerationError, UsageError
from trilens.evaluation.continuations import continuations, in_a_loop
from trilens.evaluation.perplexity import measure_perplexity
from trilens.lens.lens import Lens
from trilens.results import Tabular

__all__ = ["ModelEvaluation", "TextEvaluation", "evaluate_texts"]


@dataclass(frozen=True, slots=True)
class TextEvaluation:
    """What a model makes of one text.

    Attributes:
        name: What the text is called.
        n_tokens: Predicted tokens.
        block_length: Tokens of the longest context, on which a perplexity depends.
        perplexity: exp of the mean negative log-likelihood; infinite where logits are not finite.
        loops: Share of its greedy continuations that end in a loop, in [0, 1]; None where it
            does not generate.
        change: Beside the other model: what the text says of both; None without one.
    """

    name: str
    n_tokens: int
    block_length: int
    perplexity: float
    loops: float | None
    change: SampleReport | None = None


@dataclass(frozen=True, slots=True)
class ModelEvaluation(Tabular):
    """What a model makes of texts and tasks.

    Attributes:
        model: What it is called.
        against: What the model beside it is called; None without one.
        texts: One entry for each text.
        tasks: Of each task of lm-eval its metrics; empty where none was run.
    """

    model: str
    against: str | None
    texts: tuple[TextEvaluation, ...]
    tasks: Mapping[str, Mapping[str, float]] = field(default_factory=lambda: MappingProxyType({}))

    def table(self) -> list[dict[str, Any]]:
        """One row for each text; of what was not measured None."""
        rows = []
        for text in self.texts:
            change = text.change
            free = None if change is None else change.continuations
            rows.append(
                {
                    "text": text.name,
                    "tokens": text.n_tokens,
                    "perplexity": text.perplexity,
                    "loops": text.loops,
                    "ratio": None if change is None else change.ratio,
                    "kl_nats": None if change is None else change.kl_nats,
                    "same_top1": None if change is None else change.same_top1,
                    "agreement": None if free is None else free.agreement,
                }
            )
        return rows

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "model": self.model,
            "against": self.against,
            "texts": [
                {
                    "name": text.name,
                    "n_tokens": text.n_tokens,
                    "block_length": text.block_length,
                    "perplexity": text.perplexity,
                    "loops": text.loops,
                    "change": None if text.change is None else text.change.to_dict(),
                }
                for text in self.texts
            ],
            "tasks": {name: dict(metrics) for name, metrics in self.tasks.items()},
        }


def evaluate_texts(
    lens: Lens,
    samples: Sequence[Sample],
    *,
    against: Lens | None = None,
    max_tokens: int = 16_384,
) -> tuple[TextEvaluation, ...]:
    """Measure a model on texts, each apart.

    Args:
        lens: the model.
        samples: the texts.
        against: the model that it was made from, or another with the same tokens: then KL, same
            top token and agreement of greedy continuations are measured too.
        max_tokens: of each text, at most.

    Raises:
        UsageError: the model is no causal language model, or the two have other vocabularies.
        TextError: a text with fewer than 128 predicted tokens.
        NonFiniteError: the model, or the one beside it, gives NaN or infinities.

    Memory: the logits of 8 blocks; of both models where there are two.
    """
    if against is not None and against.anatomy.vocab != lens.anatomy.vocab:
        raise UsageError(
            f"the models have {against.anatomy.vocab} and {lens.anatomy.vocab} tokens: only models "
            "with the same tokens are compared"
        )
    tokenizer = lens.tokenizer
    if tokenizer is None and against is not None:
        tokenizer = against.tokenizer
    found = []
    for sample in samples:
        text = blocks_of(lens.model, sample, tokenizer, limit_tokens=max_tokens)
        found.append(_of_text(lens, text, against))
    return tuple(found)


def _of_text(lens: Lens, text: Blocks, against: Lens | None) -> TextEvaluation:
    longest = max(map(len, text.blocks))
    if against is not None:
        change = compare_on(against.model, lens.model, text)
        free = change.continuations
        loops = None if free is None else free.loops_after
        return TextEvaluation(
            text.name, change.n_tokens, longest, change.perplexity_after, loops, change
        )
    own = measure_perplexity(lens.model, text.blocks)
    prompts, new = free_prompts(lens.model, text.prompts)
    loops = None
    if prompts:
        with suppress(GenerationError):
            written = continuations(lens.model, prompts, new=new)
            loops = sum(map(in_a_loop, written)) / len(written)
    return TextEvaluation(text.name, own.n_tokens, longest, own.value, loops)
