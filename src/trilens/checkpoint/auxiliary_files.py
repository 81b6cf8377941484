"""The small files of a ternary checkpoint: configuration, index, and what is copied."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trilens.checkpoint.coding import entries
from trilens.checkpoint.format.names import CONFIG_NAME
from trilens.checkpoint.format.quantization_config import quantization_config
from trilens.checkpoint.job import DTYPE_NAMES, Job
from trilens.io.atomic import write_bytes
from trilens.io.guarded import read_bytes
from trilens.io.json import json_bytes
from trilens.io.weight_files import INDEX_NAME, SINGLE_NAME

__all__ = ["write_side_files"]


def write_side_files(out: Path, job: Job) -> dict[str, str]:
    """Write them, and give the hash of each by its name.

    Raises:
        WriteError: no space, no permission.
    """
    content = {path.name: read_bytes(path) for path in job.source.side_files}
    index = _index(job)
    if index is not None:
        content[index[0]] = json_bytes(index[1])
    content[CONFIG_NAME] = json_bytes(_config(job))
    return {name: write_bytes(out / name, data) for name, data in content.items()}


def _index(job: Job) -> tuple[str, dict[str, Any]] | None:
    explicit = job.source.settings.get("transformers_weights")
    if [file.name for file in job.source.files] in ([SINGLE_NAME], [explicit]):
        return None
    weight_map = {}
    total = 0
    for file in job.source.files:
        for choice, header in job.of_file(file):
            for name, _, _, size_bytes in entries(choice, header, job.plan):
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
    config["quantization_config"] = quantization_config(job.plan, job.choices, job.source.headers)
    return config
