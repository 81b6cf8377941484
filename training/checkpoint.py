"""Writing a demo checkpoint: bf16 weights, tokenizer, and the record of its training."""

from __future__ import annotations

import copy
import json
import platform
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from training.evaluate import Evaluation
from training.loop import LoopOptions, LoopResult
from training.tokenizer import save_tokenizer

__all__ = ["save_checkpoint", "total_bytes", "write_training_record"]


def save_checkpoint(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path
) -> None:
    """Save a bf16 copy of ``model`` and its tokenizer; ``model`` itself stays as it is."""
    folder.mkdir(parents=True, exist_ok=True)
    stored = copy.deepcopy(model).to(torch.bfloat16)
    stored.save_pretrained(folder)
    save_tokenizer(tokenizer, folder)


def total_bytes(folder: Path) -> int:
    """Size of all the files in a checkpoint folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def write_training_record(
    folder: Path,
    *,
    arch: str,
    seed: int,
    threads: int,
    batch: int,
    context: int,
    loop: LoopOptions,
    result: LoopResult,
    evaluation: Evaluation,
) -> None:
    """Write ``training.json``: how the checkpoint was made and what it measures."""
    record: dict[str, Any] = {
        "arch": arch,
        "seed": seed,
        "threads": threads,
        "sequences_per_step": batch,
        "tokens_per_sequence": context,
        "schedule": asdict(loop),
        "steps": result.steps,
        "tokens_seen": result.tokens,
        "training_seconds": round(result.seconds, 1),
        "final_training_loss_nats": round(result.final_loss_nats, 4),
        "heldout_loss_nats": round(evaluation.loss.nll_nats, 4),
        "heldout_loss_measured": "on the saved bf16 weights, in fp32 arithmetic",
        "heldout_tokens": evaluation.loss.n_tokens,
        "bytes_per_token": round(evaluation.bytes_per_token, 4),
        "parameters": evaluation.parameters,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
    for scores in evaluation.head_scores:
        best = scores.best()
        record[f"best_{scores.name.replace('-', '_')}_head"] = {
            "layer": best.layer,
            "head": best.head,
            "score": round(best.score, 4),
            "median_of_all_heads": round(scores.median(), 4),
        }
    text = json.dumps(record, indent=2) + "\n"
    (folder / "training.json").write_text(text, encoding="utf-8")
