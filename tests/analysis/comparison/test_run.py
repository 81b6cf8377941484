"""`compare` as a whole: equal models, different ones, refusals, saving, the command."""

from __future__ import annotations

import copy
import errno
import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)
from typer.testing import CliRunner

import trilens
from tinymodels import build, prompt_ids
from tolerances import largest, sum_error
from trilens import CompareOptions, Comparison, Lens, compare
from trilens.analysis.comparison.rows import METRICS
from trilens.cli.main import app
from trilens.demo import demo_path
from trilens.errors import (
    CorruptFileError,
    EmptyPromptError,
    IncomparableError,
    ModelNotFoundError,
    NonFiniteError,
    UsageError,
    ValueRangeError,
    WriteError,
)
from trilens.io.atomic import locked_folder
from trilens.report.text.comparison import render_comparison
from trilens.statistics.divergence import kl_nats
from trilens.ternary.packed.linear import TernaryLinear
from trilens.ternary.quantize import PerLayerQuant

TEXT = "def add(a, b):\n    return a + b\n\n\ndef sub(a, b):\n    return a - b\n" * 8


def prompts(kind: str, *lengths: int) -> list[torch.Tensor]:
    return [prompt_ids(kind, n, seed=n)[0] for n in lengths]


@pytest.fixture(scope="module")
def pair() -> tuple[Lens, Lens]:
    return Lens(build("llama")), Lens(build("llama", seed=1))


@pytest.fixture(scope="module")
def found(pair: tuple[Lens, Lens]) -> Comparison:
    return compare(*pair, prompts("llama", 12, 12, 30, 7))


@pytest.mark.parametrize("kind", ["llama", "mamba", "rwkv", "qwen3_next"])
def test_equal_models_differ_by_exactly_zero(kind: str) -> None:
    options = CompareOptions(lens="all", batch_size=2)
    twins = Lens(build(kind)), Lens(build(kind))
    result = compare(*twins, prompts(kind, 20, 20, 33, 7), options=options)
    assert {row.delta for row in result.rows} == {0.0}
    assert not result.role_changes
    assert not result.arrays["token_kl_nats"].tensor.any()
    assert all(row.metric in METRICS for row in result.rows)
    metrics = {row.metric for row in result.rows}
    assert {"kl_nats_mean", "cosine", "settled", "openness", "js_nats"} <= metrics
    assert {row.layer for row in result.rows} >= set(range(twins[0].n_layers))


def test_other_weights_differ_in_every_part(found: Comparison, pair: tuple[Lens, Lens]) -> None:
    for metric in ("kl_nats_mean", "cosine", "js_nats", "openness", "weight_relative_error"):
        assert any(row.delta for row in found.select(metric)), metric
    ids = prompts("llama", 12)[0]
    left, right = (lens.capture(ids).logits for lens in pair)
    expected = kl_nats(left, right)[:-1]
    got = found.arrays["token_kl_nats"].tensor[:11].double().numpy()
    # Two float32 log-softmaxes: sums over the vocabulary, of 1, and logits of some nats.
    nats = float(sum_error(left.shape[1], 2, torch.float32))
    nats += float(sum_error(4, max(largest(left), largest(right)), torch.float32))
    assert got == pytest.approx(expected, abs=nats)
    assert found.n_tokens == 61
    assert found.row("same_top1").before == 1
    assert found.select("js_nats", layer=1)[0].layer == 1


def test_batches_change_nothing_but_rounding(found: Comparison, pair: tuple[Lens, Lens]) -> None:
    alone = compare(
        *pair, iter(prompts("llama", 12, 12, 30, 7)), options=CompareOptions(batch_size=1)
    )
    for one, other in zip(found.rows, alone.rows, strict=True):
        assert (one.metric, one.layer, one.head) == (other.metric, other.layer, other.head)
        assert one.after == pytest.approx(other.after, rel=1e-4, abs=1e-5), one


