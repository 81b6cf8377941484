"""What a decoder's tokens look at in the source that its encoder read."""

from __future__ import annotations

from typing import NoReturn, SupportsIndex

from trilens.caches.attention import AttentionCache
from trilens.errors import UsageError

__all__ = ["CrossAttentionCache"]


class CrossAttentionCache(AttentionCache):
    """Cross attention by layer: queries are the decoder's tokens, keys the encoder's positions.

    Every question of `AttentionCache` but a distance: the two sides count their own positions.
    """

    __slots__ = ()

    def mean_distance(self, layer: SupportsIndex, *, batch: SupportsIndex = 0) -> NoReturn:
        """Not defined.

        Raises:
            UsageError: always.
        """
        raise UsageError(
            "cross attention has no distance: a query counts tokens of the target, a key positions "
            "of the source; ask top_attended_positions or entropy"
        )
