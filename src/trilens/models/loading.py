"""From a path or hub id to a model, its tokenizer and nothing random in between.

Only safetensors are read. What can be refused is refused before memory is taken: a missing file, a
malformed header, weights larger than what is free. A model that transformers would have completed
with random numbers is an error.
"""

from __future__ import annotations

import logging
import os
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
import torch
import transformers
from huggingface_hub.utils import logging as hub_logging
from huggingface_hub.utils.tqdm import (
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
)
from transformers.conversion_mapping import (
    WeightConverter,
    get_checkpoint_conversion_mapping,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import logging as transformers_logging

from trilens.errors import ConfigError, CorruptFileError, LoadError, MemoryShortError, UsageError
from trilens.io.hub import local_folder
from trilens.io.messages import clip, reason
from trilens.io.safetensors_header import TensorHeader
from trilens.io.short_memory import is_short_of_memory
from trilens.io.weight_files import read_headers
from trilens.io.weight_memory import copied_bytes, memory_bytes
from trilens.models.build import (
    build_from_tensors,
    build_model,
    fitting_class,
    read_config,
    read_settings,
)
from trilens.models.gguf_loading import build_gguf, gguf_bytes, gguf_path
from trilens.models.rwkv7 import model as rwkv7

__all__ = ["Loaded", "check_fits", "load", "load_mapped", "load_tokenizer"]

_DTYPES = ("auto", "bfloat16", "float16", "float32", "float64")
_PLACEMENTS = ("auto", "balanced", "balanced_low_0", "sequential")

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tekken.json",
)

