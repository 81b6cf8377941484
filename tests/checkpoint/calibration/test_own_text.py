"""Calibration on what the model writes itself: drawn from it, seeded, kept, or refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import (
    BertConfig,
    BertForMaskedLM,
    T5Config,
    T5ForConditionalGeneration,
)
from typer.testing import CliRunner

from calibration_cases import DOCUMENTS, SMALL, load_tokenizer, tiny
from checkpoint_cases import load
from trilens.checkpoint import Calibration, Sample, TernaryPlan, ternarize, validate
from trilens.checkpoint.calibration import chain, cost, run
from trilens.checkpoint.calibration.cost import cost_of
from trilens.checkpoint.calibration.effort import find_effort
from trilens.checkpoint.calibration.options import draw
from trilens.checkpoint.calibration.own_text import OwnText, check_writes, write_text
from trilens.checkpoint.job import read_job
from trilens.cli.main import app
from trilens.demo import demo_path
from trilens.errors import (
    AnatomyError,
    CorruptFileError,
    DamageError,
    GenerationError,
    NonFiniteError,
    TextError,
    UsageError,
    ValueRangeError,
)
from trilens.progress import Step

CODE = Sample("code", DOCUMENTS[:1])
LINES = Sample("lines", tuple(f"{i} = {i}\n" * 40 for i in range(2)))
PLAIN = OwnText()
GPTQ = TernaryPlan("gptq", group_size=16)


def own(*evaluation: Any, **changes: Any) -> Calibration:
    return Calibration((), evaluation, own_text=OwnText(), **{**SMALL, **changes})


def written(kind: str, own_text: OwnText = PLAIN, seed: int = 0, **sizes: int) -> Any:
    model = load(demo_path(kind), dtype=torch.float32)
    tokenizer = load_tokenizer(demo_path(kind))
    found = write_text(model, tokenizer, own_text, **{"rows": 5, "length": 12, **sizes}, seed=seed)
    return model, tokenizer, torch.stack(found)


@pytest.mark.parametrize("kind", ["transformer", "mamba", "rwkv7"])
def test_text_is_drawn_from_the_model(kind: str) -> None:
    """Cold, it is the model's own likeliest text; the seed decides, and changes nothing else."""
    model, tokenizer, cold = written(kind, OwnText(temperature=1e-4))
    assert cold.shape == (5, 12)
    assert not set(cold[:, 0].tolist()) & set(tokenizer.all_special_ids)
    assert len(set(cold[:, 0].tolist())) > 1
    with torch.no_grad():
        scores = model(cold).logits[:, :-1]
    chosen = scores.gather(2, cold[:, 1:, None])[..., 0]
    assert torch.all(chosen >= scores.amax(2) - 1e-2)  # a draw at 1e-4 may take what is as likely
    state = torch.get_rng_state()
    first = torch.stack(write_text(model, tokenizer, PLAIN, rows=5, length=12, seed=0))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first, written(kind)[2])
    assert not torch.equal(first, written(kind, seed=1)[2])
    assert not torch.equal(first[:, 1:], cold[:, 1:])


def test_batches_are_not_written_alike() -> None:
    """More rows than are written at once: the later ones are drawn anew."""
    _, _, found = written("transformer", OwnText(prompts=("def ",)), rows=40, length=16)
    assert len({tuple(row.tolist()) for row in found}) > 35


def test_prompts_begin_the_rows_in_turns() -> None:
    prompts = ("def main(", "import os\nimport ")
    _, tokenizer, found = written("transformer", OwnText(prompts=prompts), length=16)
    for i, row in enumerate(found):
        assert tokenizer.decode(row).startswith(prompts[i % 2])
    with pytest.raises(GenerationError, match="leave room"):
        written("transformer", OwnText(prompts=("import os\n" * 20,)))


def test_special_tokens_that_begin_every_text_begin_these(tmp_path: Path) -> None:
    source = tiny("llama", tmp_path)
    tokenizer = load_tokenizer(source)
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    bos = tokenizer.bos_token_id
    template = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
    tokenizer.backend_tokenizer.post_processor = template
    assert tokenizer("d")["input_ids"][0] == bos
    found = write_text(load(source), tokenizer, PLAIN, rows=3, length=6, seed=0)
    for row in found:
        assert row[0] == bos and row[1] != bos and len(row) == 6


