"""What a finished calibration leaves in the output, and what only the written model can say."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from trilens.checkpoint.calibration.kept import prompts_of
from trilens.checkpoint.calibration.own_text import kept_lines
from trilens.checkpoint.calibration.store import Store
from trilens.checkpoint.evaluate import compare_freely
from trilens.checkpoint.format.damage import Damage
from trilens.checkpoint.format.names import OWN_TEXT_NAME
from trilens.checkpoint.job import Job
from trilens.errors import MemoryShortError
from trilens.io.atomic import write_bytes
from trilens.models.loading import load, load_mapped

__all__ = ["gone_on", "write_own_text"]


def write_own_text(out: Path, store: Store) -> dict[str, str]:
    """Write the text that the model wrote itself; its hash by its name, nothing without one.

    Raises:
        WriteError: no space, no permission.
        CorruptFileError: it is not as it was written.
    """
    lines = kept_lines(store.folder)
    return {} if lines is None else {OWN_TEXT_NAME: write_bytes(out / OWN_TEXT_NAME, lines)}


def gone_on(out: Path, job: Job, store: Store, damage: Damage) -> Damage:
    """The damage with greedy continuations of each text, where both models can be run whole.

    The source runs over its mapped weights, the ternary model is loaded; where that does not fit
    into memory, there are no continuations.
    """
    source = job.source
    prompts = prompts_of(store.folder)
    try:
        after = load(out).model
    except MemoryShortError:
        return damage
    before, _ = load_mapped(source.folder, type(job.model), source.config, job.tensors)
    return replace(
        damage,
        texts=tuple(
            replace(text, continuations=compare_freely(before, after, prompts.get(text.name, [])))
            for text in damage.texts
        ),
    )
