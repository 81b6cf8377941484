"""The pipeline: what it writes, bit for bit, what it refuses, and how it resumes."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import RepoCard
from safetensors.torch import load_file, save_file

import trilens
from checkpoint_cases import load, saved, tensors
from tinymodels import prompt_ids
from trilens.checkpoint import pipeline
from trilens.checkpoint.format.names import part_name
from trilens.checkpoint.format.plan import TernaryPlan
from trilens.checkpoint.format.report import TernaryReport
from trilens.checkpoint.pipeline import ternarize
from trilens.checkpoint.validation import validate
from trilens.errors import (
    ConfigError,
    CorruptFileError,
    ModelNotFoundError,
    NonFiniteError,
    UnsafeFormatError,
    UsageError,
    WriteError,
)
from trilens.io import atomic
from trilens.io.weight_files import GUARD_NAME
from trilens.progress import Step
from trilens.ternary.quantize import PerLayerQuant

PLANS = {
    "absmean": TernaryPlan(),
    "exact rows": TernaryPlan("exact", per="row"),
    "groups": TernaryPlan("twn", group_size=24, scale_dtype="float16"),
    "asymmetric": TernaryPlan("asymmetric", group_size=32),
    "planes": TernaryPlan("planes", per="row"),
}


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def decoded(found: dict[str, torch.Tensor], base: str, cols: int, plan: TernaryPlan) -> np.ndarray:
    """Ŵ of a stored matrix in float32, from its parts, by NumPy alone."""

    def plane(prefix: str) -> np.ndarray:
        codes = found[part_name(base, f"{prefix}codes")].numpy()
        digits = np.stack([codes >> shift & 3 for shift in (0, 2, 4, 6)], axis=-1)
        trits = digits.reshape(*codes.shape[:-1], -1)[..., :cols].astype(np.int8) - 1
        return trits.astype(np.float32) * spread(f"{prefix}scale")

    def spread(part: str) -> np.ndarray:
        values = found[part_name(base, part)].numpy()
        return (
            np.repeat(values, plan.group_size, axis=-1)[..., :cols] if plan.group_size else values
        )

    values = plane("")
    if plan.rule == "planes":
        values = values + plane("second_")
    return values + spread("offset") if plan.rule == "asymmetric" else values


@pytest.mark.parametrize(
    ("model_type", "name"),
    [
        *((model_type, name) for model_type in ("llama", "gpt2", "gpt_oss") for name in PLANS),
        ("mixtral", "groups"),
        ("granitemoe", "exact rows"),
    ],
)
def test_files_hold_the_quantizers_matrices(model_type: str, name: str, tmp_path: Path) -> None:
    plan = PLANS[name]
    source = saved(model_type, tmp_path / "src")
    report = ternarize(source, tmp_path / "out", plan=plan)
    before, after = tensors(source), tensors(tmp_path / "out")
    assert {tensor.name for tensor in report.tensors} == set(before)
    for tensor in report.tensors:
        weight = before[tensor.name]
        turned = model_type == "gpt2" or (model_type == "gpt_oss" and weight.ndim == 3)
        if tensor.outcome == "kept":
            assert torch.equal(after[tensor.name], weight)
            continue
        matrices = weight if weight.ndim == 3 else weight[None]
        matrices = matrices.transpose(-1, -2) if turned else matrices
        ours = decoded(after, tensor.packed_as, matrices.shape[-1], plan)
        error = energy = 0.0
        for index, matrix in enumerate(matrices):
            quant = PerLayerQuant.quantize(
                matrix,
                "w",
                rule=plan.rule,
                group_size=plan.group_size,
                per=plan.per,
                scale_dtype=plan.scale_dtype,
            )
            wanted = quant.reconstruct().numpy()
            assert np.array_equal(ours[index] if weight.ndim == 3 else ours, wanted)
            error += float(((matrix.double().numpy() - wanted) ** 2).sum())
            energy += float((matrix.double() ** 2).sum())
        assert tensor.decoded_exactly
        assert tensor.outcome == "ternary"
        assert tensor.relative_error == pytest.approx(error / energy, rel=1e-9)
    assert len(report.coded) > 3
    assert not report.fallbacks
    assert report.size_bytes == sum(t.numel() * t.element_size() for t in after.values())
    assert validate(tmp_path / "out") == report


def test_the_model_computes_with_these_matrices(tmp_path: Path) -> None:
    source = saved("llama", tmp_path / "src")
    report = ternarize(source, tmp_path / "out", plan=TernaryPlan("exact", group_size=16))
    dense = load(source)
    with torch.no_grad():
        for tensor in report.coded:
            weight = dense.get_parameter(tensor.name)
            quant = PerLayerQuant.quantize(weight, "w", rule="exact", group_size=16)
            weight.copy_(quant.reconstruct())
        ids = prompt_ids("llama", 20)
        assert torch.equal(load(tmp_path / "out")(ids).logits, dense(ids).logits)


def test_the_output_is_complete(tmp_path: Path) -> None:
    source = saved("llama", tmp_path / "src")
    own = "---\nlicense: mit\nbase_model: owner/first\nextra: [1]\n---\nthe source's own card"
    (source / "README.md").write_text(own)
    (source / "training.json").write_text('{"heldout_loss": 1.0}')
    (source / "LICENSE").write_text("as it is")
    (source / "sub").mkdir()
    report = ternarize(source, tmp_path / "a" / "out", plan=TernaryPlan(keep=["down_proj"]))
    out = tmp_path / "a" / "out"
    assert set(content(out)) == {
        "LICENSE",
        "README.md",
        "README.source.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer_config.json",
        "trilens-ternary.json",
    }
    for name in ("generation_config.json", "tokenizer_config.json"):
        assert (out / name).read_bytes() == (source / name).read_bytes()
    config = json.loads((out / "config.json").read_text())
    section = config.pop("quantization_config")
    assert config.pop("transformers_weights") == GUARD_NAME
    assert config == json.loads((source / "config.json").read_text())
    assert section["quant_method"] == "trilens"
    assert len(section["layers"]) == len(report.coded)
    card = (out / "README.md").read_text()
    for row in report.table():
        assert f"`{row['name']}`" in card
    assert r"the plan keeps 'down\_proj'" in card
    assert (out / "README.source.md").read_text() == own
    assert RepoCard(card).data.to_dict() == {
        "license": "mit",
        "base_model": "owner/first",
        "base_model_relation": "quantized",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["ternary", "trilens"],
    }
    assert "Loads only after `import trilens`" in card.split("---")[2].split("\n\n")[2]
    assert "pip install trilens" in card
    assert "\ntrilens ternarize src -o OUT --rule absmean --ignore down_proj\n" in card
    assert trilens.__version__ in card
    assert str(tmp_path) not in card
    assert {t.name.split(".")[-2] for t in report.fallbacks} == {"down_proj"}
    assert TernaryReport.from_dict(json.loads(json.dumps(report.to_dict()))) == report


def test_sizes_and_bits(tmp_path: Path) -> None:
    source = saved("llama", tmp_path / "src", dtype=torch.bfloat16)
    dry = ternarize(source, tmp_path / "out", plan=TernaryPlan(group_size=32), dry_run=True)
    assert not (tmp_path / "out").exists()
    assert dry.dry_run
    assert {tensor.outcome for tensor in dry.tensors} == {"planned", "kept"}
    assert "nothing was written" in dry.verdict
    real = ternarize(source, tmp_path / "out", plan=TernaryPlan(group_size=32))
    assert [t.size_bytes for t in real.tensors] == [t.size_bytes for t in dry.tensors]
    assert all(tensor.bits_per_weight == 2 + 32 / 32 for tensor in real.coded)
    assert all(t.bits_per_weight == 16 for t in real.tensors if t.outcome == "kept")


def test_weights_that_are_ternary_already_are_kept_exactly(tmp_path: Path) -> None:
    source = saved("llama", tmp_path / "src")
    first = ternarize(source, tmp_path / "one")
    assert "usually unusable" in first.verdict
    load(tmp_path / "one").dequantize().save_pretrained(tmp_path / "dense")
    second = ternarize(tmp_path / "dense", tmp_path / "two", plan=TernaryPlan())
    assert {tensor.outcome for tensor in second.coded} == {"already ternary"}
    assert {tensor.relative_error for tensor in second.coded} == {0.0}
    assert "kept exactly" in second.verdict
    one, two = tensors(tmp_path / "one"), tensors(tmp_path / "two")
    assert set(one) == set(two)
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_no_verdict_calls_a_damaged_model_fine(tmp_path: Path) -> None:
    source = saved("llama", tmp_path / "src")
    for name, plan in PLANS.items():
        report = ternarize(source, tmp_path / name, plan=plan)
        assert "usually unusable" in report.verdict
        assert "usually unusable" in (tmp_path / name / "README.md").read_text()


def test_shards_keep_their_names(tmp_path: Path) -> None:
    source = saved("llama", tmp_path / "src", shard_size="150KB")
    names = sorted(path.name for path in source.glob("*.safetensors"))
    assert len(names) > 2
    ternarize(source, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").glob("*.safetensors")) == names
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    stored = {n: p.name for p in (tmp_path / "out").glob("*.safetensors") for n in load_file(p)}
    assert index["weight_map"] == stored
    assert load(tmp_path / "out")(prompt_ids("llama", 5)).logits.isfinite().all()


class Killed(BaseException):
    """The process ends here: nothing after this line runs."""


def kill_at(step: int, patch: pytest.MonkeyPatch) -> list[int]:
    """End the run at its n-th write, flush or rename, without any cleaning up."""
    count = [0]

    def die(file):
        if file._file >= 0:
            os.close(file._file)
            file._file = -1

    def dying(real):
        def call(*arguments, **options):
            count[0] += 1
            if count[0] == step:
                raise Killed
            return real(*arguments, **options)

        return call

    patch.setattr(atomic.os, "pwrite", dying(os.pwrite))
    patch.setattr(atomic.os, "fsync", dying(os.fsync))
    patch.setattr(Path, "replace", dying(Path.replace))
    patch.setattr(atomic.AtomicFile, "close", die)
    return count


def test_killed_anywhere_it_resumes_to_the_same_bytes(tmp_path: Path) -> None:
    source = saved("llama", tmp_path / "src", shard_size="150KB")
    with pytest.MonkeyPatch.context() as patch:
        count = kill_at(-1, patch)
        ternarize(source, tmp_path / "whole")
        steps = count[0]
    wanted = content(tmp_path / "whole")
    rng = np.random.default_rng(0)
    last = range(steps - 16, steps + 1)  # the small files at the end, one by one
    for step in sorted({*rng.integers(1, steps, 16).tolist(), 1, 2, 3, *last}):
        out = tmp_path / f"killed at {step}"
        with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
            kill_at(int(step), patch)
            ternarize(source, out)
        if "trilens-ternary.json" in content(out):
            validate(out)
        else:
            with pytest.raises(ModelNotFoundError, match=r"has no trilens-ternary\.json"):
                validate(out)
        ternarize(source, out)
        assert content(out) == wanted, f"killed at step {step}"


def test_a_finished_run_is_not_done_again(tmp_path: Path) -> None:
    source = saved("llama", tmp_path / "src")
    first = ternarize(source, tmp_path / "out")
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    assert ternarize(source, tmp_path / "out") == first
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == stamps


def test_shards_that_are_whole_are_not_written_again(tmp_path: Path) -> None:
    source = saved("llama", tmp_path / "src", shard_size="150KB")
    seen: list[str] = []

    def stop(step: Step) -> None:
        assert step.done == len(seen) + 1
        seen.append(step.what)
        if len(seen) == 30:
            raise Killed

    with pytest.raises(Killed):
        ternarize(source, tmp_path / "out", progress=stop)
    again: list[str] = []
    report = ternarize(source, tmp_path / "out", progress=lambda step: again.append(step.what))
    assert 0 < len(again) < len(report.tensors)
    assert set(again) | set(seen) == {tensor.name for tensor in report.tensors}


def test_another_order_is_refused(tmp_path: Path) -> None:
    source = saved("llama", tmp_path / "src", shard_size="150KB")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        kill_at(60, patch)
        ternarize(source, tmp_path / "unfinished")
    shutil.copytree(source, tmp_path / "done-src")
    ternarize(tmp_path / "done-src", tmp_path / "done")
    for out in ("unfinished", "done"):
        with pytest.raises(UsageError, match=r"another plan \(rule\)"):
            ternarize(source, tmp_path / out, plan=TernaryPlan("twn"))
    shard = sorted(source.glob("*.safetensors"))[0]
    changed = load_file(shard)
    next(iter(changed.values()))[0] += 1
    save_file(changed, shard, metadata={"format": "pt"})
    for out in ("unfinished", "done"):
        with pytest.raises(UsageError, match=rf"another source files \({shard.name}\)"):
            ternarize(source, tmp_path / out)


def test_a_shard_that_rotted_since_is_written_again(tmp_path: Path) -> None:
    source = saved("llama", tmp_path / "src", shard_size="150KB")
    ternarize(source, tmp_path / "whole")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(pipeline, "write_side_files", lambda *_: (_ for _ in ()).throw(Killed))
        ternarize(source, tmp_path / "out")
    shard = sorted((tmp_path / "out").glob("*.safetensors"))[1]
    raw = bytearray(shard.read_bytes())
    raw[-1] ^= 1
    shard.write_bytes(raw)
    ternarize(source, tmp_path / "out")
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_refused_before_anything_is_written(tmp_path: Path) -> None:
    source = saved("llama", tmp_path / "src")
    out = tmp_path / "out"
    ternarize(source, tmp_path / "ternary")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled" / "config.json").write_bytes((source / "config.json").read_bytes())
    (tmp_path / "pickled" / "pytorch_model.bin").write_bytes(b"")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    cases = [
        (tmp_path / "full", out, {}, ConfigError, "give the directory of a transformers model"),
        (tmp_path / "adapter", out, {}, ConfigError, "merge it into its base model"),
        (source, out, {"format": "tern"}, UsageError, "tern"),
        (source, out, {"plan": TernaryPlan(keep=["x9"])}, UsageError, "x9"),
        (source, out, {"plan": TernaryPlan(keep=["proj"])}, UsageError, "nothing is left"),
        (tmp_path / "ternary", out, {}, UsageError, "quantized already"),
        (tmp_path / "nowhere", out, {}, ModelNotFoundError, "nowhere"),
        (tmp_path / "pickled", out, {}, UnsafeFormatError, "pickled"),
        (source, source, {}, UsageError, "source itself"),
        (source, tmp_path / "full", {}, UsageError, "not empty"),
        (source, source / "config.json", {}, WriteError, "config.json"),
    ]
    before = content(source)
    for src, dst, options, error, words in cases:
        with pytest.raises(error, match=words):
            ternarize(src, dst, **options)
    assert content(source) == before
    assert not out.exists()
    assert content(tmp_path / "full") == {"thesis.txt": b"mine"}


@pytest.mark.parametrize(
    "name", ["../model.safetensors", "/etc/model.safetensors", "a\\b.safetensors"]
)
def test_hostile_shard_names_are_refused_before_opening(name: str, tmp_path: Path) -> None:
    source = saved("llama", tmp_path / "src")
    (source / "model.safetensors").rename(tmp_path / "m.safetensors")
    index = {"weight_map": {"model.norm.weight": name}}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CorruptFileError, match="only plain"):
        ternarize(source, tmp_path / "out")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_no_numbers_are_named(value: float, tmp_path: Path) -> None:
    source = saved("llama", tmp_path / "src")
    path = source / "model.safetensors"
    changed = load_file(path)
    changed["model.layers.1.mlp.up_proj.weight"][3, 5] = value
    save_file(changed, path, metadata={"format": "pt"})
    with pytest.raises(NonFiniteError, match=r"layers\.1\.mlp\.up_proj.*\(3, 5\)"):
        ternarize(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    # The way out that the error names works.
    ternarize(source, tmp_path / "kept", plan=TernaryPlan(keep=[r"layers\.1\.mlp\.up_proj"]))


def test_zeros_and_a_missing_dtype(tmp_path: Path) -> None:
    source = saved("llama", tmp_path / "src", dtype=torch.bfloat16)
    path = source / "model.safetensors"
    changed = load_file(path)
    changed["model.layers.0.mlp.up_proj.weight"].zero_()
    save_file(changed, path, metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    del config["dtype"]
    (source / "config.json").write_text(json.dumps(config))
    report = ternarize(source, tmp_path / "out")
    zero = next(t for t in report.coded if t.name == "model.layers.0.mlp.up_proj.weight")
    assert (zero.relative_error, zero.sparsity) == (0.0, 1.0)
    assert load(tmp_path / "out").dtype == torch.bfloat16


def test_a_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = saved("llama", tmp_path / "src")
    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(pipeline.shutil, "disk_usage", lambda _: usage._replace(free=1000))
        with pytest.raises(WriteError, match="1000 bytes of free space"):
            ternarize(source, tmp_path / "out")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(atomic.os, "pwrite", full)
        with pytest.raises(WriteError, match="No space left"):
            ternarize(source, tmp_path / "out")
    assert not list((tmp_path / "out").glob(".*"))
    ternarize(source, tmp_path / "out")


def test_a_refusal_after_whole_shards_leaves_nothing(tmp_path: Path) -> None:
    source = saved("llama", tmp_path / "src", shard_size="150KB")
    path = sorted(source.glob("*.safetensors"))[-1]
    changed = load_file(path)
    name = next(name for name, values in changed.items() if values.ndim == 2 and "layers" in name)
    changed[name][0, 0] = float("nan")
    save_file(changed, path, metadata={"format": "pt"})
    (tmp_path / "there").mkdir()
    for out in ("new", "there"):
        with pytest.raises(NonFiniteError):
            ternarize(source, tmp_path / out)
    assert not (tmp_path / "new").exists()
    assert not list((tmp_path / "there").iterdir())


def change_at(step_name: str, change):
    """A progress callback that changes the source once, as a tensor was written."""
    done: list[bool] = []

    def progress(step: Step) -> None:
        if step_name in step.what and not done:
            done.append(True)
            change()

    return progress


def flip(path: Path, place: int = -1) -> None:
    with path.open("r+b") as file:
        file.seek(place, 2)
        byte = file.read(1)
        file.seek(place, 2)
        file.write(bytes([byte[0] ^ 1]))


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def replace_by_a_copy(path: Path) -> None:
    shutil.copy(path, path.with_suffix(".copy"))
    path.with_suffix(".copy").replace(path)


@pytest.mark.parametrize("change", [flip, truncate, replace_by_a_copy])
@pytest.mark.parametrize("shard_size", ["150KB", "50GB"])
def test_a_source_that_changes_meanwhile_is_refused(
    tmp_path: Path, change, shard_size: str
) -> None:
    source = saved("llama", tmp_path / "src", shard_size=shard_size)
    last = sorted(source.glob("*.safetensors"))[-1]
    stamps = last.stat()

    def once() -> None:
        change(last)
        os.utime(last, ns=(stamps.st_atime_ns, stamps.st_mtime_ns))

    with pytest.raises(CorruptFileError, match=r"changed while it was read|cut off while"):
        ternarize(source, tmp_path / "out", progress=change_at("layers.0", once))
    assert not (tmp_path / "out" / "trilens-ternary.json").exists()


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_small_files_that_change_meanwhile_are_refused(tmp_path: Path, name: str) -> None:
    source = saved("llama", tmp_path / "src")

    def change() -> None:
        text = json.loads((source / name).read_text())
        (source / name).write_text(json.dumps({**text, "initializer_range": 0.5}))

    with pytest.raises(CorruptFileError, match=rf"{name} changed while it was read"):
        ternarize(source, tmp_path / "out", progress=change_at("layers.0", change))
    assert not (tmp_path / "out" / "trilens-ternary.json").exists()


def test_one_run_alone_writes_to_a_directory(tmp_path: Path) -> None:
    source = saved("llama", tmp_path / "src")
    with (
        atomic.locked_folder(tmp_path / "out"),
        pytest.raises(WriteError, match="another run is writing it"),
    ):
        ternarize(source, tmp_path / "out")
    ternarize(source, tmp_path / "out")


def journal_of_a_killed_run(source: Path, out: Path) -> Path:
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(pipeline, "write_side_files", lambda *_: (_ for _ in ()).throw(Killed))
        ternarize(source, out)
    return out / "trilens-unfinished.json"


def test_a_journal_that_was_tampered_with(tmp_path: Path) -> None:
    source = saved("llama", tmp_path / "src", shard_size="150KB")
    ternarize(source, tmp_path / "whole")
    journal = journal_of_a_killed_run(source, tmp_path / "out")
    text = journal.read_text()
    for at in np.random.default_rng(0).integers(0, len(text), 40):
        data = bytearray(text.encode())
        data[at] ^= 1
        journal.write_bytes(data)
        with pytest.raises((CorruptFileError, UsageError)):
            ternarize(source, tmp_path / "out")
    # By a hand that left no hash: values of another kind are made again.
    values = json.loads(text)
    del values["sha256"]
    for bad in ("1", None, [], -1):
        for entry in values["shards"].values():
            entry["tensors"][0]["size_bytes"] = bad
        journal.write_text(json.dumps(values))
        shutil.copytree(tmp_path / "out", tmp_path / f"again {bad}")
        ternarize(source, tmp_path / f"again {bad}")
        assert content(tmp_path / f"again {bad}") == content(tmp_path / "whole")


def test_a_disk_that_lies_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = saved("llama", tmp_path / "src")
    real = os.pwrite
    count = [0]

    def lying(file, data, offset):
        count[0] += 1
        return real(file, bytes(len(data)) if count[0] == 9 else data, offset)

    monkeypatch.setattr(atomic.os, "pwrite", lying)
    with pytest.raises(WriteError, match="check the disk"):
        ternarize(source, tmp_path / "out")


def test_tensors_that_are_not_aligned_are_read(tmp_path: Path) -> None:
    """Headers of any length are legal; numbers then lie at odd places."""
    source = saved("llama", tmp_path / "src")
    path = source / "model.safetensors"
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    path.write_bytes(
        (length + 1).to_bytes(8, "little") + raw[8 : 8 + length] + b" " + raw[8 + length :]
    )
    shifted = ternarize(source, tmp_path / "shifted")
    path.write_bytes(raw)
    assert ternarize(source, tmp_path / "straight") == shifted
    weights = [content(tmp_path / name)["model.safetensors"] for name in ("shifted", "straight")]
    assert weights[0] == weights[1]


@pytest.mark.parametrize(
    "own", ["---\nlicense: [\n---\n", "---\n- 1\n---\n", "no header", "", "\xff"]
)
def test_a_source_s_card_without_a_header_is_copied(own: str, tmp_path: Path) -> None:
    source = saved("llama", tmp_path / "src")
    (source / "README.md").write_bytes(own.encode("latin-1"))
    ternarize(source, tmp_path / "out")
    assert (tmp_path / "out" / "README.source.md").read_bytes() == own.encode("latin-1")
    assert "license" not in RepoCard.load(tmp_path / "out" / "README.md").data.to_dict()
