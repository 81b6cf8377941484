"""From a checkpoint to a ternary checkpoint, tensor by tensor."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, SupportsIndex, get_args

from trilens.checkpoint.auxiliary_files import origin_of, write_side_files
from trilens.checkpoint.calibration.aftermath import gone_on, write_own_text
from trilens.checkpoint.calibration.options import Calibration
from trilens.checkpoint.calibration.own_text import OwnText, check_writes
from trilens.checkpoint.calibration.rollback import rollback
from trilens.checkpoint.calibration.store import Store
from trilens.checkpoint.coding import entries, planned
from trilens.checkpoint.dense import write_dense
from trilens.checkpoint.evaluate import Blocks, Sample, compare_checkpoints, read_samples
from trilens.checkpoint.format.damage import Damage, check_damage
from trilens.checkpoint.format.manifest import Journal, Order, manifest_bytes, read_manifest
from trilens.checkpoint.format.model_card import model_card
from trilens.checkpoint.format.names import (
    CARD_NAME,
    CONFIG_NAME,
    JOURNAL_NAME,
    MANIFEST_NAME,
)
from trilens.checkpoint.format.plan import TernaryPlan
from trilens.checkpoint.format.quantization_config import overrides
from trilens.checkpoint.format.report import TernaryReport
from trilens.checkpoint.gguf.formats import GgufFormat, find_format
from trilens.checkpoint.gguf.writer import check_place, write_gguf
from trilens.checkpoint.hf_bitnet import write_bitnet
from trilens.checkpoint.job import Job, read_job
from trilens.checkpoint.output_folder import check_folder, clean_refusal
from trilens.checkpoint.sharding import Who, write_shards
from trilens.checkpoint.validation import validate
from trilens.errors import DamageError, UsageError, ValueRangeError, WriteError
from trilens.io.atomic import locked_folder, write_bytes
from trilens.io.paths import as_path
from trilens.numbers import at_least
from trilens.progress import Progress

__all__ = ["Format", "ternarize"]

# Of a quantization_config: what a GGUF file can hold the trits of.
_KNOWN_SETTINGS = {
    "quant_method",
    "format_version",
    "rule",
    "per",
    "group_size",
    "layers",
    "merged",
    "overrides",
    "storage",
    "experts",
    "weights",
}

Format = Literal["trilens", "dense", "hf-bitnet", "gguf-tq1_0", "gguf-tq2_0", "gguf-q2_0"]


_PLAIN = {"dense": write_dense, "hf-bitnet": write_bitnet}
"""Layouts that transformers loads without trilens, made of what `ternarize` wrote."""


def ternarize(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    *,
    plan: TernaryPlan | None = None,
    format: Format = "trilens",
    dry_run: bool = False,
    revision: str | None = None,
    calibration: Calibration | None = None,
    sample: Sample | Sequence[Sample] | None = None,
    max_perplexity_ratio: float | None = None,
    tokenizer: Any = None,
    workers: SupportsIndex = 1,
    ray: str | None = None,
    progress: Progress | None = None,
) -> TernaryReport:
    """Write a ternary copy of a checkpoint.

    The output is complete: weights, configuration, tokenizer files, model card, manifest. A run
    that was killed is taken up by the same call, and ends in the same bytes. One run at a time
    may write to a directory: another one is refused.

    Post-training ternary weights usually ruin a model that was not trained for them: see
    `TernaryReport.verdict`, and measure before use.

    Args:
        src: directory with config.json and safetensors, or a hub id.
        dst: directory for the output: new, empty, or of the same unfinished run. For GGUF a new
            file, which is written whole or not at all.
        plan: what is ternarized, and how; `TernaryPlan()` where not given.
        format: "trilens": packed two-bit codes and float32 scales in safetensors; "gguf-tq2_0",
            "gguf-tq1_0", "gguf-q2_0": one file for llama.cpp, whose source may also be the output
            of an earlier call; "dense": that output with dense weights, see `write_dense`;
            "hf-bitnet": it in transformers' own BitNet layout, see `write_bitnet`.
        dry_run: read headers only, and report what would be stored.
        revision: of a hub id.
        calibration: the text that calibrated rules look at, and that the damage is measured on;
            a plan with such rules and no calibration: what the model writes itself.
        sample: a text, or several, on which source and result are measured; what each says stands
            in the report and in the model card.
        max_perplexity_ratio: the largest ratio of perplexities that is left, on the worst of the
            samples; of a calibration's texts see `Calibration`.
        tokenizer: goes before the source's own, for a sample or a calibration, and is written into
            the output; one of transformers, or what `--tokenizer` reads.
        progress: called with each block while a calibration runs, then with each tensor written.

    Raises:
        UsageError: an option is wrong, an expression matches nothing, nothing is left to code, the
            source is quantized already (other than as BitNet, whose trits are kept), or `dst`
            holds something else or another order's output; a sample and a dry run, a GGUF file, or
            a source that is no causal language model.
        TextError: a sample that is too short.
        LoadError: the source cannot be read, or changed while it was; see `trilens.errors`.
        NonFiniteError: NaN or Inf among the weights of a matrix; nothing is left behind.
        ValueRangeError: a scale that its dtype cannot hold; nothing is left behind.
        WriteError: the output cannot be written, or another run writes it.
        DamageError: the perplexity rises by more than `max_perplexity_ratio`, here or of the
            calibration; nothing is left behind.
        ShardError: a weight file whose worker was lost several times; names it and the cause.
        GenerationError: the model is to write its own calibration text, and writes none.
        TextError, AnatomyError: a text or a model that cannot be calibrated on; see
            `checkpoint.calibration.run.run_calibration`, also for its memory.

    Memory: tensors are read one by one, by each worker: up to 3 × the largest one for bfloat16
    sources, and what the rule needs (`PerLayerQuant.quantize`). A calibration maps the source. With
    a sample the whole model is loaded before, and both models after.
    """
    plan, gguf_format = plan or TernaryPlan(), find_format(format)
    samples = (sample,) if isinstance(sample, Sample) else tuple(sample or ())
    _check_bound(max_perplexity_ratio, samples)
    out = as_path(dst, "output")
    _check_format(format, gguf_format, out, plan)
    who = Who(at_least(1, workers, "workers"), ray)
    if format != "trilens":
        _check_alone(format, who)
        _check_unmeasured(format, calibration, samples)
    job = read_job(src, plan, revision=revision, ternary=format != "trilens", tokenizer=tokenizer)
    if format in _PLAIN:
        return _PLAIN[format](job, out, dry_run=dry_run, progress=progress)
    if gguf_format is not None:
        _check_trits(job)
        return write_gguf(job, gguf_format, out, dry_run=dry_run, progress=progress)
    if calibration is not None and job.keeps_trits:
        raise UsageError(
            f"{job.source.name} is ternary already, and its trits are kept as they are: leave the "
            "calibration out"
        )
    _check_names(job)
    if job.plan.calibrated and calibration is None:
        calibration = Calibration(own_text=OwnText())
    if calibration is not None and calibration.own_text is not None:
        check_writes(job.model)
    if dry_run and samples:
        raise UsageError(
            f"sample {samples[0].name!r} cannot be measured in a dry run, which writes no model: "
            "leave one of them out"
        )
    if dry_run:
        tensors = [planned(*pair, job.plan) for pair in job.pairs]
        return TernaryReport(job.plan, tuple(tensors), dry_run=True, note=job.note)
    check_folder(out, job.source.folder)
    order = Order.of(
        [
            *job.source.files,
            job.source.folder / CONFIG_NAME,
            *job.source.side_files,
            *job.source.cards,
        ],
        job.plan,
        _samples_sha256(samples),
        None if calibration is None else calibration.to_dict(),
        job.source.given_sha256,
    )
    bound = None if calibration is None else calibration.max_perplexity_ratio
    bounds = (bound, max_perplexity_ratio)
    if (out / MANIFEST_NAME).is_file():
        return _finished(out, order, bounds)
    # Read first: a sample that is no good is refused before anything is written.
    texts = read_samples(samples, job.source.folder, tokenizer=tokenizer) if samples else ()
    with locked_folder(out):
        check_folder(out, job.source.folder)
        if (out / MANIFEST_NAME).is_file():  # another run has ended meanwhile
            return _finished(out, order, bounds)
        _check_space(out, job)
        journal = Journal(out, order)
        with clean_refusal(out, journal):
            return _write(
                out, job, order, journal, calibration, texts, max_perplexity_ratio, who, progress
            )


def _finished(out: Path, order: Order, bounds: tuple[float | None, float | None]) -> TernaryReport:
    order.check_same(read_manifest(out), out / MANIFEST_NAME)
    (out / JOURNAL_NAME).unlink(missing_ok=True)
    found = validate(out)
    for damage, bound in zip((found.damage, found.sample), bounds, strict=True):
        check_damage(damage, bound, written=True)
    return found


def _write(
    out: Path,
    job: Job,
    order: Order,
    journal: Journal,
    calibration: Calibration | None,
    texts: tuple[Blocks, ...],
    highest: float | None,
    who: Who,
    progress: Progress | None,
) -> TernaryReport:
    before: Store | None = None
    damage: Damage | None = None
    if calibration is not None:
        before, damage = rollback(out, job, calibration, journal, progress=progress)
    tensors, digests = write_shards(out, job, order, journal, before, who=who, progress=progress)
    digests |= write_side_files(out, job)
    job.source.check_unchanged()
    order.check_copied(digests, job.source.side_files)
    measured = compare_checkpoints(texts, job.source.folder, out) if texts else ()
    if before is not None and damage is not None:
        digests |= write_own_text(out, before)
        damage = gone_on(out, job, before, damage)
    report = TernaryReport(job.plan, tuple(tensors), samples=measured, damage=damage, note=job.note)
    try:
        check_damage(report.sample, highest)
    except DamageError:
        for name in digests:
            (out / name).unlink(missing_ok=True)
        raise
    card = model_card(report, origin_of(job))
    digests[CARD_NAME] = write_bytes(out / CARD_NAME, card.encode())
    files = {
        name: {"size_bytes": (out / name).stat().st_size, "sha256": digest}
        for name, digest in sorted(digests.items())
    }
    if before is not None:
        shutil.rmtree(before.folder)
    write_bytes(out / MANIFEST_NAME, manifest_bytes(order, report, files))
    journal.remove()
    return report


def _check_format(format: str, engine: GgufFormat | None, out: Path, plan: TernaryPlan) -> None:
    """Refuse a format that there is not, and a place or a plan that the format does not have."""
    if engine is not None:
        _check_engine(out, plan)
    elif plan.embeddings != "keep":
        raise UsageError(
            f"embeddings {plan.embeddings!r} is for GGUF files, and format {format!r} keeps them "
            "as they are: leave it out, or take a gguf format"
        )
    elif format not in get_args(Format):
        raise UsageError(f"format {format!r} is unknown: there are {', '.join(get_args(Format))}")
    elif out.suffix == ".gguf":
        raise UsageError(
            f"output {out} is named like a GGUF file, and format {format!r} writes a directory: "
            "pass a gguf format, for example gguf-tq2_0, or another name"
        )


def _check_bound(bound: Any, samples: Sequence[Sample]) -> None:
    """Refuse a bound that is none, or that bounds nothing."""
    if bound is None:
        return
    if isinstance(bound, bool) or not (isinstance(bound, int | float) and bound > 0):
        raise ValueRangeError(
            f"max_perplexity_ratio is {bound!r}: a number above 0 is needed, such as 1.5"
        )
    if not samples:
        raise UsageError(
            f"max_perplexity_ratio {bound:g} bounds what is measured on a sample: give one "
            "(sample=…, --evaluate TEXT)"
        )


def _samples_sha256(samples: Sequence[Sample]) -> str | None:
    """Hash of all samples: of a single one its own."""
    if len(samples) < 2:
        return samples[0].sha256 if samples else None
    return hashlib.sha256("".join(sample.sha256 for sample in samples).encode()).hexdigest()


def _check_unmeasured(
    format: str, calibration: Calibration | None, samples: Sequence[Sample]
) -> None:
    """Refuse a calibration or a sample for what is made from a ternary checkpoint."""
    results = {"dense": "dense weights", "hf-bitnet": "a BitNet checkpoint"}
    result = results.get(format, "a GGUF file")
    if calibration is not None:
        raise UsageError(
            f"{result} ({format}) cannot be calibrated: write a directory with the calibration, "
            f"then {result} from that directory, which keeps every trit"
        )
    if samples:
        raise UsageError(
            f"a sample cannot be measured on {result} ({format}): write a directory with the "
            f"sample, then {result} from that directory, which keeps every trit"
        )


def _check_alone(format: str, who: Who) -> None:
    """Refuse workers for what one process writes."""
    if not who.is_here:
        given = f"workers {who.workers}" if who.ray is None else f"ray {who.ray!r}"
        raise UsageError(
            f"{given} cannot write format {format!r}: write a directory with several workers, then "
            f"{format} from that directory, which keeps every trit"
        )


def _check_engine(out: Path, plan: TernaryPlan) -> None:
    """Refuse a place or a plan that no GGUF file has."""
    check_place(out)
    if plan.rotate:
        raise UsageError(
            "rotate has no place in a GGUF file: engines would not rotate the inputs; leave it out"
        )
    if plan.calibrated:
        raise UsageError(
            f"rule {plan.calibrated[0]!r} needs a calibration, which a GGUF file is not written "
            "with: write a directory by that rule, then the GGUF file from that directory"
        )


def _check_trits(job: Job) -> None:
    """Refuse a ternary checkpoint whose layers do more than multiply by trits."""
    settings = job.source.settings.get("quantization_config") or {}
    given = {key for key, value in settings.items() if value is not None}
    unknown = sorted(given - _KNOWN_SETTINGS)
    if unknown:
        raise UsageError(
            f"{job.source.title} was ternarized with {unknown[0]!r}, which no GGUF file can hold: "
            "give the checkpoint with plain weights"
        )


def _check_names(job: Job) -> None:
    """Refuse packed parts under names that are taken, or that no configuration could tell."""
    names = [name for pair in job.pairs for name, *_ in entries(*pair, job.plan)]
    if len(set(names)) < len(names):
        raise UsageError(
            f"{job.source.name} has tensors named like packed parts: they would collide"
        )
    overrides(job.plan, job.choices, job.headers)


def _check_space(out: Path, job: Job) -> None:
    needed = sum(size_bytes for pair in job.pairs for *_, size_bytes in entries(*pair, job.plan))
    there = sum(path.stat().st_size for path in out.iterdir() if path.is_file())
    free = shutil.disk_usage(out).free
    if needed - there > free:
        raise WriteError(
            f"directory {out} has {free} bytes of free space: the output needs {needed - there}"
        )
