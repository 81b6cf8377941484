"""Declaration of `trilens plan`.

Exit codes: 0 done; 1 a file can't be written; 2 an argument is wrong, or the model can't be used;
3 no plan within the budget keeps the damage within the bound.
"""

from __future__ import annotations

from trilens.cli import options as o
from trilens.cli.groups import Loading, Sampling
from trilens.cli.lazy import run

__all__ = ["plan"]


def plan(
    model: o.Model,
    data: o.Data,
    output: o.Output = None,
    budget_bits: o.Budget = None,
    max_perplexity_ratio: o.MaxPerplexityRatio = None,
    calibrate: o.Calibrate = None,
    evaluate: o.Evaluate = None,
    costs: o.Costs = "measured",
    storage: o.Storage = "compact",
    scale_dtype: o.ScaleDtype = "float16",
    sampling: Sampling = Sampling(max_tokens=2048),
    loading: Loading = Loading(dtype="float32"),
    report: o.Report = None,
    format: o.Format = "table",
    debug: o.Debug = False,
) -> None:
    """Plan ternary weights under a budget of bits.

    Under a budget, a bound on the damage, or both. For every matrix: the rule and group size, or
    none. The whole plan is measured in memory on held-out text: --evaluate, or every other document
    of --data. Writes a file for ternarize --plan. With --calibrate the plan may name calibrated
    rules; ternarize then takes the text, too.
    """
    run("plan", locals())
