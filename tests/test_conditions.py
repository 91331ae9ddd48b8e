"""Condition images: strokes against OpenCV, colours against the published table, normals against scipy and geometry.

Golden strokes were drawn by opencv-python-headless 5.0.0 (4.10 gives the same) through opencv_skeleton below:
    pip install opencv-python-headless && python -m tests.test_conditions
When OpenCV is installed, the live comparison runs too.
"""

import hashlib
import math

import numpy as np
import pytest
import scipy.ndimage
import torch
import trimesh

from hoi.conditions import (
    BONES,
    SKELETON_COLORS,
    draw_conditions,
    draw_normal,
    draw_segmentation,
    draw_skeleton,
    normals_from_inverse_depth,
    read_segmentation,
    scale_inverse_depth,
)
from hoi.geometry.camera import Camera, look_at, make_intrinsics
from hoi.geometry.render import Renderer
from hoi.network.model import stack_conditions

GOLDEN_SKELETONS = "ae88dd9df75a8a27"
GOLDEN_BONES = "2b02b5ecfc8b1f08"
TABLE = """
139,53,255 174,88,255 209,123,255 244,158,255
0,56,255 35,91,255 70,126,255 105,161,255
43,140,237 78,175,255 113,210,255 148,245,255
37,168,36 72,203,71 107,238,106 142,255,141
147,147,0 182,182,35 217,217,70 252,252,105
"""  # thumb to little, bone 1 to 4


def opencv_skeleton(keypoints_2d: np.ndarray, height: int, width: int) -> np.ndarray:
    """The same strokes by OpenCV: discs of radius 3, then 1-degree ellipse polygons."""
    import cv2

    canvas = np.zeros((height, width, 3), dtype=np.uint8)
    points = [tuple(int(value) for value in point) for point in np.round(keypoints_2d)]
    colors = [tuple(int(value) for value in color.split(",")) for color in TABLE.split()] + [(70, 17, 145)]
    for point, color in zip(points, colors, strict=True):
        cv2.circle(canvas, point, 3, color, -1)
    for bone, color in enumerate(colors[:20]):
        (ax, ay), (bx, by) = points[0 if bone % 4 == 0 else bone], points[bone + 1]
        length = math.dist((ax, ay), (bx, by))
        if 5 < length < 150:
            angle = int(math.degrees(math.atan2(ay - by, ax - bx)))
            center, axes = (int((ax + bx) / 2), int((ay + by) / 2)), (int(length / 2), 3)
            cv2.fillConvexPoly(canvas, cv2.ellipse2Poly(center, axes, angle, 0, 360, 1), color)
    return canvas


def random_hands(count: int) -> list[np.ndarray]:
    """Hands of all sizes, some partly outside the picture."""
    generator = np.random.default_rng(7)
    hands = []
    for index in range(count):
        root, step = generator.uniform(0, 512, 2), (8, 20, 45)[index % 3]
        steps = generator.normal(size=(5, 4, 2)) * step
        hands.append(np.concatenate([root[None], (root + np.cumsum(steps, axis=1)).reshape(20, 2)]))
    return hands