def test_a_packed_model_is_compared_with_its_original() -> None:
    before, model = Lens(build("llama")), build("llama")
    mlp = model.model.layers[0].mlp
    quant = PerLayerQuant.quantize(mlp.down_proj.weight.detach().numpy(), "down")
    mlp.down_proj = TernaryLinear.from_quant(quant)
    result = compare(before, Lens(model), prompts("llama", 20))
    (error,) = result.select("weight_relative_error")
    assert (error.layer, error.module) == (0, "mlp.down_proj.weight")
    assert error.after > 0.01
    assert result.row("kl_nats_mean").after > 0
    # The block's own attention reads what came before the damage.
    assert all(row.delta == 0 for row in result.select("js_nats", layer=0))


def test_a_rounded_copy_in_another_dtype() -> None:
    result = compare(
        Lens(build("llama")), Lens(build("llama", dtype=torch.bfloat16)), prompts("llama", 20, 9)
    )
    assert 0 < result.row("kl_nats_mean").after < 0.1
    assert all(0.99 < row.after < 1 for row in result.select("cosine"))


def test_the_lens_at_the_last_token_at_all_and_at_none(pair: tuple[Lens, Lens]) -> None:
    shapes = {}
    for which in ("last", "all", "none"):
        result = compare(*pair, prompts("llama", 9, 5), options=CompareOptions(lens=which))
        array = result.arrays.get("settle_layer")
        shapes[which] = None if array is None else tuple(array.tensor.shape)
        assert bool(result.select("settled")) == (which != "none")
    assert shapes == {"last": (2, 2), "all": (2, 14), "none": None}
    assert result.row("perplexity").after > 0


