"""Our hand at given joints: known hands are found again, and what is no hand in metres is said to be so."""

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from hoi.geometry.hand import JOINT_ROWS, MANO_TO_OPENPOSE, HandModel, HandParams, mirrored_hand
from hoi.geometry.hand_fit import fit_joints, joints_fault


def some_hand(hand: HandModel, seed: int) -> HandParams:
    """Curled at random, somewhere, of another size; every second one left."""
    generator = np.random.default_rng(seed)
    turns = generator.normal(0, 0.1, (15, 3))
    turns[JOINT_ROWS] += generator.uniform(0, 1.3, (5, 3))[..., None] * hand.flexion_axes[JOINT_ROWS]
    betas = np.append(generator.normal(0, 1, 3), np.zeros(7))
    orient = Rotation.random(random_state=generator).as_rotvec()
    found = HandParams(orient, turns.ravel(), generator.normal(0, 0.3, 3), betas)
    return mirrored_hand(found) if seed % 2 else found


@pytest.mark.parametrize("seed", range(2))
def test_a_known_hand_is_found_again_by_its_joints(hand, seed):
    known = some_hand(hand, seed)
    found, off = fit_joints(hand(known).keypoints_3d, hand, known.hand_side)
    skin = np.linalg.norm(hand(found).vertices - hand(known).vertices, axis=1)
    assert found.hand_side == known.hand_side and off.max() < 5e-4 and skin.mean() < 2.5e-3
    np.testing.assert_allclose(off, np.linalg.norm(hand(found).keypoints_3d - hand(known).keypoints_3d, axis=1))


def test_the_order_and_the_unit_of_joints_are_told_by_their_bones(hand):
    joints = hand(some_hand(hand, 0)).keypoints_3d
    mano = np.empty((21, 3))
    mano[list(MANO_TO_OPENPOSE)] = joints
    assert joints_fault(joints, "openpose", hand) == joints_fault(mano, "mano", hand) == ""
    assert "a hand in mano order" in joints_fault(mano, "mediapipe", hand)
    assert "a hand in openpose order" in joints_fault(joints, "mano", hand)
    assert "in millimetres" in joints_fault(1000 * mano, "mano", hand)
    assert "in centimetres" in joints_fault(100 * joints, "openpose", hand)
    assert "no hand's" in joints_fault(3 * joints, "openpose", hand)
