"""Does config.json agree with the weight files? Asked before anything of its sizes is allocated.

A configuration is a few bytes that ask for any amount of memory or time. Counts are compared with
bounds before a class sees them; then the load is run dry, on the meta device, from the headers.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers.quantizers import auto

from trilens.errors import ConfigError
from trilens.io.messages import clip, reason
from trilens.io.safetensors_header import TensorHeader

__all__ = [
    "StoredShape",
    "check_buffers",
    "check_counts",
    "check_quant_method",
    "dry_class",
    "unreadable",
]

_COUNT = re.compile(
    r"(n|num|number|nb)_(\w+_)?(layers?|blocks?|heads?|experts?|groups?|stages?|levels?|buckets?)"
    r"|n_?(layer|head|group)s?|(\w+_)?(layers|blocks|depth|heads|experts)"
)
# Configurations are read into lists of this length, one entry a layer, before the files are seen.
_MOST_COUNTED = 10_000
# Models that use one block many times have fewer tensors than layers.
_ALWAYS_COUNTED = 256
# Masks and tables of positions, computed from the configuration alone.
_BUFFER_BYTES = 1 << 28


def check_counts(
    settings: Mapping[str, Any], file: Path, headers: Mapping[str, TensorHeader] | None = None
) -> None:
    """Refuse more layers, heads or experts than a model can have.

    Args:
        settings: config.json as it stands.
        file: where it is from.
        headers: the stored tensors; a model has no more layers than these, or 256.

    Raises:
        ConfigError: names the key and the bound.
    """
    limit = _MOST_COUNTED if headers is None else max(_ALWAYS_COUNTED, len(headers))
    for key, value in _numbers(settings):
        if _COUNT.fullmatch(key) is None or abs(value) <= limit:
            continue
        if headers is None:
            why = f"at most {limit} are read"
        elif not re.search(r"layer|block|depth", key):
            continue
        else:
            why = f"its files hold {len(headers)} tensors"
        raise ConfigError(
            f"{file} has {clip(key)} {clip(value)}: {why}; give the configuration that belongs to "
            "the weights"
        )


def _numbers(settings: Mapping[str, Any]) -> Iterator[tuple[str, int | float]]:
    for key, value in settings.items():
        if isinstance(value, Mapping):
            yield from _numbers(value)
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield key, value
        elif isinstance(value, list):
            # Some families have one number for each of several parts.
            numbers = [n for n in value if isinstance(n, int | float) and not isinstance(n, bool)]
            yield from ((key, n) for n in numbers if not key.endswith("layers"))


def check_quant_method(settings: Mapping[str, Any], file: Path) -> None:
    """Refuse a quantization that transformers would skip with a warning.

    Raises:
        ConfigError: `quantization_config` is no object, or its method is not known.
    """
    found = settings.get("quantization_config")
    if found is None:
        return
    if not isinstance(found, Mapping):
        raise ConfigError(f"{file} has a quantization_config that is no object: {clip(found)}")
    if found.get("load_in_8bit") is True or found.get("load_in_4bit") is True:
        return
    known = auto.AUTO_QUANTIZATION_CONFIG_MAPPING
    method = found.get("quant_method")
    if not isinstance(method, str) or method not in known:
        raise ConfigError(
            f"{file} has the quant_method {clip(method)}, which is not known here: known are "
            f"{', '.join(sorted(map(str, known)))}; its weights mean nothing without it"
        )


def unreadable(folder: Path, config: Any, cause: Exception) -> str:
    """Why a quantized checkpoint is not read, and what to do; "" for one that is not quantized.

    Its package refuses before weights are read: it is not installed, or wants another device.
    """
    section = getattr(config, "quantization_config", None)
    if section is None:
        return ""
    found = section if isinstance(section, Mapping) else section.to_dict()
    method = str(getattr(found.get("quant_method"), "value", found.get("quant_method")))
    if method == "trilens":
        return ""
    return (
        f"{folder} is quantized (quant_method {method!r}) in a way that is not read here: "
        f"{reason(cause)}; install what it names, load it where it runs and give Lens(model), or "
        "take the checkpoint that it was made of"
    )


def check_buffers(folder: Path, model: Any, headers: Mapping[str, TensorHeader]) -> None:
    """Refuse tables, computed from the configuration, that dwarf the weights.

    Args:
        folder: the checkpoint, for messages.
        model: the model on the meta device.
        headers: the stored tensors.

    Raises:
        ConfigError: names the largest table.
    """
    sizes = {name: b.numel() * b.element_size() for name, b in model.named_buffers()}
    limit = _BUFFER_BYTES + 2 * sum(header.size_bytes for header in headers.values())
    if sum(sizes.values()) > limit:
        name = max(sizes, key=lambda name: sizes[name])
        raise ConfigError(
            f"{folder / 'config.json'} asks for tables of {sum(sizes.values())} bytes, first of "
            f"all {name}: at most {limit} are allowed beside these weights"
        )


class StoredShape:
    """A stored tensor's shape, in the place of its values: what is read of it is on meta."""

    def __init__(self, header: TensorHeader) -> None:
        self.shape = torch.Size(header.shape)
        integer = header.dtype.startswith(("U", "I", "B")) and header.dtype != "BF16"
        self.dtype = torch.uint8 if integer else torch.float32

    def __getitem__(self, _: object) -> StoredShape:
        return self

    def is_floating_point(self) -> bool:
        """As a tensor says it."""
        return self.dtype.is_floating_point

    def get_shape(self) -> list[int]:
        """As safetensors' slices say it."""
        return list(self.shape)

    def to(self, device: Any = None, dtype: torch.dtype | None = None) -> torch.Tensor:
        """What the loader asks for when it wants values."""
        return torch.empty(self.shape, dtype=dtype or self.dtype, device="meta")


def dry_class(cls: type) -> Any:
    """`cls`, whose `from_pretrained` leaves everything on meta: nothing is made, nothing drawn.

    Such a class has `dry_run` set, by which our own quantizer knows it.
    """

    def nothing(*_: Any, **__: Any) -> None:
        return None

    return type(
        cls.__name__,
        (cls,),
        {
            "__module__": cls.__module__,
            "__doc__": cls.__doc__,
            "dry_run": True,
            "_move_missing_keys_from_meta_to_device": nothing,
            "_initialize_missing_keys": nothing,
        },
    )