def encoder(folder: Path) -> Path:
    config = BertConfig(
        vocab_size=64, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32,
    )  # fmt: skip
    BertForMaskedLM(config).save_pretrained(folder)
    return folder


def test_each_text_is_reported_apart_and_the_worst_counts(tmp_path: Path) -> None:
    source = tiny("llama", tmp_path / "src")
    report = ternarize(source, tmp_path / "out", plan=GPTQ, calibration=own(CODE, LINES))
    damage = report.damage
    assert damage is not None and damage.own_text
    assert [(text.name, text.own_kind) for text in damage.texts] == [
        ("code", False),
        ("lines", False),
        ("the model's own text, set apart", True),
    ]
    worst = max(damage.texts, key=lambda text: text.ratio)
    assert damage.ratio == worst.ratio and damage.n_tokens == worst.n_tokens
    assert all(text.name in report.verdict for text in damage.texts)
    assert "kind that was calibrated on" in report.verdict
    for text in damage.texts:
        assert text.kl_nats is not None and text.kl_nats > 0
        assert text.same_top1 is not None and 0 <= text.same_top1 <= 1
        assert text.continuations is not None and text.continuations.n_tokens == 48
    assert validate(tmp_path / "out") == report
    # Between the mildest and the worst: refused.
    bound = (damage.ratio + min(text.ratio for text in damage.texts)) / 2
    strict = own(CODE, LINES, max_perplexity_ratio=bound)
    with pytest.raises(DamageError, match="nothing was written"):
        ternarize(source, tmp_path / "no", plan=GPTQ, calibration=strict)
    assert not (tmp_path / "no").exists()
    with pytest.raises(DamageError, match="written before"):
        ternarize(source, tmp_path / "out", plan=GPTQ, calibration=strict)


def test_the_text_is_kept_with_the_run_and_not_written_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tiny("llama", tmp_path / "src")
    plain = ternarize(source, tmp_path / "whole", plan=GPTQ, calibration=own())
    lines = (tmp_path / "whole" / "trilens-calibration-text.jsonl").read_text("utf-8")
    rows = [json.loads(line) for line in lines.splitlines()]
    assert sum(len(row["token_ids"]) for row in rows) == 512 + 64
    tokenizer = load_tokenizer(source)
    assert [row["text"] for row in rows] == [tokenizer.decode(row["token_ids"]) for row in rows]
    assert plain.damage is not None and plain.damage.calibration_tokens == 512

    class Killed(BaseException):
        pass

    def killed(now: Step) -> None:
        if now.done == 1:
            raise Killed

    out = tmp_path / "out"
    with pytest.raises(Killed):
        ternarize(source, out, plan=GPTQ, calibration=own(), progress=killed)

    def again(*_args: Any, **_options: Any) -> Any:
        raise AssertionError("the text is there")

    monkeypatch.setattr(run, "write_text", again)
    kept = out / "trilens-calibration" / "own-text.json"
    content = kept.read_bytes()
    kept.write_bytes(content.replace(b"1", b"2", 1))
    with pytest.raises(CorruptFileError, match="own-text"):
        run._written(None, tokenizer, own(), None, run.Store(kept.parent), None)
    kept.write_bytes(content)
    ternarize(source, out, plan=GPTQ, calibration=own())
    for path in (tmp_path / "whole").iterdir():
        assert (out / path.name).read_bytes() == path.read_bytes()
    with pytest.raises(UsageError, match="another calibration text"):
        ternarize(source, out, plan=GPTQ, calibration=own(seed=5))


def test_half_of_a_mixture_is_the_models_own() -> None:
    tokenizer = load_tokenizer(demo_path())
    both = Calibration(DOCUMENTS, own_text=OwnText(), tokens=1024, length=64)
    rows, apart = both.own_rows(64)
    assert (rows, apart) == (8, 1)
    marks = [torch.full((64,), 7) for _ in range(rows + apart)]
    drawn = draw(both, tokenizer, longest=None, written=marks)
    assert sum(int((block == 7).all()) for block in drawn.blocks) == 8
    assert 1024 - 64 <= drawn.n_tokens <= 1024
    assert [text.own_kind for text in drawn.apart] == [True, True]
    alone = Calibration(own_text=OwnText(), tokens=1000, length=64)
    varied = [torch.arange(64) + i for i in range(sum(alone.own_rows(64)))]
    drawn = draw(alone, None, longest=None, written=varied)
    assert drawn.n_tokens == 1000 and len(drawn.apart) == 1
    with pytest.raises(TextError, match="that the model wrote itself"):
        draw(alone, None, longest=None, written=marks * 2)


