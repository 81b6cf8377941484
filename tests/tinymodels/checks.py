"""The checks that a capture of a tiny model must pass; one place for the sweep and the tests."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from tinymodels import build, forward_kwargs, prompt_ids
from trilens.axes import GATES_AS_SITES, NOT_READ, SITES
from trilens.edits import Scale
from trilens.errors import AttentionPathError, TrilensError
from trilens.lens.capture import Capture
from trilens.lens.lens import Lens
from trilens.models.families import FamilyGate, FamilyRow

__all__ = ["CheckError", "attention_vs_eager", "check_capture", "family_sites", "sweep_one"]

TOKENS = 40
SHORT = (40, 23, 31)
TOLERANCE = 1e-5
# Weights are products over all tokens of values that other batch shapes round otherwise.
EFFECTIVE_TOLERANCE = 2e-5


class CheckError(AssertionError):
    """A captured value differs from its independent reference."""


def need(condition: bool, what: str) -> None:
    if not condition:
        raise CheckError(what)


def equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool(torch.equal(a, b))


@torch.no_grad()
def hooked_run(model: Any, paths: list[str], kwargs: dict[str, Any]) -> tuple[Any, list[Tensor]]:
    """A plain run with one plain hook per block, in call order: the independent path."""
    seen: list[Tensor] = []
    modules = dict(model.named_modules(remove_duplicate=False))

    def hook(_module: Any, _args: Any, output: Any) -> None:
        first = output[0] if isinstance(output, tuple | list) else output
        seen.append((first if isinstance(first, Tensor) else output.hidden_states).clone())

    unique = {id(modules[path]): modules[path] for path in paths}
    handles = [module.register_forward_hook(hook) for module in unique.values()]
    try:
        return model(**kwargs), seen
    finally:
        for handle in handles:
            handle.remove()


def check_capture(lens: Lens, plain: Tensor, capture: Capture, kwargs: dict[str, Any]) -> None:
    """Logits and residuals of a capture with residual="all" against a plain hooked run."""
    need(
        capture.logits is not None and equal(capture.logits, plain[0]),
        "logits differ from the plain run",
    )
    _, seen = hooked_run(lens.model, [block.path for block in lens.anatomy.blocks], kwargs)
    need(len(seen) == lens.n_layers, f"{len(seen)} hooked blocks, {lens.n_layers} layers")
    for layer, stream in enumerate(seen):
        ours = capture.residual.get_layer(layer)
        rows = lens.anatomy.form.read(stream)[0]
        need(equal(ours, rows), f"residual of layer {layer} differs from an independent hook")


@torch.no_grad()
def attention_vs_eager(lens: Lens, capture: Capture, kwargs: dict[str, Any]) -> float | None:
    """Largest |Δ| between our patterns and eager `output_attentions`; None where not offered."""
    model = copy.deepcopy(lens.model)
    try:
        model.set_attn_implementation("eager")
        # Falcon keeps "sdpa", and adds its bool mask as a number where it is asked for weights.
        model.config._attn_implementation = "eager"
        output = model(**kwargs, output_attentions=True)
    except (ValueError, TypeError, NotImplementedError, AttributeError):
        return None
    weights = getattr(output, "attentions", None)
    layers = capture.attention.layers
    weights = [w for w in weights or () if isinstance(w, Tensor) and w.dim() == 4]
    if len(weights) != len(layers):
        return None
    worst = 0.0
    for layer, theirs in zip(layers, weights, strict=True):
        ours = capture.attention.get_layer(layer)
        need(ours.shape == theirs.shape, f"attention of layer {layer}: {ours.shape} {theirs.shape}")
        mass = capture.attention.sink_mass(layer)[..., None]
        later = float((theirs.sum(-1) - 1).abs().max()) < 1e-4 < float(mass.max())
        # A function that puts its sinks on the output returns weights without them.
        used = theirs * (1 - mass) if later else theirs
        worst = max(worst, float((ours - used).abs().max()))
    return worst


def unembed_vs_logits(lens: Lens, capture: Capture) -> float:
    """Largest relative |Δ| between norm and head of the last residual, and the logits."""
    last = capture.residual.readout(lens.n_layers - 1)
    ours = lens.unembed(last)
    return float((ours - capture.logits).abs().max() / capture.logits.abs().max())


def many_vs_one(lens: Lens, model_type: str, *, attention: bool, gates: bool) -> float:
    """Largest relative |Δ| between `capture_many` and `capture` over all that is held."""
    prompts = [prompt_ids(model_type, length, seed=length)[0].tolist() for length in SHORT]
    options = {"residual": "all", "attention": attention, "gates": gates}
    worst = 0.0
    for prompt, many in zip(
        prompts, lens.capture_many(prompts, batch_size=3, **options), strict=True
    ):
        one = lens.capture(prompt, **options)
        need(many.token_ids.tolist() == prompt, "token ids of capture_many differ")
        worst = max(worst, difference(many, one))
    return worst


def difference(a: Capture, b: Capture) -> float:
    pairs = [(a.logits, b.logits)]
    pairs += [(a.residual.get_layer(i), b.residual.get_layer(i)) for i in b.residual.layers]
    if b.has("attention"):
        pairs += [(a.attention.get_layer(i), b.attention.get_layer(i)) for i in b.attention.layers]
    if b.has("gates"):
        pairs += [
            (a.gates.get(name, i), b.gates.get(name, i))
            for name in b.gates.names
            for i in b.gates.layers(name)
        ]
    worst = 0.0
    for left, right in pairs:
        need(left.shape == right.shape, f"shapes differ: {left.shape} {right.shape}")
        scale = max(1.0, float(right.abs().max()))
        worst = max(worst, float((left - right).abs().max()) / scale)
    return worst


def sweep_one(model_type: str) -> tuple[FamilyRow, dict[str, Any]]:
    """Capture one type every way, against its references.

    Returns:
        The row for the table, and the measured differences.
    """
    model = build(model_type)
    ids = prompt_ids(model_type, TOKENS)
    kwargs = {**forward_kwargs(model_type, ids), "use_cache": False}
    with torch.no_grad():
        plain = model(**kwargs).logits
    name = type(model).__name__
    try:
        lens = Lens(model)
    except TrilensError as error:
        return FamilyRow(model_type, name, "refused", 0, (), (), (), str(error)), {}
    anatomy = lens.anatomy
    attention = bool(anatomy.attention) and not anatomy.other_attention
    gates = bool(lens.gate_layers)
    capture = lens.capture(ids, residual="all", attention=attention, gates=gates)
    check_capture(lens, plain, capture, kwargs)
    figures: dict[str, Any] = {"attention_vs_eager": None}
    figures["unembed"] = unembed_vs_logits(lens, capture)
    need(figures["unembed"] <= TOLERANCE, f"norm and head differ by {figures['unembed']}")
    if attention:
        figures["attention_vs_eager"] = attention_vs_eager(lens, capture, kwargs)
        need(
            (figures["attention_vs_eager"] or 0.0) <= TOLERANCE,
            f"attention differs from eager by {figures['attention_vs_eager']}",
        )
    figures["many_vs_one"] = many_vs_one(lens, model_type, attention=attention, gates=gates)
    need(figures["many_vs_one"] <= TOLERANCE, f"capture_many differs by {figures['many_vs_one']}")
    effective, no_effective = effective_layers(lens, model_type, ids, figures)
    sites, no_sites = family_sites(lens)
    check_sites(lens, ids, capture, sites)
    figures["batches"] = lens.batches_safely(TOKENS)
    with torch.no_grad():
        need(equal(model(**kwargs).logits, plain), "the plain run changed after the captures")
    states = state_layers(lens, ids)
    reason = why_not_full(lens, attention=attention, effective=effective, states=states)
    row = FamilyRow(
        model_type=model_type,
        model_class=name,
        outcome="residual" if reason else "full",
        n_layers=lens.n_layers,
        attention=lens.attention_layers,
        effective=effective,
        gates=family_gates(capture),
        reason=reason,
        no_effective=no_effective,
        sites=sites,
        no_sites=no_sites,
        states=states,
    )
    return row, figures


def state_layers(lens: Lens, ids: Tensor) -> tuple[int, ...]:
    """Recurrent layers whose state a capture holds: each is proven by what was read of it."""
    if not lens.state_layers:
        return ()
    found = lens.capture(ids, states=[0, TOKENS // 2, -1], residual=None, logits=None)
    need(found.states.layers == lens.state_layers, f"states of layers {found.states.layers} only")
    return found.states.layers


def why_not_full(
    lens: Lens, *, attention: bool, effective: tuple[int, ...], states: tuple[int, ...]
) -> str:
    """What a capture of the type lacks: an attention, or a recurrence's own; "" for nothing."""
    claims = lens._runner.proof.gates
    if lens.anatomy.other_attention:
        return next(iter(lens.anatomy.other_attention.values()))
    if not attention and not claims.recurrences:
        return "no softmax attention layers, and no recurrence that is known"
    gated = {layer for name, layer in claims.gates if name.startswith("mixer.")}
    for layer in claims.recurrences:
        parts = (("effective attention", effective), ("state", states), ("gate", gated))
        for what, layers in parts:
            if layer not in layers:
                return f"the recurrence of layer {layer} has no proven {what}"
    return ""


