"""`compare`: two models on the same tokens, one batch of each held at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence, Sized
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor

from trilens.analysis.comparison.attention import EFFECTIVE, SOFTMAX, AttentionAccumulator
from trilens.analysis.comparison.compatible import check_comparable, shared_vocabulary
from trilens.analysis.comparison.gates import GateAccumulator
from trilens.analysis.comparison.heads import RoleAccumulator, repeated_probe
from trilens.analysis.comparison.logit_lens import LensAccumulator, convergence_layers
from trilens.analysis.comparison.output import output_rows
from trilens.analysis.comparison.residual import ResidualAccumulator
from trilens.analysis.comparison.result import Comparison, NamedArray
from trilens.analysis.comparison.sites import CommonSites, common_sites, refuse_nonfinite
from trilens.analysis.comparison.states import StateAccumulator
from trilens.analysis.comparison.weights import weight_rows
from trilens.caches.activation import FullActivationCache
from trilens.caches.patterns.protocol import Pattern
from trilens.errors import (
    CaptureError,
    EmptyPromptError,
    IncomparableError,
    NonFiniteError,
    UsageError,
    ValueRangeError,
)
from trilens.evaluation.output import OutputAccumulator, OutputResult
from trilens.lens.capture import Capture
from trilens.lens.lens import Lens
from trilens.lens.parts import ModelInfo
from trilens.models.auto_classes import is_built_for
from trilens.models.encoded import each_prompt, is_messages
from trilens.models.positions import max_positions_of
from trilens.models.tokens import PromptLike, read_prompt, vocab_size_of
from trilens.numbers import at_least
from trilens.progress import Progress, Step
from trilens.text.token_blocks import batches_by_length

__all__ = ["CompareOptions", "as_lens", "compare"]

_LENSES = ("last", "all", "none")


@dataclass(frozen=True, slots=True)
class CompareOptions:
    """How to compare.

    Attributes:
        lens: logit lens of the last token of each prompt, of all tokens (about as dear as a
            forward pass for each layer's unembedding), or none.
        batch_size: prompts in one forward pass.
        gate_threshold: a unit is dead below this mean openness and saturated above 1 − it.
        role_threshold: a head has a role from this score on, in (0, 1].
        seed: of the bootstrap.
        add_special_tokens: for text prompts, as the tokenizer does.

    Raises:
        UsageError: lens is none of the three.
        ValueRangeError: a number outside its range.
    """

    lens: Literal["last", "all", "none"] = "last"
    batch_size: int = 4
    gate_threshold: float = 0.1
    role_threshold: float = 0.4
    seed: int = 0
    add_special_tokens: bool = True

    def __post_init__(self) -> None:
        """Check the values."""
        if self.lens not in _LENSES:
            raise UsageError(f"lens {self.lens!r} is not an option: 'last', 'all' or 'none'")
        object.__setattr__(self, "batch_size", at_least(1, self.batch_size, "batch_size"))
        if not 0 <= self.gate_threshold <= 0.5:
            raise ValueRangeError(f"gate_threshold {self.gate_threshold} is out of range: [0, 0.5]")
        if not 0 < self.role_threshold <= 1:
            raise ValueRangeError(f"role_threshold {self.role_threshold} is out of range: (0, 1]")


def compare(
    before: Lens | str | Path,
    after: Lens | str | Path,
    prompts: Iterable[PromptLike],
    *,
    options: CompareOptions | None = None,
    progress: Progress | None = None,
) -> Comparison:
    """Run two models of equal shape on the same tokens and measure what differs.

    Output: perplexity, KL divergence, top tokens. Internal, per layer: residual stream, attention
    (of recurrent layers the effective attention), what heads do, gates, recurrent states, logit
    lens, weights.

    Args:
        before: the reference: a lens, a checkpoint directory or a hub id.
        after: the derived model: ternary, fine-tuned, in another dtype, a later checkpoint.
        prompts: as `Lens.capture_many`; read once, so that a generator will do.
        options: see `CompareOptions`.
        progress: called after every batch with the prompts that are done; the total is the number
            done where `prompts` has no length.

    Returns:
        A frozen comparison. Equal models give a delta of exactly 0 in every row.

    Raises:
        IncomparableError: the models differ in tokenizer, vocabulary, depth or shapes.
        EmptyPromptError: no prompts at all, or one with nothing to predict.
        NonFiniteError: NaN or Inf, naming the model, the prompt and the first layer.
        PromptError, LoadError, AnatomyError: as `Lens.capture` and `Lens.from_pretrained`.

    Memory
        One batch of captures of each model; besides that 4 bytes per token and some numbers per
        head and gate unit, however many prompts there are.
    """
    chosen = options or CompareOptions()
    if isinstance(prompts, str) or not isinstance(prompts, Iterable):
        raise UsageError(f"prompts is one {type(prompts).__name__}: give a list of prompts")
    prompts = each_prompt(prompts)
    left, right = as_lens(before), as_lens(after)
    check_comparable(left, right)
    run = _Run(left, right, chosen)
    read = _read(prompts, left, right, chosen)
    for batch in batches_by_length(read, batch_size=chosen.batch_size):
        run.add(batch.unbind())
        if progress is not None:
            total = len(prompts) if isinstance(prompts, Sized) else run.n_prompts
            progress(Step(run.n_prompts, total, "prompts"))
    return run.result()


class _Run:
    def __init__(self, before: Lens, after: Lens, options: CompareOptions) -> None:
        self.lenses = (before, after)
        self.options = options
        self.sites: CommonSites = common_sites(before, after)
        self.vocab = shared_vocabulary(before, after)
        masked = is_built_for("masked", before.model)
        self.output = OutputAccumulator(next_token=not masked, seed=options.seed)
        self.has_output = bool(before.anatomy.unembedding) and bool(after.anatomy.unembedding)
        self.min_tokens = 1 if masked or not self.has_output else 2
        self.residual = ResidualAccumulator()
        self.attention = AttentionAccumulator()
        self.gates = GateAccumulator(options.gate_threshold)
        self.states = StateAccumulator()
        self.lens = LensAccumulator(before.n_layers)
        self.converged: list[Tensor] = []
        self.models: list[ModelInfo] = []
        self.n_prompts = self.n_tokens = self.block_length = 0

    def add(self, batch: Sequence[Tensor]) -> None:
        for number, ids in enumerate(batch, start=self.n_prompts):
            if len(ids) < self.min_tokens:
                raise EmptyPromptError(
                    f"prompt {number} has {len(ids)} token: {self.min_tokens} or more are needed, "
                    "or there is nothing to predict"
                )
            if self.has_output and self.vocab is not None and int(ids.max()) >= self.vocab:
                raise IncomparableError(
                    f"prompt {number} holds the token id {int(ids.max())}: the models share the "
                    f"ids 0–{self.vocab - 1}"
                )
        before, after = (self._captures(lens, batch) for lens in self.lenses)
        while before:
            self._take(before.pop(0), after.pop(0))

    def _captures(self, lens: Lens, batch: Sequence[Tensor]) -> list[Capture]:
        captures = lens.capture_many(
            batch,
            batch_size=len(batch),
            residual="all",
            attention=bool(self.sites.attention),
            effective=bool(self.sites.effective),
            gates=bool(self.sites.gates),
            states=bool(self.sites.states),
            logits="all",
        )
        return list(captures)

    def _take(self, before: Capture, after: Capture) -> None:
        pair = (before, after)
        for side, capture in zip(("before", "after"), pair, strict=True):
            refuse_nonfinite(capture, side, self.n_prompts)
        if before.logits is not None and after.logits is not None:
            try:
                self.output.add(
                    before.logits[..., : self.vocab],
                    after.logits[..., : self.vocab],
                    before.token_ids,
                )
            except NonFiniteError as error:
                raise NonFiniteError(
                    f"prompt {self.n_prompts}: {error}; the residual stream is finite after every "
                    "layer, so that the final norm or the unembedding is where to look"
                ) from error
        streams = [_full(capture) for capture in pair]
        for layer in streams[0].layers:
            stream, other = (each.get_layer(layer) for each in streams)
            if stream is not None and other is not None:
                self.residual.add(layer, stream, other)
        for layer, module in self._modules().items():
            self.attention.add(layer, module, _unsigned(before, layer), _unsigned(after, layer))
        if before.has("gates") and after.has("gates"):
            for name, layer in self.sites.gates:
                self.gates.add(name, layer, before.gates, after.gates)
        if self.sites.states:
            self.states.add(before.states, after.states, self.sites.states)
        if self.has_output and self.options.lens != "none":
            first = 0 if self.options.lens == "all" else -1
            converged = [
                convergence_layers(
                    lens, [each.readout(layer)[first:] for layer in each.layers], self.vocab
                )
                for lens, each in zip(self.lenses, streams, strict=True)
            ]
            self.lens.add(converged[0], converged[1])
            self.converged.append(torch.stack(converged).int())
        self.n_tokens += len(before.token_ids)
        self.block_length = max(self.block_length, len(before.token_ids))
        self.n_prompts += 1
        self.models = [before.model, after.model]

    def _modules(self) -> dict[int, str]:
        return {
            **dict.fromkeys(self.sites.attention, SOFTMAX),
            **dict.fromkeys(self.sites.effective, EFFECTIVE),
        }

    def result(self) -> Comparison:
        if not self.n_prompts:
            raise EmptyPromptError("prompts are empty: there is nothing to compare; give some")
        output = self.output.result() if self.has_output else None
        roles = self._roles()
        weights, missing = weight_rows(*self.lenses)
        rows = [
            *(output_rows(output) if output is not None else ()),
            *self.residual.rows(),
            *self.attention.rows(),
            *(roles.rows() if roles else ()),
            *self.gates.rows(),
            *self.states.rows(),
            *self.lens.rows(),
            *weights,
        ]
        notes = [*self.sites.notes, *missing]
        if not self.has_output:
            notes.append("a model without an unembedding: no output is compared")
        vocabs = [lens.anatomy.vocab for lens in self.lenses]
        if self.has_output and vocabs != [self.vocab] * 2:
            notes.append(
                f"outputs are compared over the {self.vocab} token ids that both models share (of "
                f"{vocabs[0]} before and {vocabs[1]} after), probabilities renormalised"
            )
        return Comparison(
            before=self.models[0],
            after=self.models[1],
            n_prompts=self.n_prompts,
            n_tokens=self.n_tokens,
            options=MappingProxyType(asdict(self.options)),
            rows=tuple(rows),
            role_changes=tuple(roles.changes(self.options.role_threshold) if roles else ()),
            arrays=MappingProxyType(self._arrays(output)),
            notes=tuple(notes),
            block_length=self.block_length,
        )

    def _roles(self) -> RoleAccumulator | None:
        """What heads do, on a probe of repeated tokens that both models read."""
        layers = self._modules()
        smaller = min(self.lenses, key=lambda lens: vocab_size_of(lens.model))
        probes = repeated_probe(smaller.model)
        if not layers or not probes:
            return None
        roles = RoleAccumulator()
        request: dict[str, Any] = {
            "residual": None,
            # Asked for no logits, some models run their last layers for the last token alone.
            "logits": "last",
            "attention": bool(self.sites.attention),
            "effective": bool(self.sites.effective),
        }
        runs = (lens.capture_many(probes, batch_size=2, **request) for lens in self.lenses)
        for before, after in zip(*runs, strict=True):
            for layer, module in layers.items():
                patterns = _unsigned(before, layer), _unsigned(after, layer)
                roles.add(layer, module, before.token_ids, *patterns)
        return roles

    def _arrays(self, output: OutputResult | None) -> dict[str, NamedArray]:
        arrays: dict[str, NamedArray] = {}
        if output is not None:
            # A copy: the result's own array is read-only, which torch warns of.
            kl = torch.from_numpy(output.token_kl_nats.copy())
            arrays["token_kl_nats"] = NamedArray(("predictions",), kl)
            counts = torch.from_numpy(output.prompt_tokens)
            arrays["prompt_predictions"] = NamedArray(("prompts",), counts)
            if output.nll_nats_before is not None:
                nll = torch.from_numpy(output.prompt_nll_nats)
                arrays["prompt_nll_nats"] = NamedArray(("prompts", "before_after"), nll)
        if self.converged:
            converged = torch.cat(self.converged, dim=1)
            arrays["settle_layer"] = NamedArray(("before_after", "positions"), converged)
        for unit in self.gates.units():
            pair = torch.stack([unit.before, unit.after])
            name = f"openness.{unit.layer}.{unit.name}"
            arrays[name] = NamedArray(("before_after", "units"), pair)
        return arrays


def as_lens(model: Lens | str | Path) -> Lens:
    """A lens as it is; a directory or hub id loaded.

    Raises:
        UsageError: none of these, or one whose prompts are pairs.
    """
    if isinstance(model, str | Path):
        model = Lens.from_pretrained(str(model))
    if not isinstance(model, Lens):
        raise UsageError(
            f"a model to compare is a {type(model).__name__}: give a Lens, a checkpoint directory "
            "or a hub id"
        )
    model.check_reads_texts()
    return model


def _read(
    prompts: Iterable[PromptLike], before: Lens, after: Lens, options: CompareOptions
) -> Iterator[Tensor]:
    """Token ids, read by both tokenizers where there are two."""
    for number, prompt in enumerate(prompts):
        ids = _ids(
            prompt, before if before.tokenizer is not None else after, before, options, number
        )
        written = isinstance(prompt, str) or is_messages(prompt)
        if written and None not in (before.tokenizer, after.tokenizer):
            other = _ids(prompt, after, after, options, number)
            if not torch.equal(ids, other):
                raise IncomparableError(
                    f"tokenizers differ: prompt {number} is {ids[:6].tolist()} … "
                    f"({len(ids)} tokens) before and {other[:6].tolist()} … ({len(other)} tokens) "
                    "after; give token ids, if the same ids mean the same to both models"
                )
        yield ids


def _ids(
    prompt: PromptLike, reader: Lens, lens: Lens, options: CompareOptions, number: int
) -> Tensor:
    return read_prompt(
        prompt,
        tokenizer=reader.tokenizer,
        vocab_size=vocab_size_of(lens.model),
        max_positions=max_positions_of(lens.model),
        add_special_tokens=options.add_special_tokens,
        number=number,
    ).ids


def _full(capture: Capture) -> FullActivationCache:
    residual = capture.parts.residual
    return residual if isinstance(residual, FullActivationCache) else FullActivationCache()


def _unsigned(capture: Capture, layer: int) -> Pattern:
    """The pattern of a layer; a recurrent layer's through the view without signs."""
    attention = capture.parts.attention
    if attention is None:
        raise CaptureError(f"layer {layer} gave no pattern in this pass; it gave one to the probe")
    return attention.relu_l1().pattern(layer)
