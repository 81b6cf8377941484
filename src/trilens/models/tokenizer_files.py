"""A tokenizer from files of its own, for a model that came without one."""

from __future__ import annotations

import os
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from transformers import PreTrainedTokenizerFast

from trilens.errors import CorruptFileError, ModelNotFoundError, UsageError
from trilens.io.messages import reason
from trilens.models.loading import load_tokenizer
from trilens.models.world_tokenizer import world_tokenizer

__all__ = ["read_tokenizer", "tokenizer_files"]


def read_tokenizer(path: str | os.PathLike[str]) -> Any:
    """The tokenizer of a directory, a tokenizer.json, or RWKV's vocabulary file (.txt).

    Raises:
        ModelNotFoundError: nothing is there, or a directory without a tokenizer.
        UsageError: a file of another kind.
        CorruptFileError, ConfigError: it can't be read, or needs code or packages.
    """
    place = Path(path)
    if place.is_dir():
        tokenizer = load_tokenizer(place, trusted=False)
        if tokenizer is None:
            raise ModelNotFoundError(
                f"directory {place} holds no tokenizer: give one with its files"
            )
        return tokenizer
    if not place.is_file():
        raise ModelNotFoundError(
            f"tokenizer {place} does not exist: give a directory, a tokenizer.json or RWKV's "
            "vocabulary file"
        )
    if place.suffix == ".txt":
        return world_tokenizer(place)
    if place.suffix != ".json":
        raise UsageError(
            f"tokenizer {place} is a file of another kind: give a directory, a tokenizer.json or "
            "RWKV's vocabulary file (.txt)"
        )
    try:
        return PreTrainedTokenizerFast(tokenizer_file=str(place))
    # The reader of another library raises plain exceptions.
    except Exception as cause:
        raise CorruptFileError(f"{place} is no tokenizer.json: {reason(cause)}") from cause


def tokenizer_files(tokenizer: Any) -> dict[str, bytes]:
    """The files that a tokenizer saves, by name.

    Raises:
        UsageError: an object that saves none.
    """
    save = getattr(tokenizer, "save_pretrained", None)
    if not callable(save):
        raise UsageError(
            f"tokenizer is {type(tokenizer).__name__}, which has no save_pretrained: pass one of "
            "transformers, or what read_tokenizer gives"
        )
    with TemporaryDirectory(prefix="trilens-tokenizer-") as folder:
        save(folder)
        return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}
