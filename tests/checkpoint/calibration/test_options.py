"""The calibration text: what is drawn, what is kept apart, what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from trilens.checkpoint.calibration.options import Calibration, draw
from trilens.checkpoint.calibration.streams import batches_of, pieces_of
from trilens.demo import demo_path
from trilens.errors import NoTokenizerError, TextError, UsageError, ValueRangeError


@pytest.fixture(scope="module")
def tokenizer() -> object:
    return AutoTokenizer.from_pretrained(demo_path("transformer"))


def document(number: int, words: int = 300) -> str:
    return " ".join(f"word{number}x{i} = {i * number}" for i in range(words)) + "\n"


DOCUMENTS = tuple(document(i) for i in range(20))


def test_the_seed_decides_and_the_budget_holds(tokenizer: object) -> None:
    first, again, other = (
        draw(Calibration(DOCUMENTS, tokens=1000, length=64, seed=seed), tokenizer, longest=512)
        for seed in (3, 3, 4)
    )
    assert first.n_tokens <= 1000
    assert first.n_tokens >= 1000 - 64
    assert all(map(torch.equal, first.blocks, again.blocks))
    assert not all(map(torch.equal, first.blocks, other.blocks))
    assert {len(block) for block in first.blocks[:-1]} == {64}


def test_pieces_are_the_same_text() -> None:
    whole = batches_of([torch.arange(8) + 8 * i for i in range(5)] + [torch.arange(3)], 4)
    for tokens in (1, 8, 16, 20, 10**6):
        pieces = pieces_of(whole, tokens)
        assert [p.start for p in pieces] == [0] + [p.stop for p in pieces[:-1]]
        assert torch.equal(
            torch.cat([p.ids.flatten() for p in pieces]),
            torch.cat([b.ids.flatten() for b in whole]),
        )
        assert all(p.ids.numel() <= max(8, tokens) for p in pieces)


def test_the_model_limits_the_length(tokenizer: object) -> None:
    drawn = draw(Calibration(DOCUMENTS, tokens=1000), tokenizer, longest=32)
    assert max(map(len, drawn.blocks)) == 32


def test_documents_of_the_evaluation_are_refused(tokenizer: object) -> None:
    """Also where white space differs; and what is set apart by itself is not calibrated on."""
    spaced = DOCUMENTS[4].replace(" ", "  ")
    options = Calibration(DOCUMENTS, (spaced, DOCUMENTS[7]), tokens=10**6)
    drawn = draw(options, tokenizer, longest=512)
    assert drawn.refused == 2
    text = tokenizer.decode(torch.cat(drawn.blocks))  # type: ignore[attr-defined]
    assert "word3x" in text and "word4x" not in text and "word7x" not in text
    drawn = draw(Calibration(DOCUMENTS, tokens=10**6), tokenizer, longest=512)
    seen = tokenizer.decode(torch.cat(drawn.blocks))  # type: ignore[attr-defined]
    apart = tokenizer.decode(torch.cat(drawn.evaluation))  # type: ignore[attr-defined]
    numbers = [i for i in range(20) if f"word{i}x0 " in apart]
    assert len(numbers) == 2
    assert not any(f"word{i}x" in seen for i in numbers)
    with pytest.raises(TextError, match="all 20 calibration documents"):
        draw(Calibration(DOCUMENTS, DOCUMENTS), tokenizer, longest=512)


def test_one_document_is_cut(tokenizer: object) -> None:
    for text in (document(1, 3000), "\n".join(document(1, 3000).split(" = "))):
        drawn = draw(Calibration((text,), tokens=10**6), tokenizer, longest=512)
        assert len(drawn.evaluation) >= 1 and drawn.n_tokens > 5000


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("too short", "too short: "),
        ("a a a a a a a a " * 500, "different tokens"),
        ("\n" + " " * 4000 + "x", "too short|different tokens"),
    ],
)
def test_bad_text(text: str, problem: str, tokenizer: object) -> None:
    with pytest.raises(TextError, match=problem):
        draw(Calibration((text,), (document(1),)), tokenizer, longest=512)


def test_bad_options() -> None:
    with pytest.raises(TextError, match="empty"):
        Calibration(())
    with pytest.raises(TextError, match="empty"):
        Calibration(("  \n",))
    with pytest.raises(UsageError, match="list of strings"):
        Calibration("text")  # type: ignore[arg-type]
    for option in ({"tokens": 10}, {"length": 1}, {"seed": -1}, {"batch_size": 0}, {"tokens": 1e6}):
        with pytest.raises(ValueRangeError, match=next(iter(option))):
            Calibration(DOCUMENTS, **option)  # type: ignore[arg-type]
    for bound in (0, -1.0, float("nan")):
        with pytest.raises(ValueRangeError, match="max_perplexity_ratio"):
            Calibration(DOCUMENTS, max_perplexity_ratio=bound)
    with pytest.raises(NoTokenizerError):
        draw(Calibration(DOCUMENTS), None, longest=512)


def test_from_files(tmp_path: Path) -> None:
    lines = [json.dumps({"text": text}) for text in DOCUMENTS]
    (tmp_path / "texts.jsonl").write_text("\n".join(lines))
    (tmp_path / "apart.txt").write_text(DOCUMENTS[0])
    found = Calibration.from_source(
        tmp_path / "texts.jsonl", evaluation=tmp_path / "apart.txt", tokens=512
    )
    assert found.documents == DOCUMENTS
    assert found.evaluation == (DOCUMENTS[0],)
    other = Calibration(DOCUMENTS, (DOCUMENTS[0],), tokens=512, max_perplexity_ratio=2.0)
    assert found.to_dict() == other.to_dict()  # the bound does not change the result
    assert found.to_dict() != Calibration(DOCUMENTS[1:], tokens=512).to_dict()
    with pytest.raises(TextError, match="no text at"):
        Calibration.from_source(tmp_path / "missing")
