"""Edits made ready for a run: checked against the model and the prompts, one action for each site.

An action takes the value of a site in one pass and gives a new one. Which tokens it touched is
counted, so that an edit that touched nothing is found when the run ends.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from trilens.edits.edit import Edit, Knockout, Scale, SiteEdit
from trilens.errors import EditError, LoadError, SilentSiteError, UntouchedEditError, UsageError
from trilens.io.messages import clip, listed
from trilens.models.gates.mixers import Boundary
from trilens.models.sites.claims import SiteClaims
from trilens.models.sites.site import Site, SiteKey
from trilens.taps.edit_changes import Change, change_of
from trilens.taps.edit_conflicts import check_conflicts
from trilens.taps.edit_knockouts import EdgeCut, cuts_of
from trilens.taps.edit_targets import BY_QUERY, ModelFacts, Target, Texts, sites_of, target_of
from trilens.taps.span import Span

__all__ = ["Action", "Compiled", "Touched", "compile_edits"]


@dataclass(slots=True)
class Touched:
    """How many values each edit touched in each layer, counted while the model runs."""

    counts: dict[tuple[int, int | None], int] = field(default_factory=dict)

    def add(self, number: int, layer: int | None, n: int) -> None:
        """Count what an edit touched."""
        self.counts[number, layer] = self.counts.get((number, layer), 0) + n


@dataclass(frozen=True, slots=True, eq=False)
class Action:
    """One edit at one site.

    Attributes:
        target: where, and which tokens.
        apply: of a value [batch, seq, *site.shape] (of attn.scores and attn.pattern
            [batch, heads, seq_q, seq_k]) and the pass's tokens the new value; None where the pass
            holds no token that the edit names.
    """

    target: Target
    apply: Callable[[Tensor, Span], Tensor | None]

    @property
    def site(self) -> Site:
        """Where."""
        return self.target.site

    @property
    def number(self) -> int:
        """Of the edit, from 0."""
        return self.target.number


@dataclass(frozen=True, slots=True, eq=False)
class Compiled:
    """The edits of one run.

    Attributes:
        edits: as they were given.
        actions: by site, in the order in which the edits were given.
        cuts: knockouts, by layer.
        touched: what was touched so far.
        boundaries: by layer, the recurrences that no kernel function carries.
    """

    edits: tuple[Edit, ...] = ()
    actions: dict[SiteKey, tuple[Action, ...]] = field(default_factory=dict)
    cuts: dict[int, tuple[EdgeCut, ...]] = field(default_factory=dict)
    touched: Touched = field(default_factory=Touched)
    boundaries: Mapping[int, Boundary] = field(default_factory=dict)

    def apply(self, key: SiteKey, value: Tensor, span: Span) -> Tensor | None:
        """All edits of a site, one after the other; None where none touched the value."""
        made = None
        for action in self.actions.get(key, ()):
            new = action.apply(value if made is None else made, span)
            made = made if new is None else new
        return None if made is value else made

    def check_touched(self) -> None:
        """Refuse a run in which an edit touched nothing.

        Raises:
            UntouchedEditError: names the edit and the layers.
        """
        for number, edit in enumerate(self.edits):
            silent = [
                layer
                for at, layer in self._expected()
                if at == number and not self._count(at, layer)
            ]
            if silent:
                layers = [each for each in silent if each is not None]
                where = f" at layers {listed(layers, 12)}" if layers else ""
                raise UntouchedEditError(
                    f"edit {number} ({edit}) touched nothing{where}: the run ended before the "
                    "tokens that it names, or the model did not pass there"
                )

    def _expected(self) -> list[tuple[int, int | None]]:
        sites = [(action.number, key[1]) for key, each in self.actions.items() for action in each]
        return sites + [(cut.number, layer) for layer, each in self.cuts.items() for cut in each]

    def _count(self, number: int, layer: int | None) -> int:
        return self.touched.counts.get((number, layer), 0)


def compile_edits(
    edits: Edit | Sequence[Edit],
    claims: SiteClaims,
    *,
    model: ModelFacts,
    prompts: Sequence[int],
    new_tokens: int = 0,
    attention: Collection[int] = (),
    recurrent: Collection[int] = (),
    boundaries: Mapping[int, Boundary] | None = None,
) -> Compiled:
    """Check edits, and prepare them for a run.

    Args:
        edits: in the order in which they are applied to one site.
        claims: the model's sites.
        model: which model it is.
        prompts: tokens of each prompt of the run.
        new_tokens: the most tokens that are generated after each.
        attention: layers with softmax attention that can be edited.
        recurrent: layers whose writes to a state can be edited.
        boundaries: of those, the ones that no kernel function carries.

    Raises:
        EditError: an edit that cannot be made; names it.
        EditConflictError: one that another would overwrite.
        LoadError: a file of an edit that cannot be read.
    """
    given = (edits,) if isinstance(edits, Edit) else tuple(edits)
    texts, touched = Texts(tuple(prompts), new_tokens), Touched()
    actions: dict[SiteKey, list[Action]] = {}
    cuts: dict[int, list[EdgeCut]] = {}
    targets: list[Target] = []
    for number, edit in enumerate(given):
        try:
            if isinstance(edit, SiteEdit):
                for site in sites_of(edit, claims, model):
                    target = target_of(number, edit, site, texts)
                    change = change_of(edit, target, model)
                    actions.setdefault(site.key, []).append(
                        _action(target, change, touched, _keeps_sum(edit))
                    )
                    targets.append(target)
            elif isinstance(edit, Knockout):
                for cut in cuts_of(number, edit, claims, model, texts, attention, recurrent):
                    cuts.setdefault(cut.layer, []).append(cut)
            else:
                raise EditError("it is no edit: use Steer, Ablate … of trilens.edits")
        except (UsageError, LoadError) as error:
            title = str(edit) if isinstance(edit, Edit) else clip(edit)
            kind = type(error) if isinstance(error, EditError | LoadError) else EditError
            raise kind(f"edit {number} ({title}): {error}") from error
    check_conflicts(given, targets)
    return Compiled(
        given,
        {key: tuple(each) for key, each in actions.items()},
        {layer: tuple(each) for layer, each in cuts.items()},
        touched,
        boundaries or {},
    )


def _keeps_sum(edit: SiteEdit) -> bool:
    return isinstance(edit, Scale) and edit.renormalise


def _to_sum_of(old: Tensor, new: Tensor, number: int) -> Tensor:
    """Weights scaled so that each row keeps its sum."""
    before, after = old.sum(-1, keepdim=True), new.sum(-1, keepdim=True)
    if bool(((after == 0) & (before > 0)).any()):
        raise EditError(
            f"edit {number}: nothing is left of a query's attention weights that could be "
            "renormalised: leave it a key, or scale without renormalise"
        )
    return new * torch.where(after == 0, 1.0, before / after)


def _action(target: Target, change: Change, touched: Touched, keeps_sum: bool) -> Action:
    site = target.site
    by_query = site.name in BY_QUERY

    def apply(value: Tensor, span: Span) -> Tensor | None:
        chosen = target.chosen(span)
        if chosen is None:
            return None
        by_token = value.transpose(1, 2) if by_query else value
        batch, seq = by_token.shape[:2]
        if batch != len(span.lengths) or seq != span.seq:
            raise SilentSiteError(
                f"{site.name} has {batch} × {seq} tokens in a pass of {len(span.lengths)} × "
                f"{span.seq}: it cannot be edited there"
            )
        touched.add(target.number, site.layer, len(chosen.rows))
        whole = len(chosen.rows) == batch * seq
        old = by_token.flatten(0, 1) if whole else by_token[chosen.rows, chosen.columns]
        named = target.pick(old)
        new = change(named, chosen)
        if new is named:
            return value
        new = target.put(old, new)
        if keeps_sum:
            new = _to_sum_of(old, new, target.number)
        if whole:
            made = new.reshape(by_token.shape)
        else:
            made = by_token.clone()
            made[chosen.rows, chosen.columns] = new
        return made.transpose(1, 2) if by_query else made

    return Action(target, apply)
