"""The long-form table: one row per layer, module, head and metric."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["METRICS", "Place", "Row"]

METRICS: dict[str, str] = {
    "perplexity": "exp of nll_nats",
    "nll_nats": "mean negative log-likelihood of the next token, in nats",
    "nll_nats_ci95_low": "lower end of its 95 % interval, prompts resampled; a resampled value",
    "nll_nats_ci95_high": "upper end",
    "nll_nats_change_ci95_low": "lower end of the 95 % interval of its change, in pairs",
    "nll_nats_change_ci95_high": "upper end",
    "perplexity_ci95_low": "exp of nll_nats_ci95_low",
    "perplexity_ci95_high": "exp of nll_nats_ci95_high",
    "kl_nats_mean": "mean over tokens of KL(before ‖ after), in nats",
    "kl_nats_median": "its median",
    "kl_nats_p99": "its 99th percentile: the smallest of its values that is not exceeded by 99 %",
    "kl_nats_max": "its maximum",
    "same_top1": "share of positions with the same most probable token",
    "same_top5": "mean share of the five most probable tokens that both have",
    "right_probability": "mean probability of the next token",
    "right_probability_rms_change": "root mean square of the change of that probability",
    "cosine": "mean over tokens of the cosine between the residual streams",
    "cosine_last": "mean over prompts of that of the last token",
    "relative_error": "mean over tokens of the squared ‖before − after‖² / ‖before‖²",
    "relative_error_last": "mean over prompts of that of the last token",
    "js_nats": "mean over queries of the Jensen–Shannon divergence of the renormalised rows "
    "(a sink's share is left out), in [0, ln 2]",
    "entropy_nats": "mean over queries of the entropy of the renormalised row",
    "distance_tokens": "mean over queries of the mean distance from query to key",
    "first_token_mass": "mean weight on the first token",
    "sink_mass": "mean share of a row that no key got",
    "previous_token_score": "weight on the token before, on repeated random tokens",
    "duplicate_token_score": "weight on the same token's first appearance",
    "induction_score": "weight on the token after the same token's first appearance",
    "previous_token_score_sd": "standard deviation of that score over the probe's sequences",
    "duplicate_token_score_sd": "standard deviation of that score over the probe's sequences",
    "induction_score_sd": "standard deviation of that score over the probe's sequences",
    "openness": "mean openness over units and tokens, in [0, 1]",
    "openness_abs_change": "mean over units of the change of the mean openness, without its sign",
    "dead": "units whose mean openness is below the threshold",
    "saturated": "units whose mean openness is above 1 − the threshold",
    "newly_dead": "units that are dead after and were not before",
    "newly_saturated": "units that are saturated after and were not before",
    "effective_capacity": "share of units that are neither dead nor saturated",
    "value_rms": "root mean square of a gate that has no openness",
    "horizon_tokens": "median over units of the memory horizon 1/(1 − a), a the mean decay",
    "state_cosine": "mean over prompts of the cosine between recurrent states, last token",
    "state_relative_error": "mean over prompts of ‖before − after‖² / ‖before‖² of that state",
    "state_norm": "mean over prompts of the Frobenius norm of that state",
    "settled": "share of positions whose final top token is on top from this layer on",
    "settle_layer": "mean first layer from which the final top token stays on top",
    "weight_relative_error": "squared relative error ‖W − Ŵ‖² / ‖W‖²",
    "weight_sparsity": "share of weights that are 0",
}
"""Every metric, in words."""


@dataclass(frozen=True, slots=True)
class Row:
    """One number before and after.

    Attributes:
        layer: the model's own number, or None for the model as a whole.
        module: what was measured: "output", "resid_post", "attention", a gate's name, a weight …
        head: the query head, or None.
        metric: a key of `METRICS`.
        before: the value before; of a divergence, the model's from itself.
        after: the value after; of a divergence, that of the two.
        delta: after − before, exactly 0 where they are equal.
    """

    layer: int | None
    module: str
    head: int | None
    metric: str
    before: float
    after: float
    delta: float


@dataclass(frozen=True, slots=True)
class Place:
    """What was measured, as in `Row`: it gives rows of that place."""

    module: str
    layer: int | None = None
    head: int | None = None

    def change(self, metric: str, before: float, after: float) -> Row:
        """A row of a quantity that each of the two models has."""
        # Two equal infinities differ by nothing.
        delta = 0.0 if before == after else float(after) - float(before)
        return Row(self.layer, self.module, self.head, metric, float(before), float(after), delta)

    def against_itself(self, metric: str, value: float, itself: float = 0.0) -> Row:
        """A row of a comparison: `itself` is what the model before would give against itself."""
        return self.change(metric, itself, value)
