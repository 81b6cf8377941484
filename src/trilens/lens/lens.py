"""`Lens`: a model, its tokenizer and its proven anatomy; one forward pass gives one `Capture`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, SupportsIndex

import torch
from torch import Tensor

from trilens.edits import Edit
from trilens.lens.capture import Capture
from trilens.lens.decoding import Stream, read_decoding
from trilens.lens.folding import FoldedHead, folded_head
from trilens.lens.generation import Generation, generate
from trilens.lens.gradients import Gradients, Metric
from trilens.lens.inputs import with_target
from trilens.lens.opened import Opened
from trilens.lens.request import Asked, Which
from trilens.lens.stack import Where, stack
from trilens.lens.unembedding import unembedded
from trilens.models.tokens import PromptLike
from trilens.numbers import at_least
from trilens.progress import Progress
from trilens.taps.held_readout import held_readout
from trilens.taps.mode import evaluating

__all__ = ["Lens"]


class Lens(Opened):
    """Opens one transformers language model.

    The model is never rewritten and its config never touched: captures hook it for the length of
    one forward pass and leave nothing behind.

    Args:
        model: a loaded causal LM, masked LM or bare encoder, or a wrapper of one; see `unwrapped`.
        tokenizer: its tokenizer: of transformers, a `tokenizers.Tokenizer`, or any object with
            encode and decode; without one, prompts are token ids.
        stack: of a model with several stacks of blocks, the one to open: "decoder", "encoder",
            "language", "vision" or "audio", of those in `stacks`; the decoder, or the language
            model, where not given.
        probe: inputs, as `capture` takes them, that the model is proven on in place of a short
            made-up text: for a model that runs with images alone, or whose blocks do not all run
            on text. Every tensor of that one pass is held while it is proven: give a short one.

    Raises:
        UsageError: no transformers model, no tokenizer, a weight that is nowhere in memory, or a
            stack that the model does not have.
        RecorderError: the model runs, but not while it is recorded.
        AnatomyError: blocks, final norm or unembedding could not be proven on a short probe.
    """

    def capture(
        self,
        prompt: PromptLike | None = None,
        *,
        inputs: Mapping[str, Any] | None = None,
        target: PromptLike | None = None,
        residual: Which | None = "last",
        attention: bool = False,
        gates: bool = False,
        effective: bool = False,
        layers: Iterable[SupportsIndex] | None = None,
        logits: Which | None = "all",
        add_special_tokens: bool = True,
        states: bool | Iterable[SupportsIndex] = False,
        sites: Iterable[str] = (),
        edits: Iterable[Edit] | Edit = (),
    ) -> Capture:
        """Run one prompt once and keep what was asked.

        Args:
            prompt: text, a list of token ids, a tensor [seq] or [1, seq], what a tokenizer
                returned for one prompt (its padding is left out), or chat messages; for the
                decoder of an encoder–decoder the source, or a `SourceTarget`.
            inputs: in place of a prompt, what the forward takes: input_ids or inputs_embeds of one
                prompt, and whatever stands beside them, such as a processor makes of text and
                images. `Capture.image_positions` says which tokens stand for an image.
            target: what such a decoder reads; as of `SourceTarget`.
            residual: residual stream after each block: of the last token, of all, or none.
            attention: keep each layer's post-rotary queries and keys, of cross attention too.
            gates: keep each proven gate: what it is computed from, or its value.
            effective: keep the effective attention of recurrent layers in `effective`, and beside
                the softmax layers' in `attention`; proven when a layer is first captured.
            layers: layer numbers; all where not given.
            logits: of all positions, of the last, or none.
            add_special_tokens: for a text prompt, as the tokenizer does.
            states: keep the recurrent state of recurrent layers: True after the last token, or
                positions, −1 for the last; proven in the pass that gives it.
            sites: names of `axes.SITES`, or TransformerLens' and nnterp's; kept in `sites`, of the
                layers that have them.
            edits: of `trilens.edits`, applied in their order before anything is kept.

        Returns:
            A frozen capture, detached, in the model's dtype and on its device. Queries, keys and
            full residuals are references to the model's own tensors: no copy.

        Raises:
            PromptError: empty, too long, out of vocabulary, or text without a tokenizer.
            UsageError: inputs that the forward does not take, of several prompts, or not finite.
            OutOfRangeError: a layer, or a position for a state, that is not there.
            AttentionPathError: attention was asked of a layer that has none to give.
            CaptureError: an effective attention that the kernel's output does not prove.
            RecurrentStateError: a state that is not proven, or no layer asked has one.
            SiteError: a site that is unknown, or not proven in the layers asked.
            EditError: an edit that does not fit this model or prompt, or touched nothing.
            SilentSiteError: a site did not fire, or gates were asked where none is proven.
            UnclaimedGateError: gates were asked of a layer that also gates in an unknown way.
        """
        asked = Asked(
            residual=residual,
            attention=attention,
            gates=gates,
            effective=effective,
            layers=layers,
            logits=logits,
            states=states,
            sites=sites,
        ).once()
        prompt, inputs = with_target(prompt, inputs, target)
        return self._runner.capture(prompt, asked, edits, add_special_tokens, inputs)

    def capture_many(
        self,
        prompts: Iterable[PromptLike] | None = None,
        *,
        inputs: Iterable[Mapping[str, Any]] | None = None,
        batch_size: SupportsIndex = 8,
        residual: Which | None = "last",
        attention: bool = False,
        gates: bool = False,
        effective: bool = False,
        layers: Iterable[SupportsIndex] | None = None,
        logits: Which | None = "all",
        add_special_tokens: bool = True,
        states: bool | Iterable[SupportsIndex] = False,
        sites: Iterable[str] = (),
        edits: Iterable[Edit] | Edit = (),
        progress: Progress | None = None,
    ) -> Iterator[Capture]:
        """One capture per prompt, in order, unpadded, holding one batch at a time.

        Batches are padded on the right whatever the tokenizer says, and unpadded before anyone
        sees them. A model whose padded rows differ from single ones in a measured check runs its
        prompts one by one. Arguments and errors are those of `capture`.

        Args:
            prompts: read once; or what a tokenizer returned for several texts.
            inputs: in place of prompts, several mappings as `capture` takes one. Those that stand
                beside each other and have tensors of the same shapes run in one pass, where the
                first of them gave the same as passes of their own.
            progress: called after each forward pass with the prompts done; where `prompts` has no
                length, their total is that of those done.

        Raises:
            ValueRangeError: a batch size below 1.
        """
        size = at_least(1, batch_size, "batch_size")
        asked = Asked(
            residual=residual,
            attention=attention,
            gates=gates,
            effective=effective,
            layers=layers,
            logits=logits,
            states=states,
            sites=sites,
        ).once()
        return self._runner.batches(
            prompts, size, asked, edits, add_special_tokens, progress, inputs
        )

    def stack(
        self,
        prompts: Iterable[PromptLike],
        *,
        site: str = "resid_post",
        layers: Iterable[SupportsIndex] | None = None,
        position: Where = -1,
        batch_size: SupportsIndex = 8,
        progress: Progress | None = None,
    ) -> Tensor:
        """One site of many prompts as one tensor [prompt, layer, …], such as a probe is fitted on.

        Args:
            prompts: as `capture_many` takes them.
            site: a name of `axes.SITES` or an alias; its first axis must be the tokens.
            layers: in the result ascending; all that have the site where not given.
            position: of one token, negative from each prompt's own end; "last"; or "mean".
            batch_size: prompts per forward pass.
            progress: called after each pass.

        Raises:
            UsageError: no prompts, a site whose first axis is not the tokens, or no such position.
            OutOfRangeError: a layer, or a position that a prompt is too short for.
            ShapeError: layers whose values differ in shape.
        """
        return stack(
            self,
            prompts,
            site=site,
            layers=layers,
            position=position,
            batch_size=batch_size,
            progress=progress,
        )

    def gradients(
        self,
        prompt: PromptLike | None,
        metric: Metric,
        *,
        inputs: Mapping[str, Any] | None = None,
        sites: Iterable[str] = ("resid_post",),
        layers: Iterable[SupportsIndex] | None = None,
        edits: Iterable[Edit] | Edit = (),
        add_special_tokens: bool = True,
    ) -> Gradients:
        """A metric's gradients at sites, and the sites' values: one pass forward and one back.

        The model runs in eval mode and its own dtype, the metric in float32; its parameters are
        frozen for the run and get no gradient.

        Args:
            prompt: as `capture` takes it; None where inputs are given.
            inputs: as `capture` takes them.
            metric: of the logits [seq, vocab], float32: a scalar tensor. Those of
                `trilens.analysis` can be given.
            sites: as `capture` takes them.
            layers: layer numbers; all where not given.
            edits: as `capture` takes them.
            add_special_tokens: as `capture` takes it.

        Raises:
            MetricError: the metric gives no finite scalar, or does not depend on the logits.
            SiteError: a site that is not proven in the layers asked.

        Memory
            Every activation of the pass: what training of one batch of this prompt keeps.
        """
        asked = Asked(residual=None, layers=layers, sites=sites).once()
        return self._runner.gradients(prompt, metric, asked, edits, add_special_tokens, inputs)

    def generate(
        self,
        prompt: PromptLike | None = None,
        *,
        inputs: Mapping[str, Any] | None = None,
        target: PromptLike | None = None,
        max_new_tokens: SupportsIndex = 40,
        edits: Iterable[Edit] | Edit = (),
        capture: Mapping[str, Any] | None = None,
        temperature: float = 0.0,
        top_k: SupportsIndex | None = None,
        top_p: float | None = None,
        seed: SupportsIndex = 0,
        stop: str | SupportsIndex | Iterable[str | SupportsIndex] = (),
        stream: Stream | None = None,
        add_special_tokens: bool = True,
    ) -> Generation:
        """Go on from a prompt, with the model's cache, and keep what was asked of every pass.

        The decoder of an encoder–decoder answers the source that its encoder reads.

        Args:
            prompt: as in `capture`; chat messages end with the start of an answer.
            inputs: as in `capture`, of token ids.
            target: what such a decoder goes on from; where it is not given, what it begins with.
            max_new_tokens: the most tokens to add.
            edits: applied in every pass; their positions count in the whole text.
            capture: options of `capture`, {} for its defaults: one capture of the whole text, the
                last token included.
            temperature: 0 takes the likeliest token, above it one is drawn.
            top_k: draw among so many likeliest tokens.
            top_p: draw among the likeliest tokens that make up this probability.
            seed: of the draws; torch's own random state stays as it is.
            stop: texts or token ids that end the text, besides the model's own end.
            stream: called with each new piece of text and its token id.
            add_special_tokens: for a text prompt, as the tokenizer does.

        Raises:
            GenerationError: no causal model, its steps do not give what one pass over the text
                gives (measured on a probe), or the text would not fit its positions.
            ValueRangeError: a number outside its range.
            TrilensError: as `capture`.
        """
        decoding = read_decoding(
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
            stop=stop,
            vocab=self._runner.vocab,
        )
        prompt, inputs = with_target(prompt, inputs, target)
        return generate(
            self._runner,
            prompt,
            decoding,
            edits=edits,
            capture=capture,
            stream=stream,
            special=add_special_tokens,
            inputs=inputs,
        )

    def batches_safely(self, tokens: int) -> bool:
        """Whether padded rows equal single prompts on this model, up to so many tokens: measured.

        Logits and every residual of a padded batch of random prompts are compared with single
        runs, within 1e-5 of the largest value in float32 (the rounding of a narrower dtype). It is
        measured once for each doubling of the length: sparse attention and windows begin to matter
        only when a prompt is longer than they are. False where prompts are no tokens alone: of
        sound and images, `capture_many` measures those that it is given.
        """
        return self._runner.batches_safely(tokens)

    @torch.no_grad()
    def unembed(self, residual: Tensor, *, tokens: slice | Tensor | None = None) -> Tensor:
        """The logits that the model's own final norm and unembedding make of a residual stream.

        Args:
            residual: [..., d_model], for example `resid_post` of any layer; of several residual
                streams their readout, `cap.residual.readout(layer)`.
            tokens: only of these token ids: a slice, or int64 [n].

        Returns:
            [..., vocab], or [..., n] of some tokens; of the last layer's residual, the model's
            logits (within rounding).

        Raises:
            UsageError: the model has no unembedding (a bare encoder).
            ShapeError: the last axis is not d_model.
        """
        with self._runner.lock(), evaluating(self.model):
            return unembedded(self.model, self.anatomy, residual, tokens)

    def fold(self, residual: Tensor, tokens: Sequence[int]) -> FoldedHead:
        """Final norm and unembedding of some tokens as one affine map, as `folded_head` says."""
        with self._runner.lock(), evaluating(self.model), torch.inference_mode(False):
            return folded_head(self.model, self.anatomy, residual, tokens)

    def fold_readout(self, streams: Tensor, direction: Tensor) -> Tensor:
        """A direction of the readout as one of several streams, as `held_readout` says.

        Raises:
            ShapeError: streams that are not [streams, d_model], or a direction not [d_model].
            CaptureError: the model has one residual stream, or its readout is not linear.
        """
        with self._runner.lock(), evaluating(self.model), torch.inference_mode(False):
            return held_readout(self.model, self.anatomy, streams, direction, self._runner.vocab)
