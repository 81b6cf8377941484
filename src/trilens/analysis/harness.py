"""Tasks of lm-eval, EleutherAI's harness, on a model that is loaded; ternary ones as any other."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import Any

from trilens.errors import UsageError
from trilens.io.messages import listed, reason
from trilens.io.short_memory import is_short_of_memory
from trilens.lens.lens import Lens
from trilens.taps.mode import evaluating

__all__ = ["run_tasks"]


def run_tasks(
    lens: Lens, tasks: Sequence[str], *, limit: int | None = None, seed: int = 0
) -> dict[str, dict[str, float]]:
    """Run tasks of lm-eval.

    Args:
        lens: the model and its tokenizer.
        tasks: their names, as lm-eval has them, or paths of task files.
        limit: examples of each task, at most; None for all.
        seed: of what the harness draws.

    Returns:
        Of each task its metrics, as lm-eval names them.

    Raises:
        UsageError: lm-eval is not installed, a task is unknown, or its data cannot be had.

    Memory: the model, and the logits of one example.
    """
    try:
        harness: Any = import_module("lm_eval")
        wrapper: Any = import_module("lm_eval.models.huggingface").HFLM
    except ImportError as cause:
        raise UsageError(
            f"tasks are run by lm-eval, which is not installed ({reason(cause)}): "
            "pip install lm-eval, or leave --task out"
        ) from cause
    if lens.tokenizer is None:
        raise UsageError("tasks are texts, and this model came without a tokenizer: name one")
    try:
        with evaluating(lens.model):
            found: Any = harness.simple_evaluate(
                model=wrapper(pretrained=lens.model, tokenizer=lens.tokenizer, batch_size=1),
                tasks=list(tasks),
                limit=limit,
                random_seed=seed,
                numpy_random_seed=seed,
                torch_random_seed=seed,
                fewshot_random_seed=seed,
                log_samples=False,
                bootstrap_iters=0,
            )
    except Exception as cause:
        if is_short_of_memory(cause):
            raise
        raise UsageError(
            f"lm-eval cannot run {listed(tasks)} ({reason(cause)}): its own list of tasks is "
            "`lm_eval --tasks list`, and their data must be at hand"
        ) from cause
    return {
        task: {
            name.removesuffix(",none"): float(value)
            for name, value in metrics.items()
            if isinstance(value, int | float) and not isinstance(value, bool)
        }
        for task, metrics in found["results"].items()
    }
