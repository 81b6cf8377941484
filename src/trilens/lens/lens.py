"""`Lens`: a model, its tokenizer and its proven anatomy; one forward pass gives one `Capture`."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence, Sized
from typing import Any, Literal, SupportsIndex

import torch
from torch import Tensor
from transformers import PreTrainedModel

from trilens.errors import UsageError
from trilens.lens.batching import BatchSafety
from trilens.lens.capture import Capture
from trilens.lens.parts import ModelInfo
from trilens.lens.proof import Proof, prove
from trilens.lens.request import read_attention, read_layers, read_states
from trilens.lens.split import split
from trilens.lens.unembedding import unembedded
from trilens.models.anatomy import Anatomy
from trilens.models.encoded import each_prompt
from trilens.models.forward_call import batch_arguments, text_config
from trilens.models.gates.absent import attention_reasons, effective_reasons
from trilens.models.gates.effective_proof import effective_patterns
from trilens.models.loading import load
from trilens.models.positions import beyond_positions, configured_positions, max_positions_of
from trilens.models.tokenizers import usable_tokenizer
from trilens.models.tokens import (
    Prompt,
    PromptLike,
    pad_id_for,
    read_prompt,
    vocab_size_of,
)
from trilens.models.unwrap import is_pipeline, unwrapped
from trilens.numbers import at_least
from trilens.progress import Progress, Step
from trilens.taps.lock import CaptureLock
from trilens.taps.mode import evaluating
from trilens.taps.passes import run_pass
from trilens.taps.recording import CaptureRequest

__all__ = ["Lens"]

_LOCK = CaptureLock()

Which = Literal["last", "all"]


class Lens:
    """Opens one transformers language model.

    The model is never rewritten and its config never touched: captures hook it for the length of
    one forward pass and leave nothing behind.

    Args:
        model: a loaded causal LM, masked LM or bare encoder, or a wrapper of one; see `unwrapped`.
        tokenizer: its tokenizer: of transformers, a `tokenizers.Tokenizer`, or any object with
            encode and decode; without one, prompts are token ids.

    Raises:
        UsageError: no transformers model, no tokenizer, or a weight that is nowhere in memory.
        RecorderError: the model runs, but not while it is recorded.
        AnatomyError: blocks, final norm or unembedding could not be proven on a short probe.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: Any = None) -> None:
        if tokenizer is None and is_pipeline(model):
            tokenizer = getattr(model, "tokenizer", None)
        self.model = model = unwrapped(model)
        self.tokenizer = usable_tokenizer(tokenizer)
        self.unused_weights: tuple[str, ...] = ()
        self._prove()

    def _prove(self) -> None:
        """Prove the model as it is now: its modules may be replaced while a lens holds it."""
        self._vocab = vocab_size_of(self.model)
        with _LOCK.take(self.model.config):
            self._proof: Proof = prove(self.model, self._vocab)
        self._max_positions = max_positions_of(self.model)
        self._copies = False
        self._effective_proven: set[int] = set()
        self._safety = BatchSafety(
            lambda prompts: self._run(
                prompts, self._wanted(prompts, "all", False, False, False, None), "all"
            )
        )

    @classmethod
    def from_pretrained(
        cls,
        path_or_hub_id: str | os.PathLike[str],
        *,
        dtype: str | torch.dtype = "auto",
        device_map: Any = None,
        revision: str | None = None,
        trust_remote_code: bool = False,
        attn_implementation: str | None = None,
    ) -> Lens:
        """Load a checkpoint directory or hub id and open it.

        Only safetensors are read, never a pickle; code that ships with a checkpoint runs only
        where `trust_remote_code` allows it. `attn_implementation` ("sdpa", "eager" …) is chosen by
        transformers where not given.

        Raises:
            LoadError: and its subclasses, see `trilens.errors`.
            AnatomyError: the model's parts could not be proven.
        """
        loaded = load(
            path_or_hub_id,
            dtype=dtype,
            device_map=device_map,
            revision=revision,
            trust_remote_code=trust_remote_code,
            attn_implementation=attn_implementation,
        )
        lens = cls(loaded.model, loaded.tokenizer)
        lens.unused_weights = tuple(loaded.unused)
        return lens

    @property
    def anatomy(self) -> Anatomy:
        """Blocks, final norm, unembedding and attention sites, with the facts that prove them."""
        return self._proof.anatomy

    @property
    def n_layers(self) -> int:
        """Number of layers."""
        return self.anatomy.n_layers

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        return self.anatomy.d_model

    @property
    def attention_layers(self) -> tuple[int, ...]:
        """Layers whose softmax attention can be captured."""
        return tuple(self.anatomy.attention)

    @property
    def effective_layers(self) -> tuple[int, ...]:
        """Recurrent layers whose effective attention can be captured."""
        return self._proof.gates.effective_layers

    @property
    def state_layers(self) -> tuple[int, ...]:
        """Layers whose recurrent state can be captured."""
        return self._proof.gates.state_layers

    @property
    def gate_layers(self) -> dict[str, tuple[int, ...]]:
        """Per gate name, the layers where it is proven."""
        found: dict[str, list[int]] = {}
        for name, layer in self._proof.gates.gates:
            found.setdefault(name, []).append(layer)
        return {name: tuple(layers) for name, layers in found.items()}

    def __repr__(self) -> str:
        name = type(self.model).__name__
        return f"Lens({name}, {self.n_layers} layers, d_model {self.d_model})"

    def capture(
        self,
        prompt: PromptLike,
        *,
        residual: Which | None = "last",
        attention: bool = False,
        gates: bool = False,
        effective: bool = False,
        layers: Iterable[SupportsIndex] | None = None,
        logits: Which | None = "all",
        add_special_tokens: bool = True,
        states: bool | Iterable[SupportsIndex] = False,
    ) -> Capture:
        """Run one prompt once and keep what was asked.

        Args:
            prompt: text, a list of token ids, a tensor [seq] or [1, seq], what a tokenizer
                returned for one prompt (its padding is left out), or chat messages.
            residual: residual stream after each block: of the last token, of all, or none.
            attention: keep each layer's post-rotary queries and keys.
            gates: keep each proven gate: what it is computed from, or its value.
            effective: keep the effective attention of recurrent layers in `effective`, and beside
                the softmax layers' in `attention`; proven when a layer is first captured.
            layers: layer numbers; all where not given.
            logits: of all positions, of the last, or none.
            add_special_tokens: for a text prompt, as the tokenizer does.
            states: keep the recurrent state of recurrent layers: True after the last token, or
                positions, −1 for the last; proven in the pass that gives it.

        Returns:
            A frozen capture, detached, in the model's dtype and on its device. Queries, keys and
            full residuals are references to the model's own tensors: no copy.

        Raises:
            PromptError: empty, too long, out of vocabulary, or text without a tokenizer.
            OutOfRangeError: a layer, or a position for a state, that is not there.
            AttentionPathError: attention was asked of a layer that has none to give.
            CaptureError: an effective attention that the kernel's output does not prove.
            RecurrentStateError: a state that is not proven, or no layer asked has one.
            SilentSiteError: a site did not fire, or gates were asked where none is proven.
            UnclaimedGateError: gates were asked of a layer that also gates in an unknown way.
        """
        self._refresh()
        read = self._read(prompt, add_special_tokens)
        wanted = self._wanted([read], residual, attention, gates, effective, layers, states)
        return self._run([read], wanted, logits)[0]

    def capture_many(
        self,
        prompts: Iterable[PromptLike],
        *,
        batch_size: SupportsIndex = 8,
        residual: Which | None = "last",
        attention: bool = False,
        gates: bool = False,
        effective: bool = False,
        layers: Iterable[SupportsIndex] | None = None,
        logits: Which | None = "all",
        add_special_tokens: bool = True,
        states: bool | Iterable[SupportsIndex] = False,
        progress: Progress | None = None,
    ) -> Iterator[Capture]:
        """One capture per prompt, in order, unpadded, holding one batch at a time.

        Batches are padded on the right whatever the tokenizer says, and unpadded before anyone
        sees them. A model whose padded rows differ from single ones in a measured check runs its
        prompts one by one. Arguments and errors are those of `capture`.

        Args:
            prompts: read once; or what a tokenizer returned for several texts.
            progress: called after each forward pass with the prompts done; where `prompts` has no
                length, their total is that of those done.

        Raises:
            ValueRangeError: a batch size below 1.
        """
        size = at_least(1, batch_size, "batch_size")
        if isinstance(prompts, str) or not isinstance(prompts, Iterable):
            raise UsageError(
                f"prompts is one {type(prompts).__name__}: give a list of prompts, or use capture"
            )
        prompts = each_prompt(prompts)
        chosen = None if layers is None else tuple(layers)
        # Read again for every batch: an iterator would be empty by then.
        after = tuple(states) if isinstance(states, Iterator) else states

        def batches() -> Iterator[Capture]:
            pending: list[Prompt] = []
            self._refresh()
            for number, prompt in enumerate(prompts):
                pending.append(self._read(prompt, add_special_tokens, number))
                if len(pending) == size:
                    yield from run(pending)
                    pending = []
            if pending:
                yield from run(pending)

        done, total = 0, len(prompts) if isinstance(prompts, Sized) else 0

        def run(group: list[Prompt]) -> Iterator[Capture]:
            nonlocal done
            lengths = {len(prompt.ids) for prompt in group}
            together = len(lengths) == 1 or self.batches_safely(max(lengths))
            for part in [group] if together else [[prompt] for prompt in group]:
                wanted = self._wanted(part, residual, attention, gates, effective, chosen, after)
                captures = self._run(part, wanted, logits)
                done += len(part)
                if progress is not None:
                    progress(Step(done, total or done, "prompts"))
                yield from captures

        return batches()

    def batches_safely(self, tokens: int) -> bool:
        """Whether padded rows equal single prompts on this model, up to so many tokens: measured.

        Logits and every residual of a padded batch of random prompts are compared with single
        runs, within 1e-5 of the largest value in float32 (the rounding of a narrower dtype). It is
        measured once for each doubling of the length: sparse attention and windows begin to matter
        only when a prompt is longer than they are.
        """
        return self._safety.up_to(tokens, self.model, self._vocab, configured_positions(self.model))

    @torch.no_grad()
    def unembed(self, residual: Tensor) -> Tensor:
        """The logits that the model's own final norm and unembedding make of a residual stream.

        Args:
            residual: [..., d_model], for example `resid_post` of any layer.

        Returns:
            [..., vocab]; of the last layer's residual, the model's logits (within rounding).

        Raises:
            UsageError: the model has no unembedding (a bare encoder).
            ShapeError: the last axis is not d_model.
        """
        with _LOCK.take(self.model.config), evaluating(self.model):
            return unembedded(self.model, self.anatomy, residual)

    def _refresh(self) -> None:
        if self._proof.is_outdated(self.model, vocab_size_of(self.model)):
            self._prove()

    def _read(
        self, prompt: PromptLike, add_special_tokens: bool, number: int | None = None
    ) -> Prompt:
        return read_prompt(
            prompt,
            tokenizer=self.tokenizer,
            vocab_size=self._vocab,
            max_positions=self._max_positions,
            add_special_tokens=add_special_tokens,
            number=number,
        )

    def _wanted(
        self,
        prompts: Sequence[Prompt],
        residual: Which | None,
        attention: bool,
        gates: bool,
        effective: bool,
        layers: Iterable[SupportsIndex] | None,
        states: bool | Iterable[SupportsIndex] = False,
    ) -> CaptureRequest:
        if residual not in ("last", "all", None):
            raise UsageError(f"residual {residual!r} is not an option: 'last', 'all' or None")
        chosen = read_layers(layers, self.n_layers)
        claims, name = self._proof.gates, type(self.model).__name__
        softmax: tuple[int, ...] = ()
        if attention:
            which = "this model" if layers is None else f"layers {', '.join(map(str, chosen))}"
            softmax = read_attention(chosen, which, self.anatomy, claims, name)
        recurrent = claims.effective_within(chosen, name) if effective else ()
        lengths = tuple(len(prompt.ids) for prompt in prompts)
        remembered = read_states(states, lengths, chosen, claims, name, self.n_layers)
        held = {*softmax, *recurrent}
        return CaptureRequest(
            layers=chosen,
            residual=residual,
            lengths=lengths,
            attention=softmax,
            gates=claims.within(chosen, name) if gates else {},
            copy=self._copies,
            kernels=recurrent,
            boundaries=claims.boundaries((*recurrent, *remembered.layers)),
            states=remembered,
            absent=attention_reasons(self.anatomy, claims.recurrences, chosen, held),
            absent_effective=effective_reasons(self.anatomy, claims.recurrences, chosen),
        )

    def _run(
        self, prompts: Sequence[Prompt], wanted: CaptureRequest, logits: Which | None
    ) -> list[Capture]:
        """One forward pass over a padded batch, taken apart into one capture per prompt."""
        if logits not in ("last", "all", None):
            raise UsageError(f"logits {logits!r} is not an option: 'all', 'last' or None")
        pad = pad_id_for(self.tokenizer, text_config(self.model), self._vocab)
        arguments = batch_arguments(self.model, prompts, pad, logits=logits is not None)
        longest = max(wanted.lengths)
        with _LOCK.take(self.model.config), beyond_positions(self.model, longest):
            recording = run_pass(self.model, self.anatomy, wanted, arguments)
        # A model that writes into tensors it has handed on: from now on keep copies.
        self._copies |= recording.request.copy
        effective = effective_patterns(recording.kernels, wanted.lengths, self._effective_proven)
        return split(prompts, recording, effective, logits=logits, info=self._info())

    def _info(self) -> ModelInfo:
        config = self.model.config
        return ModelInfo(
            name=str(getattr(config, "_name_or_path", "") or ""),
            model_class=type(self.model).__name__,
            model_type=str(getattr(config, "model_type", "")),
            n_layers=self.n_layers,
            d_model=self.d_model,
            dtype=str(self.model.dtype).removeprefix("torch."),
        )
