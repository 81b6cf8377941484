"""The letters of every shape and the names of every site: one list, used everywhere.

Shapes
    batch   prompts in one forward pass
    seq     tokens of one prompt; seq_q query positions, seq_k key positions
    d_model width of the residual stream
    streams residual streams, where a model keeps several: a site of the residual is
            [seq, streams, d_model] there
    heads   query heads; kv_heads key/value heads; d_head width of one head
    units   gate units: channels, heads, states or experts, flattened in row-major order
    vocab   tokens the unembedding knows
    layers  the model's own block numbers, from 0

Sites
    named places of the forward pass, and gates: the tables below
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from difflib import get_close_matches

from trilens.errors import UnknownSiteError
from trilens.printable import bounded, escaped

__all__ = [
    "GATES_AS_SITES",
    "GATE_SITES",
    "NOT_READ",
    "RESIDUALS",
    "SITES",
    "SITE_ORDER",
    "SiteSpec",
    "site_name",
]

GATE_SITES: dict[str, str] = {
    "mlp.gate": "GLU gate of a block's MLP: the activation that multiplies the up projection",
    "mlp.receptance": "sigmoid that multiplies the output of a block's channel mixing",
    "mlp.shared_gate": "sigmoid, one per token, that multiplies the shared expert's output",
    "router": "probability of each expert, before the top-k cut",
    "block.gate": "activation that multiplies data in the block itself, beside its MLP",
    "attn.router": "probability of each attention expert, before the top-k cut",
    "attn.out_gate": "gate on the output of attention, before its output projection",
    "mixer.z": "output gate of a recurrent mixer: an activation that multiplies its output",
    "mixer.out_gate": "output gate of a recurrent mixer: a sigmoid, or a product without one",
    "mixer.dt": "step size of a state space model",
    "mixer.rate": "rate A of a state space model: a parameter, the same for every token",
    "mixer.decay": "what a recurrence keeps of its state from one token to the next",
    "mixer.beta": "how strongly a delta rule writes",
    "mixer.receptance": "sigmoid that multiplies the output of a recurrence's time mixing",
    "mixer.in_context_rate": "in-context learning rate of a delta rule with vector-valued rates",
    "mixer.value_mix": "share of the first block's values in a block's own",
    "mixer.input": "gate on what enters a recurrence",
    "mixer.recurrence": "gate on a recurrence's decay",
    "stream.read": "weights by which a block's parts read one vector of several residual streams",
    "stream.write": "weights by which what a block's parts give is written into each stream",
    "stream.mix": "weights by which a block's parts pass the residual streams on to each other",
}


@dataclass(frozen=True, slots=True)
class SiteSpec:
    """One named place of the forward pass.

    Attributes:
        axes: of its value, for one prompt.
        where: what it is, in words.
        proof: the identity that proves it on the probe.
        per_layer: whether each layer has its own.
        aliases: other tools' names for it.
    """

    axes: str
    where: str
    proof: str
    per_layer: bool = True
    aliases: tuple[str, ...] = ()


def _gate(name: str) -> SiteSpec:
    """A gate as a site: what its function is given."""
    where = GATE_SITES[name].partition(":")[0]
    return SiteSpec(
        "[seq, units]",
        f"what the gate's function is given: {where}",
        "its function gives what the model multiplies by",
    )


SITES: dict[str, SiteSpec] = {
    "embed": SiteSpec(
        "[seq, d_model]",
        "output of the token embedding",
        "the embedding's rows of these tokens, up to one measured factor",
        per_layer=False,
        aliases=("hook_embed", "token_embeddings"),
    ),
    "resid_pre": SiteSpec(
        "[seq, d_model]",
        "residual stream before a block",
        "the output of the block before, bit for bit",
        aliases=("hook_resid_pre", "layers_input"),
    ),
    "attn.read": SiteSpec(
        "[seq, d_model]",
        "what attention reads of several residual streams, before its norm",
        "what a module that is given the streams hands on to attention",
    ),
    "attn.router": _gate("attn.router"),
    "attn.q": SiteSpec(
        "[seq, heads, d_head]",
        "queries before the rotary step",
        "equal to attn.q_rot where nothing rotates, else of the same length per head",
        aliases=("attn.hook_q",),
    ),
    "attn.k": SiteSpec(
        "[seq, kv_heads, d_head]",
        "keys before the rotary step",
        "equal to attn.k_rot where nothing rotates, else of the same length per head",
        aliases=("attn.hook_k",),
    ),
    "attn.q_rot": SiteSpec(
        "[seq, heads, d_head]",
        "queries as attention reads them",
        "pattern · attn.v = attn.z",
        aliases=("attn.hook_rot_q",),
    ),
    "attn.k_rot": SiteSpec(
        "[seq, kv_heads, d_head]",
        "keys as attention reads them",
        "pattern · attn.v = attn.z",
        aliases=("attn.hook_rot_k",),
    ),
    "attn.v": SiteSpec(
        "[seq, kv_heads, d_head]",
        "values",
        "pattern · attn.v = attn.z",
        aliases=("attn.hook_v",),
    ),
    "attn.scores": SiteSpec(
        "[heads, seq_q, seq_k]",
        "attention scores before the softmax",
        "their softmax is attn.pattern",
        aliases=("attn.hook_attn_scores",),
    ),
    "attn.pattern": SiteSpec(
        "[heads, seq_q, seq_k]",
        "attention weights",
        "pattern · attn.v = attn.z",
        aliases=("attn.hook_pattern", "attention_probabilities"),
    ),
    "attn.z": SiteSpec(
        "[seq, heads, d_head]",
        "each head's weighted sum of values",
        "pattern · attn.v = attn.z",
        aliases=("attn.hook_z",),
    ),
    "attn.out_gate": _gate("attn.out_gate"),
    "attn.head_out": SiteSpec(
        "[seq, heads, d_model]",
        "each head's part of attn.out, through the output projection without its bias",
        "the heads and the bias sum to attn.out",
        aliases=("attn.hook_result",),
    ),
    "attn.out": SiteSpec(
        "[seq, d_model]",
        "output of attention's output projection",
        "the heads and the bias sum to attn.out",
        aliases=("hook_attn_out", "attentions_output"),
    ),
    "attn.add": SiteSpec(
        "[seq, d_model]",
        "what attention adds to the residual stream, after norms and factors",
        "resid_mid − resid_pre in a sequential block; the parts sum to resid_post",
    ),
    "cross.in": SiteSpec(
        "[seq, d_model]",
        "what cross attention reads of the decoder's stream",
        "input of the module that runs it",
        aliases=("hook_cross_attn_in",),
    ),
    "cross.out": SiteSpec(
        "[seq, d_model]",
        "output of cross attention",
        "output of the module that runs it",
        aliases=("hook_cross_attn_out",),
    ),
    "cross.add": SiteSpec(
        "[seq, d_model]",
        "what cross attention adds to the residual stream, after norms and factors",
        "the parts sum to resid_post",
    ),
    "resid_mid": SiteSpec(
        "[seq, d_model]",
        "residual stream before a block's MLP, after all else that the block adds",
        "resid_pre plus what the parts before the MLP add, bit for bit",
        aliases=("hook_resid_mid", "hook_resid_mid_cross"),
    ),
    "mlp.read": SiteSpec(
        "[seq, d_model]",
        "what a block's MLP reads of several residual streams, before its norm",
        "what a module that is given the streams hands on to the MLP",
    ),
    "mlp.in": SiteSpec(
        "[seq, d_model]",
        "what a block's MLP reads",
        "input of the module whose output is mlp.out",
        aliases=("hook_mlp_in", "mlps_input"),
    ),
    "mlp.gate": SiteSpec(
        "[seq, units]",
        "a GLU's gate before its activation",
        "act(mlp.gate) · mlp.up = mlp.post",
        aliases=("mlp.hook_pre_gate", "mlp.hook_pre"),
    ),
    "mlp.up": SiteSpec(
        "[seq, units]",
        "what a GLU's gate multiplies",
        "act(mlp.gate) · mlp.up = mlp.post",
        aliases=("mlp.hook_pre_linear",),
    ),
    "mlp.post": SiteSpec(
        "[seq, units]",
        "hidden units of an MLP after its activation: what its last projection reads",
        "down(mlp.post) = mlp.out",
        aliases=("mlp.hook_post",),
    ),
    "mlp.receptance": _gate("mlp.receptance"),
    "mlp.shared_gate": _gate("mlp.shared_gate"),
    "mlp.out": SiteSpec(
        "[seq, d_model]",
        "output of a block's MLP",
        "down(mlp.post) = mlp.out, or the module's own output",
        aliases=("hook_mlp_out", "mlps_output"),
    ),
    "mlp.add": SiteSpec(
        "[seq, d_model]",
        "what a block's MLP adds to the residual stream, after norms and factors",
        "the parts sum to resid_post",
    ),
    "router": SiteSpec(
        "[seq, experts]",
        "logits of a router",
        "the router's probabilities are made of them",
    ),
    "mixer.read": SiteSpec(
        "[seq, d_model]",
        "what a recurrent mixer reads of several residual streams, before its norm",
        "what a module that is given the streams hands on to the mixer",
    ),
    "mixer.in": SiteSpec(
        "[seq, d_model]", "what a recurrent mixer reads", "input of the module that runs it"
    ),
    "mixer.dt": _gate("mixer.dt"),
    "mixer.decay": _gate("mixer.decay"),
    "mixer.beta": _gate("mixer.beta"),
    "mixer.in_context_rate": _gate("mixer.in_context_rate"),
    "mixer.value_mix": _gate("mixer.value_mix"),
    "mixer.input": _gate("mixer.input"),
    "mixer.recurrence": _gate("mixer.recurrence"),
    "mixer.receptance": _gate("mixer.receptance"),
    "mixer.z": _gate("mixer.z"),
    "mixer.out_gate": _gate("mixer.out_gate"),
    "state": SiteSpec(
        "[seq, *state]",
        "what a recurrence remembers after a token, as `cap.states` has it",
        "the model's own kernel function goes on from it",
    ),
    "mixer.out": SiteSpec(
        "[seq, d_model]", "output of a recurrent mixer", "output of the module that runs it"
    ),
    "mixer.add": SiteSpec(
        "[seq, d_model]",
        "what a recurrent mixer adds to the residual stream, after norms and factors",
        "the parts sum to resid_post",
    ),
    "block.gate": _gate("block.gate"),
    "resid_post": SiteSpec(
        "[seq, d_model]",
        "residual stream after a block, before the final norm",
        "the next block's input, bit for bit",
        aliases=("hook_resid_post", "layers_output"),
    ),
    "final_norm": SiteSpec(
        "[seq, d_model]",
        "output of the final norm",
        "the unembedding of it is the logits",
        per_layer=False,
        aliases=("ln_final.hook_normalized", "ln_final"),
    ),
}
"""Every named place of the forward pass, in the order in which a block passes them."""

RESIDUALS = ("resid_pre", "resid_mid", "resid_post")
"""Sites of the residual: of a model with several streams their value has an axis of streams."""

NOT_READ = ("state",)
"""Sites that are edited alone."""

GATES_AS_SITES = tuple(
    name for name in SITES if name in GATE_SITES and name not in ("mlp.gate", "router")
)
"""Gates that are sites by the rules of gates alone."""

SITE_ORDER: dict[str, int] = {name: number for number, name in enumerate(SITES)}
"""Name of a site → its place in that order."""

_NAMES = {
    **{name: name for name in (*GATE_SITES, *SITES)},
    **{alias: name for name, spec in SITES.items() for alias in spec.aliases},
}
_BLOCK = re.compile(r"blocks\.([0-9]{1,9})\.(.+)")
_INDEX = re.compile(r"(.+)\[([0-9]{1,9})\]")


def site_name(text: object) -> tuple[str, int | None]:
    """The site or gate that a text names, and the layer where it names one too.

    Args:
        text: a name of the tables, or TransformerLens' ("blocks.5.hook_resid_post",
            "attn.hook_z") or nnterp's ("layers_output", "layers_output[5]").

    Raises:
        UnknownSiteError: no site; the nearest names are offered.
    """
    if not isinstance(text, str):
        raise UnknownSiteError(f"site {_shown(text)} is no name: give one such as 'resid_post'")
    name, layer = text, None
    if match := _BLOCK.fullmatch(text):
        layer, name = int(match[1]), match[2]
    elif match := _INDEX.fullmatch(text):
        name, layer = match[1], int(match[2])
    found = _NAMES.get(name)
    if found is not None and (layer is None or found not in SITES or SITES[found].per_layer):
        return found, layer
    if found is not None:
        raise UnknownSiteError(
            f"site {_shown(text)} names layer {layer}: the model has {found} once"
        )
    # Names that look alike, and those whose last word is the same: "z" is "attn.z".
    near = get_close_matches(name[:80], _NAMES, n=4, cutoff=0.6)
    near += [each for each in _NAMES if each.rpartition(".")[2] == name]
    offered = list(dict.fromkeys(_NAMES[each] for each in near)) or [
        each for each in SITES if each not in GATES_AS_SITES
    ]
    raise UnknownSiteError(f"site {_shown(text)} is unknown: did you mean {', '.join(offered)}?")


def _shown(text: object) -> str:
    return bounded(escaped(repr(text)), 80)
