"""The Mamba and the RWKV-7 that ship along: small, trained, and open to every question."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import trilens
from training.batches import encode_documents, heldout_windows
from training.checkpoint import total_bytes
from training.models import ARCHITECTURES, ModelOptions, build_model
from trilens.demo import demo_path, training_record
from trilens.demo.corpus import check_heldout, heldout_documents, load_heldout_record, stdlib_root
from trilens.evaluation.perplexity import measure_perplexity

RECURRENT = ("mamba", "rwkv7")
# Every so many windows of all the held-out text: Mamba goes token by token on a CPU.
_WINDOW_STRIDE = 24

pytestmark = pytest.mark.parametrize("name", RECURRENT)


def test_it_is_at_most_six_megabytes_of_bf16(name: str) -> None:
    assert total_bytes(demo_path(name)) <= 6_000_000
    stored = AutoModelForCausalLM.from_pretrained(demo_path(name), dtype="auto")
    assert {weight.dtype for weight in stored.parameters()} == {torch.bfloat16}
    assert stored.config.model_type == ARCHITECTURES[name].model_type
    assert stored.num_parameters() == training_record(name)["parameters"] < 3_000_000


def test_the_three_share_one_tokenizer(name: str) -> None:
    ours = AutoTokenizer.from_pretrained(demo_path(name))
    assert ours.get_vocab() == AutoTokenizer.from_pretrained(demo_path()).get_vocab()


def test_the_script_builds_this_very_shape(name: str) -> None:
    stored = AutoModelForCausalLM.from_pretrained(demo_path(name))
    built = build_model(name, ModelOptions(vocab_size=2048, context=512, end_of_text_id=0))
    shapes = {key: weight.shape for key, weight in built.state_dict().items()}
    assert shapes == {key: weight.shape for key, weight in stored.state_dict().items()}


def test_the_heldout_loss_is_the_recorded_one(name: str) -> None:
    recorded = training_record(name)
    assert recorded["arch"] == name
    assert recorded["heldout_loss_nats"] <= 3.3
    assert recorded["heldout_tokens"] > 100_000
    tokenizer = AutoTokenizer.from_pretrained(demo_path(name))
    documents = heldout_documents(stdlib_root(), load_heldout_record())
    encoded = encode_documents(tokenizer, documents)
    windows = heldout_windows(encoded, tokenizer.model_max_length)
    full = [window for window in windows if len(window) == tokenizer.model_max_length + 1]
    model = AutoModelForCausalLM.from_pretrained(demo_path(name), dtype=torch.float32)
    loss = measure_perplexity(model, full[::_WINDOW_STRIDE])
    assert loss.n_tokens > 5_000
    if check_heldout(stdlib_root(), load_heldout_record()).comparable:
        # A sample of windows, all of them full: easier text than the ends of files, by a little.
        assert loss.nll_nats == pytest.approx(recorded["heldout_loss_nats"], abs=0.25)
    else:
        assert loss.nll_nats <= 3.8


def test_every_question_has_an_answer(name: str) -> None:
    lens = trilens.Lens.from_pretrained(str(demo_path(name)))
    capture = lens.capture("def area(r):\n    return r * ", gates=True, effective=True)
    assert capture.has("attention") and capture.has("gates")
    assert tuple(capture.attention.layers) == tuple(range(lens.n_layers))
    rows = capture.attention.top_attended_positions(lens.n_layers - 1, -1, 3)
    assert len(rows) == 3
    assert capture.gates.names
