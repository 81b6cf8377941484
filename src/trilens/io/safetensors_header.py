"""What a checkpoint's safetensors files hold, read from their headers alone.

A safetensors file is 8 bytes (length of the header, little-endian), the header (JSON: name → dtype,
shape, offsets) and the tensors' bytes, without gaps. Everything a loader must know before it opens
a file is in the header, so a truncated or malformed checkpoint is refused here, by name, before a
model is built and before memory is taken.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from trilens.errors import ConfigError, CorruptFileError, LoadError, UnsafeFormatError
from trilens.io.messages import clip, reason

__all__ = [
    "INDEX_NAME",
    "SINGLE_NAME",
    "TensorHeader",
    "estimate",
    "explicit_name",
    "memory_bytes",
    "read_header",
    "read_headers",
    "read_json",
    "refusal",
    "shard_names",
    "weight_files",
]

SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"

# The format's own limit; a larger number is a damaged length, not a header.
_HEADER_LIMIT_BYTES = 100_000_000
# torch's own limit; it also keeps the product of the sizes a number that can be written down.
_RANK_LIMIT = 64

_DTYPE_BITS: dict[str, int] = {
    "BOOL": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "C64": 64,
    "F64": 64,
    "I64": 64,
    "U64": 64,
}
# What transformers casts to the model's dtype; integers, booleans and packed weights stay as they
# are stored.
_CAST_DTYPES = frozenset({"F16", "BF16", "F32", "F64"})

_PICKLE_SUFFIXES = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"})
_DISTRIBUTED_SHARD = re.compile(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors")


@dataclass(frozen=True, slots=True)
class TensorHeader:
    """One tensor as its file's header describes it.

    `dtype` is the format's own name ("BF16"), `begin` and `end` count bytes of `file` from its
    start.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    begin: int
    end: int

    @property
    def size_bytes(self) -> int:
        """Bytes that the tensor takes in its file."""
        return self.end - self.begin


def read_json(path: Path, error: type[LoadError], *, unique_keys: bool = False) -> dict[str, Any]:
    """Read a JSON object from `path`.

    Args:
        path: the file.
        error: the class to raise: `ConfigError` for settings, `CorruptFileError` for files about
            weights.
        unique_keys: refuse a key that is there twice, of which JSON readers take either.

    Raises:
        LoadError: of the class `error`, when the file cannot be read, is not UTF-8 JSON or is not
            an object.
    """
    try:
        text = path.read_text(encoding="utf-8")
        found = json.loads(
            text, object_pairs_hook=_once(f"{path} is malformed", error) if unique_keys else None
        )
    except OSError as cause:
        raise error(f"{path} cannot be read: {cause.strerror or cause}") from cause
    except UnicodeDecodeError as cause:
        raise error(f"{path} is not UTF-8 text: bad byte at position {cause.start}") from cause
    except json.JSONDecodeError as cause:
        raise error(
            f"{path} is not valid JSON: {cause.msg} at line {cause.lineno}, column {cause.colno}; "
            "fetch or write it again"
        ) from cause
    except (RecursionError, ValueError) as cause:
        raise error(
            f"{path} is not JSON that can be read: nested too deep or a number too long"
        ) from cause
    if not isinstance(found, dict):
        raise error(f"{path} holds a JSON {type(found).__name__}: an object is needed")
    return found


def _once(what: str, error: type[LoadError]) -> Callable[[list[tuple[str, Any]]], dict[str, Any]]:
    def pairs_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            counts = Counter(name for name, _ in pairs)
            raise error(f"{what}: {clip(counts.most_common(1)[0][0])} is there twice")
        return found

    return pairs_once


def read_header(file: Path) -> dict[str, TensorHeader]:
    """Read and check one safetensors file's header; no tensor byte is read.

    Returns:
        The file's tensors, by name, in the order of their bytes.

    Raises:
        CorruptFileError: the file is missing, truncated or too long, its header is not valid, or a
            tensor's dtype, shape and offsets contradict each other.
    """
    try:
        size_bytes = file.stat().st_size
        with file.open("rb") as stream:
            prefix = stream.read(8)
            if len(prefix) < 8:
                raise CorruptFileError(
                    f"{file} is truncated: expected at least 8 bytes, the file has {size_bytes}"
                )
            length = int.from_bytes(prefix, "little")
            if length > _HEADER_LIMIT_BYTES:
                raise CorruptFileError(
                    f"{file} is not a safetensors file: its header would take {length} bytes, "
                    f"allowed are 2–{_HEADER_LIMIT_BYTES}"
                )
            if 8 + length > size_bytes:
                raise CorruptFileError(
                    f"{file} is truncated: the header needs {8 + length} bytes, the file has "
                    f"{size_bytes}"
                )
            text = stream.read(length)
    except OSError as cause:
        raise CorruptFileError(f"{file} cannot be read: {cause.strerror or cause}") from cause
    tensors = sorted(_parse_header(file, text, start=8 + length), key=lambda t: (t.begin, t.end))
    _check_layout(file, tensors, start=8 + length, size_bytes=size_bytes)
    return {tensor.name: tensor for tensor in tensors}