def bone_sweep() -> list[np.ndarray]:
    """Single bones of all lengths and directions: one bone of the thumb, the other joints together in a corner."""
    hands = []
    for index, length in enumerate(np.linspace(4, 152, 600)):
        hand = np.full((21, 2), 20.0)
        turn = index * 2.399963  # the golden angle
        hand[1] = [256 + index % 2, 256 + index // 2 % 2]
        hand[2] = hand[1] + length * np.array([math.cos(turn), math.sin(turn)])
        hand[3:5] = hand[2]
        hands.append(hand)
    return hands


def hash_of(pictures: list[np.ndarray]) -> str:
    return hashlib.sha256(b"".join(picture.tobytes() for picture in pictures)).hexdigest()[:16]


def test_strokes_equal_opencv_pixel_for_pixel() -> None:
    assert hash_of([draw_skeleton(hand, 512, 512) for hand in random_hands(60)]) == GOLDEN_SKELETONS
    assert hash_of([draw_skeleton(hand, 512, 512)[150:362, 150:362] for hand in bone_sweep()]) == GOLDEN_BONES


def test_strokes_equal_the_installed_opencv() -> None:
    pytest.importorskip("cv2", reason="opencv-python-headless is optional; the golden strokes above are its own")
    for hand in random_hands(200):
        np.testing.assert_array_equal(draw_skeleton(hand, 512, 512), opencv_skeleton(hand, 512, 512))


def test_colours_are_the_published_table() -> None:
    table = [[int(value) for value in color.split(",")] for color in TABLE.split()]
    assert SKELETON_COLORS[:20].tolist() == table
    assert SKELETON_COLORS[20].tolist() == [70, 17, 145]
    assert [BONES[index] for index in (0, 1, 3, 4, 5, 16, 19)] == [
        (0, 1),
        (1, 2),
        (3, 4),
        (0, 5),
        (5, 6),
        (0, 17),
        (19, 20),
    ]


def test_a_joint_is_a_disc_of_29_pixels_in_the_colour_of_its_own_cell() -> None:
    hand = np.stack([40.0 + 200 * (np.arange(21) % 3), 20.0 + 23 * np.arange(21)], axis=1)  # no bone is in range
    picture = draw_skeleton(hand, 512, 512)
    for joint, (x, y) in enumerate(hand.astype(int)):
        disc = (picture[y - 5 : y + 6, x - 5 : x + 6] == SKELETON_COLORS[joint]).all(axis=2)
        assert disc.sum(axis=1).tolist() == [0, 0, 1, 5, 5, 7, 5, 5, 1, 0, 0]
        np.testing.assert_array_equal(disc, disc.T)
    # The quirk: a fingertip has the first colour of the next finger.
    assert picture[int(hand[4, 1]), int(hand[4, 0])].tolist() == [0, 56, 255]
    assert picture[int(hand[20, 1]), int(hand[20, 0])].tolist() == [70, 17, 145]


@pytest.mark.parametrize(("length", "drawn"), [(5, False), (6, True), (149, True), (150, False)])
def test_a_bone_is_drawn_when_its_length_lies_between_5_and_150(length: int, drawn: bool) -> None:
    hand = np.full((21, 2), -1000.0)
    hand[1], hand[2] = (100, 100), (100 + length, 100)
    picture = draw_skeleton(hand, 512, 512)
    rows, columns = np.nonzero((picture == SKELETON_COLORS[1]).all(axis=2))  # joint 1 has the colour of bone 1
    assert (len(rows) > 29) == drawn
    if drawn:
        assert rows.min() == 97 and rows.max() == 103
        assert columns.max() == (200 + length) // 2 + length // 2


def test_all_bones_are_drawn_where_asked_and_the_short_ones_as_in_the_release() -> None:
    hand = random_hands(1)[0]  # bones of about 10 pixels
    np.testing.assert_array_equal(draw_skeleton(hand, 512, 512, "all"), draw_skeleton(hand, 512, 512))
    np.testing.assert_array_equal(draw_skeleton(hand, 512, 512, None), draw_skeleton(hand, 512, 512))
    hand = np.full((21, 2), -3000.0)
    for turn in np.linspace(0, 2 * math.pi, 60):
        hand[1] = 256 - 220 * np.array([math.cos(turn), math.sin(turn)])
        hand[2] = 512 - hand[1]
        drawn = (draw_skeleton(hand, 512, 512, "all") == SKELETON_COLORS[1]).all(axis=2)
        assert scipy.ndimage.label(drawn, np.ones((3, 3)))[1] == 1, "a long bone has gaps"
        assert 2200 < drawn.sum() < 2900, "pi 220 3.5 is 2419"
    with pytest.raises(ValueError, match="skeleton_rule is 'some', expected one of official, all"):
        draw_skeleton(hand, 512, 512, "some")


def test_bones_lie_over_joints_and_later_fingers_over_earlier_ones() -> None:
    hand = np.full((21, 2), -1000.0)
    hand[0], hand[1], hand[17] = (200, 200), (260, 200), (260, 200)
    picture = draw_skeleton(hand, 512, 512)
    assert picture[200, 230].tolist() == SKELETON_COLORS[16].tolist()


def test_strokes_are_cut_at_the_border_and_otherwise_unchanged() -> None:
    hand = random_hands(1)[0]
    whole = draw_skeleton(hand, 700, 700)
    np.testing.assert_array_equal(draw_skeleton(hand - [150, 100], 512, 512), whole[100:612, 150:662])


@pytest.mark.parametrize("size", [64, 128, 256, 40, 320])
def test_small_pictures_are_area_averages_of_the_strokes_at_512(size: int) -> None:
    hand = random_hands(2)[1]
    large = draw_skeleton(hand, 512, 512).astype(float)
    small = draw_skeleton((hand + 0.5) / 512 * size - 0.5, size, size)
    tiles = size // math.gcd(
        size, 512
    )  # a large pixel is cut into so many, and a small one is a whole number of pieces
    rows = np.repeat(large, tiles, axis=0).reshape(size, -1, 512, 3).mean(axis=1)
    expected = np.repeat(rows, tiles, axis=1).reshape(size, size, -1, 3).mean(axis=2)
    assert small.max() > 50 and np.abs(small - expected).max() <= 0.5 + 1e-9


