"""Options that go together: declared once, taken by a command and handed on as one value."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from functools import wraps
from typing import Any, get_type_hints

from trilens.cli import options as o
from trilens.cli import store_options as so

__all__ = ["Coding", "Fitting", "Loading", "Sampling", "Storing", "flattened"]


@dataclass(frozen=True, kw_only=True)
class Loading:
    """How a model is loaded: the options of `Lens.from_pretrained`, and a tokenizer of its own."""

    dtype: o.Dtype = "auto"
    device_map: o.DeviceMap = None
    revision: o.Revision = None
    trust_remote_code: o.TrustRemoteCode = False
    attn_implementation: o.AttnImplementation = None
    stack: o.Stack = None
    gguf_file: o.GgufFile = None
    tokenizer: o.TokenizerFiles = None


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Which token blocks are drawn from a text."""

    max_tokens: o.SampleTokens = 4096
    seq_length: o.SampleLength = 256
    seed: o.Seed = 0
    field: o.Field = "text"


@dataclass(frozen=True, kw_only=True)
class Coding:
    """What a matrix becomes."""

    rule: o.Rule = "absmean"
    group_size: o.GroupSize = None
    per: o.Per = None


@dataclass(frozen=True, kw_only=True)
class Fitting:
    """How calibrated rules are fitted; what is not given, `Calibration` decides."""

    max_perplexity_ratio: o.MaxPerplexityRatio = None
    effort: o.Effort = None
    max_tokens: o.MaxTokens = None
    seq_length: o.SeqLength = None
    batch_size: o.BatchSize = None
    seed: o.Seed = None
    device: o.Device = None


@dataclass(frozen=True, kw_only=True)
class Storing:
    """What is kept of a whole corpus, and who captures it."""

    store_dtype: so.StoreDtype = "auto"
    reduce: so.Reduce = None
    values: so.StoreValues = True
    field: o.Field = "text"
    label: so.Label = None
    strict: so.Strict = False
    max_tokens: o.MaxTokens = None
    seq_length: o.SampleLength = 512
    batch_tokens: so.BatchTokens = 4096
    shard_tokens: so.ShardTokens = 32768
    threads: so.Threads = 1
    workers: so.Workers = 1
    ray: so.Ray = None
    gpus_per_worker: so.GpusPerWorker = 0.0
    overwrite: so.Overwrite = False


def flattened(command: Callable[..., None]) -> Callable[..., None]:
    """The command with the options of its groups one by one in its signature, as typer reads them.

    A parameter is a group where its default is one.
    """
    parameters = inspect.signature(command).parameters
    groups: dict[str, Any] = {
        name: each.default for name, each in parameters.items() if is_dataclass(each.default)
    }
    if not groups:
        return command
    hints = get_type_hints(command, include_extras=True)
    single = []
    for name, each in parameters.items():
        if name not in groups:
            single.append(each.replace(annotation=hints[name]))
            continue
        group = groups[name]
        single += [
            each.replace(name=option, annotation=hint, default=getattr(group, option))
            for option, hint in get_type_hints(type(group), include_extras=True).items()
        ]

    @wraps(command)
    def called(**given: Any) -> None:
        for name, group in groups.items():
            given[name] = type(group)(**{each.name: given.pop(each.name) for each in fields(group)})
        command(**given)

    called.__annotations__ = {each.name: each.annotation for each in single}
    called.__signature__ = inspect.Signature(single)  # type: ignore[attr-defined]
    return called
