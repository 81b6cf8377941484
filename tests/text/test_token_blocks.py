from __future__ import annotations

import pytest
from transformers import AutoTokenizer

from trilens.demo import demo_path
from trilens.errors import TextError
from trilens.text.token_blocks import sample_blocks, set_aside

TOKENIZER = AutoTokenizer.from_pretrained(demo_path())


def test_every_document_has_its_share() -> None:
    documents = [f"name_{i} = " + "x + " * 200 for i in range(10)]
    found = sample_blocks(TOKENIZER, documents, length=16, tokens=80)
    assert [block.numel() for block in found] == [16] * 5
    again = sample_blocks(TOKENIZER, documents, length=16, tokens=80)
    assert [block.tolist() for block in again] == [block.tolist() for block in found]
    assert len({TOKENIZER.decode(block)[:8] for block in found}) == 5
    few = sample_blocks(TOKENIZER, documents[:2], length=16, tokens=80)
    assert sum(block.numel() for block in few) == 80


def test_documents_without_a_block_are_passed_over() -> None:
    found = sample_blocks(TOKENIZER, ["x", "y = 1 + 2 + 3"], length=8, tokens=16)
    assert len(found) >= 1
    with pytest.raises(TextError, match="no document gives a block"):
        sample_blocks(TOKENIZER, [""], length=8, tokens=16)


def test_what_is_set_aside_is_never_worked_with() -> None:
    assert set_aside(["a", "b", "c"]) == (("a", "c"), ("b",))
    assert set_aside(["1\n2\n3\n4\n"]) == (("1\n2\n",), ("3\n4\n",))
    with pytest.raises(TextError, match="held out"):
        set_aside(["one line"])
