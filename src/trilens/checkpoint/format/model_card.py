"""The model card of a ternary checkpoint."""

from __future__ import annotations

import shlex
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from huggingface_hub import ModelCardData

from trilens.checkpoint.format.names import MANIFEST_NAME, SOURCE_CARD_NAME
from trilens.checkpoint.format.plan import TernaryPlan
from trilens.checkpoint.format.report import TernaryReport
from trilens.io.weight_files import GUARD_NAME
from trilens.printable import one_line
from trilens.text.markdown import markdown_code, markdown_text
from trilens.version import __version__

__all__ = ["Origin", "bitnet_card", "dense_card", "model_card"]


@dataclass(frozen=True, slots=True)
class Origin:
    """What a card says of the source.

    Attributes:
        name: What it is called: a hub id, or the name of its directory.
        hub_id: Its hub id; None for a directory.
        metadata: What its own card states; see `source_card.inherited_metadata`.
        has_card: Its own card is copied.
        is_causal: It is a causal language model.
    """

    name: str
    hub_id: str | None = None
    metadata: dict[str, Any] = field(default_factory=dict)
    has_card: bool = False
    is_causal: bool = False


def model_card(report: TernaryReport, origin: Origin) -> str:
    """README.md: how to load it, what was done, what it costs, and a row for each matrix."""
    lines = [
        *_header(origin, "ternary"),
        "**Loads only after `import trilens`.** transformers alone stops with an error that names "
        f"`{GUARD_NAME}`.",
        "",
        "```sh",
        "pip install trilens",
        "```",
        "",
        "```python",
        "import trilens",
        "from transformers import AutoModelForCausalLM",
        "",
        'model = AutoModelForCausalLM.from_pretrained("this directory")',
        "```",
        "",
        "For engines that do not know the format: `trilens ternarize DIRECTORY -o OUT --to dense` "
        "writes dense weights, `--to gguf-tq2_0` a file for llama.cpp.",
        "",
        markdown_text(report.verdict),
        "",
        *_facts(report),
        "",
        "`trilens validate DIRECTORY` reads every byte back and checks it.",
        "",
        "## How it was made",
        "",
        f"trilens {__version__}:",
        "",
        "```sh",
        _command(report, origin),
        "```",
        "",
        *_matrices(report),
        "",
        *_not_quantized(report),
    ]
    if origin.has_card:
        lines += ["", f"The source's own card is [{SOURCE_CARD_NAME}]({SOURCE_CARD_NAME})."]
    return "\n".join(lines) + "\n"


def dense_card(report: TernaryReport, origin: Origin) -> str:
    """README.md of dense weights: what they are made of."""
    lines = [
        *_header(origin, "dense"),
        f"{len(report.coded)} matrices of this checkpoint hold the values of ternary weights, "
        f"written as dense ones by trilens {__version__}: it loads and runs as any checkpoint of "
        f"its architecture, at full size. {report.verdict}",
    ]
    if origin.has_card:
        lines += ["", f"The ternary checkpoint's card is [{SOURCE_CARD_NAME}]({SOURCE_CARD_NAME})."]
    return "\n".join(lines) + "\n"


def bitnet_card(report: TernaryReport, origin: Origin) -> str:
    """README.md of a checkpoint in transformers' own BitNet layout."""
    lines = [
        *_header(origin, "BitNet layout"),
        f"{len(report.coded)} matrices of this checkpoint are trits −1, 0, +1 with one scale each, "
        f"packed by trilens {__version__} in the layout `bitnet` of transformers, which loads it "
        "without trilens (with accelerate). Such layers round their input to 8 bits: outputs "
        f"differ a little from those of the ternary checkpoint. {report.verdict}",
    ]
    if origin.has_card:
        lines += ["", f"The ternary checkpoint's card is [{SOURCE_CARD_NAME}]({SOURCE_CARD_NAME})."]
    return "\n".join(lines) + "\n"


def _header(origin: Origin, kind: str) -> list[str]:
    """What the hub reads, and the title."""
    stated = dict(origin.metadata)
    base = origin.hub_id or stated.pop("base_model", None)
    stated.pop("base_model", None)
    if base is not None:
        stated |= {"base_model": base, "base_model_relation": "quantized"}
    if origin.is_causal:
        stated["pipeline_tag"] = "text-generation"
    data = ModelCardData(library_name="transformers", tags=["ternary", "trilens"], **stated)
    return ["---", data.to_yaml(), "---", "", f"# {markdown_text(origin.name)}, {kind}", ""]