def test_a_joint_of_a_small_picture_is_centred_on_its_keypoint() -> None:
    hand = np.full((21, 2), -1000.0)
    hand[0] = 40.25, 77.5
    picture = draw_skeleton(hand, 128, 128)[..., 2].astype(float)
    rows, columns = np.mgrid[:128, :128]
    center = (columns * picture).sum() / picture.sum(), (rows * picture).sum() / picture.sum()
    np.testing.assert_allclose(center, hand[0], atol=0.5 * 128 / 512 + 0.01)


def test_the_segmentation_has_the_published_colours() -> None:
    picture = draw_segmentation(np.array([[0, 1, 2]], dtype=np.uint8))
    assert picture.tolist() == [[[0, 0, 0], [128, 128, 128], [153, 51, 51]]]


def test_a_segmentation_is_read_back_also_when_its_colours_moved() -> None:
    labels = np.random.default_rng(0).integers(0, 3, (12, 9))
    moved = draw_segmentation(labels).astype(int) + np.random.default_rng(1).integers(-12, 13, (12, 9, 3))
    np.testing.assert_array_equal(read_segmentation(moved.clip(0, 255).astype(np.uint8)), labels)
    with pytest.raises(ValueError, match=r"segmentation picture is \(12, 9\), expected \(H, W, 3\)"):
        read_segmentation(moved[..., 0])


def test_left_is_red_up_is_green_and_the_camera_is_blue() -> None:
    normals = np.array([[[-1.0, 0, 0], [0, -1, 0], [0, 0, -1], [1, 0, 0]]])
    picture = draw_normal(normals, np.array([[True, True, True, False]]))
    assert picture.tolist() == [[[255, 128, 128], [128, 255, 128], [128, 128, 255], [0, 0, 0]]]


def test_the_recipe_is_sobel_with_mirrored_border_against_two_pi() -> None:
    inverse_depth = scipy.ndimage.gaussian_filter(np.random.default_rng(0).normal(size=(40, 50)), 3) * 500 + 400
    gx, gy = (scipy.ndimage.sobel(inverse_depth, axis=axis, mode="mirror") for axis in (1, 0))
    low = (inverse_depth - inverse_depth.min()) / np.ptp(inverse_depth) < 0.1
    assert 10 < low.sum() < 1000
    release = np.stack([np.where(low, 0, gx), np.where(low, 0, gy), np.full(gx.shape, 2 * np.pi)], axis=-1)
    release /= np.linalg.norm(release, axis=-1, keepdims=True)
    normals = normals_from_inverse_depth(inverse_depth)
    np.testing.assert_allclose(normals, -release, atol=1e-12)
    picture = draw_normal(normals, np.ones(low.shape, dtype=bool))
    np.testing.assert_allclose(picture, (release + 1) / 2 * 255, atol=0.5 + 1e-9)


def test_a_constant_depth_gives_normals_towards_the_camera() -> None:
    np.testing.assert_array_equal(normals_from_inverse_depth(np.full((4, 5), 3.0)), np.tile([0.0, 0, -1], (4, 5, 1)))


