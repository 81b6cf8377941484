"""The words that stand for a text on the command line."""

from __future__ import annotations

from pathlib import Path

import pytest

from trilens.cli.run.text import documents_of
from trilens.demo.corpus import checked_heldout_documents
from trilens.errors import TextError


def test_demo_is_the_text_that_the_demo_models_did_not_see() -> None:
    assert documents_of("demo") == tuple(each.text for each in checked_heldout_documents())


def test_a_file_of_that_name_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "demo").write_text("from a file")
    monkeypatch.chdir(tmp_path)
    assert documents_of("demo") == ("from a file",)


def test_other_words_are_no_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(TextError, match="no text at wikitext"):
        documents_of("wikitext")
