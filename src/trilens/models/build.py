"""From a checkpoint's directory to its configuration, the class that fits it, and a model whose
every weight was read.

The class follows config.json's `architectures`. What transformers would complete with random
numbers, leave out or cast without a word is an error here.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from transformers.models.auto import modeling_auto

from trilens.errors import ConfigError, CorruptFileError, LoadError, MemoryShortError, TrilensError
from trilens.io.json import read_json
from trilens.io.messages import reason
from trilens.io.safetensors_header import TensorHeader
from trilens.io.short_memory import is_short_of_memory
from trilens.models.completeness import check_complete, check_floating
from trilens.models.config_check import (
    StoredShape,
    check_buffers,
    check_counts,
    check_quant_method,
    dry_class,
    unreadable,
)

__all__ = [
    "build_from_tensors",
    "build_model",
    "candidate_classes",
    "fitting_class",
    "read_config",
    "read_settings",
]

# Classes whose output is logits over a vocabulary, in the order in which they are tried.
_LANGUAGE_MAPPINGS = (
    "MODEL_FOR_CAUSAL_LM_MAPPING",
    "MODEL_FOR_MASKED_LM_MAPPING",
    "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING",
    "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING",
    "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING",
    "MODEL_FOR_MULTIMODAL_LM_MAPPING",
)
_REMOTE_AUTO_CLASSES = ("AutoModelForCausalLM", "AutoModelForMaskedLM", "AutoModel")


def read_settings(folder: Path) -> dict[str, Any]:
    """config.json as it stands.

    Raises:
        ConfigError: it is missing or broken, or the directory is an adapter's.
    """
    if (folder / "adapter_config.json").is_file():
        raise ConfigError(
            f"directory {folder} holds an adapter (adapter_config.json): merge it into its base "
            "model, and give the merged model's directory"
        )
    file = folder / "config.json"
    if not file.is_file():
        raise ConfigError(
            f"directory {folder} has no config.json: give the directory of a transformers model"
        )
    return read_json(file, ConfigError, non_finite=True)


def read_config(
    folder: Path, settings: Mapping[str, Any], *, trusted: bool
) -> tuple[Any, type | None]:
    """The configuration that a checkpoint's config.json gives.

    Args:
        folder: the checkpoint's directory.
        settings: config.json as it stands.
        trusted: may code that comes with the checkpoint run?

    Returns:
        The configuration; the transformers auto class to load through when the model's code comes
        with the checkpoint and is trusted, else None.

    Raises:
        ConfigError: it is of an unknown type, or needs code or packages that are not there.
    """
    file = folder / "config.json"
    check_counts(settings, file)
    if not trusted:
        check_quant_method(settings, file)
    model_type, auto_map = settings.get("model_type"), settings.get("auto_map")
    if auto_map is not None and not isinstance(auto_map, dict):
        raise ConfigError(f"{file} has an auto_map that is not an object: {auto_map!r}")
    if not isinstance(model_type, str) and not auto_map:
        raise ConfigError(
            f"{file} names no model_type: {model_type!r} is not a type that transformers has"
        )
    known = isinstance(model_type, str) and model_type in transformers.CONFIG_MAPPING
    if not known and not (trusted and auto_map):
        raise ConfigError(_unknown_type(file, model_type, has_code=bool(auto_map)))
    try:
        config = transformers.AutoConfig.from_pretrained(
            folder, trust_remote_code=trusted, local_files_only=not _elsewhere(auto_map)
        )
    except TrilensError:
        raise
    except ImportError as cause:
        raise ConfigError(
            f"{file} needs a package that is not installed: {reason(cause)}"
        ) from cause
    except Exception as cause:
        raise ConfigError(
            f"{file} is not a valid {model_type} configuration: {reason(cause)}"
        ) from cause
    remote = [name for name in _REMOTE_AUTO_CLASSES if name in (auto_map or {})]
    if remote and trusted:
        return config, getattr(transformers, remote[0])
    if not candidate_classes(config):
        raise ConfigError(_unknown_type(file, model_type, has_code=bool(remote)))
    foreign = _foreign_architecture(config) if remote else None
    if foreign is not None:
        raise ConfigError(_unknown_type(file, foreign, has_code=True))
    return config, None


def _unknown_type(file: Path, name: Any, *, has_code: bool) -> str:
    if has_code:
        return (
            f"{file} is of type {name!r}, whose code comes with the checkpoint: read that code, "
            "then let it run with trust_remote_code=True (--trust-remote-code); commands without "
            "that option (ternarize, validate) never run it"
        )
    return (
        f"{file} is of type {name!r}, which transformers {transformers.__version__} does not know: "
        "upgrade transformers, or take a checkpoint that brings its code (this one names none in "
        "auto_map)"
    )


def _elsewhere(auto_map: Mapping[str, Any] | None) -> bool:
    """Does the code lie in another repository of the hub ("owner/name--module.Class")?"""
    return any("--" in str(value) for value in (auto_map or {}).values())


def _architectures(config: Any) -> list[str]:
    named = getattr(config, "architectures", None)
    return [n for n in named if isinstance(n, str)] if isinstance(named, list | tuple) else []


def _foreign_architecture(config: Any) -> str | None:
    """The named class, when neither transformers nor anything registered with it has it."""
    named = _architectures(config)
    ours = {cls.__name__ for cls in candidate_classes(config)}
    if not named or any(name in ours or hasattr(transformers, name) for name in named):
        return None
    return named[0]


def _classes(mapping_name: str, config: Any) -> list[type]:
    mapping = getattr(modeling_auto, mapping_name, None)
    found = mapping.get(type(config), ()) if mapping is not None else ()
    return list(found) if isinstance(found, list | tuple) else [found]


def candidate_classes(config: Any) -> list[type]:
    """The classes to load a checkpoint of `config` with, in the order in which to try them.

    One class when `architectures` names it. The bare model when `architectures` names another head,
    because that head's output is no vocabulary. Otherwise every class that the type has: masked
    before causal for encoders that have both.
    """
    language = [cls for name in _LANGUAGE_MAPPINGS for cls in _classes(name, config)]
    bare = _classes("MODEL_MAPPING", config)
    named = _architectures(config)
    for cls in language + bare:
        if cls.__name__ in named:
            return [cls]
    masked = _classes("MODEL_FOR_MASKED_LM_MAPPING", config)
    for name in named:
        head: Any = getattr(transformers, name, None)
        if inspect.isclass(head) and getattr(head, "config_class", None) is type(config):
            pretraining = _classes("MODEL_FOR_PRETRAINING_MAPPING", config)
            return [*masked, *bare[:1]] if head in pretraining else bare[:1]
    if masked and not getattr(config, "is_decoder", False):
        language = masked + [cls for cls in language if cls not in masked]
    return list(dict.fromkeys(language + bare[:1]))


def build_model(
    folder: Path,
    config: Any,
    remote: type | None,
    *,
    headers: Mapping[str, TensorHeader],
    options: Mapping[str, Any],
) -> tuple[Any, tuple[str, ...]]:
    """Load the model in `folder` with the first class that its files complete.

    Args:
        folder: the checkpoint's directory.
        config: its configuration.
        remote: the auto class of `read_config`, or None.
        headers: the headers of its files, by name.
        options: passed to `from_pretrained`.

    Returns:
        The model in eval mode, and the names of the tensors in the files that it has no place for.

    Raises:
        CorruptFileError: weights are missing, of another size or type than the model's, or
            contradict its configuration.
        ConfigError: transformers cannot build a model from the configuration.
        MemoryShortError: memory ran out.
    """
    cls: Any = remote if remote is not None else fitting_class(folder, config, headers)
    extra = {**options, **_pooler(cls, headers)}
    if remote is not None:
        extra["trust_remote_code"] = True
    model, report = _build_one(folder, config, cls, extra)
    check_complete(folder, model, report)
    check_floating(folder, model, headers)
    return model.eval(), tuple(sorted(report["unexpected_keys"]))


def fitting_class(folder: Path, config: Any, headers: Mapping[str, TensorHeader]) -> type:
    """The first class that the files complete, found by a load on the meta device.

    No value is read and nothing of a model's size is allocated, whatever the configuration says.

    Args:
        folder: the checkpoint, for messages.
        config: its configuration; not changed.
        headers: its stored tensors.

    Raises: as `build_model`.
    """
    check_counts(config.to_dict(), folder / "config.json", headers)
    first: CorruptFileError | None = None
    for cls in candidate_classes(config):
        try:
            _check_fits(folder, config, cls, headers)
        except CorruptFileError as cause:
            first = first or cause
            continue
        return cls
    raise first or LoadError(
        f"{folder} has a configuration for which transformers has no model class"
    )


def _check_fits(folder: Path, config: Any, cls: type, headers: Mapping[str, TensorHeader]) -> None:
    section = getattr(config, "quantization_config", None)
    if section is not None and section.get("quant_method") != "trilens":
        return  # only its own package knows what such names and shapes stand for
    options = {
        "state_dict": {name: StoredShape(header) for name, header in headers.items()},
        "dtype": torch.float32,
        **_pooler(cls, headers),
    }
    model, report = _build_one(folder, copy.deepcopy(config), dry_class(cls), options)
    check_complete(folder, model, report)
    check_floating(folder, model, headers)
    check_buffers(folder, model, headers)


def build_from_tensors(
    folder: Path, model_class: Any, config: Any, tensors: Mapping[str, Any], dtype: torch.dtype
) -> Any:
    """Build one class over tensors that are in memory or mapped.

    Args:
        folder: where they are from, for messages.
        model_class: the class.
        config: its configuration; a copy of it is used.
        tensors: every stored tensor by its name; not copied where dtype and layout are the model's.
        dtype: of the model.

    Raises: as `build_model`.
    """
    own = copy.deepcopy(config)
    if getattr(own, "rescale_every", 0):
        # Such a model would divide the caller's tensors in place at its first pass, and halve its
        # residual to match; without both it computes the same.
        own.rescale_every = 0
    options = {"state_dict": dict(tensors), "dtype": dtype}
    model, report = _build_one(folder, own, model_class, options)
    check_complete(folder, model, report)
    return model.eval()


def _pooler(cls: Any, headers: Mapping[str, TensorHeader]) -> dict[str, bool]:
    """A bare encoder's pooler stands after the residual stream; files without it are complete."""
    has_pooler = "add_pooling_layer" in inspect.signature(cls.__init__).parameters
    if has_pooler and not any("pooler." in name for name in headers):
        return {"add_pooling_layer": False}
    return {}


def _build_one(
    folder: Path, config: Any, cls: Any, options: Mapping[str, Any]
) -> tuple[Any, Mapping[str, Any]]:
    name = cls.__name__
    try:
        model, report = cls.from_pretrained(
            None if "state_dict" in options else folder,
            config=config,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
            # Sizes that differ then come back by name, and are refused below.
            ignore_mismatched_sizes=True,
            **options,
        )
    except TrilensError:
        raise
    except (SafetensorError, EOFError) as cause:
        raise CorruptFileError(
            f"{folder} has weights that cannot be read: {reason(cause)}"
        ) from cause
    except ImportError as cause:
        raise ConfigError(
            unreadable(folder, config, cause)
            or f"{folder} needs a package that is not installed to build {name}: {reason(cause)}"
        ) from cause
    except Exception as cause:
        if is_short_of_memory(cause):
            raise MemoryShortError(
                f"memory ran out while loading {folder}: {reason(cause)}"
            ) from cause
        raise ConfigError(
            unreadable(folder, config, cause)
            or f"{folder} cannot be built as {name} by transformers {transformers.__version__}: "
            f"{reason(cause)}"
        ) from cause
    return model, report