def test_a_calibrated_rule_without_a_text_takes_the_models_own(tmp_path: Path) -> None:
    report = ternarize(tiny("mamba", tmp_path / "src"), tmp_path / "dry", plan=GPTQ, dry_run=True)
    assert report.dry_run
    source = encoder(tmp_path / "bert")
    for dry_run in (True, False):
        with pytest.raises(GenerationError, match=r"Bert\w+ cannot write .* --calibrate TEXT"):
            ternarize(source, tmp_path / "out", plan=GPTQ, dry_run=dry_run)
    assert not (tmp_path / "out").exists()
    with torch.device("meta"), pytest.raises(GenerationError, match="T5"):
        check_writes(T5ForConditionalGeneration(T5Config()))


def test_a_model_that_overflows_is_named(tmp_path: Path) -> None:
    source = tiny("llama", tmp_path / "src")
    model = load(source)
    model.lm_head.weight.data[3] = float("nan")
    with pytest.raises(NonFiniteError, match="own calibration text"):
        write_text(model, None, PLAIN, rows=2, length=6, seed=0)
    model.save_pretrained(source)
    with pytest.raises(AnatomyError, match="gives NaN on a plain prompt"):
        ternarize(source, tmp_path / "out", plan=GPTQ, calibration=own())
    assert not (tmp_path / "out").exists()


def test_a_model_that_cannot_be_calibrated_writes_nothing_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its blocks depend on more than their arguments, which is known first."""

    def written(*_args: Any, **_options: Any) -> Any:
        raise AssertionError("the text was written")

    monkeypatch.setattr(run, "write_text", written)
    source = tiny("llama", tmp_path / "src")

    def refused(*_args: Any) -> None:
        raise AnatomyError("cannot be run one by one")

    monkeypatch.setattr(run.BlockRunner, "_prove", refused)
    with pytest.raises(AnatomyError, match="one by one"):
        ternarize(source, tmp_path / "out", plan=GPTQ, calibration=own())
    assert not (tmp_path / "out").exists()


def test_bad_options() -> None:
    for heat in (0, -1.0, float("inf"), float("nan"), "hot", True):
        with pytest.raises(ValueRangeError, match="temperature"):
            OwnText(temperature=heat)  # type: ignore[arg-type]
    for prompts in ("text", ("",), (3,)):
        with pytest.raises(UsageError, match="prompts"):
            OwnText(prompts=prompts)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="own_text"):
        Calibration(own_text="self")  # type: ignore[arg-type]
    with pytest.raises(TextError, match="empty"):
        Calibration()
    with pytest.raises(UsageError, match="'code'"):
        Calibration(DOCUMENTS, (CODE, CODE))
    with pytest.raises(UsageError, match="fast, default, max"):
        Calibration(DOCUMENTS, effort="much")  # type: ignore[arg-type]
    assert Calibration(DOCUMENTS, effort="fast").budget < Calibration(DOCUMENTS).budget
    assert Calibration.from_source("self").own_text == OwnText()
    prompted = Calibration(own_text=OwnText(prompts=("a",)))
    assert prompted.to_dict() != Calibration(own_text=OwnText()).to_dict()


def test_the_cost_is_told(tmp_path: Path) -> None:
    job = read_job(tiny("llama", tmp_path / "src"), TernaryPlan("best", group_size=16))
    small = cost_of(job, own(), rate=1e9)
    assert small.written_tokens == 576 and small.tokens == 512 and small.evaluation_tokens == 64
    # Nine rows are written at once, one token after the other, and the continuations after that.
    layers = load(tmp_path / "src").config.num_hidden_layers
    steps = 64 + 2 * 48
    written = small.seconds - sum(small.operations.values()) / 1e9
    assert written == pytest.approx(layers * steps * 3e-3)
    weights = sum(p.numel() for p in load(tmp_path / "src").parameters())
    assert small.weights == weights
    assert small.operations["writing the text"] == 2 * weights * 576
    assert {row["part"] for row in small.table()} >= {"fit of all blocks", "coding"}
    assert f"{weights:,} weights" in small.sentence and "576" in small.sentence
    # Of the same text, the efforts differ by their passes over it.
    most, default = find_effort("max").fit, find_effort("default").fit
    assert most.whole_passes == default.trit_passes == 0
    more = cost_of(job, own(effort="max"), rate=1e9).operations["fit of all blocks"]
    of_a_pass = small.operations["fit of all blocks"] / default.whole_passes
    assert more == most.trit_passes * of_a_pass
    assert cost_of(job, own()).seconds > 0
    with pytest.raises(GenerationError):
        cost_of(read_job(encoder(tmp_path / "bert"), GPTQ), own())


def test_one_graph_and_rounded_products_are_foreseen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model whose blocks fit in one graph runs once less; products of moving trits are fast."""
    job = read_job(tiny("llama", tmp_path / "src"), TernaryPlan("best", group_size=16))
    options = own(effort="max")
    once = 2 * cost_of(job, options, rate=1e9).weights * options.budget
    passes = find_effort("max").fit.trit_passes
    for small, times in ((math.inf, 3), (0, 4)):
        monkeypatch.setattr(chain, "_SMALL", small)
        found = cost_of(job, options, rate=1e9).operations["fit of all blocks"]
        assert found == times * passes * once

    rates = {torch.float32: 1e9, torch.bfloat16: 4e9}
    monkeypatch.setattr(cost, "_measured_rate", lambda dtype, _: rates[dtype])
    monkeypatch.setattr(cost, "multiplies_bfloat16", lambda _: False)
    wide = cost_of(job, options)
    assert wide == cost_of(job, options, rate=cost._REACHED * 1e9)
    default = cost_of(job, own())
    monkeypatch.setattr(cost, "multiplies_bfloat16", lambda _: True)
    saved = wide.operations["fit of all blocks"] * (1 / 1e9 - 1 / 4e9)
    assert cost_of(job, options).seconds == pytest.approx(wide.seconds - saved)
    assert cost_of(job, own()) == default  # no trits move


