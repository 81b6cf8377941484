"""The shipped demo checkpoint: small enough, a real language model, with heads worth opening."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from tolerances import sum_error
from training.batches import encode_documents, heldout_windows
from training.checkpoint import total_bytes
from training.heads import HeadScores, induction_scores, previous_token_scores
from training.optimizers import make_optimizers, orthogonalise
from trilens.demo import DEMO_MODELS, demo_path
from trilens.demo.corpus import (
    HeldOutRecord,
    check_heldout,
    heldout_documents,
    load_heldout_record,
    stdlib_root,
    training_documents,
)
from trilens.errors import UsageError
from trilens.evaluation.perplexity import measure_perplexity

# Every so many windows of ALL the held-out text: a sample that is an estimate of the recorded
# loss by construction, where a choice of files would be a choice of their difficulty.
_WINDOW_STRIDE = 6


@pytest.fixture(scope="module")
def folder() -> Path:
    return demo_path()


@pytest.fixture(scope="module")
def recorded(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "training.json").read_text(encoding="utf-8"))
    return content


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def model(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )


@pytest.fixture(scope="module")
def windows(tokenizer: PreTrainedTokenizerBase) -> list[torch.Tensor]:
    documents = heldout_documents(stdlib_root(), load_heldout_record())
    encoded = encode_documents(tokenizer, documents)
    return heldout_windows(encoded, tokenizer.model_max_length)[::_WINDOW_STRIDE]


def test_checkpoint_is_at_most_six_megabytes(folder: Path) -> None:
    assert total_bytes(folder) <= 6_000_000


def test_weights_are_stored_in_bf16(folder: Path) -> None:
    stored = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    assert {weight.dtype for weight in stored.parameters()} == {torch.bfloat16}


def test_every_linear_reads_a_multiple_of_256(model: PreTrainedModel) -> None:
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    assert linears
    assert {linear.in_features % 256 for linear in linears} == {0}


def test_shape_of_the_model(model: PreTrainedModel, recorded: dict[str, Any]) -> None:
    config = model.config
    assert config.model_type == "llama"
    assert config.num_key_value_heads < config.num_attention_heads
    assert config.tie_word_embeddings
    assert model.num_parameters() == recorded["parameters"] < 3_000_000


@pytest.mark.parametrize(
    "text", ["def f(x):\n\treturn [x]  # é 漢字 🙂\n", "", "  \n\n  ", "a <|endoftext|> b"]
)
def test_tokenizer_round_trips_text(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_tokenizer_knows_its_end_of_text(
    tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel
) -> None:
    assert tokenizer.bos_token == tokenizer.eos_token == "<|endoftext|>"
    assert tokenizer.eos_token_id == model.config.eos_token_id
    assert len(tokenizer) == model.config.vocab_size
    assert tokenizer.model_max_length == model.config.max_position_embeddings


def test_recorded_figures_satisfy_the_bar(recorded: dict[str, Any]) -> None:
    assert recorded["heldout_loss_nats"] <= 3.0
    assert recorded["heldout_tokens"] > 100_000
    assert recorded["steps"] > 0
    assert recorded["training_seconds"] > 0
    assert set(recorded["versions"]) == {"python", "torch", "transformers"}
    for kind in ("previous_token", "induction"):
        best = recorded[f"best_{kind}_head"]
        assert best["score"] >= max(0.25, 3 * best["median_of_all_heads"])


def test_heldout_loss_recomputed(
    model: PreTrainedModel,
    windows: list[torch.Tensor],
    recorded: dict[str, Any],
) -> None:
    loss = measure_perplexity(model, windows)
    assert loss.n_tokens > 20_000
    if check_heldout(stdlib_root(), load_heldout_record()).comparable:
        assert loss.nll_nats <= 3.0
        assert loss.nll_nats == pytest.approx(recorded["heldout_loss_nats"], abs=0.15)
    else:
        assert loss.nll_nats <= 3.5


def test_recorded_previous_token_head_stands_out(
    model: PreTrainedModel,
    windows: list[torch.Tensor],
    recorded: dict[str, Any],
) -> None:
    longest = max(map(len, windows))
    full = torch.stack([window[:-1] for window in windows if len(window) == longest][:8])
    _assert_stands_out(previous_token_scores(model, full), recorded["best_previous_token_head"])


def test_recorded_induction_head_stands_out(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, recorded: dict[str, Any]
) -> None:
    scores = induction_scores(model, tokenizer.bos_token_id, seed=1, sequences=8)
    _assert_stands_out(scores, recorded["best_induction_head"])


def test_scores_agree_with_a_plain_loop(model: PreTrainedModel) -> None:
    inputs = torch.arange(1, 25).reshape(2, 12)
    with torch.inference_mode():
        attentions = model(input_ids=inputs, output_attentions=True).attentions
    expected = torch.stack([attentions[2][:, 5, t, t - 1] for t in range(1, 12)]).mean().item()
    close = float(sum_error(22, 1, torch.float32))
    assert previous_token_scores(model, inputs).values[2][5] == pytest.approx(expected, abs=close)


def test_heldout_windows_label_every_token_once() -> None:
    documents = [torch.arange(10), torch.arange(100, 105)]
    windows = heldout_windows(documents, length=4)
    assert max(map(len, windows)) == 5
    assert torch.cat([window[1:] for window in windows]).tolist() == [
        *range(1, 10),
        *range(101, 105),
    ]


def test_heldout_modules_are_not_trained_on(tmp_path: Path) -> None:
    for name in ("kept.py", "secret.py", "tests/kept.py", "encodings/kept.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x = 1\n", encoding="utf-8")
    record = HeldOutRecord(python_version="3.0", sha256={"secret.py": "0", "gone.py": "0"})
    assert [document.name for document in training_documents(tmp_path, record)] == ["kept.py"]
    check = check_heldout(tmp_path, record)
    assert not check.comparable
    assert (check.different, check.missing) == (("secret.py",), ("gone.py",))
    assert "secret.py" in check.message(record)
    assert "gone.py" in check.message(record)


def test_recorded_digests_are_those_of_the_recorded_python() -> None:
    record = load_heldout_record()
    if platform.python_version() != record.python_version:
        pytest.skip(f"the digests are recorded for Python {record.python_version}")
    assert check_heldout(stdlib_root(), record).comparable


def test_unknown_demo_model_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="transformer"):
        demo_path("nonesuch")
    assert DEMO_MODELS == ("transformer", "mamba", "rwkv7")


def test_importing_the_package_imports_none_of_the_training() -> None:
    code = (
        "import sys, trilens; before = set(sys.modules); import trilens.demo\n"
        "print(sorted(name for name in sys.modules if name.startswith('trilens.demo.')))\n"
        "print(sorted({'torch', 'transformers', 'tokenizers'} & (set(sys.modules) - before)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["[]", "[]"]


def test_muon_takes_hidden_linears_only(model: PreTrainedModel) -> None:
    muon, adamw = make_optimizers(model, matrix_rate=0.1, other_rate=0.1, weight_decay=0.0)
    # Seven linears a layer; the tied embedding and the nine gains are AdamW's.
    assert len(muon.param_groups[0]["params"]) == 28
    assert len(adamw.param_groups[0]["params"]) == 10


def test_orthogonalise_brings_singular_values_near_one() -> None:
    matrices = torch.randn(2, 48, 16, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalise(matrices))
    assert values.min() > 0.5
    assert values.max() < 1.3


def _assert_stands_out(scores: HeadScores, recorded: dict[str, Any]) -> None:
    score = scores.values[recorded["layer"]][recorded["head"]]
    assert score == pytest.approx(recorded["score"], abs=0.1)
    assert score >= 3 * scores.median()
