"""Command lines, drawn from a seed: every command, with arguments that are wrong in many ways."""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Any

from typer.main import get_command

from hostile.mutations import mutate_bytes
from trilens.cli.main import app

__all__ = ["COMMANDS", "command_line"]

COMMANDS: dict[str, Any] = dict(getattr(get_command(app), "commands"))  # noqa: B009
"""Name → the command with its parameters."""

# What takes the time of a whole model or text goes in with few tokens.
_SMALL = {"--max-tokens": "48", "--seq-length": "16", "--batch-size": "2"}
_VALUES = (
    "", " ", "-", "--", "-1", "0", "1", "3", "1e3", "nan", "inf", "-inf", "0x10", "9" * 30, "1.5",
    "None", "true", "x", "x" * 300, "y" * 5000, "é", "\udcff", "\x1b[2J\x07", "a\nb", "\u2028",
    "\u202e", "a\\b", "'", '"', "$HOME", "~", "*", "(", "[", "(a+)+$", "0,1", "0-1", "1-0", "-",
    "kl_nats_mean>0", "kl_nats_mean>nan", "nll>", ">", "table", "json", "auto", "cpu", "cuda:9",
    "meta", "last", "all", "none", "float32", "group", "row", "exact", "gptq", "best", "demo",
    "gguf-tq2_0", "dense", "two_bit", "compact", "predicted",
)  # fmt: skip
# One of two that a command wants, and what makes a budget of a plan.
_NEEDED = {("capture", "--data"), ("evaluate", "--evaluate"), ("plan", "--budget-bits")}
_SAVED = ("ternary", "gguf", "capture", "comparison", "store", "store")
_PLACES = (
    ".", "..", "/", "/dev/null", "/dev/zero", "/dev/full", "/dev/stdin", "/proc/self/mem",
    "nothing", "nothing/x", "org/name", "a/b/c", "file:///etc/passwd", "http://127.0.0.1/x",
    "x/" * 2100, "z" * 256,
)  # fmt: skip


def command_line(rng: random.Random, whole: dict[str, Path], place: Path) -> list[str]:
    """A command line without its program.

    Args:
        rng: of the seed.
        whole: sound files by what they are: model, ternary, gguf, capture, comparison, store,
            text, pth.
        place: an empty folder, for damaged files and for output.
    """
    name = rng.choice(list(COMMANDS))
    # Only what is nearly right gets beyond the checks of a command.
    nearly = rng.random() < 0.4
    line = [name]
    for parameter in COMMANDS[name].params:
        options = [each for each in parameter.opts if each.startswith("-")]
        if "--debug" in options or "--help" in options:
            continue
        if not options:
            if rng.random() < 0.95:
                line.append(_value(rng, parameter, whole, place, nearly))
            continue
        long = options[-1]
        # Of a ternary copy they are options of a calibration, which few lines ask for.
        small = None if nearly and name == "ternarize" else _SMALL.get(long)
        given = parameter.required or small is not None or (name, long) in _NEEDED
        if rng.random() < (0.97 if given else 0.03 if nearly else 0.1):
            line.append(rng.choice([*options, *parameter.secondary_opts]))
            if not getattr(parameter, "is_flag", False):
                sound = small is not None and rng.random() < 0.85
                line.append(
                    small if sound and small else _value(rng, parameter, whole, place, nearly)
                )
    for _ in range(rng.choice((0,) if nearly else (0, 0, 0, 1, 2))):
        kind = rng.randrange(4)
        at = rng.randrange(len(line) + 1)
        if kind == 0:
            line.insert(at, rng.choice(_VALUES))
        elif kind == 1:
            del line[min(at, len(line) - 1)]
        elif kind == 2:
            line.insert(at, line[min(at, len(line) - 1)])
        else:
            line.insert(at, rng.choice(("--no-such", "-z", "--format", "--help", "--version")))
        line = line or [""]
    return line


def _value(
    rng: random.Random, parameter: Any, whole: dict[str, Path], place: Path, nearly: bool
) -> str:
    """Sound for its parameter, often; a damaged file; or anything."""
    kind = rng.random()
    sound = _sound(parameter, whole, place)
    if sound and kind < (0.97 if nearly else 0.6):
        return rng.choice(sound)
    if kind < 0.75:
        return _damaged(rng, whole, place)
    if kind < 0.85:
        return rng.choice((*_PLACES, *map(str, whole.values())))
    return rng.choice(_VALUES)


def _sound(parameter: Any, whole: dict[str, Path], place: Path) -> tuple[str, ...]:
    model, text = str(whole["model"]), str(whole["text"])
    which = ("last", "all", "none")
    fixed = {
        "model": (model, model, str(whole["capture"]), str(whole["ternary"])),
        "before": (model,), "made_from": (model,), "limit": ("1",),
        "after": (model, str(whole["ternary"])),
        "data": (text,), "calibrate": (text,), "evaluate": (text,), "prompt": ("the cat sat",),
        "output": (str(place / "out"), str(place / "out.gguf")), "source": (str(whole["pth"]),),
        "path": tuple(str(whole[each]) for each in _SAVED),
        "layers": ("0", "0-1", "1"), "top_k": ("1", "3"), "seed": ("0", "7"), "field": ("text",),
        "group_size": ("4", "8"), "budget_bits": ("4", "8"), "device_map": ("cpu",),
        "device": ("cpu",),
        "max_perplexity_ratio": ("1.5",), "fail_if": ("kl_nats_mean>0",), "type": ("llama",),
        "ignore": ("mlp",), "only": ("mlp",), "residual": which, "logits": which, "lens": which,
        "format": ("table", "json"), "dtype": ("auto", "float32", "bfloat16"),
        "rule": ("absmean", "twn", "exact", "planes", "gptq", "best"), "per": ("tensor", "row"),
        "to": ("trilens", "dense", "gguf-tq2_0"), "storage": ("two_bit", "compact"),
        "scale_dtype": ("float16", "float32"), "costs": ("measured", "predicted"),
        "target": ("cat", "#3"), "against": ("sat", "#4"), "max_new_tokens": ("1", "3"),
        "clean": ("the cat sat",), "corrupted": ("the mat sat",), "temperature": ("0", "1.0"),
        "site": ("resid_post", "attn.z"), "direction": ("denoise", "noise"), "stop": ("mat",),
        "edit": ("scale:resid_post@0 factor=0.5",), "top_p": ("0.9",),
        "by": ("component", "head", "position"),
    }  # fmt: skip
    return fixed.get(str(parameter.name), ())


def _damaged(rng: random.Random, whole: dict[str, Path], place: Path) -> str:
    source = rng.choice(list(whole.values()))
    copy = place / f"damaged {rng.randrange(10**6)}{source.suffix}"
    if source.is_dir():
        shutil.copytree(source, copy)
        file = rng.choice(sorted(copy.iterdir()))
    else:
        shutil.copy(source, copy)
        file = copy
    if rng.random() < 0.1:
        file.unlink()
    else:
        file.write_bytes(mutate_bytes(rng, file.read_bytes()))
    return str(copy)
