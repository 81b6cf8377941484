"""Calibration from end to end, on tiny models of several kinds and on the demo transformer."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from calibration_cases import DOCUMENTS, SMALL, load_tokenizer, tiny
from checkpoint_cases import load, tensors
from gguf_cases import saved_with_tokenizer
from trilens.checkpoint import Calibration, TernaryPlan, ternarize, validate
from trilens.checkpoint.calibration import run
from trilens.checkpoint.calibration.blocks import BlockRunner
from trilens.checkpoint.calibration.options import draw
from trilens.checkpoint.calibration.store import Store
from trilens.checkpoint.format.damage import Damage
from trilens.checkpoint.format.matrix_plan import MatrixPlan
from trilens.checkpoint.format.report import TensorReport
from trilens.checkpoint.gguf import validate_gguf
from trilens.checkpoint.job import read_job
from trilens.cli.main import app
from trilens.demo import demo_path
from trilens.errors import CorruptFileError, DamageError, NonFiniteError, TextError, UsageError
from trilens.evaluation.perplexity import measure_perplexity
from trilens.lens.proof import prove
from trilens.models.stacks import only_stack
from trilens.progress import Step


def calibration(**changes: Any) -> Calibration:
    return Calibration(DOCUMENTS, **{**SMALL, **changes})


@pytest.fixture(scope="module")
def small_demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The demo transformer's first two layers."""
    folder = tmp_path_factory.mktemp("small") / "src"
    model = load(demo_path("transformer"))
    model.model.layers = model.model.layers[:2]
    model.config.num_hidden_layers = 2
    model.config.layer_types = None
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(demo_path("transformer") / name, folder / name)
    return folder


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("rule", ["exact", "gptq", "best_planes"])
def test_the_written_model_has_the_damage_that_was_told(
    rule: Any, small_demo: Path, tmp_path: Path
) -> None:
    """The measured perplexities are those of the checkpoints as transformers loads them."""
    plan = TernaryPlan(rule, group_size=128, only=("self_attn",), rotate=rule == "gptq")
    report = ternarize(small_demo, tmp_path / "out", plan=plan, calibration=calibration())
    assert report.damage is not None
    tokenizer = load_tokenizer(small_demo)
    blocks = draw(calibration(), tokenizer, longest=512).evaluation
    for folder, found in (
        (small_demo, report.damage.perplexity_before),
        (tmp_path / "out", report.damage.perplexity_after),
    ):
        wanted = measure_perplexity(load(folder, dtype=torch.float32), blocks).value
        assert found == pytest.approx(wanted, rel=1e-4)
    assert validate(tmp_path / "out") == report
    assert not (tmp_path / "out" / "trilens-calibration").exists()
    assert all(tensor.output_error is not None for tensor in report.coded)
    fitted = [tensor.name for tensor in report.tensors if tensor.fitted]
    before, after = tensors(small_demo), tensors(tmp_path / "out")
    changed = [n for n in before if n in after and not torch.equal(before[n], after[n])]
    assert sorted(fitted) == sorted(changed)
    assert rule.startswith("best") or not fitted


def test_output_errors_on_text_that_nothing_was_fitted_to(small_demo: Path, tmp_path: Path) -> None:
    """Of a matrix whose inputs are the dense model's own, on the held-out blocks alone."""
    plan = TernaryPlan("gptq", group_size=128, only=("self_attn",))
    report = ternarize(small_demo, tmp_path / "out", plan=plan, calibration=calibration())
    blocks = draw(calibration(), load_tokenizer(small_demo), longest=512).evaluation
    dense = load(small_demo, dtype=torch.float32)
    coded = load(tmp_path / "out", dtype=torch.float32)
    path = "model.layers.0.self_attn.q_proj"
    inputs: list[torch.Tensor] = []
    hook = dense.get_submodule(path).register_forward_pre_hook(
        lambda _module, args: inputs.append(args[0].reshape(-1, args[0].shape[-1]).double())
    )
    with torch.no_grad():
        for block in blocks:
            dense(input_ids=block.reshape(1, -1))
    hook.remove()
    x = torch.cat(inputs)
    w, w_hat = (m.get_submodule(path).weight.detach().double() for m in (dense, coded))
    wanted = float((x @ (w_hat - w).T).square().sum() / (x @ w.T).square().sum())
    errors = {tensor.name: tensor for tensor in report.coded}
    found = errors[f"{path}.weight"]
    assert found.output_error_held_out == pytest.approx(wanted, rel=1e-4)
    assert all(tensor.output_error_held_out != tensor.output_error for tensor in report.coded)
    assert report.damage is not None
    assert report.damage.block_length == max(block.numel() for block in blocks)
    assert f"in blocks of up to {report.damage.block_length} that were not" in report.verdict
    assert "| output error | held out |" in (tmp_path / "out" / "README.md").read_text("utf-8")
    older = {
        k: v
        for k, v in json.loads(json.dumps(asdict(found))).items()
        if k != "output_error_held_out"
    }
    assert TensorReport.from_dict(older) == replace(found, output_error_held_out=None)
    damage = {k: v for k, v in report.damage.to_dict().items() if k != "block_length"}
    assert Damage.from_dict(damage) == replace(report.damage, block_length=None)


