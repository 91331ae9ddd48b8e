"""Our hand at joints that were measured elsewhere: 21 points in metres -> HandParams and how far each joint is off.

Joints say neither how thick a hand is nor how far a finger is turned about its own axis; there the fit stays at rest.
"""

from dataclasses import replace
from functools import lru_cache

import numpy as np
from scipy.optimize import least_squares
from scipy.spatial.transform import Rotation

from hoi.conditions import BONES
from hoi.geometry.hand import JOINT_ROWS, MANO_TO_OPENPOSE, PARAM_SIZES, HandModel, HandParams, mirrored_hand
from hoi.geometry.mano import MIRROR

# Names of the orders that joints come in -> which of them stands where in OpenPose's order.
JOINT_ORDERS = {"openpose": tuple(range(21)), "mediapipe": tuple(range(21)), "mano": MANO_TO_OPENPOSE}
FIT_LIMIT = 0.015  # metres: a fit that misses a joint by more than a finger's width is another hand
BACKWARDS = -0.5  # radians, three joints of a finger together: no hand bends so far back, but a mirrored one fits so
PALM = (0, 5, 9, 13, 17)  # keypoints that hardly move against each other
HAND_LENGTHS = (0.06, 0.15)  # metres from the wrist to the knuckle of the middle finger; adults have 0.08 to 0.11
UNIT_FACTORS = {"millimetres": 1000, "centimetres": 100}
STEP = 1e-3  # radians, metres or coefficients, of derivatives: the hand is computed in float32
# What pulls the fit towards rest, metres a radian or coefficient: far below what a joint's place does.
POSE_PULL, SHAPE_PULL = 2e-3, 5e-4
PARTS = np.cumsum(list(PARAM_SIZES.values()))[:-1]  # where each begins in a row of them all
CURLS = (0.0, 0.8)  # radians that fingers are bent by where the fit starts; the better end is taken


def bone_lengths(joints: np.ndarray) -> np.ndarray:
    """(21, 3) in OpenPose order -> (20,), in the order of conditions.BONES."""
    start, end = np.transpose(BONES)
    return np.linalg.norm(joints[end] - joints[start], axis=1)


@lru_cache(maxsize=4)
def rest_bones(hand: HandModel) -> np.ndarray:
    """Of the mean hand: (20,) metres.  Remembered: a file of scenes asks once a line."""
    return bone_lengths(hand(HandParams(np.zeros(3), np.zeros(45), np.zeros(3), np.zeros(10))).keypoints_3d)


def joints_fault(joints: np.ndarray, order: str, hand: HandModel) -> str:
    """What is wrong with joints (21, 3) as bone lengths tell, as the end of "joints ..."; empty when nothing is.

    order  the one of JOINT_ORDERS that they are said to be in
    """
    length = np.linalg.norm(joints[4 if order == "mano" else 9] - joints[0])  # the middle finger's knuckle
    rest = rest_bones(hand)
    misfits = {}
    for name, rows in JOINT_ORDERS.items():
        bones = bone_lengths(joints[list(rows)])
        # The largest of ratios to our hand's bones, whatever the hand's size and unit.
        ratios = np.log(np.maximum(bones, 1e-9) / rest)
        misfits[name] = float(np.abs(ratios - np.median(ratios)).mean())
    best = min(misfits, key=misfits.get)
    if misfits[order] > 1.5 * misfits[best] + 0.1:
        return (f"are said to be in {order} order, but their bones are those of a hand in {best} order "
                f"(off by {misfits[order]:.2f} and {misfits[best]:.2f})")  # fmt: skip
    if HAND_LENGTHS[0] <= length <= HAND_LENGTHS[1]:
        return ""
    units = [unit for unit, factor in UNIT_FACTORS.items()
             if HAND_LENGTHS[0] <= length / factor <= HAND_LENGTHS[1]]  # fmt: skip
    told = f"are in {units[0]}" if units else "are no hand's"
    return (f"{told}, as it seems: the knuckle of the middle finger is {length:.4g} from the wrist, expected "
            f"{HAND_LENGTHS[0]} to {HAND_LENGTHS[1]} metres")  # fmt: skip


def fit_joints(joints: np.ndarray, hand: HandModel, hand_side: str = "right") -> tuple[HandParams, np.ndarray]:
    """The pose and shape whose keypoints are nearest to the joints.

    joints   (21, 3) metres, OpenPose order, in any frame
    returns  the hand in that frame, and how far each of its keypoints is from its joint (21,), metres
    Least squares over pose, place and shape, from the palm's place and two curls of the fingers.
    """
    target = joints * MIRROR if hand_side == "left" else joints
    fits = [_fit(target, hand, curl) for curl in CURLS]
    params = HandParams(*np.split(min(fits, key=lambda fit: fit.cost).x, PARTS))
    params = params if hand_side == "right" else mirrored_hand(params)
    return params, np.linalg.norm(hand(params).keypoints_3d - joints, axis=1)


def fit_fault(found: HandParams, off: np.ndarray, hand: HandModel) -> str:
    """Why the result of fit_joints is not the hand whose joints were given; empty when it may be."""
    right = found if found.hand_side == "right" else mirrored_hand(found)
    flexion = np.einsum("fki,fki->f", right.hand_pose.reshape(15, 3)[JOINT_ROWS], hand.flexion_axes[JOINT_ROWS])
    if np.median(flexion[1:]) < BACKWARDS:
        return f"a {found.hand_side} hand would bend its fingers backwards to reach the joints; are they of the other?"
    if off.max() > FIT_LIMIT:
        return (f"our hand misses joint {off.argmax()} (OpenPose order) by {1000 * off.max():.1f} mm, and "
                f"{1000 * FIT_LIMIT:g} are allowed")  # fmt: skip
    return ""


def _fit(target: np.ndarray, hand: HandModel, curl: float):
    """Least squares from a hand whose palm lies where the target's does and whose fingers are bent by `curl`."""
    bent = np.zeros((15, 3))
    bent[JOINT_ROWS[1:]] = curl * hand.flexion_axes[JOINT_ROWS[1:]]
    start = HandParams(np.zeros(3), bent.ravel(), np.zeros(3), np.zeros(10))
    rest = hand(start).keypoints_3d
    palm = list(PALM)
    turn, _ = Rotation.align_vectors(target[palm] - target[0], rest[palm] - rest[0], weights=[1e-6, 1, 1, 1, 1])
    start = replace(start, global_orient=turn.as_rotvec(), transl=target[0] - rest[0])
    pull = np.concatenate([np.zeros(3), np.full(45, POSE_PULL), np.zeros(3), np.full(10, SHAPE_PULL)])

    def keypoints(x: np.ndarray) -> np.ndarray:
        """Of hands (B, 61): (B, 63)."""
        return hand.pose_batch(*np.split(x, PARTS, axis=1))[2].reshape(len(x), -1)

    def residuals(x: np.ndarray) -> np.ndarray:
        return np.concatenate([keypoints(x[None])[0] - target.ravel(), pull * x])

    def slopes(x: np.ndarray) -> np.ndarray:
        at = keypoints(x + STEP * np.eye(len(x) + 1, len(x)))  # the last row adds nothing
        return np.concatenate([(at[:-1] - at[-1]).T / STEP, np.diag(pull)])

    x = np.concatenate([getattr(start, name) for name in PARAM_SIZES])
    return least_squares(residuals, x, slopes, ftol=1e-5, xtol=1e-5, max_nfev=60)
