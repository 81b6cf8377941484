"""`trilens inspect`: a prompt, or a saved capture, layer by layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from trilens.analysis.inspection import Inspection, inspect_capture
from trilens.analysis.whole_capture import available_parts, capture_known_gates, whole_capture
from trilens.cli.console import check_file, show_result, status, timed
from trilens.cli.groups import Loading
from trilens.cli.pages import is_page, model_facts, write_page
from trilens.cli.run.prompts import chosen_layers, open_lens, prompt_of
from trilens.edits import Edit, parse_edit
from trilens.errors import UsageError
from trilens.io.hub import file_refusal
from trilens.io.paths import as_path
from trilens.io.sealed import NO_HASH_NOTE
from trilens.lens.capture import Capture
from trilens.lens.lens import Lens
from trilens.models.token_strings import token_strings
from trilens.models.tokens import PromptLike
from trilens.report.making import capture_page
from trilens.report.page import Page
from trilens.report.text.inspection import print_inspection

__all__ = ["inspect_page", "inspect_prompt", "run"]

_WEIGHTS = (".pth", ".pt", ".bin", ".ckpt")  # files of other programs, never captures


def run(
    *,
    model: str,
    prompt: str | None,
    decoder_prompt: str | None,
    chat: bool,
    layers: str | None,
    top_k: int,
    effective: bool,
    states: bool,
    edit: list[str] | None,
    output: Path | None,
    format: str,
    loading: Loading,
) -> None:
    """Inspect and print, or write to a file."""
    check_file(output, format)
    edits = tuple(parse_edit(text) for text in edit or ())
    with timed(output):
        if as_path(model, "model").is_file() and Path(model).suffix.lower() != ".gguf":
            if Path(model).suffix.lower() in _WEIGHTS:
                raise file_refusal(Path(model))
            needless = {
                "--prompt": prompt, "--chat": chat, "--layers": layers, "--effective": effective,
                "--states": states, "--edit": edit, "--device-map": loading.device_map,
                "--revision": loading.revision, "--dtype": loading.dtype != "auto",
                "--trust-remote-code": loading.trust_remote_code, "--tokenizer": loading.tokenizer,
                "--attn-implementation": loading.attn_implementation, "--stack": loading.stack,
                "--gguf-file": loading.gguf_file, "--decoder-prompt": decoder_prompt,
            }  # fmt: skip
            given = [name for name, value in needless.items() if value]
            if given:
                raise UsageError(
                    f"{given[0]} is for a model, and {model} is a file: its capture is shown as it "
                    "was saved; leave the option out"
                )
            if output is not None and is_page(output):
                write_page(output, _saved(Path(model)))
                return
            inspection = _inspect_saved(Path(model), top_k)
        elif prompt is None:
            raise UsageError(f"model {model} needs a prompt: give -p TEXT, or -p - to read it")
        else:
            lens = open_lens(model, loading)
            given_prompt = prompt_of(prompt, chat=chat, decoder_prompt=decoder_prompt)
            if output is not None and is_page(output):
                page = inspect_page(
                    lens,
                    given_prompt,
                    chosen_layers(layers, lens.n_layers),
                    edits,
                )
                write_page(output, page, model_facts(model, loading))
                return
            name = Path(model).name if Path(model).is_dir() else model
            inspection = inspect_prompt(
                lens,
                name,
                given_prompt,
                layers,
                top_k,
                effective=effective,
                states=states,
                edits=edits,
            )
        show_result(inspection, print_inspection, format=format, file=output)


def _saved(file: Path) -> Page:
    page = capture_page(Capture.load(file))
    return replace(page, title=file.name)


def inspect_page(
    lens: Lens, prompt: PromptLike, layers: list[int] | None, edits: Sequence[Edit] = ()
) -> Page:
    """Capture all that this model has of a prompt, as a page; what it has not is a note."""
    with status("capturing"):
        capture, notes = whole_capture(lens, prompt, layers=layers, edits=edits)
    with status(f"summarising {len(capture.token_ids)} tokens"):
        page = capture_page(capture, lens=lens)
    # What this model has not is no reason to capture again.
    return replace(page, notes=(*notes, *map(_edited, edits)))


def _edited(edit: Edit) -> str:
    return f"edited: {edit}"


def _inspect_saved(file: Path, top_k: int) -> Inspection:
    capture = Capture.load(file)
    if not capture.has("residual"):
        raise UsageError(
            f"{file} holds no residual stream, so that there are no layers to show: save it again "
            "with --residual last"
        )
    # A capture knows its prompt's tokens as text, and no others.
    known = dict(zip(capture.token_ids.tolist(), capture.tokens, strict=True))
    return inspect_capture(
        capture,
        name=file.name,
        top_k=top_k,
        token_text=lambda token: known.get(token, f"#{token}"),
        notes=[] if capture.hash_checked else [NO_HASH_NOTE],
    )


def inspect_prompt(
    lens: Lens,
    name: str,
    prompt: PromptLike,
    layers: str | None,
    top_k: int,
    *,
    effective: bool,
    states: bool = False,
    edits: Sequence[Edit] = (),
) -> Inspection:
    """Capture what this model has of a prompt and summarise it; what it has not is a note."""
    chosen = chosen_layers(layers, lens.n_layers)
    asked = range(lens.n_layers) if chosen is None else chosen
    attention, gates, notes = available_parts(lens, asked)
    recurrent = [layer for layer in lens.effective_layers if layer in asked]
    if effective:
        notes.append(
            "effective attention: signed weights of a recurrence's values, the largest by size; "
            "rows do not sum to 1"
        )
    elif recurrent:
        notes.append("recurrent layers: --effective shows what they attend to")

    notes += map(_edited, edits)
    with status(f"capturing {name}"):
        capture = capture_known_gates(
            lens, prompt, notes,
            attention=attention, gates=gates, effective=effective, layers=chosen, states=states,
            edits=edits,
        )  # fmt: skip
    # Statistics of all positions take the time of another pass, where a prompt is long.
    with status(f"summarising {len(capture.token_ids)} tokens"):
        return inspect_capture(
            capture,
            name=name,
            top_k=top_k,
            token_text=lambda token: token_strings([token], lens.tokenizer)[0],
            notes=notes,
        )
