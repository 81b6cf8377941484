"""The letters of every shape and the names of every site: one list, used everywhere.

Shapes
    batch   prompts in one forward pass
    seq     tokens of one prompt; seq_q query positions, seq_k key positions
    d_model width of the residual stream
    heads   query heads; kv_heads key/value heads; d_head width of one head
    units   gate units: channels, heads, states or experts, flattened in row-major order
    vocab   tokens the unembedding knows
    layers  the model's own block numbers, from 0

Sites
    resid_post   residual stream after a block, before the final norm
    pattern      attention pattern of a layer
    the gates    named below
"""

from __future__ import annotations

__all__ = ["GATE_SITES"]

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
}