def _parse_header(file: Path, text: bytes, *, start: int) -> Iterator[TensorHeader]:
    try:
        header = json.loads(
            text.decode("utf-8"),
            object_pairs_hook=_once(f"{file} has a malformed header", CorruptFileError),
        )
    except (ValueError, RecursionError) as cause:
        raise CorruptFileError(
            f"{file} has a malformed header: not valid JSON ({reason(cause)})"
        ) from cause
    if not isinstance(header, dict):
        raise CorruptFileError(f"{file} has a malformed header: no JSON object")
    for name, entry in header.items():
        if name == "__metadata__":
            if not isinstance(entry, dict) or not all(isinstance(v, str) for v in entry.values()):
                raise CorruptFileError(
                    f"{file} has a malformed header: __metadata__ is not text to text"
                )
            continue
        yield _parse_entry(file, name, entry, start=start)


def _parse_entry(file: Path, name: str, entry: Any, *, start: int) -> TensorHeader:
    where = f"{file} has a malformed header: tensor {clip(name)}"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise CorruptFileError(f"{where} needs exactly dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _DTYPE_BITS:
        raise CorruptFileError(
            f"{where} has dtype {clip(dtype)}; known are {', '.join(_DTYPE_BITS)}"
        )
    if not _is_sizes(shape) or len(shape) > _RANK_LIMIT:
        raise CorruptFileError(
            f"{where} has shape {clip(shape)}: a list of at most {_RANK_LIMIT} sizes is needed"
        )
    if not _is_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CorruptFileError(
            f"{where} has data_offsets {clip(offsets)}, not [begin, end] with begin ≤ end"
        )
    needed_bits = math.prod(shape) * _DTYPE_BITS[dtype]
    if needed_bits != 8 * (offsets[1] - offsets[0]):
        raise CorruptFileError(
            f"{where} of shape {clip(shape)} and dtype {dtype} needs {clip(-(-needed_bits // 8))} "
            f"bytes, its data_offsets span {offsets[1] - offsets[0]}"
        )
    return TensorHeader(name, dtype, tuple(shape), file, start + offsets[0], start + offsets[1])


def _is_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 2**63 for n in value)


def _check_layout(file: Path, tensors: list[TensorHeader], *, start: int, size_bytes: int) -> None:
    end = start
    for tensor in tensors:
        if tensor.begin != end:
            problem = (
                "overlaps the tensor before it" if tensor.begin < end else "leaves a gap before it"
            )
            raise CorruptFileError(
                f"{file} has a malformed header: tensor {clip(tensor.name)} {problem} "
                f"(begins at byte {tensor.begin}, expected {end})"
            )
        end = tensor.end
    if end != size_bytes:
        problem = "is truncated" if size_bytes < end else "has bytes that no tensor owns"
        raise CorruptFileError(
            f"{file} {problem}: expected {end} bytes, the file has {size_bytes}; fetch it again"
        )


