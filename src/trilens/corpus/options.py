"""What a store is to hold, and how the corpus is cut for it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal, Self, TypeAlias, get_args

from trilens.errors import UsageError, ValueRangeError
from trilens.numbers import at_least

__all__ = ["REDUCERS", "Reduction", "StoreOptions", "StoredDtype"]

StoredDtype: TypeAlias = Literal["auto", "bfloat16", "float16", "float32", "int8"]
Reduction: TypeAlias = Literal[
    "mean", "covariance", "class_means", "top_contexts", "gating", "attention"
]
REDUCERS: tuple[Reduction, ...] = get_args(Reduction)


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreOptions:
    """What a store holds. All of it is part of the store's fingerprint.

    Attributes:
        sites: names of `axes.SITES` or other tools' names, whose first axis is the tokens.
        layers: layer numbers; None for all that have the site.
        dtype: of what is stored; "auto" is the model's own, float32 where that is wider. "int8"
            is one scale per token; the manifest states its error.
        reduce: reducers beside the values: "mean", "covariance", "class_means" and "top_contexts"
            of the sites, "gating" of every proven gate, "attention" of every head.
        values: store the values; False keeps the reducers alone.
        context: maximum tokens of a forward pass; a longer document is cut into windows that see
            nothing of each other. The model's positions bound it.
        shard_tokens: tokens of a shard: a worker holds them in memory.
        batch_tokens: maximum tokens of a forward pass, padding included.
        max_tokens: stop reading the corpus after so many tokens; the last document is cut to fit.
        add_special_tokens: as the tokenizer does, once a document.
        threads: of torch, for each worker: sums depend on it, so that it is fixed.
        top_k: contexts that "top_contexts" keeps for each unit.
        gate_threshold: of "gating", in [0, 0.5].

    Raises:
        UsageError: an option that is none.
        ValueRangeError: a number outside its range.
    """

    sites: tuple[str, ...] = ("resid_post",)
    layers: tuple[int, ...] | None = None
    dtype: StoredDtype = "auto"
    reduce: tuple[str, ...] = ()
    values: bool = True
    context: int = 512
    shard_tokens: int = 1 << 15
    batch_tokens: int = 1 << 12
    max_tokens: int | None = None
    add_special_tokens: bool = True
    threads: int = 1
    top_k: int = 10
    gate_threshold: float = 0.1

    def __post_init__(self) -> None:
        for name in ("sites", "reduce", "layers"):
            given = getattr(self, name)
            if isinstance(given, str):
                raise UsageError(f"{name} {given!r} is not a list: give names, such as [{given!r}]")
            if given is not None:
                object.__setattr__(self, name, tuple(given))
        if self.dtype not in get_args(StoredDtype):
            known = ", ".join(get_args(StoredDtype))
            raise UsageError(f"dtype {self.dtype!r} is not stored: the dtypes are {known}")
        unknown = [name for name in self.reduce if name not in REDUCERS]
        if unknown:
            raise UsageError(
                f"reducer {unknown[0]!r} is unknown: the reducers are {', '.join(REDUCERS)}"
            )
        for name in ("context", "shard_tokens", "batch_tokens", "threads", "top_k"):
            at_least(1, getattr(self, name), name)
        if self.max_tokens is not None:
            at_least(1, self.max_tokens, "max_tokens")
        if not 0.0 <= self.gate_threshold <= 0.5:
            raise ValueRangeError(
                f"gate_threshold is {self.gate_threshold}: it must be in [0, 0.5]"
            )
        if not self.values and not self.reduce:
            raise UsageError(
                "nothing would be stored: keep the values, or name reducers of "
                f"{', '.join(REDUCERS)}"
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, plain: dict[str, Any]) -> Self:
        """The options that `to_dict` gave.

        Raises:
            TypeError, ValueError, UsageError: they are not.
        """
        return cls(**plain)
