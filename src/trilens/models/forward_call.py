"""How to call any transformers language model: what its forward takes, and a probe for it."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from trilens.models.batched_arguments import joined_arguments
from trilens.models.offload import execution_device
from trilens.models.tokens import Prompt

__all__ = [
    "batch_arguments",
    "config_numbers",
    "device_of",
    "forward_arguments",
    "given_arguments",
    "pass_options",
    "probe_ids",
    "takes",
    "text_config",
]


def text_config(model: PreTrainedModel) -> Any:
    """The config of the text part of the model (the config itself for a text model)."""
    config = model.config
    return config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config


def device_of(model: PreTrainedModel) -> torch.device:
    """The device that takes the token ids: where the input embedding computes."""
    try:
        embedding = model.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        embedding = None
    weight = getattr(embedding, "weight", None)
    if isinstance(weight, Tensor) and not weight.is_meta:
        return weight.device
    paths = (path for path, module in model.named_modules() if module is embedding)
    return execution_device(model, next(paths, ""))


def takes(model: Any, name: str) -> bool:
    """Whether the model's forward has a parameter of this name."""
    return name in inspect.signature(model.forward).parameters


def forward_arguments(
    model: PreTrainedModel, ids: Tensor, mask: Tensor | None, *, logits: bool = True
) -> dict[str, Any]:
    """Arguments for one plain pass over ids [batch, seq]; only what this forward knows.

    Args:
        model: the model to call.
        ids: token ids [batch, seq].
        mask: 1 for real tokens, 0 for padding [batch, seq], or None.
        logits: False asks for the last position's logits only, where the model can.
    """
    arguments: dict[str, Any] = {"input_ids": ids}
    if mask is not None and takes(model, "attention_mask"):
        arguments["attention_mask"] = mask
    last = None if logits else ids.shape[-1] - 1
    return arguments | pass_options(model) | _only_of(model, last)


def _only_of(model: PreTrainedModel, position: int | None) -> dict[str, Any]:
    """Logits of one position alone, where the model can; of all where it is None."""
    if position is None or not takes(model, "logits_to_keep"):
        return {}
    # As a number, it lets gemma4 drop all other positions from its last layers as well; as an
    # index it speaks of logits alone.
    return {"logits_to_keep": torch.tensor([position], device=device_of(model))}


def pass_options(model: nn.Module) -> dict[str, Any]:
    """What any plain pass of a model is told: no cache, and an output with names."""
    known = inspect.signature(model.forward).parameters
    options = {"use_cache": False, "return_dict": True}
    return {name: value for name, value in options.items() if name in known}


def given_arguments(model: PreTrainedModel, given: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments for one pass over what a prompt brings itself, where the model computes."""
    there, dtype = device_of(model), model.dtype
    moved = {name: _moved(value, there, dtype) for name, value in given.items()}
    return moved | pass_options(model)


def _moved(value: Any, device: torch.device, dtype: torch.dtype) -> Any:
    if isinstance(value, list):
        return [_moved(each, device, dtype) for each in value]
    if not isinstance(value, Tensor):
        return value
    # Numbers along one axis, such as seconds of a video's frames, are no activations.
    return value.to(device, dtype if value.is_floating_point() and value.ndim > 1 else None)


def batch_arguments(
    model: PreTrainedModel,
    prompts: Sequence[Prompt],
    pad: int,
    *,
    logits: bool,
    source_pad: int = 0,
) -> dict[str, Any]:
    """Arguments for one pass over prompts padded on the right; no mask where nothing is padded.

    Prompts that bring arguments of their own have their `batch_key` in common.
    """
    if prompts[0].arguments is not None:
        given, longest = joined_arguments(prompts, pad, source_pad)
        last = None if logits else longest - 1
        # A decoder sees no later token, whether it takes a mask or not.
        given = {n: value for n, value in given.items() if "mask" not in n or takes(model, n)}
        return given_arguments(model, given) | _only_of(model, last)
    longest = max(len(prompt.ids) for prompt in prompts)
    ids = torch.full((len(prompts), longest), pad, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt.ids)] = prompt.ids
        mask[row, : len(prompt.ids)] = 1
    device = device_of(model)
    there = None if bool(mask.all()) else mask.to(device)
    return forward_arguments(model, ids.to(device), there, logits=logits)


def _special_ids(config: Any, depth: int = 2) -> Iterator[int]:
    """Every id that the config names: pad, bos, eos, placeholders of images and audio."""
    values = vars(config)
    for name, value in values.items():
        if name.endswith(("token_id", "token_index", "token_ids")):
            items = value if isinstance(value, list | tuple) else [value]
            yield from (item for item in items if isinstance(item, int))
        elif depth and name.endswith("config") and hasattr(value, "__dict__"):
            yield from _special_ids(value, depth - 1)


def probe_ids(
    model: PreTrainedModel, vocab: int, length: int, *, seed: int = 0, kinds: int | None = None
) -> Tensor:
    """Ordinary token ids [1, length] for a probe: none that the config gives a special meaning.

    Args:
        model: whose config names the special ids.
        vocab: rows of the input embedding.
        length: tokens.
        seed: of the choice.
        kinds: different tokens at most; fewer than length makes a text that repeats itself.
    """
    special = set(_special_ids(model.config))
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(min(vocab, 4096), generator=generator).tolist()
    plain = [token for token in order if token not in special] or order
    few = plain[: kinds or length]
    picks = torch.randint(len(few), (length,), generator=generator).tolist()
    ids = [few[i] for i in picks] if kinds else [few[i % len(few)] for i in range(length)]
    return torch.tensor([ids], device=device_of(model))


def config_numbers(model: PreTrainedModel) -> tuple[float, ...]:
    """The numbers above 1 in the model's config: what a measured constant may come from."""
    configs = {id(config): config for config in (model.config, text_config(model))}
    found = {
        float(value)
        for config in configs.values()
        for value in vars(config).values()
        if isinstance(value, int | float) and not isinstance(value, bool) and value > 1
    }
    return tuple(sorted(found))