def family_sites(lens: Lens) -> tuple[tuple[str, ...], tuple[tuple[str, str], ...]]:
    """The sites proven wherever there is such a place, and the others with their first reason."""
    claims = lens._runner.proof.sites
    proven: list[str] = []
    refused: list[tuple[str, str]] = []
    for name, spec in SITES.items():
        if name in GATES_AS_SITES or name in NOT_READ:  # Counted as gates and states.
            continue
        layers = range(lens.n_layers) if spec.per_layer else (None,)
        keys = [(name, layer) for layer in layers]
        need(all((key in claims.sites) != (key in claims.reasons) for key in keys), f"{name} lost")
        missing = [key for key in keys if key not in claims.sites and key not in claims.absent]
        if missing:
            refused.append((name, claims.reasons[missing[0]]))
        elif any(key in claims.sites for key in keys):
            proven.append(name)
    return tuple(proven), tuple(refused)


def check_sites(lens: Lens, ids: Tensor, capture: Capture, names: tuple[str, ...]) -> None:
    """The captured sites against each other: streams, and heads that sum to attention's output.

    All are edited by factor 1 in the same pass: not a bit of the logits may change.
    """
    fixed = {name for (name, _), site in lens.sites.sites.items() if site.fixed}
    edits = [Scale(name, 1.0) for name in names if name not in fixed]
    edited = lens.capture(ids, residual=None, sites=names, edits=edits)
    if capture.logits is not None and edited.logits is not None:
        need(equal(edited.logits, capture.logits), "identity edits changed the logits")
    found = edited.sites
    for layer in range(lens.n_layers):
        own = capture.residual.get_layer(layer)
        need(equal(found["resid_post", layer], own), f"resid_post of layer {layer} differs")
        linked = layer and layer not in lens.anatomy.starts
        if linked and "resid_pre" in names and lens.anatomy.final_scale == 1.0:
            before, after = found["resid_post", layer - 1], found["resid_pre", layer]
            scale = float((before * after).sum() / (before * before).sum())
            gap = float((before * scale - after).abs().max() / after.abs().max())
            need(gap <= TOLERANCE, f"resid_pre of layer {layer} is not the block before's output")
    for layer in lens.site_layers.get("attn.head_out", ()) if "attn.head_out" in names else ():
        heads = found["attn.head_out", layer].double()
        rest = found["attn.out", layer].double() - heads.sum(1)
        gap = float((rest - rest[:1]).abs().max() / heads.abs().sum(1).max())
        need(gap <= TOLERANCE, f"the heads of layer {layer} do not sum to attn.out: {gap}")