def test_models_that_differ_are_refused_with_what_differs(pair: tuple[Lens, Lens]) -> None:
    def small(**changes: Any) -> Lens:
        options = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
        options |= {"num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 90}
        return Lens(LlamaForCausalLM(LlamaConfig(**{**options, **changes})).eval())

    ids, plain = [torch.arange(10)], small()
    for changes, words in (
        ({"num_hidden_layers": 3}, "2 layers before, 3 after"),
        ({"hidden_size": 64}, "32 d_model before, 64 after"),
        ({"vocab_size": 91}, "90 tokens in the vocabulary before, 91 after"),
        ({"intermediate_size": 40}, r"down_proj.weight is \[32, 48\] before, \[32, 40\] after"),
        ({"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16}, r"\[4, 10, 10\]"),
    ):
        with pytest.raises(IncomparableError, match=words):
            compare(plain, small(**changes), ids)


class Words:
    """As much of a tokenizer as reading a prompt needs."""

    def __init__(self, vocabulary: dict[str, int], shift: int = 0) -> None:
        self.vocabulary, self.shift = vocabulary, shift

    def get_vocab(self) -> dict[str, int]:
        return self.vocabulary

    def __call__(self, _text: str, **_options: Any) -> dict[str, list[int]]:
        raise AssertionError("ids are given")

    def decode(self, ids: list[int], **_options: Any) -> str:
        return "".join(f"<{token}>" for token in ids)

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
        return [f"<{token}>" for token in ids]


def test_tokenizers_that_differ_are_refused() -> None:
    model = build("llama")
    with pytest.raises(IncomparableError) as caught:
        compare(
            Lens(model, Words({"a": 0, "b": 1, "c": 2})),
            Lens(model, Words({"a": 0, "b": 2, "d": 3})),
            prompts("llama", 9),
        )
    words = str(caught.value)
    assert "1 tokens only in the tokenizer before, such as 'c'" in words
    assert "1 tokens only in the tokenizer after, such as 'd'" in words
    assert "'b': 1 before, 2 after" in words


def padded(model: PreTrainedModel, vocab: int) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model.resize_token_embeddings(vocab, mean_resizing=False)
    return model.eval()


@pytest.mark.parametrize("side", ["before", "after"])
def test_vocabularies_that_end_differently_are_compared_where_they_agree(side: str) -> None:
    words = {f"w{i}": i for i in range(build("llama").config.vocab_size)}
    more = words | {"<x>": len(words), "<y>": len(words) + 1}
    small = Lens(build("llama", seed=1), Words(words))
    large = Lens(padded(build("llama", seed=1), len(words) + 8), Words(more))
    pair = (large, small) if side == "before" else (small, large)
    found = compare(*pair, prompts("llama", 12, 20), options=CompareOptions(lens="all"))
    # A product with more columns may be added up in another order.
    for row in found.rows:
        assert row.after == pytest.approx(row.before, rel=1e-5, abs=1e-5, nan_ok=True), row
    assert any(f"over the {len(words)} token ids that both" in note for note in found.notes)
    assert any("rows, those of shared tokens count" in note for note in found.notes)
    with pytest.raises(IncomparableError, match=f"prompt 1 holds the token id {len(words) + 1}"):
        compare(large, large_twin(more), [*prompts("llama", 5), [3, len(words) + 1]])


def large_twin(more: dict[str, int]) -> Lens:
    """Another padding, and one token less: its last id is nobody's."""
    kept = dict(list(more.items())[:-1])
    return Lens(padded(build("llama", seed=1), len(more) + 20), Words(kept))


def test_logits_of_shared_tokens_are_renormalised() -> None:
    words = {f"w{i}": i for i in range(build("llama").config.vocab_size)}
    small = Lens(build("llama"), Words(words))
    large = Lens(padded(build("llama", seed=1), len(words) + 8), Words(words))
    ids = prompts("llama", 12)[0]
    found = compare(small, large, [ids])
    logits = [lens.capture(ids).logits[:-1, : len(words)] for lens in (small, large)]
    expected = float(kl_nats(*logits).mean())
    assert found.row("kl_nats_mean").after == pytest.approx(expected, rel=1e-5)


def test_nan_names_model_prompt_and_first_layer() -> None:
    before, model = Lens(build("llama")), build("llama")
    after = Lens(model)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = math.nan
    with pytest.raises(NonFiniteError, match=r"model after .* prompt 0, first after layer 1"):
        compare(before, after, prompts("llama", 9, 9))
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = 0
        model.lm_head.weight[3] = math.nan
    with pytest.raises(
        NonFiniteError, match=r"prompt 0: logits of the model after .* token 0: .* unembedding"
    ):
        compare(before, after, prompts("llama", 9))


def test_nothing_to_compare_is_refused(pair: tuple[Lens, Lens]) -> None:
    with pytest.raises(EmptyPromptError, match="nothing to compare"):
        compare(*pair, [])
    with pytest.raises(EmptyPromptError, match="prompt 1 has 1 token"):
        compare(*pair, prompts("llama", 9, 1))
    with pytest.raises(UsageError, match="give a list of prompts"):
        compare(*pair, "text")
    with pytest.raises(UsageError, match="a Lens, a checkpoint directory or a hub id"):
        compare(3, pair[1], prompts("llama", 9))  # type: ignore[arg-type]
    for wrong in ({"batch_size": 0}, {"gate_threshold": 0.6}, {"role_threshold": 0.0}):
        with pytest.raises(ValueRangeError):
            CompareOptions(**wrong)
    with pytest.raises(UsageError, match="'last', 'all' or 'none'"):
        CompareOptions(lens="first")  # type: ignore[arg-type]


def test_prompts_are_read_once_and_a_batch_at_a_time(
    pair: tuple[Lens, Lens], monkeypatch: pytest.MonkeyPatch
) -> None:
    read, run, most = 0, 0, 0

    def source() -> Iterator[torch.Tensor]:
        nonlocal read, most
        for ids in prompts("llama", *[8] * 10):
            read += 1
            most = max(most, read - run)
            yield ids

    plain = pair[0].capture_many

    def counted(batch: Any, **options: Any) -> Any:
        nonlocal run
        captures = list(plain(batch, **options))
        run += len(batch) if options["residual"] else 0
        return iter(captures)

    monkeypatch.setattr(pair[0], "capture_many", counted)
    compare(*pair, source(), options=CompareOptions(batch_size=2))
    assert read == run == 10
    assert most <= 3


def test_saved_and_loaded_it_is_the_same(found: Comparison, tmp_path: Path) -> None:
    again = Comparison.load(found.save(tmp_path / "new" / "folder"))
    assert again.rows == found.rows
    assert again.role_changes == found.role_changes
    assert (again.before, again.after, again.notes) == (found.before, found.after, found.notes)
    assert dict(again.options) == dict(found.options)
    assert again.arrays.keys() == found.arrays.keys()
    for name, array in found.arrays.items():
        assert again.arrays[name].axes == array.axes
        assert len(array.axes) == array.tensor.dim()
        assert torch.equal(again.arrays[name].tensor, array.tensor)
    assert render_comparison(again) == render_comparison(found)


def test_damaged_files_are_refused(found: Comparison, tmp_path: Path) -> None:
    folder = found.save(tmp_path / "saved")
    with pytest.raises(ModelNotFoundError, match=r"no comparison\.json"):
        Comparison.load(tmp_path)
    with pytest.raises(UsageError, match="is a file"):
        found.save(folder / "table.parquet")
    (folder / "table.parquet").write_bytes(b"PAR1 nothing")
    with pytest.raises(CorruptFileError, match=r"table\.parquet"):
        Comparison.load(folder)
    found.save(folder)
    (folder / "comparison.json").write_text('{"format": "trilens.comparison", "version": 9}')
    with pytest.raises(CorruptFileError, match="this trilens reads version 1"):
        Comparison.load(folder)
    found.save(folder)
    manifest = json.loads((folder / "comparison.json").read_text())
    (folder / "comparison.json").write_text(json.dumps(manifest))
    with pytest.raises(CorruptFileError, match="does not fit its own hash"):
        Comparison.load(folder)
    # As it was written before there were hashes.
    old = {key: value for key, value in manifest.items() if key not in {"parts", "sha256"}}
    (folder / "comparison.json").write_text(json.dumps(old))
    assert Comparison.load(folder).hash_checked is False
    (folder / "comparison.json").write_text(json.dumps({**old, "parts": manifest["parts"]}))
    with pytest.raises(CorruptFileError, match="are gone"):
        Comparison.load(folder)
    del old["notes"]
    (folder / "comparison.json").write_text(json.dumps(old))
    with pytest.raises(CorruptFileError, match="not a whole comparison"):
        Comparison.load(folder)


def test_only_a_comparison_is_replaced(found: Comparison, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("mine")
    with pytest.raises(UsageError, match="not empty and holds no comparison"):
        found.save(mine)
    assert [path.name for path in mine.iterdir()] == ["thesis.txt"]
    folder = found.save(tmp_path / "saved")
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["arrays.safetensors", "comparison.json", "table.parquet"]
    for _ in range(2):
        again = found.save(folder)
        assert sorted(path.name for path in again.iterdir()) == names
        assert Comparison.load(folder).hash_checked


def test_one_run_alone_saves(found: Comparison, tmp_path: Path) -> None:
    with (
        locked_folder(tmp_path / "saved"),
        pytest.raises(WriteError, match="another run is writing it"),
    ):
        found.save(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
    found.save(tmp_path / "saved")


def test_without_hard_links_the_new_names_stay(
    found: Comparison, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(Path, "hardlink_to", refused)
    for names in ({"table.parquet"}, {"new-table.parquet"}, {"table.parquet"}):
        folder = found.save(tmp_path / "saved")
        assert {path.name for path in folder.glob("*.parquet")} == names
        assert Comparison.load(folder).rows == found.rows


def test_the_table_in_pandas(found: Comparison) -> None:
    frame = found.to_pandas()
    columns = ["layer", "module", "head", "metric", "before", "after", "delta"]
    assert list(frame.columns) == columns
    assert len(frame) == len(found.rows)
    assert frame["layer"].isna().sum() == sum(row.layer is None for row in found.rows)
    assert frame.groupby("metric")["delta"].count().sum() == len(found.rows)


def test_the_text_says_what_was_found(found: Comparison) -> None:
    text = render_comparison(found)
    assert "4 prompts, 61 tokens" in text
    assert "perplexity" in text and "KL (nats)" in text and "mlp.gate" in text
    assert max(map(len, text.splitlines())) <= 120
    assert repr(found).startswith("Comparison(LlamaForCausalLM and LlamaForCausalLM: 4 prompts")


def test_questions_that_have_no_answer(found: Comparison) -> None:
    with pytest.raises(UsageError, match="none of"):
        found.select("loss")
    with pytest.raises(UsageError, match=r"has .* rows"):
        found.row("js_nats")


def test_exports() -> None:
    assert {"compare", "Comparison", "CompareOptions"} <= set(trilens.__all__)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str, str]:
    """The demo model, a copy with noise, and a text."""
    folder = tmp_path_factory.mktemp("compare")
    lens = Lens.from_pretrained(str(demo_path("transformer")))
    model = copy.deepcopy(lens.model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * parameter.std() * torch.randn_like(parameter))
    model.save_pretrained(folder / "noisy")
    lens.tokenizer.save_pretrained(folder / "noisy")
    (folder / "text.txt").write_text(TEXT)
    return str(demo_path("transformer")), str(folder / "noisy"), str(folder / "text.txt")


def test_the_command_prints_saves_and_fails_where_asked(
    checkpoints: tuple[str, str, str], tmp_path: Path
) -> None:
    before, after, text = checkpoints
    arguments = [
        "compare",
        before,
        after,
        "--data",
        text,
        "--seq-length",
        "32",
        "--max-tokens",
        "64",
    ]
    shown = CliRunner().invoke(
        app, [*arguments, "-o", str(tmp_path / "out"), "--fail-if", "kl_nats_mean>1e9"]
    )
    assert shown.exit_code == 0, shown.output
    assert "2 prompts, 64 tokens" in shown.stdout
    saved = Comparison.load(tmp_path / "out")
    kl = saved.row("kl_nats_mean").after
    assert kl > 0
    failed = CliRunner().invoke(
        app,
        [
            *arguments,
            "--format",
            "json",
            "--lens",
            "none",
            "--fail-if",
            "kl_nats_mean>0",
            "--fail-if",
            "perplexity.ratio<0",
        ],
    )
    assert failed.exit_code == 3
    assert "kl_nats_mean>0 holds in 1 row" in failed.stderr
    table = json.loads(failed.stdout)["table"]
    (row,) = [row for row in table if row["metric"] == "kl_nats_mean"]
    # Loaded again, the weights may lie otherwise in memory, and bf16 numbers be rounded otherwise:
    # by an eps of each logit, of which hundreds are averaged.
    assert row["after"] == pytest.approx(kl, rel=torch.finfo(torch.bfloat16).eps)


def test_the_command_refuses_in_one_line(checkpoints: tuple[str, str, str], tmp_path: Path) -> None:
    before, after, text = checkpoints
    empty = tmp_path / "empty.txt"
    empty.write_text(" \n")
    for arguments, words in (
        (["--data", str(empty)], "holds no text"),
        (["--data", str(tmp_path / "none.txt")], "no text at"),
        (["--data", text, "--fail-if", "loss>1"], "names no metric"),
        (["--data", text, "-o", text], "is a file"),
    ):
        done = CliRunner().invoke(app, ["compare", before, after, *arguments])
        assert done.exit_code == 2, done.output
        assert words in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1


def bert(kind: type[PreTrainedModel], seed: int) -> Lens:
    torch.manual_seed(seed)
    options = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    return Lens(kind(BertConfig(**options, num_attention_heads=4, vocab_size=90)).eval())


def test_a_masked_language_model_has_no_next_token() -> None:
    pair = bert(BertForMaskedLM, 0), bert(BertForMaskedLM, 1)
    result = compare(*pair, prompts("llama", 9, 1))
    assert result.row("kl_nats_mean").after > 0
    assert len(result.arrays["token_kl_nats"].tensor) == 10
    assert not result.select("perplexity")


def test_a_bare_encoder_is_compared_inside_alone() -> None:
    pair = bert(BertModel, 0), bert(BertModel, 1)
    result = compare(*pair, prompts("llama", 9))
    assert not result.select("kl_nats_mean") and not result.select("settled")
    assert any(row.delta for row in result.select("cosine"))
    assert any("without an unembedding" in note for note in result.notes)
    assert "without an unembedding" in render_comparison(result)


def test_json_has_null_for_what_is_not_finite(found: Comparison) -> None:
    first, *rest = found.rows
    odd = replace(found, rows=(replace(first, before=math.inf, after=math.nan), *rest))
    row = odd.to_dict()["table"][0]
    assert row["before"] is None
    assert row["after"] is None
    json.dumps(odd.to_dict(), allow_nan=False)
