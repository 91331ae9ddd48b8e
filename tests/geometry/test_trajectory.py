"""The approach trajectory against the quaternion formula, the paper's description and the official code's numbers."""

from dataclasses import replace

import numpy as np
import pytest
import trimesh
from scipy.spatial.transform import Rotation

from hoi.geometry.contact import DistanceField
from hoi.geometry.grasp import Grasp
from hoi.geometry.hand import HandParams
from hoi.geometry.trajectory import approach, bend_approach, interpolate_rotations


@pytest.fixture
def grasp() -> Grasp:
    generator = np.random.default_rng(3)
    hand_pose = HandParams(generator.normal(size=3), 0.6 * generator.normal(size=45), np.array([0.05, -0.08, 0.02]),
                         0.3 * generator.normal(size=10))
    return Grasp(hand_pose, 0.0, 0, (True,) * 5, True, 1.0)


def quaternion_slerp(a: np.ndarray, b: np.ndarray, fraction: float) -> np.ndarray:
    """Shoemake's formula, on quaternions: sin((1-f)w)/sin(w) a + sin(fw)/sin(w) b."""
    p, q = Rotation.from_rotvec(a).as_quat(), Rotation.from_rotvec(b).as_quat()
    q = q if p @ q >= 0 else -q
    angle = np.arccos(np.clip(p @ q, -1, 1))
    mixed = (np.sin((1 - fraction) * angle) * p + np.sin(fraction * angle) * q) / np.sin(angle)
    return Rotation.from_quat(mixed).as_matrix()


def test_half_way_is_half_the_angle():
    start, end = np.zeros((1, 3)), np.array([[0.0, 0.0, 1.2]])
    np.testing.assert_allclose(interpolate_rotations(start, end, np.array([0.5])), [[[0.0, 0.0, 0.6]]], atol=1e-12)


def test_rotations_follow_the_quaternion_formula():
    generator = np.random.default_rng(0)
    start, end = 1.5 * generator.normal(size=(2, 20, 3))
    ours = interpolate_rotations(start, end, np.array([0.15, 0.5, 0.8]))
    for f, fraction in enumerate((0.15, 0.5, 0.8)):
        expected = [quaternion_slerp(a, b, fraction) for a, b in zip(start, end, strict=True)]
        np.testing.assert_allclose(Rotation.from_rotvec(ours[f]).as_matrix(), expected, atol=1e-12)


def test_the_approach_starts_flat_and_vertically_above_and_ends_at_the_grasp(grasp):
    poses = approach(grasp, frames=7)
    end = grasp.hand_params
    np.testing.assert_allclose(poses[0].transl, end.transl + [0, 0, 0.15], atol=1e-15)
    np.testing.assert_allclose(poses[0].hand_pose, 0, atol=1e-15)
    assert all(np.array_equal(pose.global_orient, end.global_orient) for pose in poses)
    assert all(np.array_equal(pose.hand_betas, end.hand_betas) for pose in poses)
    for name in ("transl", "hand_pose", "global_orient"):
        np.testing.assert_array_equal(getattr(poses[-1], name), getattr(end, name))


def test_up_may_be_any_direction_of_the_objects_frame(hand, cube):
    """All of it turned: the poses of a turned approach are the turned poses, bent where the others are."""
    straight, turn = pass_by(hand, 0.015), Rotation.from_rotvec([0.4, np.pi / 2, 0.0])
    around = Rotation.from_euler("x", 90, degrees=True)  # the cube is its own image
    for rotation, field in ((turn, None), (around, cube)):
        def turned(pose, rotation=rotation):
            rest = hand(replace(pose, global_orient=np.zeros(3), transl=np.zeros(3))).joints[0]
            orient = (rotation * Rotation.from_rotvec(pose.global_orient)).as_rotvec()
            return replace(pose, global_orient=orient, transl=rotation.apply(pose.transl + rest) - rest)
        up = rotation.apply([0, 0, 1])
        path = approach(Grasp(turned(straight[-1]), 0.0, 0, (True,) * 5, True, 1.0), 9, 0.2, up=up)
        pairs = list(zip(path, straight, strict=True))
        if field:
            pairs += zip(bend_approach(path, hand, field, up), bend_approach(straight, hand, field), strict=True)
        for ours, expected in pairs:
            np.testing.assert_allclose(hand(ours).vertices, rotation.apply(hand(expected).vertices), atol=1e-6)