def test_blocks_are_all_but_embeddings(tmp_path: Path) -> None:
    model = load(tiny("llama", tmp_path / "src"))
    outside = model.model.embed_tokens.weight.numel()
    outside += 0 if model.config.tie_word_embeddings else model.lm_head.weight.numel()
    inside = sum(p.numel() for p in model.model.layers.parameters())
    norm = model.model.norm.weight.numel()
    assert cost._block_weights(model) == inside + norm
    assert inside + norm + outside == sum(p.numel() for p in model.parameters())


def test_the_command(tmp_path: Path) -> None:
    source = tiny("llama", tmp_path / "src")
    text = tmp_path / "text.jsonl"
    text.write_text("\n".join(json.dumps({"text": document}) for document in DOCUMENTS[:1]))
    small = ["--rule", "gptq", "--max-tokens", "512", "--seq-length", "64"]
    base = ["ternarize", str(source), *small]
    given = ["--evaluate", f"mine={text}", "--evaluate", str(text), "--calibrate", "self"]
    done = CliRunner().invoke(app, [*base, *given, "-o", str(tmp_path / "a")])
    assert done.exit_code == 0, done.output
    assert "576 of them written by the model itself" in done.stderr
    assert "about" in done.stderr
    damage = validate(tmp_path / "a").damage
    assert damage is not None
    assert [t.name for t in damage.texts][:2] == ["mine", "text.jsonl"]
    default = CliRunner().invoke(app, [*base, "-o", str(tmp_path / "b"), "--format", "json"])
    assert default.exit_code == 0 and json.loads(default.stdout)["damage"]["own_text"]
    assert "--calibrate self" in (tmp_path / "b" / "README.md").read_text("utf-8")
    bert = encoder(tmp_path / "bert")
    refused = CliRunner().invoke(
        app, ["ternarize", str(bert), "--rule", "gptq", "-o", str(tmp_path / "c")]
    )
    assert refused.exit_code == 2 and refused.stderr.count("\n") == 1
    assert "--calibrate TEXT" in refused.stderr
    wrong = CliRunner().invoke(app, [*base, "--evaluate", "a=", "-o", str(tmp_path / "c")])
    assert wrong.exit_code == 2 and "NAME=TEXT" in wrong.stderr
