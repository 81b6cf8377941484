"""Train a demo model from scratch: ``python -m training.train --out DIR --seed 0``.

The result is reproducible from the seed on one machine with one Python, one torch and one
thread count: files are read in sorted order, the tokenizer depends on nothing but them, and the
weights and batches come from seeded generators. Other thread counts change the order of
floating-point sums, hence the last digits and, after thousands of steps, the weights.

Progress goes to stderr, results to stdout.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from training.batches import encode_documents, training_batches
from training.checkpoint import save_checkpoint, total_bytes, write_training_record
from training.evaluate import evaluate_checkpoint, report
from training.loop import LoopOptions, LoopResult, train_model
from training.models import ARCHITECTURES, ModelOptions, build_model
from training.tokenizer import train_tokenizer
from trilens.demo.corpus import (
    checked_heldout_documents,
    load_heldout_record,
    stdlib_root,
    training_documents,
)
from trilens.errors import TrilensError, UsageError

__all__ = ["TrainOptions", "main", "train"]


@dataclass(frozen=True)
class TrainOptions:
    """One training run.

    Attributes:
        out: folder the checkpoint is written to; created when missing.
        arch: a key of ``ARCHITECTURES``.
        seed: of the weights and of the batches.
        vocab_size: tokenizer entries.
        context: tokens per training sequence.
        batch: sequences per step.
        threads: CPU threads.
        loop: the schedule.
        scratch: where periodic checkpoints go; None for none.
    """

    out: Path
    arch: str
    seed: int
    vocab_size: int
    context: int
    batch: int
    threads: int
    loop: LoopOptions
    scratch: Path | None


def train(options: TrainOptions) -> str:
    """Train, save, measure the saved checkpoint and record the figures; returns the report.

    Raises:
        UsageError: a count is not positive, the architecture is unknown, or this Python has no
            standard library sources.
    """
    for name in ("vocab_size", "context", "batch", "threads"):
        if getattr(options, name) < 1:
            raise UsageError(f"{name} must be at least 1, not {getattr(options, name)}")
    if options.loop.steps < 1:
        raise UsageError(f"steps must be at least 1, not {options.loop.steps}")
    torch.set_num_threads(options.threads)
    heldout = checked_heldout_documents()
    model, tokenizer, result = _train_new_model(options)
    save_checkpoint(model, tokenizer, options.out)
    evaluation = evaluate_checkpoint(options.out, heldout)
    write_training_record(
        options.out,
        arch=options.arch,
        seed=options.seed,
        threads=options.threads,
        batch=options.batch,
        context=options.context,
        loop=options.loop,
        result=result,
        evaluation=evaluation,
    )
    return f"{report(evaluation)}\n\ncheckpoint bytes  {total_bytes(options.out)}"


def _train_new_model(
    options: TrainOptions,
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast, LoopResult]:
    documents = training_documents(stdlib_root(), load_heldout_record())
    tokenizer = train_tokenizer(documents, options.vocab_size, options.context)
    encoded = encode_documents(tokenizer, documents)
    print(
        f"{len(documents)} training files, {sum(map(len, encoded))} tokens, "
        f"vocabulary {len(tokenizer)}",
        file=sys.stderr,
        flush=True,
    )
    torch.manual_seed(options.seed)
    end_of_text_id = tokenizer.convert_tokens_to_ids(tokenizer.eos_token)
    model = build_model(options.arch, ModelOptions(len(tokenizer), options.context, end_of_text_id))

    def save(step: int) -> None:
        if options.scratch is not None:
            save_checkpoint(model, tokenizer, options.scratch / f"step-{step}")

    batches = training_batches(encoded, options.batch, options.context, options.seed)
    with ARCHITECTURES[options.arch].training():
        return model, tokenizer, train_model(model, batches, options.loop, save)


def _parse(arguments: Sequence[str] | None) -> TrainOptions:
    parser = argparse.ArgumentParser(
        prog="python -m training.train",
        description="Train a demo model on the Python standard library's sources.",
    )
    parser.add_argument("--out", type=Path, required=True, help="checkpoint folder to write")
    parser.add_argument("--arch", choices=sorted(ARCHITECTURES), default="transformer")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=3600)
    parser.add_argument("--batch", type=int, default=4, help="sequences per step")
    parser.add_argument("--context", type=int, default=512, help="tokens per sequence")
    parser.add_argument("--vocab-size", type=int, default=2048)
    parser.add_argument("--matrix-rate", type=float, default=8e-3, help="peak rate of Muon")
    parser.add_argument("--other-rate", type=float, default=5e-3, help="peak rate of AdamW")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--scratch", type=Path, help="folder for periodic checkpoints")
    values = vars(parser.parse_args(arguments))
    loop = LoopOptions(
        **{name: values.pop(name) for name in ("steps", "matrix_rate", "other_rate")}
    )
    return TrainOptions(loop=loop, **values)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    options = _parse(arguments)
    try:
        print(train(options))
    except TrilensError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
