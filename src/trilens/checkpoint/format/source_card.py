"""What a source's own model card says of it that is true of the ternary copy too."""

from __future__ import annotations

from typing import Any

from huggingface_hub import RepoCard
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from yaml import YAMLError  # type: ignore[import-untyped]

from trilens.printable import one_line

__all__ = ["inherited_metadata"]

_INHERITED = ("license", "license_name", "license_link", "language", "base_model")
_LONGEST = 200


def inherited_metadata(card: str) -> dict[str, str | list[str]]:
    """Licence, language and base model of the source, as its README.md states them at the top.

    A card whose header cannot be read gives nothing: it is copied as it is all the same.

    Args:
        card: the text of the source's README.md, which may be empty.
    """
    if not REGEX_YAML_BLOCK.search(card):
        return {}
    try:
        data: Any = RepoCard(card, ignore_metadata_errors=True).data
        stated = data.to_dict()
    except (ValueError, TypeError, YAMLError):
        return {}
    return {key: stated[key] for key in _INHERITED if _is_text(stated.get(key))}


def _is_text(value: Any) -> bool:
    if isinstance(value, list):
        return 0 < len(value) <= _LONGEST and all(
            isinstance(each, str) and _is_text(each) for each in value
        )
    return isinstance(value, str) and 0 < len(value) <= _LONGEST and one_line(value) == value