def test_the_hand_moves_in_equal_steps(grasp):
    path = np.array([pose.transl for pose in approach(grasp, frames=5, start_distance=0.2)])
    np.testing.assert_allclose(np.diff(path, axis=0), np.tile([0, 0, -0.05], (4, 1)), atol=1e-15)


def test_eight_official_frames_are_frames_4_to_11_of_the_official_code(grasp):
    poses = approach(grasp, frames=8, variant="official")
    end = grasp.hand_params
    first = 0.3 * end.transl / np.linalg.norm(end.transl)
    for k, pose in zip(range(4, 12), poses, strict=True):
        np.testing.assert_allclose(pose.transl, first + k / 11 * (end.transl - first), atol=1e-15)
        for joint in range(15):  # from a zero pose the shortest arc is a share of the turn
            turn = Rotation.from_rotvec(end.hand_pose[3 * joint:3 * joint + 3]).as_rotvec()
            np.testing.assert_allclose(pose.hand_pose[3 * joint:3 * joint + 3], k / 11 * turn, atol=1e-9)


def test_one_frame_is_the_grasp(grasp):
    assert approach(grasp, frames=1) == [grasp.hand_params]


@pytest.fixture(scope="module")
def cube() -> DistanceField:
    """2 cm a side, at the origin."""
    box = trimesh.creation.box((0.02, 0.02, 0.02))
    return DistanceField(np.asarray(box.vertices), np.asarray(box.faces))


def pass_by(hand, overlap: float) -> list[HandParams]:
    """A flat hand comes from 0.1 m above the cube to 0.1 m below it; a fingertip overlaps it by that much (metres)."""
    flat = HandParams(np.zeros(3), np.zeros(45), np.zeros(3), np.zeros(10))
    tip, wrist = hand(flat).keypoints_3d[12], hand(flat).joints[0]
    along = np.array([*(tip - wrist)[:2], 0.0])
    along /= np.linalg.norm(along)
    end = replace(flat, transl=-tip - (0.01 - overlap) * along - [0, 0, 0.1])
    return approach(Grasp(end, 0.0, 0, (True,) * 5, True, 1.0), frames=9, start_distance=0.2)


def depth_in_cube(hand, poses: list[HandParams]) -> float:
    """Metres that the deepest vertex is inside, from the cube's planes."""
    points = np.concatenate([hand(pose).vertices for pose in poses])
    return float((0.01 - np.abs(points)).min(axis=1).max())


def test_a_free_approach_is_left_as_it_is(hand, cube):
    straight = pass_by(hand, -0.03)
    assert all(bent is pose for bent, pose in zip(bend_approach(straight, hand, cube), straight, strict=True))


def test_an_approach_that_cuts_is_bent_to_the_limit_between_the_same_ends(hand, cube):
    straight = pass_by(hand, 0.015)
    assert depth_in_cube(hand, straight) > 0.004
    bent = bend_approach(straight, hand, cube)
    assert depth_in_cube(hand, bent) < 0.0025  # the limit of 2 mm, and the distance field's error
    assert bent[0] is straight[0] and bent[-1] is straight[-1]
    aside = np.array([pose.transl - before.transl for pose, before in zip(bent, straight, strict=True)])
    assert (aside[:, 2] >= -1e-12).all() and 0.01 < np.linalg.norm(aside, axis=1).max() < 0.041
    steps = np.linalg.norm(np.diff([pose.transl for pose in bent], axis=0), axis=1)
    assert steps.max() < 2 * steps.min()  # no jumps
