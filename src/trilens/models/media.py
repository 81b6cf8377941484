"""Which tokens of a prompt stand for images, videos and audio, and which place of the image each.

The ids that stand for them are those that the configuration names. How they are laid out is read
off the tensors beside them: a grid that they state, the tokens that end a row, or as many tokens
for each tile as make up its shape. What is read off is a claim: `reading` says how it is tested.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trilens.text.media import KINDS, Media, MediaKind

__all__ = ["Reading", "changed", "find_media", "without_places"]

_TENSORS: dict[MediaKind, tuple[str, ...]] = {
    "image": ("pixel_values", "image_pixel_values", "pixel_values_images"),
    "video": ("pixel_values_videos", "pixel_values_video"),
    "audio": ("input_features", "input_values", "audio_values", "input_audio_embeds"),
}
"""What a forward takes of each kind; the first that is there counts."""
_PLACES = {"image": ("image_position_ids", "pixel_position_ids"), "video": ("video_position_ids",)}
"""Column and row of each patch, −1 where the row of patches is filled up."""
_GRIDS = {"image": ("image_grid_thw", "image_grid_hws", "grid_thw"), "video": ("video_grid_thw",)}

Positions = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True, slots=True)
class Reading:
    """The images of one kind among the tokens, and where each patch of them lies in a tensor.

    Attributes:
        media: one for each image, tile, video or audio, in the order of the text.
        tensor: the name of the input that holds the pixels.
        views: per entry of `media`, which view [C, H, W] of the tensor it is, or from which row of
            flattened patches it begins; empty where the layout claims no places.
        cells: per entry, height and width of what makes one token: in pixels of a view, or in
            patches (their product is the number of rows).
        flat: whether the tensor holds flattened patches, not views.
        rows: per entry, the rows of flattened patches that make each token, [*positions, patches];
            empty where they follow each other from `views` on.
    """

    media: tuple[Media, ...]
    tensor: str
    views: tuple[int, ...] = ()
    cells: tuple[tuple[int, int], ...] = ()
    flat: bool = False
    rows: tuple[Positions, ...] = ()


def find_media(ids: Sequence[int], tensors: Mapping[str, Any], config: Any) -> tuple[Reading, ...]:
    """What stands for images, videos and audio among token ids.

    Args:
        ids: of one prompt.
        tensors: what is given to the forward beside them.
        config: of the model.
    """
    found = []
    for kind in KINDS:
        token = _token_of(config, kind)
        name = next((n for n in _TENSORS[kind] if isinstance(tensors.get(n), Tensor)), None)
        positions = np.flatnonzero(np.asarray(ids) == token) if token is not None else np.array([])
        if name is not None and len(positions):
            found.append(_read(kind, positions.astype(np.int64), ids, name, tensors))
    return tuple(found)


def _token_of(config: Any, kind: MediaKind) -> int | None:
    for name in (f"{kind}_token_id", f"{kind}_token_index"):
        value = getattr(config, name, None)
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    return None


def _read(
    kind: MediaKind,
    positions: Positions,
    ids: Sequence[int],
    name: str,
    tensors: Mapping[str, Any],
) -> Reading:
    found: Reading | None = None
    sizes = tensors.get("image_sizes")
    if kind != "audio":
        found = _by_grid(kind, positions, name, tensors)
        found = found or _by_places(kind, positions, name, tensors)
    if found is None and kind == "image":
        # What is cut to an image's own size stands row by row, or in an order that is not known.
        found = (
            _by_rows(kind, positions, ids, name, sizes)
            if isinstance(sizes, Tensor)
            else _by_views(kind, positions, name, tensors[name])
        )
    if found is not None:
        return found
    runs = _runs(positions)
    return Reading(tuple(Media(kind, n, None, run) for n, run in enumerate(runs)), name)


def without_places(reading: Reading) -> Reading:
    """The same images, their tokens counted: no token is said to be of one place."""
    plain = (
        Media(each.kind, each.number, each.tile, each.positions.reshape(-1))
        for each in reading.media
    )
    return Reading(tuple(plain), reading.tensor)


def _runs(positions: Positions) -> list[Positions]:
    """Positions that follow each other, together."""
    return np.split(positions, np.flatnonzero(np.diff(positions) > 1) + 1)


def _by_grid(
    kind: MediaKind, positions: Positions, name: str, tensors: Mapping[str, Any]
) -> Reading | None:
    """The grid of patches that the processor states, patches merged into as many tokens as are."""
    grid = next((tensors[n] for n in _GRIDS[kind] if isinstance(tensors.get(n), Tensor)), None)
    if grid is None or grid.ndim != 2 or grid.shape[1] not in (2, 3):
        return None
    rows = [tuple(map(int, row)) for row in grid.tolist()]
    shapes = [row if len(row) == 3 else (1, *row) for row in rows]
    patches = [math.prod(shape) for shape in shapes]
    merged, rest = divmod(sum(patches), len(positions))
    side = math.isqrt(merged)
    whole = not rest and side and side * side == merged
    if not whole or any(h % side or w % side for _, h, w in shapes):
        return None
    media, start = list[Media](), 0
    for number, (frames, height, width) in enumerate(shapes):
        shape = (frames, height // side, width // side)
        mine = positions[start : start + math.prod(shape)].reshape(shape)
        media.append(Media(kind, number, None, mine[0] if frames == 1 else mine))
        start += math.prod(shape)
    pixels = tensors[name]
    flat = pixels.ndim == 2 and len(pixels) == sum(patches)
    begins = tuple(int(n) for n in np.cumsum([0, *patches[:-1]])) if flat else ()
    cells = ((side, side),) * len(begins)
    return Reading(tuple(media), name, begins, cells, flat)


def _by_places(
    kind: MediaKind, positions: Positions, name: str, tensors: Mapping[str, Any]
) -> Reading | None:
    """Patches whose columns and rows the processor states, squares of them pooled into tokens."""
    stated = next((tensors[n] for n in _PLACES[kind] if isinstance(tensors.get(n), Tensor)), None)
    pixels = tensors[name]
    if stated is None or stated.ndim != 3 or stated.shape[:2] != pixels.shape[:2]:
        return None
    places = stated.cpu().numpy().astype(np.int64)
    real = (places >= 0).all(-1)
    merged, rest = divmod(int(real.sum()), len(positions))
    side = math.isqrt(merged)
    if rest or not side or side * side != merged:
        return None
    media, rows, start = list[Media](), list[Positions](), 0
    for number, (mine, held) in enumerate(zip(places, real, strict=True)):
        width, height = mine[held].max(0, initial=-1) + 1
        if not held.sum() == width * height > 0 or width % side or height % side:
            return None
        order = np.lexsort((mine[held, 0], mine[held, 1]))
        grid = (np.flatnonzero(held)[order] + number * len(mine)).reshape(height, width)
        shape = (height // side, width // side)
        cut = grid.reshape(shape[0], side, shape[1], side).swapaxes(1, 2)
        rows.append(cut.reshape(*shape, merged))
        run = positions[start : start + math.prod(shape)]
        media.append(Media(kind, number, None, run.reshape(shape)))
        start += math.prod(shape)
    return Reading(
        tuple(media), name, (0,) * len(media), ((side, side),) * len(media), True, tuple(rows)
    )


def _by_rows(
    kind: MediaKind, positions: Positions, ids: Sequence[int], name: str, sizes: Tensor
) -> Reading | None:
    """Rows of patches with one token after each: the same inside an image, another at its end."""
    images = list[list[Positions]]()
    cut: int | None = None
    for run in _runs(positions):
        follows = images and run[0] - images[-1][-1][-1] == 2 and ids[run[0] - 1] == cut
        if follows and len(run) == len(images[-1][-1]):
            images[-1].append(run)
        else:
            images.append([run])
        after = int(run[-1]) + 1
        # An image's first row says which token cuts its rows.
        if len(images[-1]) == 1:
            cut = ids[after] if after < len(ids) else None
    pixels = [(int(height), int(width)) for height, width in sizes.reshape(-1, 2).tolist()]
    grids = [np.stack(rows) for rows in images]
    fit = len(pixels) == len(grids) and all(
        height * grid.shape[1] == width * grid.shape[0]
        for (height, width), grid in zip(pixels, grids, strict=True)
    )
    if not fit:
        return None
    media = tuple(Media(kind, number, None, grid) for number, grid in enumerate(grids))
    cells = tuple(_cell(size, each.positions) for size, each in zip(pixels, media, strict=True))
    return Reading(media, name, tuple(range(len(media))), cells)


def _cell(size: tuple[int, int], positions: Positions) -> tuple[int, int]:
    return size[0] // positions.shape[0], size[1] // positions.shape[1]


def _by_views(kind: MediaKind, positions: Positions, name: str, pixels: Tensor) -> Reading | None:
    """Tiles that the tower sees as images of one size, each of as many tokens as make its shape."""
    if pixels.ndim < 4:
        return None
    height, width = pixels.shape[-2:]
    views = pixels.reshape(-1, *pixels.shape[-3:])
    filled = [n for n, view in enumerate(views) if bool((view != 0).any())]
    for numbers in (filled, list(range(len(views)))):
        each, rest = divmod(len(positions), len(numbers)) if numbers else (0, 1)
        shape = None if rest else _shape(each, height, width)
        if shape is not None and all(len(run) % each == 0 for run in _runs(positions)):
            media = tuple(_tiles(kind, _runs(positions), shape))
            cells = tuple(_cell((height, width), each.positions) for each in media)
            return Reading(media, name, tuple(numbers), cells)
    return None


def _shape(tokens: int, height: int, width: int) -> tuple[int, int] | None:
    """Rows and columns that make so many tokens and have the proportions of an image."""
    rows = math.isqrt(tokens * height // width)
    for n in (rows, rows + 1):
        if n and tokens % n == 0 and n * width == tokens // n * height:
            return n, tokens // n
    return None


def _tiles(kind: MediaKind, runs: Sequence[Positions], shape: tuple[int, int]) -> Iterator[Media]:
    each = math.prod(shape)
    for number, run in enumerate(runs):
        for tile, positions in enumerate(run.reshape(-1, *shape)):
            yield Media(kind, number, tile if len(run) > each else None, positions)


def changed(reading: Reading, pixels: Tensor, cells: Sequence[tuple[int, ...]]) -> Tensor:
    """The pixels with noise in the place of one token of each image.

    Args:
        reading: with places.
        pixels: the tensor that it names.
        cells: per entry of `reading.media`, the index of a token in its positions.
    """
    made = pixels.clone()
    views = made if reading.flat else made.view(-1, *made.shape[-3:])
    spread = float(pixels.float().std().nan_to_num(1.0)) or 1.0
    places = zip(reading.media, reading.views, reading.cells, cells, strict=True)
    for number, (media, view, (height, width), index) in enumerate(places):
        if reading.rows:
            patches = made.view(-1, made.shape[-1])
            mine = torch.from_numpy(reading.rows[number][index]).to(made.device)
            generator = torch.Generator().manual_seed(number)
            noise = torch.randn((len(mine), made.shape[-1]), generator=generator)
            patches[mine] = (3.0 * spread * noise).to(made)
            continue
        if reading.flat:
            rows = height * width
            start = view + rows * int(np.ravel_multi_index(index, media.positions.shape))
            place = views[start : start + rows]
        else:
            top, left = index[-2] * height, index[-1] * width
            place = views[view, :, top : top + height, left : left + width]
        noise = torch.randn(place.shape, generator=torch.Generator().manual_seed(view))
        place.copy_(3.0 * spread * noise)
    return made
