"""Images, videos and audio among the tokens of a prompt: which positions stand for what."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self, SupportsIndex

import numpy as np

from trilens.caches.indices import check_index
from trilens.errors import NotStoredError, OutOfRangeError

__all__ = ["KINDS", "Media", "MediaKind", "positions_of"]

MediaKind = Literal["image", "video", "audio"]
KINDS: tuple[MediaKind, ...] = ("image", "video", "audio")

_AXES = {
    "image": ((), ("token",), ("row", "col"), ("frame", "row", "col")),
    "video": ((), ("token",), ("row", "col"), ("frame", "row", "col")),
    "audio": ((), ("frame",)),
}


@dataclass(frozen=True, slots=True, eq=False)
class Media:
    """The tokens that stand for one image, one tile of an image, one video or one audio.

    Attributes:
        kind: "image", "video" or "audio".
        number: of the image among the prompt's images, from 0.
        tile: of the tile among its image's tiles, None for an image in one piece.
        positions: token positions [rows, cols] of an image, [frames, rows, cols] of a video,
            [frames] of audio; [tokens] where no token belongs to one place of the image.
    """

    kind: MediaKind
    number: int
    tile: int | None
    positions: np.ndarray[Any, np.dtype[np.int64]]

    @property
    def name(self) -> str:
        """`image 0`, or `image 0 tile 2`."""
        return f"{self.kind} {self.number}" + ("" if self.tile is None else f" tile {self.tile}")

    def labels(self) -> dict[int, str]:
        """Per position, what stands there: `<image 0: row 3, col 5>`."""
        axes = _AXES[self.kind][self.positions.ndim]
        found = {}
        for index, position in np.ndenumerate(self.positions):
            place = ", ".join(f"{axis} {at}" for axis, at in zip(axes, index, strict=True))
            found[int(position)] = f"<{self.name}: {place}>"
        return found

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as JSON takes them."""
        return {
            "kind": self.kind,
            "number": self.number,
            "tile": self.tile,
            "positions": self.positions.tolist(),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], seq: int) -> Self:
        """What `to_dict` gave, of a prompt of so many tokens.

        Raises:
            ValueError: an unknown kind, or positions that are none of this prompt's.
            KeyError, TypeError: values of another shape.
        """
        kind, number, tile = values["kind"], values["number"], values["tile"]
        whole = all(type(n) is int and n >= 0 for n in (number, 0 if tile is None else tile))
        if kind not in KINDS or not whole:
            raise ValueError("an image's kind or number is unknown")
        positions = np.asarray(values["positions"])
        known = positions.dtype.kind == "i" and 0 < positions.ndim < len(_AXES[kind])
        if not known or not positions.size or positions.min() < 0 or positions.max() >= seq:
            raise ValueError(f"positions of an {kind} are none of {seq} tokens")
        return cls(kind, number, tile, positions.astype(np.int64))


def positions_of(
    media: Sequence[Media], kind: MediaKind, number: SupportsIndex, tile: SupportsIndex | None
) -> np.ndarray[Any, np.dtype[np.int64]]:
    """The token positions of one image, video or audio.

    Raises:
        NotStoredError: the prompt has none of this kind.
        OutOfRangeError: no such number or tile; or no tile is named, and there are several.
    """
    those = [each for each in media if each.kind == kind]
    if not those:
        raise NotStoredError(
            f"no token of this prompt stands for {_article(kind)}: give lens.capture "
            "inputs=processor(…), what the model's processor makes of text and "
            f"{kind}{'' if kind == 'audio' else 's'}"
        )
    count = 1 + max(each.number for each in those)
    at = check_index(number, count, kind, "this prompt", negative=True)
    mine = [each for each in those if each.number == at]
    if tile is None and len(mine) == 1:
        return mine[0].positions
    tiles = [each for each in mine if each.tile is not None]
    if not tiles:
        raise OutOfRangeError(f"tile {tile!r} is out of range: {kind} {at} is in one piece")
    if tile is None:
        raise OutOfRangeError(
            f"{kind} {at} is cut into tiles 0–{len(tiles) - 1}: name one, for example tile=0"
        )
    return tiles[check_index(tile, len(tiles), "tile", f"{kind} {at}", negative=True)].positions


def _article(kind: MediaKind) -> str:
    return {"image": "an image", "video": "a video", "audio": "audio"}[kind]
