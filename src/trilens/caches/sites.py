"""SiteCache: the values of named places of the forward pass, for one prompt."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Self, SupportsIndex

import torch
from torch import Tensor

from trilens.axes import NOT_READ, RESIDUALS, SITE_ORDER, SITES, site_name
from trilens.caches.derived import Derived, rebuild_derived
from trilens.caches.storage import absent_layer, distinct_bytes, moved, spell_layers
from trilens.errors import AbsentLayerError, NotStoredError, UsageError
from trilens.io.messages import listed
from trilens.numbers import whole_number

__all__ = ["SiteCache", "plain_name"]

_Key = tuple[str, int | None]


class SiteCache:
    """What passed named places of the forward pass, by name and layer.

    `cache["attn.z", 4]` is [seq, heads, d_head]; a site that the model has once needs no layer:
    `cache["embed"]`. Names of other tools are understood: `cache["blocks.4.attn.hook_z"]`. `len`
    and iteration are about the pairs (name, layer), layer None where the model has the site once.
    """

    __slots__ = ("_derived", "_keys", "_reasons", "_stored")

    def __init__(self) -> None:
        self._keys: tuple[_Key, ...] = ()
        self._stored: dict[_Key, Tensor] = {}
        self._derived: dict[_Key, Derived] = {}
        self._reasons: dict[_Key, str] = {}

    @classmethod
    def from_values(
        cls, values: Mapping[_Key, Tensor | Derived], reasons: Mapping[_Key, str] | None = None
    ) -> Self:
        """A cache of values, in the order in which a block passes its sites.

        Args:
            values: by name and layer (None for a site that the model has once); what is derived is
                computed each time it is asked.
            reasons: why a site of a layer is not there.

        Raises:
            UnknownSiteError: a name that is no site.
            UsageError: a layer for a site without, or none for one with.
        """
        cache = cls()
        for name, layer in values:
            if plain_name(name) != name:
                raise UsageError(f"site {name!r} is another tool's name for {plain_name(name)!r}")
            if SITES[name].per_layer != (layer is not None):
                raise UsageError(
                    f"site {name!r} has {'one value per layer' if layer is None else 'no layers'}: "
                    f"its key is {(name, 0 if layer is None else None)!r}, not {(name, layer)!r}"
                )
        cache._keys = tuple(sorted(values, key=lambda key: (SITE_ORDER[key[0]], key[1] or 0)))
        for key in cache._keys:
            value = values[key]
            if isinstance(value, Tensor):
                cache._stored[key] = value.detach()
            else:
                cache._derived[key] = value
        cache._reasons = dict(reasons or {})
        return cache

    @property
    def names(self) -> tuple[str, ...]:
        """The sites that are held, in the order in which a block passes them."""
        return tuple(dict.fromkeys(name for name, _ in self._keys))

    @property
    def reasons(self) -> dict[_Key, str]:
        """Why a site of a layer is not there, where that is known."""
        return dict(self._reasons)

    @property
    def is_empty(self) -> bool:
        """Whether nothing is held."""
        return not self._keys

    @property
    def nbytes(self) -> int:
        """Bytes of the distinct storages that this cache keeps alive, weights of the model too."""
        return distinct_bytes(tensor for _, tensor in self.tensors())

    def layers(self, name: str) -> tuple[int, ...]:
        """The model's layers that hold this site, ascending; () for a site without layers.

        Raises:
            UnknownSiteError: no site has this name.
            NotStoredError: the site was not captured.
        """
        known = self._name(plain_name(name))
        return tuple(layer for held, layer in self._keys if held == known and layer is not None)

    def axes(self, name: str) -> str:
        """The axes of a site's value, like "[seq, heads, d_head]".

        Raises:
            UnknownSiteError: no site has this name.
        """
        site = plain_name(name)
        held = (tensor for key, tensor in self._stored.items() if key[0] == site)
        if site in RESIDUALS and any(tensor.dim() > 2 for tensor in held):
            return "[seq, streams, d_model]"
        return SITES[site].axes

    def __getitem__(self, key: str | tuple[str, SupportsIndex | None]) -> Tensor:
        """The value of a site, of one prompt.

        Raises:
            UnknownSiteError: no site has this name; offers the nearest.
            NotStoredError: the site was not captured.
            AbsentLayerError: it was not of this layer, for which the reason is named if known.
            OutOfRangeError: the layer is not a whole number.
            UsageError: no layer for a site that every layer has, or one for a site without.
        """
        found = self._key(key)
        return self._derived[found].value() if found in self._derived else self._stored[found]

    def is_stored(self, name: str, layer: SupportsIndex | None = None) -> bool:
        """Whether a value is held as it is, not computed when it is asked; errors as `[]`."""
        return self._key((name, layer)) in self._stored

    def __len__(self) -> int:
        return len(self._keys)

    def __iter__(self) -> Iterator[_Key]:
        return iter(self._keys)

    def __contains__(self, key: object) -> bool:
        """Whether `cache[key]` gives a value; a name that is no site is refused."""
        try:
            self._key(key)  # type: ignore[arg-type]
        except NotStoredError:
            return False
        return True

    def __repr__(self) -> str:
        if self.is_empty:
            return "SiteCache(empty)"
        held = (
            f"{name}: {spell_layers(self.layers(name))}" if SITES[name].per_layer else name
            for name in self.names
        )
        return f"SiteCache({'; '.join(held)})"

    def to(self, device: torch.device | str | int) -> Self:
        """A new cache on `device`; tensors that are there already are shared, not copied.

        Raises:
            UsageError: torch does not know the device or cannot use it here.
        """
        cache = type(self)()
        cache._keys, cache._reasons = self._keys, dict(self._reasons)
        cache._stored = {key: moved(tensor, device) for key, tensor in self._stored.items()}
        cache._derived = {key: value.to(device) for key, value in self._derived.items()}
        return cache

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Everything held by a name to save it under; of derived values what they are made of.

        A name is the site's number in `params()`, and for derived values a part's name behind it.
        """
        for number, key in enumerate(self._keys):
            if key in self._stored:
                yield str(number), self._stored[key]
            else:
                for part, tensor in self._derived[key].tensors().items():
                    yield f"{number}.{part}", tensor

    def params(self) -> dict[str, Any]:
        """Everything but the tensors, as JSON."""
        return {
            "sites": [
                [*key, self._derived[key].params() if key in self._derived else None]
                for key in self._keys
            ],
            "reasons": [[*key, why] for key, why in self._reasons.items()],
        }

    @classmethod
    def rebuild(cls, tensors: Mapping[str, Tensor], params: Mapping[str, Any]) -> Self:
        """The cache that gave these `tensors()` and `params()`.

        Raises:
            UsageError, KeyError, ValueError, TypeError: they do not fit each other.
        """
        parts: dict[str, dict[str, Tensor]] = {}
        for title, tensor in tensors.items():
            number, _, part = title.partition(".")
            parts.setdefault(number, {})[part] = tensor
        values: dict[_Key, Tensor | Derived] = {}
        for index, (name, layer, derived) in enumerate(params["sites"]):
            own = parts[str(index)]
            key = (str(name), None if layer is None else int(layer))
            values[key] = own[""] if derived is None else rebuild_derived(own, derived)
        reasons = {
            (str(name), None if layer is None else int(layer)): str(why)
            for name, layer, why in params["reasons"]
        }
        return cls.from_values(values, reasons)

    def _name(self, name: str) -> str:
        if name not in self.names:
            held = listed(self.names, 8, nothing="no sites")
            raise NotStoredError(
                f"site {name!r} was not captured: this capture holds {held}; capture with "
                f"sites=[{name!r}]"
            )
        return name

    def _key(self, key: str | tuple[str, SupportsIndex | None]) -> _Key:
        layer: SupportsIndex | None
        if isinstance(key, tuple) and len(key) == 2:
            name, layer = plain_name(key[0]), key[1]
        elif isinstance(key, str):
            name, layer = site_name(key)
            name = plain_name(name)
        else:
            raise UsageError(f"{key!r} names no site: ask cache['attn.z', 4], or cache['embed']")
        name = self._name(name)
        if not SITES[name].per_layer:
            if layer is not None:
                raise UsageError(f"site {name!r} has no layers: ask cache[{name!r}]")
            return name, None
        layers = self.layers(name)
        if layer is None:
            raise UsageError(
                f"site {name!r} needs a layer: ask cache[{name!r}, {layers[0]}]; it is held for "
                f"{spell_layers(layers)}"
            )
        number = whole_number(layer, "layer")
        if number not in layers:
            raise self._absent(name, number, layers)
        return name, number

    def _absent(self, name: str, layer: int, layers: tuple[int, ...]) -> AbsentLayerError:
        why = self._reasons.get((name, layer))
        if why is None:
            why = f"capture with sites=[{name!r}], layers=[…, {layer}]"
        return absent_layer(layer, self, layers, why=why, of=f"site {name!r} of ")


def plain_name(text: object) -> str:
    """The own name of a site that a text names.

    Raises:
        UnknownSiteError: there is none; the nearest names are offered.
        UsageError: it names a layer too, or a gate.
    """
    name, layer = site_name(text)
    if layer is not None:
        raise UsageError(
            f"site {text!r} names layer {layer} too: give {name!r}, and the layer for itself"
        )
    if name not in SITES:
        raise UsageError(f"{name!r} is a gate: capture with gates=True and ask cap.gates")
    if name in NOT_READ:
        raise UsageError(f"{name!r} is captured with {name}s=, and read in cap.{name}s")
    return name
