"""The small files of a ternary checkpoint: configuration, index, and what is copied."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from trilens.checkpoint.coding import Entry, entries
from trilens.checkpoint.format.model_card import Origin
from trilens.checkpoint.format.names import CONFIG_NAME, SOURCE_CARD_NAME
from trilens.checkpoint.format.quantization_config import quantization_config
from trilens.checkpoint.format.source_card import inherited_metadata
from trilens.checkpoint.job import DTYPE_NAMES, Job
from trilens.io.atomic import write_bytes
from trilens.io.guarded import read_bytes
from trilens.io.json import json_bytes
from trilens.io.weight_files import GUARD_NAME, INDEX_NAME, SINGLE_NAME
from trilens.models.auto_classes import is_built_for

__all__ = ["origin_of", "weight_index", "write_side_files"]


def write_side_files(out: Path, job: Job) -> dict[str, str]:
    """Write them, and give the hash of each by its name.

    Raises:
        WriteError: no space, no permission.
    """
    content = job.source.copied
    for path in job.source.cards:
        content[SOURCE_CARD_NAME] = read_bytes(path)
    stored = [(h.file, entry) for c, h in job.pairs for entry in entries(c, h, job.plan)]
    explicit = job.source.settings.get("transformers_weights")
    index = weight_index(job.source.files, explicit, stored)
    if index is not None:
        content[index[0]] = json_bytes(index[1])
    content[CONFIG_NAME] = json_bytes(_config(job))
    return {name: write_bytes(out / name, data) for name, data in content.items()}


def origin_of(job: Job) -> Origin:
    """What the model card says of the source."""
    name = job.source.name
    hub_id = None if Path(name) == job.source.folder else name
    texts = [read_bytes(path).decode(errors="replace") for path in job.source.cards]
    return Origin(
        hub_id or job.source.folder.resolve().name,
        hub_id,
        metadata=inherited_metadata("".join(texts)),
        has_card=bool(texts),
        is_causal=is_built_for("causal", job.model),
    )


def weight_index(
    files: Sequence[Path], explicit: str | None, stored: Iterable[tuple[Path, Entry]]
) -> tuple[str, dict[str, Any]] | None:
    """Name and content of the index of several weight files; None for a single one.

    Args:
        files: the weight files.
        explicit: what config.json calls the index or the single file, where it does.
        stored: the tensors of the output, each with the file that it is in.
    """
    if [file.name for file in files] == [explicit or SINGLE_NAME]:
        return None
    weight_map, total = {}, 0
    for file, (name, _, _, size_bytes) in stored:
        weight_map[name] = file.name
        total += size_bytes
    return explicit or INDEX_NAME, {"metadata": {"total_size": total}, "weight_map": weight_map}


def _config(job: Job) -> dict[str, Any]:
    config = dict(job.source.settings)
    if not config.get("dtype") and not config.get("torch_dtype"):
        # Without it transformers takes the first floating-point tensor's: a scale's.
        sizes: dict[str, int] = {}
        for header in job.source.headers.values():
            if header.dtype in DTYPE_NAMES:
                sizes[header.dtype] = sizes.get(header.dtype, 0) + header.size_bytes
        config["dtype"] = DTYPE_NAMES[max(sizes, key=lambda dtype: sizes[dtype])]
    section = quantization_config(job.plan, job.choices, job.source.headers)
    if explicit := job.source.settings.get("transformers_weights"):
        section["weights"] = explicit
    config["quantization_config"] = section
    config["transformers_weights"] = GUARD_NAME
    return config
