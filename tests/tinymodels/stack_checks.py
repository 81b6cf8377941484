"""The checks that captures of a tiny model's stacks must pass, against a run of the whole model."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tinymodels import prompt_ids
from tinymodels.checks import TOLERANCE, equal, hooked_run, need
from tinymodels.mappings import MAPPINGS, build_as
from tinymodels.overrides_images import NOT_BUILT
from tinymodels.probes import beside_text
from trilens.edits import Scale
from trilens.errors import TrilensError
from trilens.lens.capture import Capture
from trilens.lens.lens import Lens
from trilens.models.mappings import MappingRow, StackRow
from trilens.models.source_target import Reading
from trilens.models.stack_probe import probe_of
from trilens.models.stacks import chosen_stack, stacks_of

__all__ = ["sweep_as"]

SOURCE, TARGET = 40, 23
_NEEDS_MORE = "does not run on a plain prompt"
_WEIGHTS = {
    "decoder": ("decoder_attentions",),
    "encoder": ("encoder_attentions",),
    "language": ("attentions",),
    "vision": ("attentions",),
    "audio": ("attentions",),
}


def sweep_as(mapping: str, model_type: str) -> tuple[MappingRow, dict[str, float]]:
    """Capture every stack of one type, against its references.

    Returns:
        The row for the table, and the largest measured differences.
    """
    if model_type in NOT_BUILT:
        row = StackRow("language", "refused", 0, (), (), NOT_BUILT[model_type])
        return MappingRow(mapping, model_type, MAPPINGS[mapping][model_type], (row,)), {}
    model = build_as(mapping, model_type)
    figures: dict[str, float] = {}
    stacks: list[StackRow] = []
    for name, stack in stacks_of(model).items():
        # What does not run as a whole can be compared with the part that runs.
        apart = name in ("vision", "audio") or any(row.outcome == "refused" for row in stacks)
        whole = stack.running(model) if apart else model
        stacks.append(_stack(model, name, figures, whole))
    return MappingRow(mapping, model_type, type(model).__name__, tuple(stacks)), figures


def _stack(
    model: PreTrainedModel, name: str, figures: dict[str, float], whole: PreTrainedModel
) -> StackRow:
    probe = None
    try:
        lens = Lens(model, stack=name)  # type: ignore[arg-type]
    except TrilensError as error:
        probe = beside_text(model) if name == "language" and _NEEDS_MORE in str(error) else None
        if probe is None:
            return StackRow(name, "refused", 0, (), (), str(error))
        try:
            lens = Lens(model, stack=name, probe=probe)
        except TrilensError as again:
            return StackRow(name, "refused", 0, (), (), str(again))
    stack = chosen_stack(model, name)
    prompt, kwargs = _inputs(lens, model, whole) if probe is None else _beside(probe)
    attention = bool(lens.attention_layers) and not lens.anatomy.other_attention
    options: dict[str, Any] = {"residual": "all", "attention": attention}
    if stack.has_source:
        options["target"] = kwargs["decoder_input_ids"]
    capture = lens.capture(**prompt, **options)
    prefix = f"{stack.path}." if stack.run == "alone" and whole is model else ""
    paths = [prefix + block.path for block in lens.anatomy.blocks]
    plain, seen = hooked_run(whole, paths, kwargs)
    need(len(seen) == lens.n_layers, f"{name}: {len(seen)} hooked blocks, {lens.n_layers} layers")
    for layer, stream in enumerate(seen):
        rows = lens.anatomy.form.read(stream)[0]
        own = capture.residual.get_layer(layer)
        need(equal(own, rows), f"{name}: residual of layer {layer} differs from a plain hook")
    if capture.logits is not None:
        need(equal(capture.logits, plain.logits[0]), f"{name}: logits differ from the plain run")
    if attention:
        _attention(whole, name, prompt, capture, kwargs, figures)
    _edits(lens, prompt, options, capture, name)
    with torch.no_grad():
        again = whole(**kwargs)
    need(equal(again[0], plain[0]), f"{name}: the plain run changed after the captures")
    return _row(lens, name, attention)


def _row(lens: Lens, name: str, attention: bool) -> StackRow:
    anatomy = lens.anatomy
    reason = ""
    if not attention:
        reason = next(
            iter(anatomy.other_attention.values()), "no softmax attention over its tokens"
        )
    elif lens.no_cross_attention:
        reason = next(iter(lens.no_cross_attention.values()))
    return StackRow(
        name=name,
        outcome="partial" if reason else "full",
        n_layers=lens.n_layers,
        attention=lens.attention_layers,
        cross=lens.cross_attention_layers,
        reason=reason,
    )


def _inputs(
    lens: Lens, model: PreTrainedModel, whole: PreTrainedModel
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the lens captures, and what the whole model is given for the same."""
    stack = chosen_stack(model, lens.stack_name)
    probe = probe_of(lens.model, stack, Reading.of(lens.model, stack))
    made = {
        key: _other(value)
        for key, value in probe.arguments.items()
        if isinstance(value, Tensor) and not key.endswith("input_ids")
    }
    if not any(value.is_floating_point() for value in made.values()):
        made = {}
    source: Any = made or {"input_ids": prompt_ids("", SOURCE)}
    kwargs: dict[str, Any] = {**source}
    known = inspect.signature(whole.forward).parameters
    if "use_cache" in known:
        kwargs["use_cache"] = False
    if "decoder_input_ids" in known:
        kwargs["decoder_input_ids"] = prompt_ids("", TARGET, seed=1)
    return {"prompt": source if made else source["input_ids"]}, kwargs


