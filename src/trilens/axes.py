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

__all__ = ["GATE_SITES", "PATTERN", "RESID_POST", "resolve_site"]

RESID_POST = "resid_post"
PATTERN = "pattern"

GATE_SITES: dict[str, str] = {
    "mlp.gate": "GLU gate of a block's MLP: the activation that multiplies the up projection",
}


def resolve_site(name: str) -> tuple[int | None, str]:
    """Read a site name, ours or TransformerLens', as (layer or None, our name).

    `blocks.5.hook_resid_post` → (5, "resid_post"); `blocks.5.attn.hook_pattern` → (5, "pattern");
    `mlp.gate` → (None, "mlp.gate"). An unknown name is returned as it is, with layer None.
    """
    parts = name.split(".")
    if len(parts) < 3 or parts[0] != "blocks" or not parts[1].isdigit():
        return None, name
    aliases = {
        "hook_resid_post": RESID_POST,
        "attn.hook_pattern": PATTERN,
        "mlp.hook_pre": "mlp.gate",
    }
    rest = ".".join(parts[2:])
    return int(parts[1]), aliases.get(rest, rest)
