"""The kinds of edits. Frozen; each says what happens to the values of a site at some tokens.

Edits of one site are applied in the order in which they are given, those of different sites as
the model reaches them. A new tensor takes the place of a value; no value is written into.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import InitVar, dataclass, field
from typing import ClassVar, Literal, SupportsIndex

from torch import Tensor

from trilens.axes import site_name
from trilens.edits.positions import PerPrompt, Positions, read_positions, text_of
from trilens.edits.render import edit_text
from trilens.edits.values import (
    Numbers,
    SiteSource,
    TensorLike,
    is_source,
    read_number,
    read_numbers,
    read_values,
)
from trilens.errors import EditError, UsageError
from trilens.io.messages import clip
from trilens.numbers import at_least

__all__ = [
    "Ablate",
    "Custom",
    "Edit",
    "Knockout",
    "Patch",
    "Project",
    "Replace",
    "Scale",
    "SiteEdit",
    "Steer",
]


@dataclass(frozen=True, slots=True, eq=False, repr=False, kw_only=True)
class Edit:
    """What every edit has.

    `str(edit)` is its text form, which `parse_edit` reads.

    Attributes:
        layers: one layer or several, None for every layer that has the site. `layer=` may be
            given in its place; it is an argument alone, and read as `layers`.
        heads: one head or several, None for all.
    """

    kind: ClassVar[str] = ""

    layers: Numbers = None
    heads: Numbers = None
    layer: InitVar[SupportsIndex | None] = None

    def __post_init__(self, layer: SupportsIndex | None) -> None:
        if layer is not None:
            if self.layers is not None:
                raise EditError(f"layer={layer!r} and layers={self.layers!r} are both given")
            _set(self, layers=layer)
        _set(
            self,
            layers=read_numbers(self.layers, "layer"),
            heads=read_numbers(self.heads, "head"),
        )

    def __str__(self) -> str:
        return edit_text(self, self.kind)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self})"


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class SiteEdit(Edit):
    """An edit of the values of a site.

    Attributes:
        site: its name, a gate's name, or another tool's name for it ("blocks.5.hook_resid_post"
            names layer 5 too).
        units: entries of the value's last axis, one or several: channels, neurons, experts.
        streams: of the residual of a model with several streams, one or several; None for all.
        positions: which tokens; None for all, those that are generated among them.
    """

    site: str
    units: Numbers = field(default=None, kw_only=True)
    streams: Numbers = field(default=None, kw_only=True)
    positions: Positions = field(default=None, kw_only=True)

    def __post_init__(self, layer: SupportsIndex | None) -> None:
        Edit.__post_init__(self, layer)
        name, named_layer = _named(self.site)
        if named_layer is not None:
            if self.layers not in (None, (named_layer,)):
                raise EditError(
                    f"site {self.site} and layers={self.layers!r} name different layers"
                )
            _set(self, layers=(named_layer,))
        _set(
            self,
            site=name,
            units=read_numbers(self.units, "unit"),
            streams=read_numbers(self.streams, "stream"),
            positions=read_positions(self.positions),
        )


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Steer(SiteEdit):
    """Add scale · vector to the value of each token.

    Attributes:
        vector: [width] for every token (of a site with heads: for every head; of several residual
            streams: for every stream), or [heads, width] or [streams, width]; they are those that
            the edit names.
        scale: factor on the vector; 0 leaves every bit as it is.
        renormalise: keep the norm that each token's vector had, along the last axis.
    """

    kind: ClassVar[str] = "steer"

    vector: TensorLike = field(kw_only=True)
    scale: float = field(default=1.0, kw_only=True)
    renormalise: bool = field(default=False, kw_only=True)

    def __post_init__(self, layer: SupportsIndex | None) -> None:
        SiteEdit.__post_init__(self, layer)
        _set(
            self,
            vector=read_values(self.vector, "vector"),
            scale=read_number(self.scale, "scale"),
            renormalise=_flag(self.renormalise, "renormalise"),
        )


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Ablate(SiteEdit):
    """Take away what a site says, by one of three methods.

    Attributes:
        method: "zero": 0; of a gate what its function gives 0 for, so that it is closed; of a
            router −inf, so that the experts named are never chosen; "mean": the mean over all
            tokens of a reference; "resample": for each token, the value of a token of the
            reference, drawn by the seed and the position, the same one at every site and layer.
        reference: of "mean" and "resample": captures that hold the site (one, or several), or a
            tensor [tokens, *shape] of the whole site's shape.
        seed: of "resample".
    """

    kind: ClassVar[str] = "ablate"

    method: Literal["zero", "mean", "resample"] = field(default="zero", kw_only=True)
    reference: TensorLike | SiteSource | Sequence[SiteSource] | None = field(
        default=None, kw_only=True
    )
    seed: int = field(default=0, kw_only=True)

    def __post_init__(self, layer: SupportsIndex | None) -> None:
        SiteEdit.__post_init__(self, layer)
        if self.method not in ("zero", "mean", "resample"):
            raise EditError(
                f"method {clip(self.method)} is unknown: it is 'zero', 'mean' or 'resample'"
            )
        if (self.method == "zero") != (self.reference is None):
            raise EditError(
                "method 'zero' takes no reference"
                if self.method == "zero"
                else f"method {self.method!r} needs a reference: captures or a tensor of tokens"
            )
        _set(self, seed=at_least(0, self.seed, "seed"))
        if self.reference is not None:
            _set(self, reference=_sources(self.reference, "reference"))


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Patch(SiteEdit):
    """Put values of another run in the place of this one's.

    Attributes:
        source: a capture that holds the site, of the same model; or a tensor [tokens, *shape] of
            the whole site's shape, for one layer.
        source_positions: the source's tokens, one for each of `positions`, or a single one for
            all of them. None takes the same positions, of a source as long as the prompt; of a
            tensor, its rows in order.
        positions: None names the prompt's tokens.
    """

    kind: ClassVar[str] = "patch"

    source: TensorLike | SiteSource = field(kw_only=True)
    source_positions: Positions = field(default=None, kw_only=True)

    def __post_init__(self, layer: SupportsIndex | None) -> None:
        SiteEdit.__post_init__(self, layer)
        source = _sources(self.source, "source")
        if isinstance(source, tuple):
            raise EditError("source is a list: a patch has one; give one edit for each prompt")
        where = read_positions(self.source_positions)
        if isinstance(where, PerPrompt) or where == "generated":
            raise EditError(
                f"source_positions {text_of(where)} cannot be read: name tokens of the source"
            )
        positions = "prompt" if self.positions is None else self.positions
        if positions == "generated":
            raise EditError(
                "a patch at positions 'generated' is not defined, since their number is not known "
                "before the run: name them by index, or use Replace"
            )
        _set(self, source=source, source_positions=where, positions=positions)


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Scale(SiteEdit):
    """Multiply the values.

    Attributes:
        factor: 1 leaves every bit as it is.
        keys: of attn.pattern and attn.scores: the keys whose weights are multiplied, None for all;
            `positions` names the queries.
        renormalise: of attn.pattern: each query's weights are then scaled to the sum they had.
    """

    kind: ClassVar[str] = "scale"

    factor: float
    keys: Positions = field(default=None, kw_only=True)
    renormalise: bool = field(default=False, kw_only=True)

    def __post_init__(self, layer: SupportsIndex | None) -> None:
        SiteEdit.__post_init__(self, layer)
        _set(
            self,
            factor=read_number(self.factor, "factor"),
            keys=read_positions(self.keys),
            renormalise=_flag(self.renormalise, "renormalise"),
        )


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Project(SiteEdit):
    """Project the values off a subspace, or onto it.

    Attributes:
        directions: [k, width] or [width]: what spans it; they need not be orthogonal.
        onto: keep what lies in the subspace; else take it away.
    """

    kind: ClassVar[str] = "project"

    directions: TensorLike = field(kw_only=True)
    onto: bool = field(default=False, kw_only=True)

    def __post_init__(self, layer: SupportsIndex | None) -> None:
        SiteEdit.__post_init__(self, layer)
        _set(
            self,
            directions=read_values(self.directions, "directions"),
            onto=_flag(self.onto, "onto"),
        )


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Replace(SiteEdit):
    """Put a value in the place of the site's.

    Attributes:
        value: a number, or a tensor that broadcasts to [tokens, *shape] of what the edit names:
            its positions, heads and units.
    """

    kind: ClassVar[str] = "replace"

    value: TensorLike

    def __post_init__(self, layer: SupportsIndex | None) -> None:
        SiteEdit.__post_init__(self, layer)
        _set(self, value=read_values(self.value, "value"))


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Custom(SiteEdit):
    """Whatever a function does.

    Attributes:
        function: takes the values named, [tokens, *shape], of one prompt in one pass, and returns
            a tensor of the same shape. What it is given is a copy.
    """

    kind: ClassVar[str] = "custom"

    function: Callable[[Tensor], Tensor]

    def __post_init__(self, layer: SupportsIndex | None) -> None:
        SiteEdit.__post_init__(self, layer)
        if not callable(self.function):
            raise EditError(f"function {clip(self.function)} cannot be called")


@dataclass(frozen=True, slots=True, eq=False, repr=False, kw_only=True)
class Knockout(Edit):
    """Cut edges of attention before the softmax: the queries' weights on the other keys sum to 1.

    In a recurrent layer, which has no such edges, the tokens `keys` write nothing into the state.

    A token's edge to itself is cut only where queries and keys both name it: None on either side
    stands for all other tokens.

    Attributes:
        queries: the tokens that no longer see the keys.
        keys: the tokens that are no longer seen.
    """

    kind: ClassVar[str] = "knockout"

    queries: Positions = None
    keys: Positions = None

    def __post_init__(self, layer: SupportsIndex | None) -> None:
        Edit.__post_init__(self, layer)
        if self.queries is None and self.keys is None:
            raise EditError("a knockout needs queries or keys: name the tokens of its edges")
        _set(self, queries=read_positions(self.queries), keys=read_positions(self.keys))


def _set(edit: Edit, **values: object) -> None:
    for name, value in values.items():
        object.__setattr__(edit, name, value)


def _named(site: object) -> tuple[str, int | None]:
    try:
        return site_name(site)
    except UsageError as error:
        raise EditError(str(error)) from None


def _flag(value: object, noun: str) -> bool:
    if not isinstance(value, bool):
        raise EditError(f"{noun} {clip(value)} is neither True nor False")
    return value


def _sources(value: object, noun: str) -> object:
    """A capture, a tuple of captures, or a tensor."""
    if is_source(value):
        return value
    if isinstance(value, list | tuple) and value and all(is_source(each) for each in value):
        return tuple(value)
    return read_values(value, noun)
