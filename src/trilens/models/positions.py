"""How many tokens a model takes: what its tables can hold, and what its configuration speaks of.

Rotary and recurrent models compute positions as they go, and run beyond the number in their
configuration; a table of positions, learned or computed once, ends.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeGuard

import torch

from trilens.errors import BeyondPositionsWarning, PromptTooLongError, TrilensError
from trilens.io.messages import reason
from trilens.io.short_memory import is_short_of_memory

__all__ = [
    "beyond_positions",
    "configured_positions",
    "max_positions_of",
    "text_settings",
    "warn_beyond_positions",
]

_POSITION_KEYS = (
    "max_position_embeddings",
    "n_positions",
    "n_ctx",
    "max_seq_len",
    "max_sequence_length",
    "max_target_positions",
)
# Of one configuration for a decoder and its encoder: whose table is there says which counts.
_SIDE_KEYS = ("max_decoder_position_embeddings", "max_encoder_position_embeddings")
# Tables have a few rows more than there are positions: for padding, or an offset.
_SPARE_ROWS = 8


def max_positions_of(model: Any) -> int | None:
    """The most tokens that a prompt may have, or None when nothing limits it.

    Only a model that looks positions up in a table, or whose mask was made once, has a limit.

    Args:
        model: the model; a configuration alone answers with its own number.
    """
    limit = configured_positions(model)
    if limit is None or not isinstance(model, torch.nn.Module) or _has_table(model, limit):
        return limit
    return None


def configured_positions(model: Any) -> int | None:
    """The number of positions in the configuration (of the text part, in a composite one).

    Where the model looks positions up in an embedding that sets rows aside for padding
    (`padding_idx`), these and the rows before them are no positions: 514 − 2 = 512 in RoBERTa.

    Args:
        model: the model; a configuration alone answers too, without that correction.
    """
    text = text_settings(getattr(model, "config", model))
    found, sides = (
        [getattr(text, key, None) for key in keys] for keys in (_POSITION_KEYS, _SIDE_KEYS)
    )
    tables = _tables(model) if isinstance(model, torch.nn.Module) else None
    if tables is not None:
        rows = {table.num_embeddings for table in tables}
        sides = [n for n in sides if n in rows]
    limit = next((n for n in (*found, *sides) if _is_count(n)), None)
    for table in tables or ():
        if table.num_embeddings == limit and table.padding_idx is not None:
            return table.num_embeddings - int(table.padding_idx) - 1
    return limit


def _tables(model: torch.nn.Module) -> list[torch.nn.Embedding]:
    """Embeddings that are named for positions."""
    return [
        module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Embedding) and "position" in name.rpartition(".")[2]
    ]


def warn_beyond_positions(model: Any, n_tokens: int) -> int | None:
    """Warn of text beyond the configured positions and give their number; None if shorter."""
    limit = configured_positions(model)
    if limit is None or n_tokens <= limit:
        return None
    warnings.warn(
        f"prompt has {n_tokens} tokens, the model was configured for {limit}: it runs, but what it "
        "computes there was not trained",
        BeyondPositionsWarning,
        stacklevel=4,
    )
    return limit


@contextmanager
def beyond_positions(model: Any, n_tokens: int) -> Iterator[None]:
    """Warn of a prompt beyond the configured positions; if the model fails on it, say why.

    Raises:
        PromptTooLongError: the model's own code failed on such a prompt.
    """
    limit = warn_beyond_positions(model, n_tokens)
    if limit is None:
        yield
        return
    try:
        yield
    except TrilensError:
        raise
    except Exception as cause:
        if is_short_of_memory(cause):
            raise
        raise PromptTooLongError(
            f"prompt has {n_tokens} tokens, this model has {limit} positions and fails beyond "
            f"them ({reason(cause)}): shorten it to at most {limit} tokens"
        ) from cause


def text_settings(config: Any) -> Any:
    """The configuration of the text part; of a plain one itself."""
    try:
        return config.get_text_config()
    except (AttributeError, ValueError):
        return config


def _has_table(model: torch.nn.Module, limit: int) -> bool:
    """Does a module hold a table of positions, or a mask over them?

    A weight with as many rows is none unless it is an embedding, or named for positions: widths
    are often the same number.
    """
    tokens = _token_embedding(model)
    sizes = range(limit, limit + _SPARE_ROWS + 1)
    for module in model.modules():
        if isinstance(module, torch.nn.Embedding):
            if module is not tokens and module.num_embeddings in sizes:
                return True
            continue
        held = [*module.named_buffers(recurse=False), *vars(module).items()]
        held += [item for item in module.named_parameters(recurse=False) if "pos" in item[0]]
        if any(isinstance(t, torch.Tensor) and set(t.shape) & set(sizes) for _, t in held):
            return True
    return False


def _token_embedding(model: Any) -> Any:
    try:
        return model.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return None


def _is_count(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
