"""Which stacks of blocks a model has, each with tokens and a residual stream of its own.

Most models have one. An encoder–decoder has two: its encoder reads a source, its decoder a target,
and attends to what the encoder made of the source.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from torch import nn
from transformers import PreTrainedModel

from trilens.errors import AnatomyError, UsageError

__all__ = [
    "STACKS",
    "Stack",
    "StackName",
    "chosen_stack",
    "encoder_of",
    "only_stack",
    "reads_tokens",
    "source_name",
    "stacks_of",
]

StackName = Literal["decoder", "encoder", "language", "vision", "audio"]
STACKS: tuple[StackName, ...] = ("decoder", "encoder", "language", "vision", "audio")
"""All names that a stack can have."""

Run = Literal["model", "alone", "with source"]

_TOWERS: dict[str, StackName] = {
    "pixel_values": "vision",
    "input_features": "audio",
    "input_values": "audio",
}
"""What a tower beside a language model reads first, and the stack that it is."""


@dataclass(frozen=True, slots=True)
class Stack:
    """One stack of blocks of a model.

    Attributes:
        name: what it is asked for by.
        path: of the submodule whose blocks are meant; "" for the model itself.
        run: "model": the whole model runs, on a prompt that this stack reads; "alone": the
            submodule runs by itself; "with source": the whole model runs, on a source that its
            encoder reads and a target that this stack reads.
    """

    name: StackName
    path: str
    run: Run

    @property
    def has_source(self) -> bool:
        """Whether a pass needs a source beside what this stack reads."""
        return self.run == "with source"

    def running(self, model: PreTrainedModel) -> PreTrainedModel:
        """The module that a pass of this stack calls."""
        if self.run != "alone":
            return model
        found = model.get_submodule(self.path)
        if not isinstance(found, PreTrainedModel):
            raise UsageError(
                f"the {self.name} of {type(model).__name__} is a {type(found).__name__}, which is "
                "no model of its own: it cannot be run alone"
            )
        return found


def stacks_of(model: PreTrainedModel) -> Mapping[str, Stack]:
    """The stacks that a lens may be opened on, by name; the first one where none is named."""
    encoder = encoder_of(model)
    if encoder is None:
        return {"language": Stack("language", "", "model"), **_towers(model)}
    path = _path_of(encoder, model)
    found = {"decoder": Stack("decoder", _path_of(model.get_decoder(), model), "with source")}
    if isinstance(encoder, PreTrainedModel):
        found["encoder"] = Stack("encoder", path, "alone")
    return found


def _towers(model: PreTrainedModel) -> dict[str, Stack]:
    """The models in a model that read pixels or sound by themselves; the outermost of each kind."""
    found: dict[str, Stack] = {}
    for path, module in model.named_modules():
        if module is model or not isinstance(module, PreTrainedModel):
            continue
        name = _TOWERS.get(source_name(module))
        if name is not None:
            found.setdefault(name, Stack(name, path, "alone"))
    return found


def chosen_stack(model: PreTrainedModel, name: str | None) -> Stack:
    """The stack of this name; the first one where none is named.

    Raises:
        UsageError: the model has no such stack.
    """
    found = stacks_of(model)
    if name is None:
        return next(iter(found.values()))
    if name not in found:
        have = ", ".join(map(repr, found))
        raise UsageError(f"stack {name!r} is not one of {type(model).__name__}: it has {have}")
    return found[name]


def only_stack(model: PreTrainedModel) -> Stack:
    """The stack of a model that has one.

    Raises:
        AnatomyError: it is an encoder–decoder.
    """
    found = next(iter(stacks_of(model).values()))
    if found.has_source:
        raise AnatomyError(
            f"{type(model).__name__} is an encoder–decoder: two stacks of blocks, each with tokens "
            "and a residual stream of its own; here a model with one stack is needed"
        )
    return found


def encoder_of(model: PreTrainedModel) -> nn.Module | None:
    """The encoder of an encoder–decoder; None for any other model, an encoder itself among them."""
    if not getattr(model.config, "is_encoder_decoder", False):
        return None
    encoder = model.get_encoder()
    if not isinstance(encoder, nn.Module) or encoder is model:
        return None
    return encoder


def source_name(module: nn.Module) -> str:
    """What a forward pass calls the thing that it reads."""
    return next(iter(_named_parameters(module)), "input_ids")


def reads_tokens(module: nn.Module) -> bool:
    """Whether a forward pass reads token ids; one that names nothing it takes is taken to."""
    named = _named_parameters(module)
    return not named or "input_ids" in named


def _named_parameters(module: nn.Module) -> list[str]:
    parameters = inspect.signature(module.forward).parameters.values()
    various = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [parameter.name for parameter in parameters if parameter.kind not in various]


def _path_of(module: nn.Module, model: nn.Module) -> str:
    return next((path for path, found in model.named_modules() if found is module), "")
