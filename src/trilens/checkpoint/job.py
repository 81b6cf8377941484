"""`Job`: a source that was read, and what is to become of it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trilens.checkpoint.format.names import CARD_NAME, CONFIG_NAME, JOURNAL_NAME, MANIFEST_NAME
from trilens.checkpoint.format.plan import TernaryPlan
from trilens.checkpoint.format.skeleton import Choice
from trilens.io.safetensors_header import TensorHeader

__all__ = ["Job", "side_files"]

_WEIGHT_SUFFIXES = (".safetensors", ".safetensors.index.json", ".bin.index.json")
_SIDE_SUFFIXES = frozenset(
    {".txt", ".model", ".tiktoken", ".jinja", ".vocab", ".bpe", ".spm", ".py"}
)
# Other JSON files may say of the source what is not true of the output (how well it was trained).
_SIDE_FILE = re.compile(
    r"(tokenizer|special_tokens|added_tokens|vocab|merges|generation_config|chat_template"
    r"|tekken|normalizer|(\w+_)?(pre)?processor_config).*\.json|(LICENSE|NOTICE|USE_POLICY).*",
    re.IGNORECASE,
)
_NOT_COPIED = frozenset({CONFIG_NAME, CARD_NAME, MANIFEST_NAME, JOURNAL_NAME})


@dataclass(frozen=True, slots=True)
class Job:
    """A source that was read, and what is to become of it."""

    folder: Path
    config: dict[str, Any]
    files: tuple[Path, ...]
    headers: dict[str, TensorHeader]
    choices: tuple[Choice, ...]
    plan: TernaryPlan
    side_files: tuple[Path, ...]
    model_config: Any
    model_class: type

    def of_file(self, file: Path) -> list[tuple[Choice, TensorHeader]]:
        """The tensors of one source file, in the order of their bytes."""
        return [
            (c, self.headers[c.name]) for c in self.choices if self.headers[c.name].file == file
        ]


def side_files(folder: Path) -> tuple[Path, ...]:
    """Tokenizer, generation settings, licence: small files that belong to the checkpoint."""
    return tuple(
        path
        for path in sorted(folder.iterdir())
        if path.is_file()
        and (path.suffix in _SIDE_SUFFIXES or _SIDE_FILE.fullmatch(path.name))
        and not path.name.endswith(_WEIGHT_SUFFIXES)
        and not path.name.startswith(".")
        and path.name not in _NOT_COPIED
    )