def family_gates(capture: Capture) -> tuple[FamilyGate, ...]:
    """The captured gates, layers of one kind and range together."""
    grouped: dict[tuple[Any, ...], list[int]] = {}
    for name in capture.gates.names if capture.has("gates") else ():
        for layer in capture.gates.layers(name):
            plain = capture.gates.spec(name, layer).to_dict()
            grouped.setdefault((name, plain["kind"], *plain["range"]), []).append(layer)
    return tuple(
        FamilyGate(name, kind, (low, high), tuple(layers))
        for (name, kind, low, high), layers in grouped.items()
    )


def effective_layers(
    lens: Lens, model_type: str, ids: Tensor, figures: dict[str, Any]
) -> tuple[tuple[int, ...], str]:
    """Layers whose effective attention a capture proves, in a batch too; or why there are none."""
    try:
        capture = lens.capture(ids, effective=True, residual=None, logits=None)
    except AttentionPathError as error:
        text = str(error)
        return (), text if "can't be captured" in text else ""
    layers = capture.effective.layers
    need(layers == lens.effective_layers, f"effective attention of layers {layers} only")
    prompts = [prompt_ids(model_type, length, seed=length)[0].tolist() for length in SHORT]
    worst = 0.0
    many = lens.capture_many(prompts, batch_size=3, effective=True)
    for prompt, ours in zip(prompts, many, strict=True):
        theirs = lens.capture(prompt, effective=True)
        for layer in layers:
            a, b = ours.effective.get_layer(layer), theirs.effective.get_layer(layer)
            worst = max(worst, float((a - b).abs().max() / b.abs().max()))
    figures["effective_many_vs_one"] = worst
    need(worst <= EFFECTIVE_TOLERANCE, f"effective attention differs in a batch by {worst}")
    return layers, ""
