"""`trilens validate`: every byte of what `ternarize` wrote."""

from __future__ import annotations

from pathlib import Path

from trilens.checkpoint.gguf import validate_gguf
from trilens.checkpoint.validation import validate
from trilens.cli.console import show_json, status
from trilens.cli.streams import say
from trilens.report.text.ternary import GGUF_HEAD, REPORT_HEAD, gguf_sentence

__all__ = ["run"]


def run(*, path: Path, format: str) -> None:
    """Check and report."""
    if path.suffix == ".gguf" and not path.is_dir():
        with status(f"checking {path}"):
            file = validate_gguf(path)
        if format == "json":
            show_json({**GGUF_HEAD, **file.to_dict()})
        else:
            say(f"{path}: undamaged. {gguf_sentence(file)}")
        return
    with status(f"checking {path}"):
        report = validate(path)
    if format == "json":
        show_json({**REPORT_HEAD, **report.to_dict()})
        return
    say(
        f"{path}: undamaged. {len(report.coded)} matrices hold legal codes and finite scales; "
        "all files have the size and hash that the manifest lists."
    )
    say(report.verdict)