def _facts(report: TernaryReport) -> list[str]:
    plan = report.plan
    scales = "matrix" if plan.per == "tensor" else str(plan.per)
    if plan.group_size is not None:
        scales = f"group of {plan.group_size} weights"
    mixed = "" if not plan.matrices else f", {len(plan.matrices)} matrices by entries of their own"
    bits = "1.6 bits each, five to a byte" if plan.storage == "compact" else "two bits each"
    return [
        f"- Rule: `{plan.rule}`, one scale per {scales}, scales rounded to {plan.scale_dtype}"
        f"{mixed}.",
        f"- {len(report.coded)} matrices are stored as trits −1, 0, +1, in {bits} "
        "(`planes`: two trits; `quad`: the level 2 too, so not ternary), every one decoded from "
        "the file and compared bit for bit.",
        f"- Tensors: {report.size_bytes:,} bytes, {report.size_bytes_before:,} before; "
        f"{report.bits_per_weight:.2f} bits per weight over all tensors, "
        f"{report.matrix_bits_per_weight:.2f} over the matrices of the blocks.",
    ]


def _command(report: TernaryReport, origin: Origin) -> str:
    plan = report.plan
    words = ["trilens", "ternarize", origin.name, "-o", "OUT"]
    if plan.matrices:
        # The plan stands in the manifest: entries for single tensors make no command line.
        return _shell([*words, "--plan", "PLAN"]) + f"  # its plan: {MANIFEST_NAME}"
    usual = TernaryPlan()
    words += ["--rule", plan.rule]
    if plan.group_size is not None:
        words += ["--group-size", str(plan.group_size)]
    elif plan.per not in {None, usual.per}:
        words += ["--per", str(plan.per)]
    words += [word for name in plan.keep for word in ("--ignore", name)]
    words += [word for name in plan.only for word in ("--only", name)]
    if plan.scale_dtype != usual.scale_dtype:
        words += ["--scale-dtype", plan.scale_dtype]
    if plan.storage != usual.storage:
        words += ["--storage", plan.storage]
    if plan.rotate:
        words.append("--rotate")
    if report.damage is not None:
        words += ["--calibrate", "self" if report.damage.own_text else "TEXT"]
    words += [word for sample in report.samples for word in ("--evaluate", sample.name)]
    return _shell(words)


def _shell(words: list[str]) -> str:
    """A command line whose words, which may be somebody's names, stay words and on one line."""
    return shlex.join(map(one_line, words))


def _matrices(report: TernaryReport) -> list[str]:
    calibrated = any(tensor.output_error is not None for tensor in report.matrices)
    about = "Relative error is ‖W−Ŵ‖²/‖W‖²; bits per weight count codes, scales and offsets."
    columns = ["matrix", "shape", "bits per weight", "relative error", "zeros", "outcome"]
    if calibrated:
        about += (
            " Output error is Σ‖Ŵx − y‖²/Σ‖y‖², on the text that the matrix was fitted to and on "
            "text set apart."
        )
        columns[4:4] = ["output error", "held out"]
    lines = [
        "## Matrices",
        "",
        about,
        "",
        f"| {' | '.join(columns)} |",
        "|" + "---|" * len(columns),
    ]
    for row in report.table():
        error, zeros = row["relative_error"], row["sparsity"]
        outputs = ""
        if calibrated:
            own, held_out = row["output_error"], row["output_error_held_out"]
            outputs = f"| {_share(own)} | {_share(held_out)} "
        lines.append(
            f"| {markdown_code(row['name'])} | {row['shape']} | {row['bits_per_weight']:.3f} "
            f"| {_share(error)} {outputs}"
            f"| {'–' if zeros is None else f'{zeros:.1%}'} | {markdown_text(row['outcome'])} |"
        )
    return lines


def _share(error: float | None) -> str:
    return "–" if error is None else f"{error:.4f}"


def _not_quantized(report: TernaryReport) -> list[str]:
    reasons = Counter(
        tensor.reason
        for tensor in report.tensors
        if tensor.outcome == "kept" and not tensor.is_matrix
    )
    counted = [f"- {count} × {markdown_text(why)}" for why, count in sorted(reasons.items())]
    return ["## Not quantized", "", *(counted or ["- nothing"])]