def test_better_rules_leave_less_error(small_demo: Path, tmp_path: Path) -> None:
    """The relative error of the last block's output over the text."""
    errors = {}
    for rule in ("exact", "gptq", "best"):
        plan = TernaryPlan(rule, group_size=128, only=("self_attn",))  # type: ignore[arg-type]
        folder = tmp_path / rule
        store, _ = run.run_calibration(read_job(small_demo, plan), calibration(), folder)
        last = store.records[-1]
        errors[rule] = last.error
        if rule.startswith("best"):
            assert last.error_before_fit is not None and last.error < last.error_before_fit
        assert [record.index for record in Store(folder).records] == [0, 1]
    assert 2 * errors["best"] < errors["gptq"] < errors["exact"]


def test_a_killed_run_goes_on_and_ends_in_the_same_bytes(small_demo: Path, tmp_path: Path) -> None:
    """Killed in the second block, then again while all blocks are fitted together."""
    plan = TernaryPlan("best", group_size=128, only=(r"(q|down)_proj",))
    ternarize(small_demo, tmp_path / "whole", plan=plan, calibration=calibration())

    class Killed(BaseException):
        pass

    def killed(now: Step) -> None:
        if now.done == 1 and "down_proj" in now.what:
            raise Killed

    def killed_late(now: Step) -> None:
        if "together, 5" in now.what:
            raise Killed

    out = tmp_path / "out"
    with pytest.raises(Killed):
        ternarize(small_demo, out, plan=plan, calibration=calibration(), progress=killed)
    assert sorted(path.name for path in out.iterdir()) == [
        "trilens-calibration",
        "trilens-unfinished.json",
    ]
    with pytest.raises(Killed):
        ternarize(small_demo, out, plan=plan, calibration=calibration(), progress=killed_late)
    seen: list[Step] = []
    ternarize(small_demo, out, plan=plan, calibration=calibration(), progress=seen.append)
    both, rest = [now for now in seen if now.total == 2], [now for now in seen if now.total != 2]
    assert {now.done for now in both} == {2}
    assert [now.done for now in rest] == list(range(1, rest[0].total + 1))
    assert any(now.seconds_left is not None for now in seen)
    assert content(out) == content(tmp_path / "whole")
    with pytest.raises(UsageError, match="another calibration text"):
        ternarize(small_demo, out, plan=plan, calibration=calibration(seed=5))


def flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)


def test_a_source_that_changes_meanwhile_is_refused(tmp_path: Path) -> None:
    source, out = tiny("llama", tmp_path / "src"), tmp_path / "out"

    def change(now: Step) -> None:
        if now.done == 0 and "down_proj" in now.what:
            flip(source / "model.safetensors")

    with pytest.raises(CorruptFileError, match="changed while it was read"):
        ternarize(source, out, plan=TernaryPlan("gptq"), calibration=calibration(), progress=change)
    assert not out.exists()


def test_finished_blocks_that_rotted_are_named(tmp_path: Path) -> None:
    source, out = tiny("llama", tmp_path / "src"), tmp_path / "out"
    plan = TernaryPlan("gptq")

    def stop(now: Step) -> None:
        if now.done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ternarize(source, out, plan=plan, calibration=calibration(), progress=stop)
    blocks = out / "trilens-calibration"
    for name in ("block-00000.safetensors", "block-00000.json"):
        before = (blocks / name).read_bytes()
        flip(blocks / name)
        with pytest.raises(CorruptFileError, match=r"block-00000\.\w+ is"):
            Store(blocks)
        (blocks / name).write_bytes(before)
    assert len(Store(blocks).records) == 1
    for name in ("dense-00001.f32", "ternary-00001.f32"):
        again = tmp_path / name
        shutil.copytree(out, again)
        flip(again / "trilens-calibration" / name)
        with pytest.raises(CorruptFileError, match=rf"{name} is damaged"):
            ternarize(source, again, plan=plan, calibration=calibration())
        assert not any(again.iterdir())  # the next call begins anew
    ternarize(source, out, plan=plan, calibration=calibration())


