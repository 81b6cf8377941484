"""`Lens`: a model, its tokenizer and its proven anatomy; one forward pass gives one `Capture`."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, SupportsIndex

import torch
from torch import Tensor
from transformers import PreTrainedModel

from trilens.axes import site_name
from trilens.edits import Edit
from trilens.lens.capture import Capture
from trilens.lens.folding import FoldedHead, folded_head
from trilens.lens.gradients import Gradients, Metric
from trilens.lens.request import Asked, Which
from trilens.lens.runner import Runner
from trilens.lens.sites import layers_of, why_no_site
from trilens.lens.stack import Where, stack
from trilens.lens.unembedding import unembedded
from trilens.models.anatomy import Anatomy
from trilens.models.loading import load
from trilens.models.sites.claims import SiteClaims
from trilens.models.tokenizers import usable_tokenizer
from trilens.models.tokens import PromptLike
from trilens.models.unwrap import is_pipeline, unwrapped
from trilens.numbers import at_least
from trilens.progress import Progress
from trilens.taps.mode import evaluating

__all__ = ["Lens"]


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
        self.unused_weights: tuple[str, ...] = ()
        self._runner = Runner(self.model, usable_tokenizer(tokenizer))

    @property
    def tokenizer(self) -> Any:
        """What reads text prompts, None for none; another one can be set."""
        return self._runner.tokenizer

    @tokenizer.setter
    def tokenizer(self, tokenizer: Any) -> None:
        self._runner.tokenizer = usable_tokenizer(tokenizer)

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
        return self._runner.proof.anatomy

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
        return self._runner.proof.gates.effective_layers

    @property
    def state_layers(self) -> tuple[int, ...]:
        """Layers whose recurrent state can be captured."""
        return self._runner.proof.gates.state_layers

    @property
    def gate_layers(self) -> dict[str, tuple[int, ...]]:
        """Per gate name, the layers where it is proven."""
        found: dict[str, list[int]] = {}
        for name, layer in self._runner.proof.gates.gates:
            found.setdefault(name, []).append(layer)
        return {name: tuple(layers) for name, layers in found.items()}

    @property
    def site_layers(self) -> dict[str, tuple[int, ...]]:
        """Per site name, the layers where it is proven; none where the model has it once."""
        return layers_of(self.sites)

    @property
    def sites(self) -> SiteClaims:
        """The proven sites, where they are read and written, and why others are not there."""
        return self._runner.proof.sites

    def why_no_site(self, name: str, layer: SupportsIndex | None = None) -> str:
        """Why a layer has not a site, in a sentence; "" where it is proven.

        Raises:
            UsageError: a name that is unknown.
        """
        site, own = site_name(name)
        at = own if layer is None else int(layer)
        return why_no_site(self.sites, site, at)

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
        sites: Iterable[str] = (),
        edits: Iterable[Edit] | Edit = (),
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
            sites: names of `axes.SITES`, or TransformerLens' and nnterp's; kept in `sites`, of the
                layers that have them.
            edits: of `trilens.edits`, applied in their order before anything is kept.

        Returns:
            A frozen capture, detached, in the model's dtype and on its device. Queries, keys and
            full residuals are references to the model's own tensors: no copy.

        Raises:
            PromptError: empty, too long, out of vocabulary, or text without a tokenizer.
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
        return self._runner.capture(prompt, asked, edits, add_special_tokens)

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
        return self._runner.batches(prompts, size, asked, edits, add_special_tokens, progress)

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
        prompt: PromptLike,
        metric: Metric,
        *,
        sites: Iterable[str] = ("resid_post",),
        layers: Iterable[SupportsIndex] | None = None,
        edits: Iterable[Edit] | Edit = (),
        add_special_tokens: bool = True,
    ) -> Gradients:
        """A metric's gradients at sites, and the sites' values: one pass forward and one back.

        The model runs in eval mode and its own dtype, the metric in float32; its parameters are
        frozen for the run and get no gradient.

        Args:
            prompt: as `capture` takes it.
            metric: of the logits [seq, vocab], float32: a scalar tensor. Those of
                `trilens.metrics` can be given.
            sites: as `capture` takes them; not attn.scores and attn.pattern.
            layers: layer numbers; all where not given.
            edits: as `capture` takes them.
            add_special_tokens: as `capture` takes it.

        Raises:
            MetricError: the metric gives no finite scalar, or does not depend on the logits.
            SiteError: a site that is not proven in the layers asked, or has no gradient.

        Memory
            Every activation of the pass: what training of one batch of this prompt keeps.
        """
        asked = Asked(residual=None, layers=layers, sites=sites).once()
        return self._runner.gradients(prompt, metric, asked, edits, add_special_tokens)

    def batches_safely(self, tokens: int) -> bool:
        """Whether padded rows equal single prompts on this model, up to so many tokens: measured.

        Logits and every residual of a padded batch of random prompts are compared with single
        runs, within 1e-5 of the largest value in float32 (the rounding of a narrower dtype). It is
        measured once for each doubling of the length: sparse attention and windows begin to matter
        only when a prompt is longer than they are.
        """
        return self._runner.batches_safely(tokens)

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
        with self._runner.lock(), evaluating(self.model):
            return unembedded(self.model, self.anatomy, residual)

    def fold(self, residual: Tensor, tokens: Sequence[int]) -> FoldedHead:
        """Final norm and unembedding of some tokens as one affine map, as `folded_head` says."""
        with self._runner.lock(), evaluating(self.model):
            return folded_head(self.model, self.anatomy, residual, tokens)