def scene() -> tuple[Camera, np.ndarray, np.ndarray, np.ndarray]:
    camera = Camera(
        make_intrinsics(256, 256), look_at(np.array([0.3, 0, 0.1]), np.zeros(3), np.array([0, 0, 1.0])), 256, 256
    )
    hand, can = trimesh.creation.icosphere(radius=0.04), trimesh.creation.cylinder(0.03, 0.12)
    gbuffer = Renderer("numpy").render(hand.vertices + [0.05, 0.05, 0.0], hand.faces, can.vertices, can.faces, camera)
    return camera, gbuffer.depth, gbuffer.label_map, gbuffer.surface_normals


def test_normals_from_rendered_depth_agree_with_the_geometry() -> None:
    camera, depth, label_map, surface_normals = scene()
    focal = camera.intrinsics[0, 0]
    normals = normals_from_inverse_depth(scale_inverse_depth(depth, nearest_value=2 * np.pi * focal / 8))
    inside = scipy.ndimage.binary_erosion(label_map == 1, iterations=3) | scipy.ndimage.binary_erosion(
        label_map == 2, iterations=3
    )
    angles = np.degrees(np.arccos(np.clip((normals * surface_normals).sum(-1)[inside], -1, 1)))
    assert inside.sum() > 3000 and np.median(angles) < 8
    for axis in (0, 1):  # steeper or flatter with the range, never mirrored
        sides = np.abs(surface_normals[..., axis]) > 0.3
        assert (np.sign(normals[..., axis]) == np.sign(surface_normals[..., axis]))[inside & sides].mean() > 0.99


def test_inverse_depth_has_the_stated_range() -> None:
    depth = np.array([[0.0, 0.5], [0.25, 1.0]])
    np.testing.assert_allclose(scale_inverse_depth(depth, nearest_value=800.0), [[0, 400], [800, 200]])
    assert not scale_inverse_depth(np.zeros((2, 2))).any()


def test_conditions_are_the_three_pictures_and_black_outside() -> None:
    _, _, label_map, surface_normals = scene()
    hand = random_hands(1)[0] / 2
    conditions = draw_conditions(hand, label_map, surface_normals)
    np.testing.assert_array_equal(conditions.skeleton, draw_skeleton(hand, 256, 256))
    np.testing.assert_array_equal(conditions.segmentation, draw_segmentation(label_map))
    assert not conditions.normal[label_map == 0].any() and conditions.normal[label_map > 0].any(axis=1).all()
    assert not draw_conditions(None, label_map, surface_normals).skeleton.any()


def test_stacked_conditions_are_the_pictures_divided_by_255_and_black_where_there_are_none() -> None:
    _, _, label_map, surface_normals = scene()
    first = draw_conditions(random_hands(1)[0] / 2, label_map, surface_normals)
    stacked = stack_conditions([first, None], 256, 256)
    assert list(stacked) == ["skeleton", "normal", "segmentation"]
    for name, tensor in stacked.items():
        assert tensor.dtype == torch.float32 and not tensor[1].any()
        np.testing.assert_array_equal(tensor[0].permute(1, 2, 0).numpy(), getattr(first, name).astype(np.float32) / 255)


def test_wrong_input_is_named() -> None:
    with pytest.raises(ValueError, match=r"keypoints_2d is \(20, 2\); expected \(21, 2\)"):
        draw_skeleton(np.zeros((20, 2)), 64, 64)
    with pytest.raises(ValueError, match="keypoints_2d of joint 3 is"):
        draw_skeleton(np.where(np.arange(21)[:, None] == 3, np.nan, 5.0) * np.ones(2), 64, 64)
    with pytest.raises(ValueError, match="values up to 7"):
        draw_segmentation(np.full((2, 2), 7))
    with pytest.raises(ValueError, match=r"surface_normals is \(2, 2\) but mask is \(2, 2\)"):
        draw_normal(np.zeros((2, 2)), np.zeros((2, 2), dtype=bool))


if __name__ == "__main__":
    print("GOLDEN_SKELETONS", hash_of([opencv_skeleton(hand, 512, 512) for hand in random_hands(60)]))
    print("GOLDEN_BONES", hash_of([opencv_skeleton(hand, 512, 512)[150:362, 150:362] for hand in bone_sweep()]))