def test_entries_of_a_plan_have_rules_of_their_own(small_demo: Path, tmp_path: Path) -> None:
    names = [f"model.layers.{i}.self_attn.{m}_proj.weight" for i in (0, 1) for m in ("q", "k", "v")]
    entries = {
        names[0]: MatrixPlan("best", group_size=64),
        names[1]: MatrixPlan("gptq_planes", per="row"),
        names[2]: MatrixPlan("keep"),
        names[3]: MatrixPlan("twn"),
    }
    plan = TernaryPlan("absmean", group_size=128, only=("self_attn",), matrices=entries)
    report = ternarize(small_demo, tmp_path / "out", plan=plan, calibration=calibration())
    assert TernaryPlan.from_json(plan.to_json()) == plan == validate(tmp_path / "out").plan
    blocks = draw(calibration(), load_tokenizer(small_demo), longest=512).evaluation
    wanted = measure_perplexity(load(tmp_path / "out", dtype=torch.float32), blocks).value
    assert report.damage is not None
    assert report.damage.perplexity_after == pytest.approx(wanted, rel=1e-4)
    errors = {t.name: t.output_error for t in report.tensors}
    assert errors[names[2]] is None
    assert errors[names[1]] < errors[names[3]] and errors[names[0]] < errors[names[3]]  # type: ignore[operator]
    for name in names[:2]:
        module = load(tmp_path / "out").get_submodule(name.removesuffix(".weight"))
        assert module.group_size == plan.of(name).group_size
        assert (module.second_codes is not None) == (name == names[1])


