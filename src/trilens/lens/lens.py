"""`Lens`: a model, its tokenizer and its proven anatomy; one forward pass gives one `Capture`."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence, Sized
from dataclasses import replace
from typing import Any, Literal, SupportsIndex

import torch
from torch import Tensor
from transformers import PreTrainedModel

from trilens.errors import ShapeError, UsageError
from trilens.lens.batching import BatchSafety, padded
from trilens.lens.capture import Capture, ModelInfo
from trilens.lens.proof import Proof, prove
from trilens.lens.request import read_attention, read_layers, read_states
from trilens.lens.split import split
from trilens.models.anatomy import Anatomy
from trilens.models.forward_call import device_of, forward_arguments, text_config
from trilens.models.loading import load
from trilens.models.positions import beyond_positions, configured_positions, max_positions_of
from trilens.models.tokens import (
    Prompt,
    PromptLike,
    pad_id_for,
    read_prompt,
    vocab_size_of,
)
from trilens.models.trace import tensors_in
from trilens.numbers import at_least
from trilens.progress import Progress, Step
from trilens.taps.effective import effective_patterns
from trilens.taps.lock import CaptureLock
from trilens.taps.mode import evaluating
from trilens.taps.session import CaptureRequest, Recording, recording_of

__all__ = ["Lens"]

_LOCK = CaptureLock()

Which = Literal["last", "all"]


class Lens:
    """Opens one transformers language model.

    The model is never rewritten and its config never touched: captures hook it for the length of
    one forward pass and leave nothing behind.

    Args:
        model: a loaded causal LM, masked LM or bare encoder.
        tokenizer: its tokenizer; without one, prompts are token ids.

    Raises:
        AnatomyError: blocks, final norm or unembedding could not be proven on a short probe.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: Any = None) -> None:
        if not isinstance(model, PreTrainedModel):
            raise UsageError(
                f"the model is a {type(model).__name__}: a loaded transformers model is needed; "
                "for a directory or hub id use Lens.from_pretrained"
            )
        self.model = model
        self.tokenizer = tokenizer
        self._vocab = vocab_size_of(model)
        with _LOCK.take(model.config):
            self._proof: Proof = prove(model, self._vocab)
        self._max_positions = max_positions_of(model)
        self.unused_weights: tuple[str, ...] = ()
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
    ) -> Lens:
        """Load a checkpoint directory or hub id and open it.

        Only safetensors are read, never a pickle; code that ships with a checkpoint runs only
        where `trust_remote_code` allows it.

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
            prompt: text, a list of token ids, or a tensor [seq] or [1, seq].
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
        chosen = None if layers is None else tuple(layers)
        # Read again for every batch: an iterator would be empty by then.
        after = tuple(states) if isinstance(states, Iterator) else states

        def batches() -> Iterator[Capture]:
            pending: list[Prompt] = []
            for prompt in prompts:
                pending.append(self._read(prompt, add_special_tokens))
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
        if not self.anatomy.unembedding:
            raise UsageError(f"{type(self.model).__name__} has no unembedding: it gives no logits")
        if not isinstance(residual, Tensor) or residual.shape[-1:] != (self.d_model,):
            shape = list(residual.shape) if isinstance(residual, Tensor) else residual
            raise ShapeError(
                f"residual is {shape!r}: a tensor [..., d_model] is needed, and this model's "
                f"d_model is {self.d_model}"
            )
        modules = dict(self.model.named_modules(remove_duplicate=False))
        values = residual.reshape(1, -1, self.d_model) * self.anatomy.final_scale
        with _LOCK.take(self.model.config), evaluating(self.model):
            for path in self.anatomy.final_norm:
                values = next(tensors_in(modules[path](values)))
            for path in self.anatomy.unembedding:
                weight = next(modules[path].parameters(), values)
                values = next(tensors_in(modules[path](values.to(weight.dtype))))
        values = values[..., : self.anatomy.vocab] * self.anatomy.logit_scale
        cap = self.anatomy.logit_softcap
        if cap is not None:
            values = cap * torch.tanh(values / cap)
        return values.reshape(*residual.shape[:-1], values.shape[-1])

    def _read(self, prompt: PromptLike, add_special_tokens: bool) -> Prompt:
        return read_prompt(
            prompt,
            tokenizer=self.tokenizer,
            vocab_size=self._vocab,
            max_positions=self._max_positions,
            add_special_tokens=add_special_tokens,
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
        )

    def _run(
        self, prompts: Sequence[Prompt], wanted: CaptureRequest, logits: Which | None
    ) -> list[Capture]:
        """One forward pass over a padded batch, taken apart into one capture per prompt."""
        if logits not in ("last", "all", None):
            raise UsageError(f"logits {logits!r} is not an option: 'all', 'last' or None")
        pad = pad_id_for(self.tokenizer, text_config(self.model), self._vocab)
        ids, mask = padded(prompts, pad, device_of(self.model))
        with beyond_positions(self.model, ids.shape[1]):
            recording, output = self._forward(ids, mask, wanted, logits is not None)
            if recording.overwritten:
                # This model writes into tensors it has handed on: from now on keep copies.
                self._copies = True
                wanted = replace(wanted, copy=True)
                recording, output = self._forward(ids, mask, wanted, logits is not None)
        values = getattr(output, "logits", None) if logits is not None else None
        return split(
            prompts,
            recording,
            wanted,
            anatomy=self.anatomy,
            recurrences=self._proof.gates.recurrences,
            effective=effective_patterns(recording.kernels, wanted.lengths, self._effective_proven),
            logits=values if isinstance(values, Tensor) else None,
            last_logits=logits == "last",
            info=self._info(),
        )

    def _forward(
        self, ids: Tensor, mask: Tensor | None, wanted: CaptureRequest, logits: bool
    ) -> tuple[Recording, Any]:
        arguments = forward_arguments(self.model, ids, mask, logits=logits)
        with (
            _LOCK.take(self.model.config),
            evaluating(self.model),
            torch.inference_mode(False),
            torch.no_grad(),
            recording_of(self.model, self.anatomy, wanted) as recording,
        ):
            output = self.model(**arguments)
        return recording, output

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
