"""A model that is opened: its tokenizer, its anatomy, and what can be asked of which layers."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, Self, SupportsIndex

import torch
from transformers import PreTrainedModel

from trilens.axes import site_name
from trilens.errors import UsageError
from trilens.lens.runner import Runner
from trilens.lens.sites import layers_of, why_no_site
from trilens.models.anatomy import Anatomy
from trilens.models.loading import load
from trilens.models.sites.claims import SiteClaims
from trilens.models.stacks import StackName, chosen_stack, stacks_of
from trilens.models.tokenizers import usable_tokenizer
from trilens.models.unwrap import tokenizer_of, unwrapped
from trilens.numbers import whole_number
from trilens.results import Shown

__all__ = ["Opened"]


class Opened(Shown):
    """A model with its tokenizer, and what is proven of it.

    Args and errors are those of `Lens`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any = None,
        *,
        stack: StackName | None = None,
        probe: Mapping[str, Any] | None = None,
    ) -> None:
        if tokenizer is None:
            tokenizer = tokenizer_of(model)
        whole = unwrapped(model)
        self._stack = chosen_stack(whole, stack)
        self.stacks = tuple(stacks_of(whole))
        self.model = self._stack.running(whole)
        self.unused_weights: tuple[str, ...] = ()
        self._runner = Runner(self.model, usable_tokenizer(tokenizer), self._stack, probe)

    @property
    def stack_name(self) -> StackName:
        """The stack that is captured, one of `stacks`."""
        return self._stack.name

    @property
    def reads_source(self) -> bool:
        """Whether a prompt is a source and a target: of an encoder–decoder's decoder."""
        return self._stack.has_source

    def check_reads_texts(self) -> None:
        """Refuse where a text alone is no prompt: what is measured on texts has no target.

        Raises:
            UsageError: the lens is on a decoder that answers a source.
        """
        if self.reads_source:
            raise UsageError(
                f"{type(self.model).__name__} predicts a target of a source, and a text is one of "
                "both: open its encoder (stack='encoder'), or a model with one stack"
            )

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
        stack: StackName | None = None,
        probe: Mapping[str, Any] | None = None,
        gguf_file: str | None = None,
    ) -> Self:
        """Load a checkpoint directory or hub id and open it.

        Only safetensors are read, never a pickle; code that ships with a checkpoint runs only
        where `trust_remote_code` allows it. `attn_implementation` ("sdpa", "eager" …) is chosen by
        transformers where not given; `stack` and `probe` as for `Lens`. `gguf_file` names a
        GGUF file in the directory, whose weights transformers unpacks, in float32 where `dtype` is
        "auto".

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
            gguf_file=gguf_file,
        )
        lens = cls(loaded.model, loaded.tokenizer, stack=stack, probe=probe)
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
    def n_streams(self) -> int:
        """Number of residual streams: 1 but for models that keep several."""
        return self.anatomy.n_streams

    @property
    def attention_layers(self) -> tuple[int, ...]:
        """Layers whose softmax attention can be captured."""
        return tuple(self.anatomy.attention)

    @property
    def cross_attention_layers(self) -> tuple[int, ...]:
        """Layers whose attention to the encoder's positions can be captured."""
        return tuple(self._runner.proof.cross)

    @property
    def no_cross_attention(self) -> dict[int, str]:
        """Of a decoder with a source, why other layers have no such attention, in words."""
        return dict(self._runner.proof.no_cross)

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
            UsageError: a name that is unknown, or a layer that is no whole number.
        """
        site, own = site_name(name)
        at = own if layer is None else whole_number(layer, "layer")
        return why_no_site(self.sites, site, at)

    def __repr__(self) -> str:
        name = type(self.model).__name__
        streams = f", {self.n_streams} streams" if self.n_streams > 1 else ""
        return f"Lens({name}, {self.n_layers} layers, d_model {self.d_model}{streams})"
