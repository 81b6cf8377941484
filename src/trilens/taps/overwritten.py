"""What a tensor held before it was written into: kept where a recording still asks for it."""

from __future__ import annotations

import torch
from torch import Tensor

from trilens.caches.storage import address_of
from trilens.models.trace import version_of

__all__ = ["Overwritten", "Seen"]

Seen = tuple[Tensor, int]
"""A tensor, and how often it had been written into when it was seen."""


class Overwritten:
    """Copies of recorded storages, each made just before the storage is written into.

    What nobody writes into costs nothing. The recorder keeps the tensors themselves, so that no
    later one stands at the address of an earlier one.
    """

    def __init__(self) -> None:
        self._recorded: set[int] = set()
        self._copies: dict[int, dict[int, Tensor]] = {}

    def see(self, tensor: Tensor) -> Seen:
        """Note that the tensor is recorded as it is now."""
        self._recorded.add(address_of(tensor))
        return tensor, version_of(tensor)

    def before_write(self, tensor: Tensor) -> None:
        """A tensor is about to be written into: copy its storage if it was recorded."""
        address = address_of(tensor)
        if address <= 0 or address not in self._recorded:
            return
        copies = self._copies.setdefault(address, {})
        version = version_of(tensor)
        if version not in copies:
            storage = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
            bytes_now = tensor.untyped_storage().clone()  # type: ignore[no-untyped-call]
            copies[version] = storage.set_(bytes_now)

    def as_seen(self, seen: Seen) -> Tensor:
        """The tensor as it was when it was seen."""
        tensor, version = seen
        if version_of(tensor) == version:
            return tensor
        copies = self._copies.get(address_of(tensor), {})
        later = [number for number in copies if number >= version]
        if not later:
            return tensor
        storage = copies[min(later)]
        view = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
        where = tensor.storage_offset(), tensor.size(), tensor.stride()
        return view.set_(storage.untyped_storage(), *where)
