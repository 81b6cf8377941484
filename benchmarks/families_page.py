"""Write docs/families.md from the table that ships with the package.

python -m benchmarks.families_page
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from trilens.models.families import CORE_SITES, FamilyRow, load_families, spell_short
from trilens.models.mappings import MappingRow, StackRow, load_mappings

PAGE = Path(__file__).parents[1] / "docs" / "families.md"


def _line(row: FamilyRow) -> str:
    reason = row.reason.split("; ")[0].replace("|", "\\|")
    return f"| {row.model_type} | {row.n_layers or '–'} | {reason} |"


def _kept(row: FamilyRow) -> str:
    """A captured type: its layers of either attention, and its gates."""
    gates = "<br>".join(map(str, row.gates)) or "–"
    layers = f"{spell_short(row.attention)} | {spell_short(row.effective)}"
    return f"| {row.model_type} | {row.n_layers} | {layers} | {gates} |"


def page() -> str:
    """The page as Markdown."""
    table = load_families()
    counts = table.count()
    groups = {
        key: [row for row in table.rows if row.outcome == key]
        for key in ("full", "residual", "refused")
    }
    captured = [row for row in table.rows if row.outcome != "refused"]
    lines = [
        "# Families",
        "",
        f"All {len(table.rows)} causal-LM types of transformers {table.transformers}, a tiny random"
        " model each, prompts longer",
        "than its sliding window, attention chunk and sparse top-k (`make sweep`; the table is",
        "`trilens families`). Captured means: logits bit-identical to a plain run, every residual",
        "bit-identical to an independent hook, attention within 1e-5 of eager `output_attentions`",
        "where the family offers it, gates equal to what the model computed, effective attention"
        " times values",
        "equal to the recurrence's own output within 1e-5, and `capture_many` within 1e-5 of"
        " `capture`",
        "(effective attention, a product over all tokens: 2e-5).",
        "",
        f"- **{counts['full']} in full**: the residual stream of every block, every softmax "
        "attention layer, and of every recurrence its",
        f"  effective attention, gates and state ({table.n_recurrent_only} have recurrences alone)",
        *_without_attention(counts.get("residual", 0)),
        f"- **{counts['refused']} refused** by an error that names the reason",
        f"- **{table.n_gated} with proven gates**",
        f"- **{table.n_effective} with proven effective attention** in their recurrent layers; no"
        " recurrence is left out"
        if not any(row.no_effective for row in table.rows)
        else f"- **{table.n_effective} with proven effective attention**",
        f"- **{table.n_sited} of the {counts['full']} in full with all core sites** in every layer"
        " that has such a place:",
        f"  {', '.join(f'`{name}`' for name in CORE_SITES)}",
        "",
        "RWKV-7, which transformers lacks, comes with trilens and has both: [rwkv7.md](rwkv7.md).",
        "",
        "## Layers and gates",
        "",
        "Layer numbers are those of the tiny model, which has every kind of layer of its type. A"
        " gate is given as",
        "name (kind, range): layers; [gates.md](gates.md) says what the names mean.",
        "",
        "| type | layers | softmax attention | effective attention | gates |",
        "|---|---|---|---|---|",
        *map(_kept, captured),
        "",
    ]
    for key, title in (("residual", "Without attention"), ("refused", "Refused")):
        if groups[key]:
            lines += [f"## {title}", "", "| type | layers | why |", "|---|---|---|"]
            lines += [*map(_line, groups[key]), ""]
    lines += _sites_not_proven(captured)
    lines += _mappings()
    return "\n".join(lines)


def _without_attention(n_types: int) -> list[str]:
    return [f"- **{n_types} without attention**: one line below says why"] if n_types else []


def _sites_not_proven(rows: Sequence[FamilyRow]) -> list[str]:
    """The sites that a layer has and the rules do not prove, with the first reason."""
    lines = [
        "## Sites that are not proven",
        "",
        "What a layer does not have (the stream between two parallel parts, an MLP of a block "
        "without one) is not listed;",
        "`trilens families --type NAME` lists what is proven.",
        "",
        "| type | sites | why |",
        "|---|---|---|",
    ]
    for row in rows:
        by_reason: dict[str, list[str]] = {}
        for name, why in row.no_sites:
            by_reason.setdefault(why.split("; ")[0].replace("|", "\\|"), []).append(name)
        for why, names in by_reason.items():
            lines.append(f"| {row.model_type} | {', '.join(names)} | {why} |")
    return [*lines, ""]


def _mappings() -> list[str]:
    """Encoder–decoders, models of sound and masked LMs, stack by stack."""
    table = load_mappings()
    counts = table.count()
    return [
        "## Encoder–decoders, sound, masked LMs, images and text",
        "",
        "Every type of `MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING` (seq2seq),"
        " `MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING` (speech) and",
        "`MODEL_FOR_MASKED_LM_MAPPING` (masked) and `MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING` (image),"
        " each of its stacks ([stacks.md](stacks.md))."
        " Full means: every residual",
        "bit-identical to a plain hook in a run of the whole model, self- and cross attention of"
        " every layer within 1e-5 of",
        "`output_attentions`, logits unchanged to the bit by edits of factor 1 at every site."
        " Models that read sound or images beside",
        "text are swept on text (language), those that need more on text with a made-up image or"
        " sound; towers alone on made-up images and",
        "sound (vision, audio); with real inputs: [inputs.md](inputs.md).",
        "",
        f"**{len(table.full_types)} types in full**; of the {len(table.rows)} entries"
        f" {counts.get('full', 0)} full, {counts.get('partial', 0)} in part,"
        f" {counts.get('refused', 0)} refused.",
        "",
        "| mapping | type | stack | layers | attention | cross attention | not in full, because |",
        "|---|---|---|---|---|---|---|",
        *(_stack_line(row, stack) for row in table.rows for stack in row.stacks),
        "",
    ]


def _stack_line(row: MappingRow, stack: StackRow) -> str:
    reason = stack.reason.split("; ")[0].replace("|", "\\|") or "–"
    layers = (
        f"{stack.n_layers or '–'} | {spell_short(stack.attention)} | {spell_short(stack.cross)}"
    )
    return f"| {row.mapping} | {row.model_type} | {stack.name} | {layers} | {reason} |"


def main() -> None:
    """Write the page."""
    PAGE.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
