"""Measure a saved checkpoint: ``python -m training.evaluate [FOLDER]``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from training.batches import encode_documents, heldout_windows
from training.heads import HeadScores, head_table, induction_scores, previous_token_scores
from training.models import has_attention_heads
from trilens.demo import demo_path
from trilens.demo.corpus import Document, checked_heldout_documents
from trilens.errors import TrilensError, UsageError
from trilens.evaluation.loop import Perplexity
from trilens.evaluation.perplexity import measure_perplexity

__all__ = ["Evaluation", "evaluate_checkpoint", "main", "report"]

# Windows of 512 tokens enough for head scores that converge to about a hundredth.
_HEAD_SCORE_WINDOWS = 32


@dataclass(frozen=True)
class Evaluation:
    """What a saved checkpoint measures.

    Attributes:
        loss: held-out loss and the tokens it is over.
        bytes_per_token: UTF-8 bytes of the held-out text per predicted token.
        parameters: parameter count, tied ones once.
        head_scores: previous-token and induction scores; empty without attention heads.
    """

    loss: Perplexity
    bytes_per_token: float
    parameters: int
    head_scores: tuple[HeadScores, ...]


def evaluate_checkpoint(folder: Path, documents: Sequence[Document]) -> Evaluation:
    """Reload a saved checkpoint and measure it in fp32 arithmetic on its stored weights.

    Args:
        folder: a Hugging Face checkpoint directory.
        documents: held-out text.

    Raises:
        UsageError: the folder holds no checkpoint.
    """
    if not (folder / "config.json").is_file():
        raise UsageError(f"no checkpoint in {folder}: it has no config.json")
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    length = tokenizer.model_max_length
    windows = heldout_windows(encode_documents(tokenizer, documents), length)
    loss = measure_perplexity(model, windows, batch_size=16)
    full = torch.stack([window[:-1] for window in windows if len(window) > length])
    return Evaluation(
        loss=loss,
        bytes_per_token=sum(document.size_bytes for document in documents) / loss.n_tokens,
        parameters=model.num_parameters(),
        head_scores=_head_scores(model, full, tokenizer.bos_token_id),
    )


def _head_scores(
    model: PreTrainedModel, windows: torch.Tensor, end_of_text_id: int
) -> tuple[HeadScores, ...]:
    """Score the heads, on windows spread over all held-out text; ``()`` when there are none."""
    if not has_attention_heads(model):
        return ()
    # Only the eager path returns attention weights.
    model.set_attn_implementation("eager")
    spread = windows[:: max(1, len(windows) // _HEAD_SCORE_WINDOWS)][:_HEAD_SCORE_WINDOWS]
    return (previous_token_scores(model, spread), induction_scores(model, end_of_text_id))


def report(evaluation: Evaluation) -> str:
    """Lay out an evaluation for reading."""
    lines = [
        f"held-out loss    {evaluation.loss.nll_nats:.4f} nats per token "
        "(stored weights, fp32 arithmetic)",
        f"held-out tokens  {evaluation.loss.n_tokens}",
        f"bytes per token  {evaluation.bytes_per_token:.3f}",
        f"parameters       {evaluation.parameters}",
    ]
    for scores in evaluation.head_scores:
        lines += ["", head_table(scores)]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m training.evaluate",
        description="Recompute the held-out loss and head scores of a demo checkpoint.",
    )
    parser.add_argument("folder", nargs="?", type=Path, help="default: the shipped transformer")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default 2)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    try:
        folder = options.folder or demo_path("transformer")
        evaluation = evaluate_checkpoint(folder, checked_heldout_documents())
    except TrilensError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(report(evaluation))
    return 0


if __name__ == "__main__":
    sys.exit(main())
