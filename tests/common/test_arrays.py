"""Formulas that several rooms share."""

import numpy as np

from hoi.common.arrays import (
    box_centre,
    box_of,
    intersection_over_union,
    pictures_to_tensor,
    resized_points,
    step,
    to_uint8,
)
from hoi.geometry.camera import crop_intrinsics


def test_every_grey_level_survives_the_way_to_the_network_and_back():
    picture = np.arange(256 * 3, dtype=np.int64).reshape(16, 16, 3).astype(np.uint8)
    image = pictures_to_tensor(picture)
    assert image.shape == (3, 16, 16) and image.min() == -1 and image.max() == 1
    np.testing.assert_array_equal(to_uint8(image.numpy()), picture)
    assert (pictures_to_tensor(np.stack([picture, picture]))[1] == image).all()


def test_points_move_as_the_camera_of_a_crop_does():
    points = np.array([[-0.5, -0.5], [12.25, 3.0], [40.0, 31.0]])
    moved = resized_points(points, (20, 30), (64, 48), corner=(7, -3))
    matrix = crop_intrinsics(np.eye(3), 7, -3, 20, 30, 64, 48)
    np.testing.assert_allclose(moved, points @ matrix[:2, :2].T + matrix[:2, 2], atol=1e-12)
    np.testing.assert_allclose(resized_points(np.array([[29.5, 19.5]]), (20, 30), (64, 48)), [[47.5, 63.5]])


def test_a_box_ends_after_the_last_pixel_of_its_mask():
    mask = np.zeros((9, 7), dtype=bool)
    mask[3, 2] = mask[5, 4] = True
    assert box_of(mask) == (2, 3, 5, 6)
    assert (mask[3:6, 2:5] == mask[np.ix_(range(3, 6), range(2, 5))]).all() and mask[3:6, 2:5].sum() == mask.sum()
    np.testing.assert_array_equal(box_centre(np.array([[0, 0, 0], [2, 4, 6], [2, 0, 0]])), [1, 2, 3])


def test_overlap_is_one_for_equal_masks_and_zero_for_empty_ones():
    left, right = np.array([True, True, False]), np.array([False, True, True])
    assert intersection_over_union(left, left) == 1 and intersection_over_union(left, right) == 1 / 3
    assert intersection_over_union(left & right & ~left, np.zeros(3, dtype=bool)) == 0


def test_a_step_rises_in_the_direction_of_its_ends():
    x = np.linspace(-1, 2, 7)
    np.testing.assert_array_equal(step(0, 1, x), [0, 0, 0, 0.5, 1, 1, 1])
    np.testing.assert_array_equal(step(1, 0, x), 1 - step(0, 1, x))
