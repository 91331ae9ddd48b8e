"""hoi/common/sheets.py: pictures land where they should."""

import io

import numpy as np
import pytest
from PIL import Image

from hoi.common.arrays import to_uint8
from hoi.common.sheets import MARGIN, contact_sheet, curve, encode_animation, smooth


def test_every_picture_stands_unchanged_at_its_place():
    generator = np.random.default_rng(0)
    rows = [list(generator.integers(0, 256, (3, 8, 10, 3), dtype=np.uint8)) for _ in range(2)]
    sheet = np.asarray(contact_sheet(rows))
    for r, row in enumerate(rows):
        for c, picture in enumerate(row):
            top, left = MARGIN + r * (8 + MARGIN), MARGIN + c * (10 + MARGIN)
            np.testing.assert_array_equal(sheet[top : top + 8, left : left + 10], picture)


def test_each_picture_has_its_own_line_of_text_above_it():
    row = [np.full((8, 60, 3), 200, dtype=np.uint8)] * 2
    texts = (["", ""], ["cup", "w" * 99], ["cup", ""])
    blank, both, first = (np.asarray(contact_sheet([row], [pair])) for pair in texts)
    left, right = slice(MARGIN, MARGIN + 60), slice(2 * MARGIN + 60, 2 * MARGIN + 120)
    assert (first[:, left] < 100).any() and (first[:, right] == blank[:, right]).all()
    assert (both[:, right] < 100).any() and (both[:, left] == first[:, left]).all()
    assert (blank[-8 - MARGIN : -MARGIN, left] == 200).all() and (both[-8 - MARGIN :] == blank[-8 - MARGIN :]).all()


def test_pictures_of_different_sizes_are_refused():
    with pytest.raises(ValueError, match="one size"):
        contact_sheet([[np.zeros((4, 4, 3), np.uint8), np.zeros((4, 5, 3), np.uint8)]])


@pytest.mark.parametrize("kind", ["GIF", "WEBP"])
@pytest.mark.parametrize("fps", [7, 8, 12, 24, 30])
def test_the_pictures_of_an_animation_take_as_long_as_the_clip(kind, fps):
    frames = [np.full((8, 8, 3), 5 * number, dtype=np.uint8) for number in range(37)]
    shown = []
    with Image.open(io.BytesIO(encode_animation(frames, fps, kind))) as animation:
        for number in range(animation.n_frames):
            animation.seek(number)
            animation.load()
            shown.append(animation.info["duration"])
    assert len(shown) == 37 and abs(sum(shown) - 1000 * 37 / fps) <= 5
    assert max(shown) - min(shown) <= 10 and max(abs(np.cumsum(shown) - 1000 * np.arange(1, 38) / fps)) <= 5


def test_one_picture_is_an_animation_too():
    with Image.open(io.BytesIO(encode_animation([np.zeros((8, 8, 3), np.uint8)], 8, "GIF"))) as animation:
        assert animation.n_frames == 1


def test_network_pictures_become_the_nearest_grey_level():
    levels = np.arange(256)
    image = np.broadcast_to(levels / 127.5 - 1, (3, 1, 256))
    np.testing.assert_array_equal(to_uint8(image)[0, :, 0], levels)
    assert to_uint8(np.full((3, 1, 1), 7.0)).max() == 255


def test_smoothing_keeps_the_mean_and_the_last_step():
    values = [(float(step), float(step % 7)) for step in range(100)]
    averaged = smooth(values, 10)
    assert len(averaged) == 10 and averaged[-1][0] == 99.0
    assert np.mean([y for _, y in averaged]) == pytest.approx(np.mean([y for _, y in values]))


def test_a_falling_loss_is_drawn_falling_and_infinite_values_are_left_out():
    points = [(0.0, 8.0), (1.0, 4.0), (2.0, float("inf")), (3.0, 1.0)]
    pixels = np.asarray(curve({"loss": points}, "t")).astype(int)
    blue = (pixels[..., 2] - pixels[..., 0] > 100) & (np.arange(pixels.shape[1]) < 500)
    columns = np.flatnonzero(blue.any(axis=0))
    heights = [np.flatnonzero(blue[:, column]).mean() for column in columns]
    assert heights[0] < 40 and all(a <= b + 1.5 for a, b in zip(heights[:-1], heights[1:], strict=True))