# One load at a time: transformers sets torch's default dtype, and the verbosity set here is the
# whole process's.
_LOADING = threading.RLock()
# In a forked process nobody loads: the thread that held the lock is not there.
os.register_at_fork(after_in_child=lambda: globals().update(_LOADING=threading.RLock()))


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model from a checkpoint, in eval mode.

    `tokenizer` is None when the checkpoint came without one. `source` is the absolute directory or
    the hub id. `estimate_bytes` is what its weights take in memory, from the files' headers.
    `unused` names the checkpoint's tensors that the model has no place for, such as a classifier's
    head when the bare model was loaded.
    """

    model: Any
    tokenizer: Any
    source: str
    estimate_bytes: int
    unused: tuple[str, ...] = ()


def load(
    path_or_hub_id: str | os.PathLike[str],
    *,
    dtype: str | torch.dtype = "auto",
    device_map: Any = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    attn_implementation: str | None = None,
    gguf_file: str | None = None,
) -> Loaded:
    """Load a model and its tokenizer from a local directory or the hub.

    The class is the one that config.json's `architectures` names, when it gives logits or is a bare
    model; the bare model when it names another head (a classifier's); else the first of causal,
    masked and bare that the files complete.

    Args:
        path_or_hub_id: directory with config.json and safetensors weights, or a hub id.
        dtype: "auto" (the checkpoint's own), "bfloat16", "float16", "float32", "float64" or such a
            torch dtype.
        device_map: None (CPU), a device, or what transformers accepts ("auto" and dicts need the
            package accelerate).
        revision: branch, tag or commit; only for a hub id.
        trust_remote_code: run Python code that comes with the checkpoint. Without it no code of the
            checkpoint runs.
        attn_implementation: the attention function, such as "sdpa" or "eager"; None leaves the
            choice to transformers.
        gguf_file: the name of a GGUF file in the directory: transformers unpacks its weights, in
            float32 where dtype is "auto".

    Raises:
        UsageError: an argument is wrong.
        ModelNotFoundError: no such directory, hub id or revision.
        OfflineError: the hub cannot be reached and its cache does not hold the model.
        ConfigError: config.json is missing, broken, of an unknown type, or needs code or packages
            that are not there.
        UnsafeFormatError: only pickled weights are there.
        CorruptFileError: files are truncated or malformed, or weights are missing or of another
            size than the model's.
        MemoryShortError: the weights need more memory than is free.
        LoadError: anything else that keeps the model from loading.

    Memory: the weights in the target dtype; see `Loaded.estimate_bytes`. On the CPU those that are
    stored in it stay mapped from their files: they may be larger than memory, and a pass then takes
    the time that reading them from the disk takes.
    """
    target = _read_dtype(dtype)
    placement, device = _read_device_map(device_map)
    if not isinstance(trust_remote_code, bool):
        raise UsageError(f"trust_remote_code is {trust_remote_code!r}: give True or False")
    options: dict[str, Any] = {"dtype": target, "device_map": placement}
    if attn_implementation is not None:
        if attn_implementation not in ALL_ATTENTION_FUNCTIONS and attn_implementation != "eager":
            known = ", ".join(sorted({"eager", *ALL_ATTENTION_FUNCTIONS.keys()}))
            raise UsageError(
                f"attn_implementation {attn_implementation!r} is not one that transformers has: "
                f"give one of {known}"
            )
        options["attn_implementation"] = attn_implementation
    if gguf_file is not None:
        file = gguf_path(path_or_hub_id, gguf_file)
        with _LOADING, _quiet():
            needed_bytes = gguf_bytes(file, target)
            _check_memory(str(file), needed_bytes, _free_bytes())
            options["dtype"] = torch.float32 if target == "auto" else target
            model, tokenizer, unused = build_gguf(file, options)
            if device is not None:
                model = _move(model, device)
        return Loaded(model, tokenizer, str(file), needed_bytes, unused)
    with _LOADING, _quiet():
        rwkv7.register()
        folder, source = local_folder(path_or_hub_id, revision=revision, code=trust_remote_code)
        config, remote = read_config(folder, read_settings(folder), trusted=trust_remote_code)
        headers = read_headers(folder)
        needed_bytes = memory_bytes(headers, folder, target)
        if placement is None:
            is_mapped = remote is None and device is None and not _converts(config)
            taken_bytes = copied_bytes(headers, folder, target) if is_mapped else needed_bytes
            _check_memory(source, taken_bytes, _free_bytes())
        model, unused = build_model(
            folder,
            config,
            remote,
            headers=headers,
            options=options,
        )
        tokenizer = load_tokenizer(folder, trusted=trust_remote_code)
        if device is not None:
            model = _move(model, device)
    return Loaded(model, tokenizer, source, needed_bytes, unused)


def check_fits(folder: Path, config: Any, headers: Mapping[str, TensorHeader]) -> None:
    """Refuse a checkpoint that could not be loaded, from its headers alone.

    Args:
        folder: the checkpoint, for messages.
        config: its configuration; not changed.
        headers: its stored tensors.

    Raises:
        CorruptFileError: weights are missing, of another size or type than the model's.
        ConfigError: counts beyond bounds, or a configuration that builds no model.
    """
    with _LOADING, _quiet():
        fitting_class(folder, config, headers)


def load_mapped(
    folder: Path, model_class: type, config: Any, tensors: Mapping[str, torch.Tensor]
) -> tuple[Any, Any]:
    """A model over tensors that the caller has, by reference where dtype and layout allow it.

    Tensors that are mapped from a file stay there: weights take memory only where they are used.
    What transformers merges or converts on the way in is copied.

    Args:
        folder: the checkpoint's directory, for its tokenizer and for messages.
        model_class: the class to build.
        config: its configuration; not changed.
        tensors: every stored tensor by its name.

    Returns:
        The model in eval mode, and its tokenizer or None.

    Raises:
        LoadError: as `load`.
    """
    sizes: dict[torch.dtype, int] = {}
    for tensor in tensors.values():
        if tensor.is_floating_point():
            sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.numel()
    dtype = max(sizes, key=lambda dtype: sizes[dtype])
    with _LOADING, _quiet():
        model = build_from_tensors(folder, model_class, config, tensors, dtype)
        return model, load_tokenizer(folder, trusted=False)


def _converts(config: Any) -> bool:
    """Whether transformers makes other tensors of the stored ones, in memory: merged experts, or
    weights that are quantized."""
    types = {config.model_type, *(sub.model_type for sub in _parts(config))}
    found = [each for name in types for each in get_checkpoint_conversion_mapping(name) or ()]
    quantized = getattr(config, "quantization_config", None) is not None
    return quantized or any(isinstance(each, WeightConverter) for each in found)


def _parts(config: Any) -> Iterator[Any]:
    """The configurations of a model's parts, those of vision and text."""
    for name in getattr(config, "sub_configs", None) or ():
        part = getattr(config, name, None)
        if hasattr(part, "model_type"):
            yield part


def _free_bytes() -> int:
    return int(psutil.virtual_memory().available)


def _read_dtype(dtype: Any) -> str | torch.dtype:
    name = str(dtype).removeprefix("torch.") if isinstance(dtype, str | torch.dtype) else None
    if name not in _DTYPES:
        raise UsageError(f"dtype {dtype!r} is not one to load in: give one of {', '.join(_DTYPES)}")
    found: str | torch.dtype = "auto" if name == "auto" else getattr(torch, name)
    return found


def _read_device_map(device_map: Any) -> tuple[Any, torch.device | None]:
    """What transformers gets, and the device to move to afterwards.

    transformers places nothing without `accelerate`; one device needs no placing when the model is
    moved after loading.
    """
    if device_map is None:
        return None, None
    if isinstance(device_map, bool):
        raise UsageError(f"device_map is {device_map!r}: give None, a device or a placement")
    accelerate = find_spec("accelerate") is not None
    if isinstance(device_map, Mapping) or (
        isinstance(device_map, str) and device_map in _PLACEMENTS
    ):
        if not accelerate:
            raise UsageError(
                f"device_map {device_map!r} needs the package accelerate, which is not installed: "
                "install it, or give one device such as 'cpu'"
            )
        return device_map, None
    try:
        device = torch.device(device_map)
        # Asking for one element is how a device that is not there says so, whatever its kind.
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, TypeError, ValueError, NotImplementedError) as cause:
        raise UsageError(
            f"device_map {device_map!r} is not a device of this machine: give None, 'cpu', "
            f"'cuda:0' … or one of {', '.join(_PLACEMENTS)} ({reason(cause)})"
        ) from cause
    if device.type == "meta":
        raise UsageError("device_map 'meta' holds no weights: give a real device")
    if device.type == "cpu":
        return None, None
    return (device, None) if accelerate else (None, device)


def _move(model: Any, device: torch.device) -> Any:
    try:
        return model.to(device)
    except Exception as cause:
        if is_short_of_memory(cause):
            raise MemoryShortError(
                f"the model does not fit on {device}: {reason(cause)}"
            ) from cause
        raise LoadError(f"the model cannot be moved to {device}: {reason(cause)}") from cause


def _check_memory(source: str, needed_bytes: int, free_bytes: int) -> None:
    if needed_bytes > free_bytes:
        raise MemoryShortError(
            f"model {source} needs {_gib(needed_bytes)} of memory for its weights, "
            f"{_gib(free_bytes)} are free: load it in a smaller dtype, or free memory"
        )


def _gib(size_bytes: int) -> str:
    return f"{size_bytes / 2**30:.2f} GiB" if size_bytes >= 2**24 else f"{size_bytes} bytes"


def load_tokenizer(folder: Path, *, trusted: bool) -> Any:
    """The tokenizer that lies in a checkpoint's directory; None where there is none.

    Args:
        folder: the checkpoint's directory.
        trusted: may code that comes with it run?

    Raises:
        ConfigError: it needs a package that is not installed, or code that is not trusted.
        CorruptFileError: its files cannot be read, or hold no vocabulary.
    """
    found = [name for name in _TOKENIZER_FILES if (folder / name).is_file()]
    found += sorted(p.name for p in folder.glob("*.tiktoken"))
    if not found:
        return None
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            folder, trust_remote_code=trusted, local_files_only=True
        )
    except ImportError as cause:
        raise ConfigError(
            f"the tokenizer of {folder} needs a package that is not installed: {reason(cause)}"
        ) from cause
    except Exception as cause:
        if not trusted and "trust_remote_code" in str(cause):
            raise ConfigError(
                f"the tokenizer of {folder} comes with code: read that code, "
                "then let it run with trust_remote_code=True (--trust-remote-code); ternarize "
                "never runs it, nor is that of a tokenizer given apart (--tokenizer) run"
            ) from cause
        raise CorruptFileError(
            f"the tokenizer of {folder} cannot be read from {', '.join(found)}: {reason(cause)}"
        ) from cause
    longest = getattr(tokenizer, "model_max_length", None)
    if longest is not None and (isinstance(longest, bool) or not isinstance(longest, int | float)):
        raise CorruptFileError(
            f"the tokenizer of {folder} has the model_max_length {clip(longest)}: a number is "
            "needed"
        )
    # Without its vocabulary's file, transformers makes a tokenizer that knows nothing.
    needed = sorted({str(name) for name in (tokenizer.vocab_files_names or {}).values()})
    own_format = any(name == "tekken.json" or name.endswith(".tiktoken") for name in found)
    if needed and not own_format and not any((folder / name).is_file() for name in needed):
        raise CorruptFileError(
            f"the tokenizer of {folder} has settings ({', '.join(found)}) but no vocabulary: "
            f"{' or '.join(needed)} is missing"
        )
    return tokenizer


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence transformers and the hub client, and put back what was, also after an exception."""
    verbosity = transformers_logging.get_verbosity()
    hub_verbosity = hub_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    hub_bars = not are_progress_bars_disabled()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        transformers_logging.set_verbosity_error()
        hub_logging.set_verbosity(logging.ERROR)
        transformers_logging.disable_progress_bar()
        try:
            yield
        finally:
            # transformers' switch moves the hub's bars too, so the hub's own state is put back
            # after it.
            if bars:
                transformers_logging.enable_progress_bar()
            if hub_bars:
                enable_progress_bars()
            else:
                disable_progress_bars()
            hub_logging.set_verbosity(hub_verbosity)
            transformers_logging.set_verbosity(verbosity)
