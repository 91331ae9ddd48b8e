"""Approach trajectory: an open hand above the object comes down, closing.  Grasp -> list[HandParams].  Paper: 3.2.

approach gives the paper's straight path; where it would cut into the object, bend_approach leads around.
"""

import itertools
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from scipy.spatial.transform import Rotation, Slerp

from hoi.geometry.contact import DistanceField
from hoi.geometry.grasp import MAX_PENETRATION_MM, Grasp
from hoi.geometry.hand import TIP_KEYPOINTS, HandModel, HandParams, stack_params

UP = np.array([0.0, 0.0, 1.0])  # of an object that stands as its own frame says
START_DISTANCES = {"paper": 0.15, "official": 0.3}  # metres, by variant: as in the paper, as in the official code
# The official code makes 12 poses and keeps the last 8: fractions 4/11, 5/11, ... 1 of the way.
OFFICIAL_FIRST_FRACTION = 4 / 11
# Tried in this order until the skin stays out.  Of 96 approaches to eight built-in objects 89 are free as they are, two
# when the fingers close later, four 2 cm aside, one 4 cm; the rest of the numbers is reserve for scans with handles.
BENDS = (0.0, 0.02, 0.04, 0.06, 0.09)  # metres aside half way
LATENESS = (1, 2, 4)  # fingers close with this power of the way


def interpolate_rotations(start: np.ndarray, end: np.ndarray, fractions: np.ndarray) -> np.ndarray:
    """Turn every joint along the shortest arc from start to end, at constant speed.

    start, end  (J, 3)     axis-angle, radians
    fractions   (F,)       0 gives start, 1 gives end
    returns     (F, J, 3)  axis-angle, radians
    Source: paper Sec. 3.2; Shoemake 1985.
    """
    arcs = [Slerp([0, 1], Rotation.from_rotvec([a, b])) for a, b in zip(start, end, strict=True)]
    return np.stack([arc(fractions).as_rotvec() for arc in arcs], axis=1)


def start_pose(
    hand_params: HandParams, start_distance: float, variant: str = "paper", up: np.ndarray = UP
) -> HandParams:
    """Where the approach begins: flat hand, root turned as in the grasp, off by start_distance (metres).

    "paper": vertically above the grasp, along `up` (3,), unit.  "official": start_distance from the object's centre, on
    the line through the grasp's translation, however far away that is.
    Raises ValueError when that translation is zero.
    """
    if variant == "paper":
        transl = hand_params.transl + start_distance * up
    else:
        length = np.linalg.norm(hand_params.transl)
        if length < 1e-9:
            raise ValueError("the grasp's transl is zero, so the official variant has no direction to start from; "
                             'use variant "paper"')
        transl = hand_params.transl * (start_distance / length)
    return replace(hand_params, hand_pose=np.zeros(45), transl=transl)


def approach(
    grasp: Grasp, frames: int, start_distance: float | None = None, variant: str = "paper", up: np.ndarray = UP,
    start: HandParams | None = None,
) -> list[HandParams]:
    """Poses of a hand that reaches for the object; the last one is the grasp.

    frames          number of poses, at least 1
    start_distance  metres, not negative; None: 0.15 for "paper", 0.3 for "official"
    variant         "paper": from the start pose to the grasp in equal steps
                    "official": as the published code, which drops the first third of the way (with frames=8 exactly its
                    frames 4 to 11 of 11)
    up              (3,) unit: where up is in the grasp's frame
    start           where the way begins; None: at start_pose
    Translation is linear; the wrist and the 15 finger joints turn by spherical interpolation.
    Raises ValueError as start_pose.
    """
    distance = START_DISTANCES[variant] if start_distance is None else start_distance
    end = grasp.hand_params
    start = start or start_pose(end, distance, variant, up)
    first = OFFICIAL_FIRST_FRACTION if variant == "official" else 0.0
    fractions = np.linspace(first, 1.0, frames) if frames > 1 else np.ones(1)
    rotations = interpolate_rotations(_joints(start), _joints(end), fractions)
    # The end is repeated exactly, not to the rounding of a quaternion.
    return [replace(end, hand_pose=turn[1:].ravel(), transl=start.transl + f * (end.transl - start.transl))
            for f, turn in zip(fractions[:-1], rotations[:-1], strict=True)] + [end]


def deepest(hand_params: Sequence[HandParams], hand: HandModel, field: DistanceField) -> float:
    """How far the skin gets into the object in the worst of the poses, metres, 0 when it never does."""
    vertices, _, _ = hand.pose_batch(**stack_params(hand_params), hand_side=hand_params[0].hand_side)
    return max(0.0, -float(field.signed_distance(vertices).min()))


def bend_approach(
    hand_params: Sequence[HandParams], hand: HandModel, field: DistanceField, up: np.ndarray = UP
) -> list[HandParams]:
    """Where the straight approach cuts into the object, come from the side and close the fingers later.

    hand_params  an approach in equal steps, at least one pose; first and last stay as they are
    field        distance to the object, in the poses' frame
    up           (3,) unit, where up is in that frame
    returns      the poses as they are if the skin stays as shallow as a grasp's must; else those of the smallest bend
                 in which it does, or, if there is none, of the shallowest cut
    A bend is a parabola: half way the hand is aside by the amount, in one direction, level or upward.
    """
    straight, limit = list(hand_params), MAX_PENETRATION_MM / 1000  # metres
    best, depth = straight, deepest(straight, hand, field)
    if depth <= limit:
        return straight
    for aside, lateness, direction in itertools.product(BENDS, LATENESS, _directions(straight[-1], hand, up)):
        bent = _bent(straight, aside * direction, lateness)
        if (cut := deepest(bent, hand, field)) < depth:
            best, depth = bent, cut
        if depth <= limit:
            break
    return best


def _directions(end: HandParams, hand: HandModel, up: np.ndarray) -> list[np.ndarray]:
    """Directions (3,), unit, in which a path may be bent: back along the hand, but not downward, then the eight compass
    points, those near that direction first.
    """
    mesh = hand(end)
    back = mesh.joints[0] - mesh.keypoints_3d[list(TIP_KEYPOINTS)].mean(axis=0)
    level = back - back @ up * up
    back = level + max(back @ up, 0.0) * up
    if np.linalg.norm(level) < 1e-9:  # any level direction will do
        level = np.cross(up, np.eye(3)[np.abs(up).argmin()])
    ahead = level / np.linalg.norm(level)
    angles = np.pi / 4 * np.array([[0], [1], [-1], [2], [-2], [3], [-3], [4]])
    around = np.cos(angles) * ahead + np.sin(angles) * np.cross(up, ahead)
    return [back / np.linalg.norm(back), *around] if np.linalg.norm(back) > 1e-9 else list(around)


def _bent(straight: Sequence[HandParams], aside: np.ndarray, lateness: int) -> list[HandParams]:
    """The poses with a parabola added to the translation, `aside` (3,) metres half way, and fingers closing later."""
    fractions = np.linspace(0, 1, len(straight))[1:-1]
    rotations = interpolate_rotations(_joints(straight[0]), _joints(straight[-1]), fractions**lateness)
    middle = [replace(pose, hand_pose=turn[1:].ravel(), transl=pose.transl + 4 * f * (1 - f) * aside)
              for pose, turn, f in zip(straight[1:-1], rotations, fractions, strict=True)]  # fmt: skip
    return [straight[0], *middle, straight[-1]]


def _joints(hand_params: HandParams) -> np.ndarray:
    """Wrist and finger rotations as (16, 3)."""
    return np.concatenate([hand_params.global_orient, hand_params.hand_pose]).reshape(16, 3)
