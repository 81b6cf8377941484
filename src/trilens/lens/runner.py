"""Runs a model's forward passes: proves the model, reads prompts, batches, records, takes apart."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

from transformers import PreTrainedModel

from trilens.edits import Edit
from trilens.errors import UsageError
from trilens.lens.batching import Batching, grouped
from trilens.lens.capture import Capture
from trilens.lens.gradients import Gradients, Metric, gradients_of
from trilens.lens.inputs import each_inputs, numbered, prompt_of_inputs, split_target
from trilens.lens.parts import ModelInfo
from trilens.lens.proof import Proof, prove
from trilens.lens.request import Asked, request_of
from trilens.lens.split import split
from trilens.lens.stepping import StepSafety
from trilens.models.batched_arguments import source_lengths
from trilens.models.encoded import each_prompt
from trilens.models.forward_call import batch_arguments, text_config
from trilens.models.forward_inputs import fitting, read_inputs
from trilens.models.gates.effective_proof import effective_patterns
from trilens.models.positions import beyond_positions
from trilens.models.source_target import (
    Reading,
    ReadOptions,
    features_prompt,
    is_features,
    read_features,
    read_pair,
)
from trilens.models.stacks import Stack
from trilens.models.tokens import Prompt, PromptLike, SourceTarget, pad_id_for
from trilens.progress import Progress, Step
from trilens.taps.bystanders import standing_by
from trilens.taps.edit_knockouts import check_heads
from trilens.taps.edits import Compiled, compile_edits
from trilens.taps.lock import CaptureLock
from trilens.taps.mode import evaluating, forgetting
from trilens.taps.passes import run_pass
from trilens.taps.positions import positions_of
from trilens.taps.readout import read_out
from trilens.taps.recording import CaptureRequest, Recording

__all__ = ["Runner"]

_LOCK = CaptureLock()


class Runner:
    """One model, what is proven of it, and its passes.

    Attributes:
        model: of transformers.
        tokenizer: its tokenizer, or None.
        stack: whose blocks are captured, and how they are run.
        proof: of the model as it is now.
        reading: the tokens that the stack and its encoder read.
        probe: inputs that the model was proven on, where a caller gave them.
        stepping: whether decoding steps equal one pass.
        info: what captures say of it.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: Any, stack: Stack, probe: object = None
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.stack = stack
        self._probe = probe
        self.probe: Mapping[str, Any] | None = None
        self._prove()

    def _prove(self) -> None:
        """Prove the model as it is now: its modules may be replaced while a lens holds it."""
        self.reading = Reading.of(self.model, self.stack)
        if self._probe is not None and self.stack.run != "model":
            raise UsageError(
                f"probe= is of a model that runs as a whole: the {self.stack.name} is proven on "
                "what its configuration says; leave it out"
            )
        if self._probe is not None:
            self.probe, _ = read_inputs(
                self._probe, self.model, vocab=self.vocab, max_positions=self.max_positions
            )
        with self.lock():
            self.proof: Proof = prove(self.model, self.stack, self.reading, self.probe)
        self.stepping = StepSafety()
        self._copies = False
        self._effective_proven: set[int] = set()
        asked = Asked(residual="all")
        run = partial(self.run, asked=asked)
        self._batching = Batching(run, self.model, self.reading)

    def refresh(self) -> None:
        """Prove the model again where its modules are others by now."""
        if self.proof.is_outdated(self.model, Reading.of(self.model, self.stack).vocab):
            self._prove()

    @property
    def vocab(self) -> int:
        """Token ids that the stack reads; 0 where it reads none."""
        return self.reading.vocab

    @property
    def max_positions(self) -> int | None:
        """The most tokens of a prompt, None for any number."""
        return self.reading.max_positions

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the model: passes of one model take turns."""
        with _LOCK.take(self.model.config):
            yield

    @property
    def info(self) -> ModelInfo:
        """What captures say of the model."""
        config, anatomy = self.model.config, self.proof.anatomy
        return ModelInfo(
            name=str(getattr(config, "_name_or_path", "") or ""),
            model_class=type(self.model).__name__,
            model_type=str(getattr(config, "model_type", "")),
            n_layers=anatomy.n_layers,
            d_model=anatomy.d_model,
            n_streams=anatomy.n_streams,
            dtype=str(self.model.dtype).removeprefix("torch."),
        )

    def read(
        self, prompt: PromptLike, add_special_tokens: bool, number: int | None = None
    ) -> Prompt:
        """One prompt as the stack reads it; `PromptError` as `read_prompt` says."""
        how = ReadOptions(self.tokenizer, add_special_tokens, number)
        if self.stack.has_source:
            pair = prompt if isinstance(prompt, SourceTarget) else SourceTarget(prompt)
            return read_pair(pair, self.model, self.reading, how)
        if isinstance(prompt, SourceTarget):
            raise UsageError(
                f"the {self.stack.name} of {type(self.model).__name__} reads no target: give the "
                "source alone, or open the decoder of an encoder–decoder"
            )
        if is_features(prompt):
            given = read_features(prompt, self.model)
            positions = positions_of(self.model, self.proof.anatomy, given)
            return features_prompt(given, positions)
        return how.read(prompt, self.reading.vocab, self.max_positions)

    def read_one(self, prompt: PromptLike | None, inputs: Any, special: bool) -> Prompt:
        """A prompt, or inputs of the forward; exactly one of them is given."""
        if (prompt is None) == (inputs is None):
            raise UsageError(
                "both a prompt and inputs are given: the inputs hold the prompt's token ids"
                if inputs is not None
                else "nothing is given to read: a prompt, or inputs=processor(…)"
            )
        if prompt is not None:
            return self.read(prompt, special)
        if self.stack.has_source:
            source, target = split_target(inputs)
            return self.read(SourceTarget(source, target), special)
        if not self.vocab:
            return self.read(inputs, special)
        with self.lock():
            return prompt_of_inputs(
                inputs,
                self.model,
                self.proof.anatomy,
                self.tokenizer,
                vocab=self.vocab,
                max_positions=self.max_positions,
            )

    def compiled(
        self, edits: Iterable[Edit] | Edit, lengths: Sequence[int], new_tokens: int = 0
    ) -> Compiled:
        """Edits, checked against the model and prompts of these lengths.

        Raises:
            EditError: an edit that cannot be made.
        """
        claims = self.proof.gates
        given = (edits,) if isinstance(edits, Edit) else tuple(edits)
        check_heads(given, self.proof.anatomy)
        return compile_edits(
            given,
            self.proof.sites,
            model=self.info,
            prompts=lengths,
            new_tokens=new_tokens,
            attention=tuple(self.proof.anatomy.attention),
            recurrent=claims.state_layers,
            boundaries=claims.boundaries(claims.state_layers),
        )

    def request(self, prompts: Sequence[Prompt], asked: Asked) -> CaptureRequest:
        """What a pass over these prompts is to leave behind."""
        lengths = [len(prompt.ids) for prompt in prompts]
        name = type(self.model).__name__
        return request_of(asked, lengths, self.proof, name, copy=self._copies)

    def record(
        self,
        prompts: Sequence[Prompt],
        wanted: CaptureRequest,
        edits: Compiled | None = None,
        *,
        logits: bool = True,
    ) -> Recording:
        """One forward pass over a padded batch, as it was recorded."""
        pad, source_pad = (
            pad_id_for(self.tokenizer, text_config(self.model), max(1, vocab))
            for vocab in (self.vocab, self.reading.source_vocab)
        )
        arguments = batch_arguments(self.model, prompts, pad, logits=logits, source_pad=source_pad)
        given = prompts[0].arguments
        forgotten = nullcontext() if given is None else forgetting(self.model)
        unseen = standing_by(self.proof.bystanders)
        fits = fitting(self.model, given)
        with (
            self.lock(),
            beyond_positions(self.model, max(wanted.lengths)),
            forgotten,
            unseen,
            fits,
        ):
            recording = run_pass(self.model, self.proof.anatomy, wanted, arguments, edits)
        # A model that writes into tensors it has handed on: from now on keep copies.
        self._copies |= recording.request.copy
        return recording

    def read_out(self, recording: Recording) -> None:
        """Note what the final norm would read of several residual streams, layer by layer."""
        anatomy = self.proof.anatomy
        if anatomy.n_streams == 1:
            return
        with self.lock(), evaluating(self.model):
            for layer, streams in recording.residual.items():
                last = recording.request.residual == "last"
                text = streams[:, None] if last else streams
                made = read_out(self.model, anatomy, text, self.vocab)
                recording.readouts[layer] = made[:, 0] if last else made

    def run(
        self, prompts: Sequence[Prompt], asked: Asked, edits: Compiled | None = None, first: int = 0
    ) -> list[Capture]:
        """One forward pass over a padded batch, taken apart into one capture per prompt.

        Args:
            prompts: of the batch.
            asked: what to keep.
            edits: made ready for these prompts, or for more.
            first: the number of the first of these prompts among those.
        """
        numbers = tuple(range(first, first + len(prompts)))
        wanted = replace(self.request(prompts, asked), numbers=numbers)
        recording = self.record(prompts, wanted, edits, logits=asked.logits is not None)
        hidden = source_lengths(prompts, recording.source) is None
        if len(prompts) > 1 and (recording.has_other_keys or hidden):
            return [
                found
                for number, prompt in enumerate(prompts, first)
                for found in self.run([prompt], asked, edits, number)
            ]
        return self.captures(prompts, recording, asked)

    def captures(
        self, prompts: Sequence[Prompt], recording: Recording, asked: Asked
    ) -> list[Capture]:
        """One capture per prompt of what was recorded."""
        lengths = recording.request.lengths
        self.read_out(recording)
        effective = effective_patterns(recording.kernels, lengths, self._effective_proven)
        return split(prompts, recording, effective, logits=asked.logits, info=self.info)

    def capture(
        self,
        prompt: PromptLike | None,
        asked: Asked,
        edits: Iterable[Edit] | Edit,
        special: bool,
        inputs: object = None,
    ) -> Capture:
        """One prompt; as `Lens.capture`."""
        self.refresh()
        read = self.read_one(prompt, inputs, special)
        compiled = self.compiled(edits, [len(read.ids)])
        found = self.run([read], asked, compiled)[0]
        compiled.check_touched()
        return found

    def gradients(
        self,
        prompt: PromptLike | None,
        metric: Metric,
        asked: Asked,
        edits: Iterable[Edit] | Edit,
        special: bool,
        inputs: object = None,
    ) -> Gradients:
        """As `Lens.gradients`."""
        self.refresh()
        read = self.read_one(prompt, inputs, special)
        compiled = self.compiled(edits, [len(read.ids)])
        wanted = replace(self.request([read], asked), gradients=True)
        found = gradients_of(
            lambda request: self.record([read], request, compiled),
            read,
            wanted,
            self.proof.sites,
            metric,
        )
        compiled.check_touched()
        return found

    def batches(
        self,
        prompts: Iterable[PromptLike] | None,
        size: int,
        asked: Asked,
        edits: Iterable[Edit] | Edit,
        special: bool,
        progress: Progress | None,
        inputs: Iterable[Mapping[str, Any]] | None = None,
    ) -> Iterator[Capture]:
        """One capture per prompt, in order; as `Lens.capture_many`."""
        several = each_inputs(prompts, inputs)
        if several is not None:
            return self._in_batches(
                self._read_inputs(several, special), _known(several), size, asked, edits, progress
            )
        if isinstance(prompts, str) or not isinstance(prompts, Iterable):
            raise UsageError(
                f"prompts is one {type(prompts).__name__}: give a list of prompts, or use capture"
            )
        prompts = each_prompt(prompts)
        read = (self.read(each, special, number) for number, each in enumerate(prompts))
        return self._in_batches(read, _known(prompts), size, asked, edits, progress)

    def _read_inputs(self, inputs: Iterable[Any], special: bool) -> Iterator[Prompt]:
        for number, each in enumerate(inputs):
            with numbered(number):
                yield self.read_one(None, each, special)

    def _in_batches(
        self,
        read: Iterator[Prompt],
        total: int,
        size: int,
        asked: Asked,
        edits: Iterable[Edit] | Edit,
        progress: Progress | None,
    ) -> Iterator[Capture]:
        self.refresh()
        given = (edits,) if isinstance(edits, Edit) else tuple(edits)
        compiled = None
        if given:
            # Edits are checked before anything runs, so that all prompts are read first.
            every = list(read)
            compiled = self.compiled(given, [len(each.ids) for each in every])
            read = iter(every)
        done = 0
        for group in grouped(read, size):
            for part in self._batching.parts(group):
                found = self.run(part, asked, compiled, done)
                done += len(part)
                if progress is not None:
                    progress(Step(done, total or done, "prompts"))
                yield from found
        if compiled is not None:
            compiled.check_touched()

    def batches_safely(self, tokens: int) -> bool:
        """As `Lens.batches_safely`."""
        if not self.vocab or (self.stack.has_source and not self.reading.source_vocab):
            return False
        return self._batching.up_to(tokens)


def _known(prompts: Iterable[Any]) -> int:
    """How many there are; 0 where that shows at the end."""
    return len(prompts) if isinstance(prompts, Sized) else 0
