"""`trilens capture`: one forward pass, saved; or a corpus into a store."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from time import perf_counter
from typing import Literal

from trilens.cli.console import check_file, shown_progress, status, timed
from trilens.cli.groups import Loading, Storing
from trilens.cli.run.prompts import chosen_layers, open_lens, prompt_of
from trilens.cli.run.text import DEMO, documents_of
from trilens.cli.streams import say
from trilens.corpus.capture import capture_corpus
from trilens.corpus.options import StoreOptions
from trilens.edits import parse_edit
from trilens.errors import UsageError
from trilens.models.tokenizer_files import read_tokenizer
from trilens.report.text.store import store_sentences

__all__ = ["run"]

Which = Literal["last", "all", "none"]


def run(
    *,
    model: str,
    prompt: str | None,
    data: str | None,
    sites: str | None,
    decoder_prompt: str | None,
    chat: bool,
    output: Path,
    residual: Which,
    attention: bool,
    gates: bool,
    effective: bool,
    states: bool,
    layers: str | None,
    logits: Which,
    edit: list[str] | None,
    storing: Storing,
    loading: Loading,
) -> None:
    """Capture and save."""
    names = None if sites is None else [name.strip() for name in sites.split(",")]
    if (prompt is None) == (data is None):
        raise UsageError(
            "capture needs either a prompt, --prompt TEXT, or a corpus, --data TEXT (trilens "
            "capture --help lists the options)"
        )
    if prompt is None:
        of_one = (chat, attention, gates, effective, states, edit, decoder_prompt is not None)
        if any(of_one):
            raise UsageError(
                "--decoder-prompt, --chat, --attention, --gates, --effective, --states and --edit "
                "are of one prompt: of a corpus name --sites and --reduce"
            )
        _store(model, str(data), names, output, layers, storing, loading)
        return
    if storing != Storing():
        raise UsageError("options of a store are of a corpus: name it with --data TEXT")
    check_file(output)
    # Read first: a typing mistake should not cost the time of a load.
    edits = [parse_edit(text) for text in edit or ()]
    with timed(output):
        lens = open_lens(model, loading)
        with status("capturing"):
            capture = lens.capture(
                prompt_of(prompt, chat=chat, decoder_prompt=decoder_prompt),
                residual=None if residual == "none" else residual,
                attention=attention,
                gates=gates,
                effective=effective,
                layers=chosen_layers(layers, lens.n_layers),
                logits=None if logits == "none" else logits,
                states=states,
                sites=names or (),
                edits=edits,
            )
        capture.save(output)
        say(repr(capture))


def _store(
    model: str,
    data: str,
    sites: list[str] | None,
    output: Path,
    layers: str | None,
    storing: Storing,
    loading: Loading,
) -> None:
    chosen = chosen_layers(layers, None)
    options = StoreOptions(
        sites=StoreOptions().sites if sites is None else tuple(sites),
        layers=None if chosen is None else tuple(chosen),
        dtype=storing.store_dtype,
        reduce=tuple(name.strip() for name in (storing.reduce or "").split(",") if name.strip()),
        values=storing.values,
        context=storing.seq_length,
        shard_tokens=storing.shard_tokens,
        batch_tokens=storing.batch_tokens,
        max_tokens=storing.max_tokens,
        threads=storing.threads,
    )
    given = asdict(loading)
    tokenizer = given.pop("tokenizer")
    is_demo = data == DEMO and not Path(data).exists()
    started = perf_counter()
    with timed(output), shown_progress() as progress:
        store = capture_corpus(
            model,
            documents_of(data) if is_demo else data,
            output,
            options=options,
            loading=given,
            field=storing.field,
            label=storing.label,
            strict=storing.strict,
            tokenizer=None if tokenizer is None else read_tokenizer(tokenizer),
            workers=storing.workers,
            ray=storing.ray,
            gpus_per_worker=storing.gpus_per_worker,
            overwrite=storing.overwrite,
            progress=progress,
        )
    say(f"{store.n_tokens / (perf_counter() - started):,.0f} tokens/s", err=True)
    for sentence in store_sentences(store):
        say(sentence)
