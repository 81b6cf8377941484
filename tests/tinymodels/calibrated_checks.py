"""A calibrated rule from end to end on a tiny model: what is written loads, and is what it says."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from calibration_cases import DOCUMENTS, SMALL, load_tokenizer, tiny
from tinymodels import build, forward_kwargs, prompt_ids
from tinymodels.checks import CheckError
from trilens.checkpoint import Calibration, TernaryPlan, ternarize, validate
from trilens.checkpoint.calibration.options import draw
from trilens.errors import TrilensError
from trilens.evaluation.perplexity import measure_perplexity
from trilens.models.positions import max_positions_of

__all__ = ["RULES", "calibrate_one"]

RULES = ("gptq", "best")
GROUP = 16
TOLERANCE = 1e-4
TOLD = 1e-3


def need(condition: bool, what: str) -> None:
    if not condition:
        raise CheckError(what)


def load(folder: Path, model_type: str) -> Any:
    """By its class, which not every configuration names to `AutoModelForCausalLM`."""
    return type(build(model_type)).from_pretrained(folder, dtype=torch.float32)


@torch.no_grad()
def logits(model: Any, model_type: str) -> torch.Tensor:
    found = model(**forward_kwargs(model_type, prompt_ids(model_type, 24))).logits
    assert isinstance(found, torch.Tensor)
    return found


def calibrate_one(model_type: str, rule: Any, folder: Path) -> dict[str, Any]:
    """Calibrate, write, load, and compare with the dense weights that it decodes to.

    Args:
        model_type: one of `TYPES`.
        rule: a calibrated rule; groups of 16, effort `fast`, 512 tokens.
        folder: an empty one.

    Returns:
        How many matrices were coded and how many of them without the text, the ratio of
        perplexities (which is that of what is loaded), and the largest difference of the logits,
        relative; or by which error it was refused.

    Raises:
        CheckError: what is loaded is not what was written.
    """
    try:
        source = tiny(model_type, folder / "src")
        options = Calibration(DOCUMENTS, effort="fast", **SMALL)
        plan = TernaryPlan(rule, group_size=GROUP)
        report = ternarize(source, folder / "out", plan=plan, calibration=options)
        ternarize(folder / "out", folder / "dense", format="dense")
    except TrilensError as error:
        return {"refused": f"{type(error).__name__}: {error}"}
    need(validate(folder / "out") == report, "the report is not that of the files")
    damage = report.damage
    assert damage is not None
    need(math.isfinite(damage.ratio), f"damage: {damage}")
    packed, dense = (load(folder / name, model_type) for name in ("out", "dense"))
    # A first pass may scale weights in place (RWKV).
    held = {name: parameter.detach().clone() for name, parameter in dense.named_parameters()}
    ours, wanted = logits(packed, model_type), logits(dense, model_type)
    tokenizer, longest = load_tokenizer(source), max_positions_of(packed)
    blocks = draw(options, tokenizer, longest=longest).evaluation
    found = measure_perplexity(packed, blocks).value
    told = damage.perplexity_after
    need(abs(found / told - 1) <= TOLD, f"perplexity is {found:.4f}, the report tells {told:.4f}")
    packed.dequantize()
    need(held.keys() == {name for name, _ in packed.named_parameters()}, "other parameters")
    for name, parameter in packed.named_parameters():
        need(torch.equal(held[name], parameter), f"{name} is not what the checkpoint decodes to")
    worst = float((ours - wanted).abs().max() / wanted.abs().max())
    need(worst <= TOLERANCE, f"logits differ by {worst:.1e} from those of the dense weights")
    return {
        "matrices": len(report.coded),
        "without_text": len(damage.fallbacks),
        "ratio": round(damage.ratio, 3),
        "logits": worst,
    }
