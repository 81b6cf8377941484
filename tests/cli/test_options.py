"""Options: one meaning each, choices that are the library's, declarations that fit their work."""

from __future__ import annotations

import inspect
import re
from importlib import import_module
from typing import get_args, get_type_hints

import pytest
import typer

from trilens.analysis.comparison import run as comparison
from trilens.checkpoint.format.plan import Storage
from trilens.checkpoint.pipeline import Format
from trilens.cli import groups, options, store_options
from trilens.cli.main import app
from trilens.corpus.options import REDUCERS, StoredDtype, StoreOptions
from trilens.models import loading
from trilens.planning.result import Costs
from trilens.ternary.calibrated.rules import CALIBRATED_RULES
from trilens.ternary.granularity import Per
from trilens.ternary.rules.coder import ScaleDtype
from trilens.ternary.rules.rules import RULES

COMMANDS = {each.callback.__name__: each.callback for each in app.registered_commands}


def choices(alias: object) -> set[str]:
    """The choices of an option, without None."""
    kind = get_args(alias)[0]
    kinds = [each for each in get_args(kind) if get_args(each)] or [kind]
    return set(get_args(kinds[0]))


@pytest.mark.parametrize(
    ("option", "known"),
    [
        ("Rule", {*RULES, *CALIBRATED_RULES}),
        ("Per", set(get_args(Per))),
        ("ScaleDtype", set(get_args(ScaleDtype))),
        ("Storage", set(get_args(Storage))),
        ("Costs", set(get_args(Costs))),
        ("To", set(get_args(Format))),
        ("Dtype", set(loading._DTYPES)),
        ("LogitLens", set(comparison._LENSES)),
        ("StoreDtype", set(get_args(StoredDtype))),
    ],
)
def test_choices_are_the_librarys(option: str, known: set[str]) -> None:
    declared = options if option in options.__all__ else store_options
    assert choices(getattr(declared, option)) == known


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_passes_what_its_work_takes(name: str) -> None:
    declared = list(inspect.signature(inspect.unwrap(COMMANDS[name])).parameters)
    work = import_module(f"trilens.cli.run.{name}").run
    taken = inspect.signature(work).parameters
    assert declared[-1] == "debug"
    assert set(taken) == set(declared[:-1])
    assert all(each.kind is inspect.Parameter.KEYWORD_ONLY for each in taken.values())


def test_a_group_is_declared_flat_and_taken_whole() -> None:
    taken = []

    def command(model: str, loading: groups.Loading = groups.Loading(dtype="float32")) -> None:
        taken.append((model, loading))

    flat = groups.flattened(command)
    parameters = inspect.signature(flat).parameters
    assert list(parameters) == [
        "model", "dtype", "device_map", "revision", "trust_remote_code", "attn_implementation",
        "stack", "gguf_file", "tokenizer",
    ]  # fmt: skip
    assert parameters["dtype"].default == "float32"
    assert get_type_hints(flat, include_extras=True)["dtype"] == options.Dtype
    flat(
        model="m",
        dtype="auto",
        device_map=None,
        revision="r",
        trust_remote_code=True,
        attn_implementation="eager",
        stack="encoder",
        gguf_file="m.gguf",
        tokenizer=None,
    )
    loading = groups.Loading(
        revision="r",
        trust_remote_code=True,
        attn_implementation="eager",
        stack="encoder",
        gguf_file="m.gguf",
    )
    assert taken == [("m", loading)]


def test_reducers_in_the_help_are_the_librarys() -> None:
    (info,) = store_options.Reduce.__metadata__
    assert set(re.findall(r"[a-z_]+", info.help.partition(":")[2])) == set(REDUCERS)


def test_the_defaults_of_a_store_are_the_librarys() -> None:
    group, own = groups.Storing(), StoreOptions()
    assert (group.seq_length, group.store_dtype) == (own.context, own.dtype)
    for name in ("batch_tokens", "shard_tokens", "threads", "values", "max_tokens"):
        assert getattr(group, name) == getattr(own, name)


def test_an_option_means_the_same_everywhere() -> None:
    helps: dict[str, set[str]] = {}
    for callback in COMMANDS.values():
        for hint in get_type_hints(callback, include_extras=True).values():
            for info in getattr(hint, "__metadata__", ()):
                if not isinstance(info, typer.models.OptionInfo):
                    continue
                # typer takes the first flag for a default until it reads the declaration.
                for flag in (info.default, *(info.param_decls or ())):
                    helps.setdefault(flag, set()).add(str(info.help))
    assert len(helps) > 40
    assert {flag: found for flag, found in helps.items() if len(found) > 1} == {}


def test_no_declared_option_is_forgotten() -> None:
    used = {
        id(info)
        for callback in COMMANDS.values()
        for hint in get_type_hints(callback, include_extras=True).values()
        for info in getattr(hint, "__metadata__", ())
    }
    for module in (options, store_options):
        for name in module.__all__:
            (info,) = getattr(module, name).__metadata__
            assert isinstance(info, typer.models.ParameterInfo)
            assert id(info) in used, name
