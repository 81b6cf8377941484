"""The small files of a checkpoint: tokenizer, generation settings, chat template, licence."""

from __future__ import annotations

import re
from pathlib import Path

from trilens.errors import CorruptFileError, LoadError
from trilens.io.guarded import SIZE_LIMIT_BYTES, check_link
from trilens.io.weight_files import INDEX_NAME

__all__ = ["check_side_files", "is_tokenizer_file", "side_files"]

_CONFIG_NAME = "config.json"
_WEIGHT_SUFFIXES = (".safetensors", ".safetensors.index.json", ".bin.index.json")
_SUFFIXES = frozenset({".txt", ".model", ".tiktoken", ".jinja", ".vocab", ".bpe", ".spm", ".py"})
# Other JSON files may say of the source what is not true of the output (how well it was trained).
_NAME = re.compile(
    r"(tokenizer|special_tokens|added_tokens|vocab|merges|generation_config|chat_template"
    r"|tekken|normalizer|(\w+_)?(pre)?processor_config).*\.json|(LICENSE|NOTICE|USE_POLICY).*",
    re.IGNORECASE,
)


# Of plain text, what tokenizers read; a corpus may lie in the same folder.
_TOKENIZER_TEXT = re.compile(r"(vocab|merges|dict|tokenizer|added_tokens).*\.txt", re.IGNORECASE)


_TOKENIZER = re.compile(
    r"(tokenizer|special_tokens|added_tokens|vocab|merges|dict|chat_template|tekken)"
    r".*\.(json|txt|jinja)|.*\.(model|tiktoken|vocab|bpe|spm)",
    re.IGNORECASE,
)


def is_tokenizer_file(name: str) -> bool:
    """Whether a file of this name belongs to a tokenizer."""
    return _TOKENIZER.fullmatch(name) is not None


def side_files(folder: Path) -> tuple[Path, ...]:
    """The files beside configuration and weights that belong to a checkpoint, by name.

    Raises:
        CorruptFileError: a link that leads out of the checkpoint, or a file that is too long.
        LoadError: the folder cannot be read.
    """
    found = tuple(path for path in _entries(folder) if _belongs(path.name) and not path.is_dir())
    for path in found:
        _check(path)
    return tuple(path for path in found if path.is_file())


def check_side_files(folder: Path) -> None:
    """Refuse a checkpoint with small files that must not be opened; other programs open them too.

    Raises:
        CorruptFileError: as `side_files`, also for config.json and the index of the weights.
        LoadError: the folder cannot be read.
    """
    for path in _entries(folder):
        if _is_opened(path.name) and not path.is_dir():
            _check(path)


def _is_opened(name: str) -> bool:
    """Whether a load opens a file of this name, here or in transformers."""
    if name in {_CONFIG_NAME, INDEX_NAME}:
        return True
    text = Path(name).suffix in {".txt", ".py"}
    return _belongs(name) and (not text or _TOKENIZER_TEXT.fullmatch(name) is not None)


def _entries(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError as cause:
        raise LoadError(f"directory {folder} cannot be read: {cause.strerror or cause}") from cause


def _belongs(name: str) -> bool:
    known = Path(name).suffix in _SUFFIXES or _NAME.fullmatch(name) is not None
    return known and not name.endswith(_WEIGHT_SUFFIXES) and not name.startswith(".")


def _check(path: Path) -> None:
    check_link(path)
    if not path.exists():
        return
    if not path.is_file():
        raise CorruptFileError(f"{path} cannot be read: it is no regular file")
    size_bytes = path.stat().st_size
    if size_bytes > SIZE_LIMIT_BYTES:
        raise CorruptFileError(
            f"{path} is too long: at most {SIZE_LIMIT_BYTES} bytes are read, it has {size_bytes}"
        )