def test_too_much_damage_is_refused_before_anything_is_written(
    small_demo: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    plan = TernaryPlan("absmean")
    with pytest.raises(DamageError, match="nothing was written"):
        ternarize(small_demo, out, plan=plan, calibration=calibration(max_perplexity_ratio=1.01))
    assert not out.exists()
    out.mkdir()  # an empty directory of the caller's stays
    with pytest.raises(DamageError):
        ternarize(small_demo, out, plan=plan, calibration=calibration(max_perplexity_ratio=1.01))
    assert not list(out.iterdir())
    report = ternarize(
        small_demo, out, plan=plan, calibration=calibration(max_perplexity_ratio=1e9)
    )
    assert report.damage is not None and report.damage.ratio > 1.01
    with pytest.raises(DamageError, match="written before"):
        ternarize(small_demo, out, plan=plan, calibration=calibration(max_perplexity_ratio=1.01))


def test_the_command_tells_the_damage(small_demo: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.jsonl"
    text.write_text("\n".join(json.dumps({"text": document}) for document in DOCUMENTS))
    common = ["ternarize", str(small_demo), "--rule", "gptq"]
    given = ["--calibrate", str(text), "--max-tokens", "512", "--seq-length", "64"]
    strict = ["ternarize", str(small_demo), *given, "--max-perplexity-ratio", "1.001"]
    refused = CliRunner().invoke(app, [*strict, "-o", str(tmp_path / "a")])
    assert refused.exit_code == 3
    # What it is going to cost, and what came of it.
    assert "Traceback" not in refused.output and refused.stderr.count("\n") == 2
    done = CliRunner().invoke(app, [*common, *given, "-o", str(tmp_path / "b")])
    assert done.exit_code == 0, done.output
    words = done.output.split()
    assert {"output", "held", "perplexity"} <= set(words) and "blocks of up to 64" in done.output
    lone = CliRunner().invoke(
        app,
        ["ternarize", str(small_demo), "-o", str(tmp_path / "c"), "--max-perplexity-ratio", "2"],
    )
    assert lone.exit_code == 2 and "--calibrate" in lone.stderr


@pytest.mark.parametrize("model_type", ["gpt2", "mixtral", "gpt_oss", "qwen3", "mamba", "gpt_neox"])
def test_other_kinds_of_models(model_type: str, tmp_path: Path) -> None:
    """Biases, Conv1D, merged and stacked experts, recurrent blocks."""
    source = tiny(model_type, tmp_path / "src")
    plan = TernaryPlan("best", group_size=16)
    report = ternarize(source, tmp_path / "out", plan=plan, calibration=calibration())
    assert report.damage is not None
    assert any(tensor.fitted for tensor in report.tensors)  # float32 vectors: every step counts
    blocks = draw(calibration(), load_tokenizer(source), longest=512).evaluation
    wanted = measure_perplexity(load(tmp_path / "out", dtype=torch.float32), blocks).value
    assert report.damage.perplexity_after == pytest.approx(wanted, rel=1e-3)
    for text in report.damage.fallbacks:
        assert "dt_proj" in text if model_type == "mamba" else "tokens of the text" in text
    validate(tmp_path / "out")


@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss"])
def test_experts_are_judged_on_the_tokens_that_reach_them(model_type: str, tmp_path: Path) -> None:
    """A router that knows no difference sends all tokens to the same two experts."""
    source = tiny(model_type, tmp_path / "src")
    model = load(source)
    for name, parameter in model.named_parameters():
        if name.endswith(("gate.weight", "router.weight", "router.bias")):
            parameter.data.zero_()
    model.save_pretrained(source)
    errors: dict[str, dict[tuple[str, int], float]] = {}
    for rule in ("exact", "gptq"):
        plan = TernaryPlan(rule, per="row")  # type: ignore[arg-type]
        store, damage = run.run_calibration(read_job(source, plan), calibration(), tmp_path / rule)
        found = [m for r in store.records for m in r.matrices if "experts" in m.name]
        reached = {(m.name, m.expert) for m in found if m.n_tokens}
        share = model.config.num_experts_per_tok / model.config.num_local_experts
        assert len(reached) == share * len(found)
        assert all(m.n_tokens in {0, 512} for m in found)
        errors[rule] = {
            (m.name, m.expert): m.output_error for m in found if m.output_error is not None
        }
        assert errors[rule].keys() == reached
        held_out = {(m.name, m.expert) for m in found if m.output_error_held_out is not None}
        assert held_out == reached
        unreached = [m for m in found if not m.n_tokens]
        if rule == "gptq":
            assert all(m.reason.startswith("0 tokens") and m.rule == "exact" for m in unreached)
            assert len(damage.fallbacks) == len(unreached)
    first = list(errors["gptq"])[: len(errors["gptq"]) // 2]
    assert sum(errors["gptq"][e] < errors["exact"][e] for e in first) == len(first)


def test_what_cannot_be_calibrated(tmp_path: Path, small_demo: Path) -> None:
    model = load(small_demo)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    model.config.tie_word_embeddings = False
    token = load_tokenizer(small_demo)(DOCUMENTS[0])["input_ids"][3]
    model.model.embed_tokens.weight.data[token] = float("nan")
    model.save_pretrained(tmp_path / "wild")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(small_demo / name, tmp_path / "wild" / name)
    with pytest.raises(NonFiniteError, match="calibration text"):
        ternarize(
            tmp_path / "wild",
            tmp_path / "out",
            plan=TernaryPlan("gptq"),
            calibration=calibration(),
        )
    short = Calibration(("too short",), (DOCUMENTS[0],))
    with pytest.raises(TextError, match="too short"):
        ternarize(small_demo, tmp_path / "out", plan=TernaryPlan("gptq"), calibration=short)
    assert not (tmp_path / "out").exists()


def test_a_gguf_file_keeps_calibrated_trits(tmp_path: Path) -> None:
    source = saved_with_tokenizer(tmp_path / "src", max_position_embeddings=64)
    plan = TernaryPlan("gptq", per="row")
    with pytest.raises(UsageError, match="directory"):
        ternarize(source, tmp_path / "m.gguf", plan=plan, format="gguf-tq2_0")
    report = ternarize(source, tmp_path / "out", plan=plan, calibration=calibration(length=32))
    written = ternarize(tmp_path / "out", tmp_path / "m.gguf", format="gguf-tq2_0")
    assert written.plan.rule == "gptq"
    assert len(written.coded) == len(report.coded)
    assert validate_gguf(tmp_path / "m.gguf").hash_checked


def test_the_runner_leaves_no_hook_behind(small_demo: Path) -> None:
    model = load(small_demo)
    anatomy = prove(model, only_stack(model)).anatomy
    runner = BlockRunner(model, anatomy)
    ids = torch.arange(20)[None]
    carried = runner.run(0, runner.block(0), runner.call(0, ids, {}))
    runner.call(1, ids, carried)
    for block in anatomy.blocks:
        assert "forward" not in block.module.__dict__
        assert not block.module._forward_pre_hooks and not block.module._forward_hooks


def test_compact_storage_of_a_calibrated_rule_loses_nothing(tmp_path: Path) -> None:
    source = tiny("llama", tmp_path / "src")
    plan = TernaryPlan("best", group_size=16, scale_dtype="float16")
    wide = ternarize(source, tmp_path / "wide", plan=plan, calibration=calibration())
    plan = replace(plan, storage="compact")
    small = ternarize(source, tmp_path / "small", plan=plan, calibration=calibration())
    validate(tmp_path / "small")
    assert small.size_bytes < wide.size_bytes
    one, two = (load(tmp_path / name).state_dict() for name in ("wide", "small"))
    assert all(torch.equal(one[name], two[name]) for name in one)