def shard_names(index: Path) -> tuple[str, ...]:
    """Read the shard file names of an index, each once, in order of first mention.

    Raises:
        CorruptFileError: the index cannot be read, has no `weight_map` or a key twice, names a file
            outside its own directory, or files that differ only by case.
    """
    weight_map = read_json(index, CorruptFileError, unique_keys=True).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CorruptFileError(f"{index} has no weight_map from tensor names to shard files")
    for name in weight_map.values():
        _check_file_name(index, name)
    names = tuple(dict.fromkeys(weight_map.values()))
    if len({name.casefold() for name in names}) < len(names):
        raise CorruptFileError(
            f"{index} names weight files that differ only by case: many file systems hold one of "
            "them; rename them"
        )
    return names


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
    names = _names_in(folder)
    sharded = [name for name in names if _DISTRIBUTED_SHARD.fullmatch(name)]
    if sharded:
        raise LoadError(
            f"{folder} holds a distributed checkpoint ({sharded[0]}): consolidate it first, "
            f"so that it holds {SINGLE_NAME} or {INDEX_NAME}"
        )
    explicit = explicit_name(folder)
    if explicit is not None and explicit.endswith(".safetensors"):
        return _existing(folder, (explicit,), folder / "config.json")
    if explicit is None and (folder / SINGLE_NAME).is_file():
        return _existing(folder, (SINGLE_NAME,), folder / SINGLE_NAME)
    index = folder / (explicit or INDEX_NAME)
    if index.is_file():
        return _existing(folder, shard_names(index), index)
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
    name = read_json(config, ConfigError).get("transformers_weights")
    if name is None:
        return None
    stem = name.removesuffix(".index.json") if isinstance(name, str) else name
    _check_file_name(config, stem)
    return str(name)


def _existing(folder: Path, names: tuple[str, ...], source: Path) -> tuple[Path, ...]:
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise CorruptFileError(
            f"{folder} lacks {len(missing)} of {len(names)} weight files named by {source.name}: "
            f"{', '.join(missing[:4])}{' …' if len(missing) > 4 else ''}"
        )
    for name in names:
        _check_link(folder, name)
    return tuple(folder / name for name in names)


def _check_link(folder: Path, name: str) -> None:
    """Refuse a link out of the checkpoint; the hub's cache links snapshots to its own blobs."""
    if not (folder / name).is_symlink():
        return
    target, home = (folder / name).resolve(), folder.resolve()
    homes = [home, home.parent.parent / "blobs"] if home.parent.name == "snapshots" else [home]
    if not any(target.is_relative_to(place) for place in homes):
        raise CorruptFileError(
            f"{folder / name} is a link that leads out of the checkpoint, to {target}: "
            "put the file itself there, or give the directory that holds it"
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
    return LoadError(f"{source} has no weights: {SINGLE_NAME} or {INDEX_NAME} is needed{found}")


def read_headers(folder: Path) -> dict[str, TensorHeader]:
    """Read the headers of all weight files of the checkpoint in `folder`.

    Raises:
        LoadError: as `weight_files` and `read_header`; also when an index names a tensor that no
            shard holds.
    """
    files = weight_files(folder)
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
    index = folder / (explicit_name(folder) or INDEX_NAME)
    if index.name.endswith(".index.json") and files[0].name != SINGLE_NAME:
        named = read_json(index, CorruptFileError)["weight_map"]
        lost = [name for name in named if name not in found]
        if lost:
            raise CorruptFileError(
                f"{index} names {len(lost)} tensors that no shard holds: {', '.join(lost[:3])}"
            )
    return found


def estimate(folder: str | Path, dtype: str | torch.dtype = "auto") -> int:
    """Bytes that the weights of the checkpoint in `folder` take in memory as `dtype`.

    Args:
        folder: directory of the checkpoint.
        dtype: "auto", a torch dtype or its name; see `memory_bytes`.

    Raises:
        LoadError: as `read_headers`.
    """
    folder = Path(folder)
    return memory_bytes(read_headers(folder), folder, dtype)


def memory_bytes(
    headers: Mapping[str, TensorHeader], folder: Path, dtype: str | torch.dtype = "auto"
) -> int:
    """Bytes that the tensors of `headers` take in memory as `dtype`.

    Floating-point tensors count at the target dtype, everything else as it is stored. "auto" is the
    dtype that config.json in `folder` names, or, without one, the dtype of the files.
    """
    target = _target_bytes(folder, dtype)
    if target is None:
        return sum(tensor.size_bytes for tensor in headers.values())
    return sum(
        math.prod(tensor.shape) * target if tensor.dtype in _CAST_DTYPES else tensor.size_bytes
        for tensor in headers.values()
    )


def _target_bytes(folder: Path, dtype: str | torch.dtype) -> int | None:
    if dtype == "auto":
        config_file = folder / "config.json"
        config = read_json(config_file, ConfigError) if config_file.is_file() else {}
        dtype = config.get("dtype") or config.get("torch_dtype") or ""
    if isinstance(dtype, str):
        found = getattr(torch, dtype.removeprefix("torch."), None) if dtype else None
        return found.itemsize if isinstance(found, torch.dtype) else None
    return dtype.itemsize if isinstance(dtype, torch.dtype) else None
