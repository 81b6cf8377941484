"""Which tokens stand for images, videos and audio: read off made-up inputs."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from trilens.errors import NotStoredError, OutOfRangeError
from trilens.models.media import changed, find_media, without_places
from trilens.text.media import Media, positions_of

IMAGE, VIDEO, AUDIO = 90, 91, 92
CONFIG = SimpleNamespace(image_token_id=IMAGE, video_token_id=VIDEO, audio_token_index=AUDIO)


def found(ids: list[int], **tensors: Any) -> list[tuple[str, tuple[int, ...]]]:
    readings = find_media(ids, tensors, CONFIG)
    return [(each.name, each.positions.shape) for r in readings for each in r.media]


def test_a_stated_grid_is_merged_into_as_many_tokens_as_there_are() -> None:
    grid = torch.tensor([[1, 4, 6], [1, 2, 2]])
    ids = [5, *[IMAGE] * 6, 7, IMAGE, 8]
    pixels = {"pixel_values": torch.ones(28, 3), "image_grid_thw": grid}
    assert found(ids, **pixels) == [("image 0", (2, 3)), ("image 1", (1, 1))]
    (reading,) = find_media(ids, pixels, CONFIG)
    assert reading.views == (0, 24)
    assert reading.cells == ((2, 2), (2, 2))
    assert reading.media[0].positions.tolist() == [[1, 2, 3], [4, 5, 6]]
    noisy = changed(reading, pixels["pixel_values"], [(1, 2), (0, 0)])
    rows = torch.nonzero((noisy != 1).any(-1)).reshape(-1).tolist()
    assert rows == [20, 21, 22, 23, 24, 25, 26, 27]
    # A grid that no square of patches makes into so many tokens says nothing.
    assert found(ids[:-2], **pixels) == [("image 0", (6,))]


def test_frames_of_a_video_and_of_audio() -> None:
    grid = torch.tensor([[3, 2, 4]])
    ids = [*[VIDEO] * 2, 5, *[VIDEO] * 2, 6, *[VIDEO] * 2, *[AUDIO] * 4]
    shapes = found(
        ids,
        pixel_values_videos=torch.ones(24, 3),
        video_grid_thw=grid,
        input_features=torch.ones(1, 8, 8),
    )
    assert shapes == [("video 0", (3, 1, 2)), ("audio 0", (4,))]
    (video, _) = find_media(
        ids,
        {
            "pixel_values_videos": torch.ones(24, 3),
            "video_grid_thw": grid,
            "input_features": torch.ones(1, 8, 8),
        },
        CONFIG,
    )
    assert video.media[0].labels()[4] == "<video 0: frame 1, row 0, col 1>"


def test_rows_that_end_with_a_token_of_their_own() -> None:
    row, end = [IMAGE] * 3, 9
    one = [*row, 8, *row, end]
    sizes = torch.tensor([[16, 24], [16, 24]])
    pixels = {"pixel_values": torch.ones(2, 3, 16, 24), "image_sizes": sizes}
    assert found([5, *one, *one, 6], **pixels) == [("image 0", (2, 3)), ("image 1", (2, 3))]
    # Rows that do not have the image's proportions are no rows: their tokens are counted.
    odd = {**pixels, "image_sizes": torch.tensor([[16, 16], [16, 24]])}
    assert {shape for _, shape in found([5, *one, *one, 6], **odd)} == {(3,)}


def test_tiles_of_one_image_and_views_that_are_padding() -> None:
    views = torch.ones(1, 4, 3, 8, 8)
    views[0, 2:] = 0.0
    ids = [*[IMAGE] * 8, 5]
    assert found(ids, pixel_values=views) == [
        ("image 0 tile 0", (2, 2)),
        ("image 0 tile 1", (2, 2)),
    ]
    apart = [*[IMAGE] * 4, 5, *[IMAGE] * 4]
    (reading,) = find_media(apart, {"pixel_values": views}, CONFIG)
    assert [each.name for each in reading.media] == ["image 0", "image 1"]
    noisy = changed(reading, views, [(0, 1), (1, 0)])
    assert bool((noisy[0, 0, :, :4, 4:] != 1).all())
    assert bool((noisy[0, 0, :, 4:] == 1).all())
    assert bool((noisy[0, 1, :, 4:, :4] != 1).all())
    counted = without_places(reading)
    assert [each.positions.tolist() for each in counted.media] == [[0, 1, 2, 3], [5, 6, 7, 8]]
    assert counted.views == ()
    # Seven tokens make no square.
    assert found([*[IMAGE] * 7], pixel_values=torch.ones(1, 3, 8, 8)) == [("image 0", (7,))]
    # A wide image: rows and columns have its proportions.
    assert found([*[IMAGE] * 8], pixel_values=torch.ones(1, 3, 8, 16)) == [("image 0", (2, 4))]


def test_nothing_stands_for_what_is_not_given() -> None:
    assert found([IMAGE, 5]) == []
    assert found([5, 6], pixel_values=torch.ones(1, 3, 8, 8)) == []
    assert find_media([IMAGE], {"pixel_values": torch.ones(1, 3, 8, 8)}, SimpleNamespace()) == ()


@pytest.mark.parametrize(
    "change",
    [
        {"kind": "smell"}, {"kind": []}, {"number": -1}, {"number": True}, {"tile": "a"},
        {"positions": [[1, 2], [3]]}, {"positions": [9]}, {"positions": [-1]},
        {"positions": [0.5]}, {"positions": []}, {"positions": 3}, {"positions": "ab"},
        {"positions": [[[[1]]]]},
    ],
)  # fmt: skip
def test_a_file_that_says_otherwise_is_damaged(change: dict[str, Any]) -> None:
    plain = Media("image", 0, None, np.arange(4).reshape(2, 2)).to_dict()
    again = Media.from_dict(plain, 9)
    assert again.positions.tolist() == [[0, 1], [2, 3]]
    with pytest.raises((ValueError, TypeError)):
        Media.from_dict({**plain, **change}, 9)


def test_positions_are_asked_by_kind_number_and_tile() -> None:
    media = [Media("video", 0, None, np.arange(3))]
    assert positions_of(media, "video", -1, None).tolist() == [0, 1, 2]
    with pytest.raises(NotStoredError, match="stands for audio"):
        positions_of(media, "audio", 0, None)
    with pytest.raises(OutOfRangeError, match="video 1 is out of range"):
        positions_of(media, "video", 1, None)
