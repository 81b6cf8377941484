"""The options that commands share: each declared once, with one meaning wherever it stands.

Choices are spelled out here, not imported: help and completion must not load the library.
`tests/cli/test_options.py` holds them against the library's own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, TypeAlias

import typer

__all__ = [
    "Against",
    "AttnImplementation",
    "Attribution",
    "BatchSize",
    "Budget",
    "By",
    "Calibrate",
    "Calibrations",
    "Chat",
    "Corpus",
    "Costs",
    "Data",
    "Debug",
    "DecoderPrompt",
    "DeviceMap",
    "Direction",
    "DryRun",
    "Dtype",
    "EachMatrix",
    "Edits",
    "Effective",
    "Effort",
    "Evaluate",
    "Evaluations",
    "FailIf",
    "Field",
    "Format",
    "GgufFile",
    "GroupSize",
    "Ignore",
    "Layers",
    "Limit",
    "LogitLens",
    "Logits",
    "MadeFrom",
    "MaxPerplexityRatio",
    "MaxTokens",
    "Model",
    "Only",
    "Output",
    "Parts",
    "PatchSite",
    "Per",
    "PlanFile",
    "Predict",
    "Prompt",
    "Report",
    "RequiredAgainst",
    "RequiredOutput",
    "RequiredPrompt",
    "RequiredTarget",
    "Residual",
    "Revision",
    "Rotate",
    "Rule",
    "SampleLength",
    "SampleTokens",
    "ScaleDtype",
    "Seed",
    "SeqLength",
    "Sites",
    "Stack",
    "States",
    "Storage",
    "Target",
    "Tasks",
    "To",
    "TokenizerFiles",
    "TopK",
    "TrustRemoteCode",
    "TypeName",
]

# Texts
_TEXT = "file (.txt, .jsonl, .json, .csv, .parquet), folder, stdlib or demo"
_DATA = typer.Option("--data", metavar="TEXT", help=f"Text to measure on: {_TEXT}.")
Data = Annotated[str, _DATA]
Corpus = Annotated[str | None, _DATA]
_CALIBRATE = typer.Option(
    "--calibrate",
    metavar="TEXT",
    help=f"Text that calibrated rules are fitted on: {_TEXT}, or self: the model writes it.",
)
_EVALUATE = f"Held-out text to measure the damage on: {_TEXT}."
Calibrate = Annotated[str | None, _CALIBRATE]
Calibrations = Annotated[list[str] | None, _CALIBRATE]
Evaluate = Annotated[
    str | None,
    typer.Option("--evaluate", metavar="TEXT", help=_EVALUATE),
]
Evaluations = Annotated[
    list[str] | None,
    typer.Option(
        "--evaluate",
        metavar="[NAME=]TEXT",
        help=_EVALUATE,
    ),
]
MadeFrom = Annotated[
    str | None,
    typer.Option(
        "--made-from", metavar="MODEL", help="The model that it was made from: directory or hub id."
    ),
]
Tasks = Annotated[
    list[str] | None,
    typer.Option("--task", metavar="NAME", help="A task of lm-eval. May be repeated."),
]
Limit = Annotated[
    int | None,
    typer.Option("--limit", metavar="N", min=1, help="Examples of each task, at most."),
]
Effort = Annotated[
    Literal["fast", "default", "max"] | None,
    typer.Option(
        "--effort", help="How many tokens calibration takes, and how long fitting rules fit."
    ),
]
Field = Annotated[
    str, typer.Option("--field", metavar="NAME", help="Key of the text in JSONL and Parquet.")
]
_MAX_TOKENS = typer.Option("--max-tokens", metavar="N", help="Maximum number of tokens.")
MaxTokens = Annotated[int | None, _MAX_TOKENS]
SampleTokens = Annotated[int, _MAX_TOKENS]
_SEQ_LENGTH = typer.Option("--seq-length", metavar="N", help="Tokens in a sequence.")
SeqLength = Annotated[int | None, _SEQ_LENGTH]
SampleLength = Annotated[int, _SEQ_LENGTH]
BatchSize = Annotated[
    int | None,
    typer.Option("--batch-size", metavar="N", help="Sequences in a forward pass."),
]
Seed = Annotated[int | None, typer.Option("--seed", metavar="N", help="Seed of everything drawn.")]

# Models
Model = Annotated[str, typer.Argument(metavar="MODEL", help="Checkpoint directory or hub id.")]
Dtype = Annotated[
    Literal["auto", "float32", "bfloat16", "float16", "float64"],
    typer.Option("--dtype", help="Dtype to load the model in; auto: the checkpoint's."),
]
Device = Annotated[
    str | None,
    typer.Option(
        "--device", metavar="DEVICE", help="Device to calibrate on: cpu, cuda, cuda:1, auto."
    ),
]
DeviceMap = Annotated[
    str | None,
    typer.Option("--device-map", metavar="DEVICE", help="cpu, cuda, cuda:1, auto: transformers'."),
]
Revision = Annotated[
    str | None,
    typer.Option("--revision", metavar="NAME", help="Branch, tag or commit of a hub id."),
]
AttnImplementation = Annotated[
    str | None,
    typer.Option(
        "--attn-implementation",
        metavar="NAME",
        help="Attention function: eager, sdpa … [default: transformers' choice]",
    ),
]
TokenizerFiles = Annotated[
    Path | None,
    typer.Option(
        "--tokenizer",
        metavar="PATH",
        help="Tokenizer: directory, tokenizer.json, or RWKV's vocabulary file (.txt).",
    ),
]
Stack = Annotated[
    Literal["decoder", "encoder", "language", "vision", "audio"] | None,
    typer.Option(
        "--stack", help="Which stack of blocks, of a model with several. [default: its decoder]"
    ),
]
GgufFile = Annotated[
    str | None,
    typer.Option(
        "--gguf-file", metavar="NAME", help="GGUF file in the directory to read the weights from."
    ),
]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run Python code of the checkpoint.")
]

# Prompts and captures
_Which: TypeAlias = Literal["last", "all", "none"]
_PROMPT = typer.Option("-p", "--prompt", metavar="TEXT", help="Prompt; - reads standard input.")
Prompt = Annotated[str | None, _PROMPT]
RequiredPrompt = Annotated[str, _PROMPT]
DecoderPrompt = Annotated[
    str | None,
    typer.Option(
        "--decoder-prompt",
        metavar="TEXT",
        help="Text that the decoder of an encoder-decoder reads; the prompt is its source.",
    ),
]
Chat = Annotated[
    bool,
    typer.Option("--chat", help="Prompt as a user's message, in the tokenizer's chat template."),
]
Layers = Annotated[
    str | None,
    typer.Option("--layers", metavar="LIST", help="Layers, for example 0,2-4. [default: all]"),
]
TopK = Annotated[
    int,
    typer.Option("--top-k", metavar="K", help="Attended tokens, and next tokens, shown.", min=1),
]
_TARGET = typer.Option(
    "--target", metavar="TOKEN", help="A next token: its text, with its space, or #ID."
)
_AGAINST = typer.Option("--against", metavar="TOKEN", help="Token whose logit is subtracted.")
_BY = typer.Option("--by", help="What is told apart.")
Target = Annotated[str | None, _TARGET]
RequiredTarget = Annotated[str, _TARGET]
Against = Annotated[str | None, _AGAINST]
RequiredAgainst = Annotated[str, _AGAINST]
Sites = Annotated[
    str | None,
    typer.Option(
        "--sites", metavar="LIST", help="Places of the forward pass: resid_post,attn.z,mlp.gate …"
    ),
]
Parts = Annotated[Literal["component", "head", "neuron"], _BY]
Effective = Annotated[
    bool, typer.Option("--effective", help="Effective attention of recurrent layers, with signs.")
]
States = Annotated[bool, typer.Option("--states", help="Recurrent states after the last token.")]
Residual = Annotated[
    _Which, typer.Option("--residual", help="Residual stream of the last token, of all, or none.")
]
Logits = Annotated[
    _Which, typer.Option("--logits", help="Logits of the last token, of all, or none.")
]

Edits = Annotated[
    list[str] | None,
    typer.Option(
        "--edit",
        metavar="EDIT",
        help="'ablate:mlp.out@3', 'steer:resid_post@2 vector=v.npy scale=4'; repeatable.",
    ),
]

# Patching
PatchSite = Annotated[
    str,
    typer.Option("--site", metavar="SITE", help="What is patched: resid_pre, attn.z, mlp.out …"),
]
By = Annotated[Literal["position", "head"], _BY]
Direction = Annotated[
    Literal["denoise", "noise"],
    typer.Option(
        "--direction", help="Clean values into the corrupted run, or corrupted into the clean one."
    ),
]
Attribution = Annotated[
    bool, typer.Option("--attribution", help="Estimate by gradients: two passes, one of them back.")
]

# Comparing
LogitLens = Annotated[
    _Which,
    typer.Option("--lens", help="Logit lens of each sequence's last token, of all, or none."),
]
FailIf = Annotated[
    list[str] | None,
    typer.Option(
        "--fail-if",
        metavar="CONDITION",
        help="Exit with 3 where it holds: 'kl_nats_mean>0.1', 'perplexity.ratio>1.05'; repeatable.",
    ),
]

# Ternary weights
RuleName: TypeAlias = Literal[
    "absmean", "absmean_refit", "twn", "exact", "asymmetric", "planes", "quad",
    "gptq", "gptq_planes", "gptq_quad", "best", "best_planes", "best_quad",
]  # fmt: skip
Rule = Annotated[
    RuleName,
    typer.Option(
        "--rule",
        metavar="RULE",
        help="Quantization rule: absmean, absmean_refit, twn, exact, asymmetric, planes, "
        "quad (four levels, not ternary); "
        "calibrated: gptq, gptq_planes, gptq_quad, best, best_planes, best_quad.",
    ),
]
GroupSize = Annotated[
    int | None,
    typer.Option("--group-size", metavar="N", help="Weights of a row that share a scale."),
]
Per = Annotated[
    Literal["tensor", "row", "group"] | None,
    typer.Option("--per", help="What shares a scale. [default: tensor, group with --group-size]"),
]
Ignore = Annotated[
    list[str] | None,
    typer.Option(
        "--ignore",
        metavar="REGEX",
        help="Matrices that are not quantized, by their names; repeatable.",
    ),
]
Only = Annotated[
    list[str] | None,
    typer.Option(
        "--only", metavar="REGEX", help="The only matrices to quantize, by name; repeatable."
    ),
]
ScaleDtype = Annotated[
    Literal["float16", "bfloat16", "float32"],
    typer.Option("--scale-dtype", help="Dtype of the scales."),
]
Storage = Annotated[
    Literal["two_bit", "compact"],
    typer.Option("--storage", help="Codes of 2 bits, or compact: 1.6 bits."),
]
Embeddings = Annotated[
    Literal["keep", "q8_0", "q4_0"],
    typer.Option("--embeddings", help="Of a GGUF file, embedding and head: kept, or rounded."),
]
Rotate = Annotated[
    bool, typer.Option("--rotate", help="Rotate weights and inputs by a Hadamard matrix first.")
]
PlanFile = Annotated[
    Path | None,
    typer.Option(
        "--plan", metavar="FILE", help="Plan of trilens plan, instead of the options of a rule."
    ),
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Report the sizes from the headers; write nothing.")
]
MaxPerplexityRatio = Annotated[
    float | None,
    typer.Option(
        "--max-perplexity-ratio",
        metavar="RATIO",
        help="Maximum ratio of perplexities, after to before; beyond it exit with 3.",
    ),
]
Budget = Annotated[
    float | None,
    typer.Option(
        "--budget-bits", metavar="BITS", help="Maximum bits per weight of the blocks' matrices."
    ),
]
Costs = Annotated[
    Literal["measured", "predicted"],
    typer.Option("--costs", help="Cost of each choice: measured, or predicted (faster)."),
]
EachMatrix = Annotated[
    bool, typer.Option("--each-matrix", help="Measure every matrix alone as well.")
]
Predict = Annotated[
    bool, typer.Option("--predict/--no-predict", help="Predict as well, and compare the ranks.")
]

# Results
To = Annotated[
    Literal["trilens", "dense", "hf-bitnet", "gguf-tq2_0", "gguf-tq1_0", "gguf-q2_0"],
    typer.Option(
        "--to",
        help="What to write: a ternary checkpoint; from one dense weights, or the BitNet layout of "
        "transformers; or a GGUF file for llama.cpp.",
    ),
]
_OUTPUT = typer.Option("-o", "--output", metavar="PATH", help="Where to write the result.")
Output = Annotated[Path | None, _OUTPUT]
RequiredOutput = Annotated[Path, _OUTPUT]
Report = Annotated[
    Path | None,
    typer.Option("--report", metavar="FILE", help="Write a report as well: one HTML page."),
]
Format = Annotated[Literal["table", "json"], typer.Option("--format", help="How to print.")]
TypeName = Annotated[
    str | None,
    typer.Option("--type", metavar="NAME", help="Types whose name contains this, in full."),
]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
