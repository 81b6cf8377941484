"""Which files of a directory are a checkpoint's weights, and all their headers."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from trilens.errors import ConfigError, CorruptFileError, LoadError, UnsafeFormatError
from trilens.io.guarded import check_link
from trilens.io.json import read_json
from trilens.io.messages import clip, listed
from trilens.io.safetensors_header import TensorHeader, read_header

__all__ = [
    "GUARD_NAME",
    "INDEX_NAME",
    "SINGLE_NAME",
    "WeightListing",
    "explicit_name",
    "gguf_way",
    "list_weights",
    "listed_headers",
    "read_headers",
    "read_weights",
    "refusal",
    "shard_names",
    "weight_files",
]

SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"

GUARD_NAME = "import-trilens-first.safetensors"
"""What config.json of a ternary checkpoint calls its weights.

There is no such file: a transformers that does not know the format stops there, with this name in
its error, where it would otherwise make up the weights and warn. With trilens it reads the files
by their usual names.
"""

_PICKLE_SUFFIXES = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"})
_DISTRIBUTED_SHARD = re.compile(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors")


# A longer name is an error of the system, not a file that is missing.
_NAME_BYTES = 255


def shard_names(index: Path) -> tuple[str, ...]:
    """Read the shard file names of an index, each once, in order of first mention.

    Raises:
        CorruptFileError: the index cannot be read, has no `weight_map` or a key twice, names a file
            outside its own directory, or files that differ only by case.
    """
    return tuple(dict.fromkeys(_weight_map(index).values()))


def _weight_map(index: Path) -> dict[str, str]:
    """Tensor names → shard file names."""
    weight_map = read_json(index, CorruptFileError, unique_keys=True).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CorruptFileError(f"{index} has no weight_map from tensor names to shard files")
    for name in weight_map.values():
        _check_file_name(index, name)
    names = set(weight_map.values())
    if len({name.casefold() for name in names}) < len(names):
        raise CorruptFileError(
            f"{index} names weight files that differ only by case: many file systems hold one of "
            "them; rename them"
        )
    return weight_map


def _check_file_name(source: Path, name: Any) -> None:
    plain = isinstance(name, str) and name.isprintable() and not set(name) & set("/\\:")
    if not plain or ".." in name or not name.endswith(".safetensors"):
        raise CorruptFileError(
            f"{source} names the weight file {clip(name)}: only plain *.safetensors names in its "
            "own directory are allowed"
        )


def weight_files(folder: Path) -> tuple[Path, ...]:
    """Find the safetensors files of a checkpoint: one file, or the shards of an index.

    Raises:
        UnsafeFormatError: only pickled weights are there. They are never opened.
        CorruptFileError: the index is malformed or names shards that are missing, or a file is a
            link that leads out of the checkpoint.
        LoadError: there are no weights, or only ones that trilens does not read.
    """
    return list_weights(folder).files


class WeightListing(NamedTuple):
    """The weight files of a checkpoint, what names them, and the tensors that an index lists."""

    files: tuple[Path, ...]
    source: Path
    named: Mapping[str, str]


def list_weights(folder: Path) -> WeightListing:
    """The weight files, before any is opened.

    Raises:
        LoadError: as `weight_files`.
    """
    names = _names_in(folder)
    sharded = [name for name in names if _DISTRIBUTED_SHARD.fullmatch(name)]
    if sharded:
        raise LoadError(
            f"{folder} holds a distributed checkpoint ({sharded[0]}): consolidate it first, "
            f"so that it holds {SINGLE_NAME} or {INDEX_NAME}"
        )
    explicit = explicit_name(folder)
    if explicit is not None and explicit.endswith(".safetensors"):
        config = folder / "config.json"
        return WeightListing(_existing(folder, [explicit], config), config, {})
    if explicit is None and (folder / SINGLE_NAME).is_file():
        single = folder / SINGLE_NAME
        return WeightListing(_existing(folder, [SINGLE_NAME], single), single, {})
    index = folder / (explicit or INDEX_NAME)
    if index.is_file():
        named = _weight_map(index)
        files = _existing(folder, list(dict.fromkeys(named.values())), index)
        return WeightListing(files, index, named)
    if explicit is not None:
        raise CorruptFileError(f"{index} is missing: config.json names it as the weights")
    raise refusal(str(folder), names)


def _names_in(folder: Path) -> list[str]:
    try:
        return sorted(path.name for path in folder.iterdir())
    except OSError as cause:
        raise LoadError(f"directory {folder} cannot be read: {cause.strerror or cause}") from cause


def explicit_name(folder: Path) -> str | None:
    """`transformers_weights` of config.json: the one way to call the weights by another name.

    Raises:
        LoadError: config.json is broken, or the name is not a plain one of a safetensors file or
        index.
    """
    config = folder / "config.json"
    if not config.is_file():
        return None
    check_link(config)
    settings = read_json(config, ConfigError, non_finite=True)
    name = settings.get("transformers_weights")
    if name == GUARD_NAME:
        section = settings.get("quantization_config")
        name = section.get("weights") if isinstance(section, dict) else None
    if name is None:
        return None
    stem = name.removesuffix(".index.json") if isinstance(name, str) else name
    _check_file_name(config, stem)
    return str(name)


def _existing(folder: Path, names: list[str], source: Path) -> tuple[Path, ...]:
    missing = [
        name
        for name in names
        if len(name.encode("utf-8", "replace")) > _NAME_BYTES or not (folder / name).is_file()
    ]
    if missing:
        raise CorruptFileError(
            f"{folder} lacks {len(missing)} of {len(names)} weight files named by {source.name}: "
            f"{listed(missing)}"
        )
    for name in names:
        check_link(folder / name)
    return tuple(folder / name for name in names)


def gguf_way(folder: str, name: str) -> str:
    """How a GGUF file comes into a lens: transformers unpacks it."""
    return (
        "a GGUF file is not opened here; to capture it, "
        f"Lens.from_pretrained({folder!r}, gguf_file={name!r}), which lets transformers unpack it"
    )


def refusal(source: str, names: list[str]) -> LoadError:
    """The error for a place whose files `names` hold no weights that trilens reads."""
    pickled = sorted(n for n in names if Path(n).suffix.lower() in _PICKLE_SUFFIXES)
    if pickled:
        return UnsafeFormatError(
            f"{source} has only pickled weights ({pickled[0]}), which can run code when opened: "
            "convert it with safetensors (safetensors.torch.save_file, or save_pretrained)"
        )
    other = sorted(
        n for n in names if n.endswith((".safetensors", ".gguf", ".h5", ".msgpack", ".onnx"))
    )
    found = f"; it has {other[0]}, which is not a transformers checkpoint's file" if other else ""
    if other and other[0].endswith(".gguf"):
        found = f"; it has {other[0]}: {gguf_way('FOLDER', other[0])}"
    return LoadError(f"{source} has no weights: {SINGLE_NAME} or {INDEX_NAME} is needed{found}")


def read_headers(folder: Path) -> dict[str, TensorHeader]:
    """Read the headers of all weight files of the checkpoint in `folder`.

    Raises:
        LoadError: as `read_weights`.
    """
    return read_weights(folder)[1]


def read_weights(folder: Path) -> tuple[tuple[Path, ...], dict[str, TensorHeader]]:
    """Find the weight files of the checkpoint in `folder`, and read all their headers.

    Raises:
        LoadError: as `weight_files` and `read_header`; also when an index names a tensor that no
            shard holds.
    """
    listing = list_weights(folder)
    return listing.files, listed_headers(folder, listing)


def listed_headers(folder: Path, listing: WeightListing) -> dict[str, TensorHeader]:
    """Read the headers of weight files that were listed.

    Raises:
        LoadError: as `read_weights`.
    """
    files, source, named = listing
    found: dict[str, TensorHeader] = {}
    for file in files:
        tensors = read_header(file)
        twice = next((name for name in tensors if name in found), None)
        if twice is not None:
            raise CorruptFileError(
                f"{folder} holds tensor {clip(twice)} twice, in {found[twice].file.name} and "
                f"{file.name}: remove one of the files"
            )
        found.update(tensors)
    lost = [name for name in named if name not in found]
    if lost:
        raise CorruptFileError(
            f"{source} names {len(lost)} tensors that no shard holds: {listed(lost)}"
        )
    return found
