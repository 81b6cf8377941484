"""Declaration of `trilens evaluate`."""

from __future__ import annotations

from trilens.cli import options as o
from trilens.cli.groups import Loading
from trilens.cli.lazy import run

__all__ = ["evaluate"]


def evaluate(
    model: o.Model,
    evaluate: o.Evaluations = None,
    made_from: o.MadeFrom = None,
    task: o.Tasks = None,
    limit: o.Limit = None,
    max_tokens: o.SampleTokens = 16384,
    seed: o.Seed = 0,
    field: o.Field = "text",
    output: o.Output = None,
    format: o.Format = "table",
    loading: Loading = Loading(),
    debug: o.Debug = False,
) -> None:
    """Measure a model, ternary or not, on texts and tasks.

    Of each text: perplexity, and greedy continuations that run in circles. With --made-from also
    the ratio of perplexities, KL, the same top token and the same greedy text. Tasks are those of
    lm-eval, where it is installed.
    """
    run("evaluate", locals())
