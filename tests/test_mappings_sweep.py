"""A quick subset of the second sweep; `make sweep` runs every type of the mappings."""

from __future__ import annotations

import pytest

from tinymodels.mappings import MAPPINGS, build_as
from tinymodels.stack_checks import sweep_as
from trilens.lens.lens import Lens
from trilens.models.mappings import MappingTable, load_mappings

pytestmark = pytest.mark.usefixtures("quiet")

# One of each mechanism: relative bias, learned positions, experts, two configs, a model put
# together of two, features of sound either way, samples, encoders of text.
FULL = (
    ("seq2seq", "mt5"),
    ("seq2seq", "bart"),
    ("seq2seq", "nllb-moe"),
    ("seq2seq", "t5gemma"),
    ("seq2seq", "encoder-decoder"),
    ("seq2seq", "m2m_100"),
    ("seq2seq", "mvp"),
    ("speech", "whisper"),
    ("speech", "moonshine"),
    ("speech", "speech_to_text"),
    ("speech", "speech-encoder-decoder"),
    ("masked", "modernbert"),
    ("masked", "roberta"),
    ("masked", "layoutlm"),
    ("image", "llava"),
    ("image", "glm4v"),
    ("image", "mistral3"),
    ("image", "blip"),  # text that runs with an image alone, and attends to it
    ("image", "lfm2_vl"),  # a tower that is given patches, their mask and the image's shape
    ("masked", "deberta-v2"),
    ("masked", "ibert"),
)
PARTIAL = (
    ("seq2seq", "t5gemma2", "in one softmax"),
    ("speech", "seamless_m4t", "number of positions changes"),
    ("speech", "dia", "does not run on a plain prompt"),
    ("image", "mllama", "no made-up input"),
    ("seq2seq", "led", "run over 512 positions"),
)
REFUSED = (
    ("masked", "big_bird", "rebuilds its own modules"),
    ("masked", "reformer", "run over 16 positions"),
    ("masked", "xlm", "spread over sibling lists (transformer.attentions, "),
    ("image", "inkling2", "final_input reads the outputs of earlier blocks"),
)


def test_text_attends_to_an_image_of_fewer_patches_than_tokens() -> None:
    row, _ = sweep_as("image", "blip")
    language = next(stack for stack in row.stacks if stack.name == "language")
    assert language.cross == (0, 1, 2, 3)


@pytest.mark.parametrize(("mapping", "model_type"), FULL)
def test_every_stack_is_captured_in_full(mapping: str, model_type: str) -> None:
    row, figures = sweep_as(mapping, model_type)
    assert row.outcome == "full", row.reason
    assert figures, "eager offers its weights here"


@pytest.mark.parametrize(("mapping", "model_type", "words"), PARTIAL)
def test_what_is_captured_in_part_says_why(mapping: str, model_type: str, words: str) -> None:
    row, _ = sweep_as(mapping, model_type)
    assert row.outcome == "partial"
    assert words in row.reason


@pytest.mark.parametrize(("mapping", "model_type", "words"), REFUSED)
def test_what_is_refused_says_why(mapping: str, model_type: str, words: str) -> None:
    row, _ = sweep_as(mapping, model_type)
    assert row.outcome == "refused"
    assert words in row.reason
    assert "\n" not in row.reason


@pytest.mark.parametrize("model_type", ["t5", "bart"])
def test_the_shipped_table_is_what_a_lens_finds(model_type: str) -> None:
    rows = load_mappings().rows
    row = next(r for r in rows if (r.mapping, r.model_type) == ("seq2seq", model_type))
    model = build_as("seq2seq", model_type)
    for stack in row.stacks:
        lens = Lens(model, stack=stack.name)  # type: ignore[arg-type]
        assert stack.attention == lens.attention_layers
        assert stack.cross == lens.cross_attention_layers
        assert stack.n_layers == lens.n_layers


def test_the_shipped_table_covers_every_type_of_the_mappings() -> None:
    table = load_mappings()
    names = [(mapping, name) for mapping, types in MAPPINGS.items() for name in types]
    assert [(row.mapping, row.model_type) for row in table.rows] == names
    assert len(table.full_types) >= 126
    image = [row.stacks[0] for row in table.rows if row.mapping == "image"]
    assert sum(stack.outcome == "full" for stack in image) >= 85
    assert all(row.reason for row in table.rows if row.outcome != "full")
    assert MappingTable.from_dict(table.to_dict()) == table
