"""The recurrent states of two models after the same tokens, layer by layer."""

from __future__ import annotations

from collections.abc import Iterable

from trilens.analysis.comparison.rows import Place, Row
from trilens.caches.states import StateCache
from trilens.statistics.divergence import cosine, relative_errors

__all__ = ["StateAccumulator"]


class StateAccumulator:
    """Takes both states of a layer after the last token, prompt by prompt.

    Memory:
        four numbers per layer and part.
    """

    __slots__ = ("_prompts", "_sums")

    def __init__(self) -> None:
        # Per layer and part: cosine, error, norm before, norm after.
        self._sums: dict[tuple[int, str], list[float]] = {}
        self._prompts = 0

    def add(self, before: StateCache, after: StateCache, sites: Iterable[tuple[int, str]]) -> None:
        """One prompt's states.

        Args:
            before: states of the model before; the state after the last token is read.
            after: likewise.
            sites: (layer, part), the same shape in both.

        Raises:
            ShapeError: shapes that differ.
            NotStoredError: no such layer or part.
        """
        for layer, part in sites:
            states = [cache.get(layer, part=part).reshape(1, -1) for cache in (before, after)]
            sums = self._sums.setdefault((layer, part), [0.0] * 4)
            # PROMOTE: squares of a hundred thousand entries.
            norms = [float(state.double().norm()) for state in states]
            values = (float(cosine(*states)[0]), float(relative_errors(*states)[0]), *norms)
            for i, value in enumerate(values):
                sums[i] += value
        self._prompts += 1

    def rows(self) -> list[Row]:
        """Cosine, relative error and norm per layer and part, means over prompts."""
        found = []
        for (layer, part), sums in sorted(self._sums.items()):
            angle, error, *norms = (value / self._prompts for value in sums)
            place = Place(f"state.{part}", layer)
            found += [
                place.against_itself("state_cosine", angle, 1.0),
                place.against_itself("state_relative_error", error),
                place.change("state_norm", *norms),
            ]
        return found