def _beside(probe: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Other inputs of the shapes of a probe, as the lens and as the whole model take them."""
    inputs = {key: _other(value) for key, value in probe.items()}
    return {"inputs": inputs}, {**inputs, "use_cache": False}


def _other(value: Tensor) -> Tensor:
    """Noise in place of a probe's noise; whole numbers say where and which, and stay."""
    if not value.is_floating_point():
        return value
    noise = torch.randn(value.shape, generator=torch.Generator().manual_seed(7))
    return torch.where(value == value.round(), value, noise)


@torch.no_grad()
def _attention(
    model: PreTrainedModel,
    name: str,
    prompt: dict[str, Any],
    capture: Capture,
    kwargs: dict[str, Any],
    figures: dict[str, float],
) -> None:
    """Our patterns against eager `output_attentions` of the whole model, where it offers them."""
    eager = copy.deepcopy(model)
    try:
        eager.set_attn_implementation("eager")
        output = eager(**kwargs, output_attentions=True)
    except (ValueError, TypeError, NotImplementedError, AttributeError):
        return
    found = _gaps(name, capture, output)
    if any(gap > TOLERANCE for gap in found.values()):
        # Other kernels round otherwise, which large scores magnify from block to block: the
        # patterns of the very run that gave these weights are the ones to compare.
        stack = name if name in stacks_of(eager) else None
        target = kwargs.get("decoder_input_ids") if name == "decoder" else None
        given = prompt.get("inputs")
        lens = Lens(eager, stack=stack, probe=given)  # type: ignore[arg-type]
        own = lens.capture(**prompt, target=target, attention=True)
        found = _gaps(name, own, output)
    for key, gap in found.items():
        need(gap <= TOLERANCE, f"{key} differ by {gap}")
        figures[key] = max(gap, figures.get(key, 0.0))


def _gaps(name: str, capture: Capture, output: Any) -> dict[str, float]:
    """Per kind of attention that the output holds, the largest |Δ| from the captured patterns."""
    caches = dict.fromkeys(_WEIGHTS.get(name, ()), capture.attention)
    if capture.has("cross_attention"):
        caches["cross_attentions"] = capture.cross_attention
    gaps: dict[str, float] = {}
    for key, cache in caches.items():
        given = [w for w in getattr(output, key, None) or () if isinstance(w, Tensor)]
        # A model with a tower may give the tower's weights under this name.
        if len(given) != len(cache.layers) or given[0].shape[-2] != len(capture.tokens):
            continue
        for layer, theirs in zip(cache.layers, given, strict=True):
            ours = cache.get_layer(layer)
            need(ours.shape == theirs.shape, f"{name}: {key} of layer {layer}: {theirs.shape}")
            gap = float((ours - theirs).abs().max())
            gaps[f"{name}.{key}"] = max(gap, gaps.get(f"{name}.{key}", 0.0))
    return gaps


def _edits(
    lens: Lens, prompt: dict[str, Any], options: dict[str, Any], capture: Capture, name: str
) -> None:
    """All sites edited by factor 1 in one pass: not a bit of the stream may change."""
    fixed = {site for (site, _), claim in lens.sites.sites.items() if claim.fixed}
    edits = [Scale(site, 1.0) for site in lens.site_layers if site not in fixed]
    edited = lens.capture(**prompt, **{**options, "attention": False}, edits=edits)
    for layer in range(lens.n_layers):
        same = equal(edited.residual.get_layer(layer), capture.residual.get_layer(layer))
        need(same, f"{name}: identity edits changed the residual of layer {layer}")
