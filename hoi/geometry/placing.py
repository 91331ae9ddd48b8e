"""Where a hand could come from.  Hand model + object -> open hands before the object, with a direction to move in.

Drawn at random and cheap to reject: whatever an arm from above the table could not reach never gets to the fingers.
Paper: Sec. 3.2 (stands in for GrabNet).
"""

import numpy as np

from hoi.geometry.closing import Closer, Hands
from hoi.geometry.contact import DistanceField
from hoi.geometry.hand import JOINT_ROWS, HandModel

START_DISTANCE = 0.25  # metres before the surface point aimed at: the open hand is clear of the object there
HAND_SPAN = 0.235  # metres between two skin points of any hand that is drawn; the largest of 1536 has 0.223
FACING_APART = -0.1029  # cosine of 95.9 degrees, see too_wide
CELL, NORMAL_STEP = 0.01, 0.02  # metres and unit vectors: surface points that are alike up to these count once
MOST_PLACES = 30_000  # whose pairs are looked at, a few seconds at most


def open_hands(hand: HandModel, count: int, generator: np.random.Generator) -> Hands:
    """Hands of slightly different people, opened by different amounts, not placed yet."""
    hand_betas = np.zeros((count, 10))
    hand_betas[:, :3] = np.clip(generator.normal(0, 0.5, (count, 3)), -1, 1)
    zero = np.zeros((count, 3))
    vertices, joints, _ = hand.batch(zero, np.zeros((count, 45)), zero, hand_betas)
    preshape = np.zeros((count, 15, 3))
    start = np.deg2rad(generator.uniform([-5, 0, 0], [25, 20, 10], (count, 1, 3)))
    preshape[:, JOINT_ROWS[1:]] = start[..., None] * hand.flexion_axes[JOINT_ROWS[1:]]
    thumb = np.deg2rad(generator.uniform([20, -15, 0], [65, 10, 10], (count, 3)))
    preshape[:, 12] = thumb[:, :1] * hand.thumb_abduction_axis + thumb[:, 1:2] * hand.flexion_axes[12]
    preshape[:, 13] = thumb[:, 2:] * hand.flexion_axes[13]
    rates = np.ones((count, 5, 3))
    rates[:, 1:] = generator.uniform([0.7, 0.8, 0.4], [1.1, 1.3, 0.8], (count, 1, 3))
    rates[:, 0] = generator.uniform([0.3, 0.6, 0.6], [1.0, 1.1, 1.1], (count, 3))
    return Hands(
        rest_vertices=(vertices - joints[:, :1]).astype(np.float32), rest_joints=joints - joints[:, :1],
        rotation=np.tile(np.eye(3), (count, 1, 1)), wrist=np.zeros((count, 3)), preshape=preshape, rates=rates,
        flexion=np.zeros((count, 5, 3)), hand_betas=hand_betas, rest_wrist=joints[:, 0],
    )


def too_wide(field: DistanceField, contact_distance: float) -> bool:
    """True when no hand can hold the object: nowhere within its span does the surface face two ways.

    contact_distance  metres from the skin to what it touches
    Friction of 0.6 allows forces 31 degrees off a normal, so contacts whose normals fit into a cone of 59 degrees all
    push the same way.  If no two normals are 95.9 degrees apart, they do fit (Jung's theorem on the sphere).
    Rims, handles, boards and corners that are sharp enough face two ways; so does, to be safe, a surface with too many
    different places to compare.  Source: Nguyen 1988; Dekster 1995.
    """
    points, normals = field.samples, field.normals[field.sample_face]
    some = slice(None, None, 1 + len(points) // 1000)
    if _face_apart(points[some], normals[some], HAND_SPAN, FACING_APART):  # nearly everything: settled in milliseconds
        return False
    keys = np.concatenate([np.round(points / CELL), np.round(normals / NORMAL_STEP)], axis=1).astype(np.int16)
    chosen = np.unique(keys, axis=0, return_index=True)[1]
    if len(chosen) > MOST_PLACES:
        return False
    # Each chosen one stands for others that lie a cell away and are turned a little, so a little more is allowed.
    reach = HAND_SPAN + 2 * (contact_distance + field.spacing + np.sqrt(3) * CELL)
    turn = 2 * np.sqrt(3) * NORMAL_STEP
    return not _face_apart(points[chosen], normals[chosen], reach, FACING_APART + turn)


def _face_apart(points: np.ndarray, normals: np.ndarray, reach: float, cosine: float) -> bool:
    """Whether any two points (N, 3) nearer than `reach` have normals (N, 3) with a product below `cosine`."""
    points, normals = (points - points.mean(axis=0)).astype(np.float32), normals.astype(np.float32)
    squared = (points**2).sum(axis=1)
    for rows in np.array_split(np.arange(len(points)), 1 + len(points) // 500):
        near = squared[rows, None] + squared - 2 * points[rows] @ points.T < reach**2
        if (near & (normals[rows] @ normals.T < cosine)).any():
            return True
    return False


def _frame(forward: np.ndarray, side: np.ndarray) -> np.ndarray:
    """(B, 3, 3) rotations whose columns are forward, side made orthogonal to it, and their cross product."""
    forward = forward / np.linalg.norm(forward, axis=1, keepdims=True)
    side = side - np.einsum("bi,bi->b", side, forward)[:, None] * forward
    side /= np.maximum(np.linalg.norm(side, axis=1, keepdims=True), 1e-9)
    return np.stack([forward, side, np.cross(forward, side)], axis=2)


def reachable(hands: Hands, table: float) -> np.ndarray:
    """(B,) bool: an arm that comes from above the table could hold the hand like this.

    The forearm (along the hand's x) may bend 25 degrees at the wrist; palms up and thumbs down are left out.
    """
    x, y, z = hands.rotation[:, 2, 0], hands.rotation[:, 2, 1], hands.rotation[:, 2, 2]
    elbow = hands.wrist[:, 2] + 0.25 * np.sin(np.arcsin(np.clip(x, -1, 1)) + np.deg2rad(25)) - 0.035
    return (elbow > table) & (hands.wrist[:, 2] > table + 0.025) & (x > -0.5) & (y > -0.45) & (z > -0.35)


def _targets(field: DistanceField, count: int, generator: np.random.Generator) -> np.ndarray:
    """Indices (B,) of surface points to aim at: half of them anywhere, half on what sticks out (handles, rims)."""
    index = generator.integers(0, len(field.samples), (count, 6))
    out = np.linalg.norm((field.samples - field.samples.mean(axis=0))[index][..., :2], axis=2)
    return np.where(generator.random(count) < 0.5, index[:, 0], index[np.arange(count), out.argmax(axis=1)])


def _palm_aim(joints: np.ndarray, normal: np.ndarray, generator: np.random.Generator) -> list[np.ndarray]:
    """Wrap around from any side: the palm comes to the point along its normal, with any roll.

    joints (B, 16, 3) in the hand's frame, normal (B, 3) of the surface.
    returns  anchor, direction of motion and a direction across it in the hand's frame, the latter two in the object's
    """
    count = len(normal)
    tilt = np.deg2rad(generator.uniform(0, 50, count))  # between palm normal (-y) and finger direction (-x)
    anchor = 0.65 * joints[:, [1, 4, 7, 10]].mean(axis=1) + generator.normal(0, 0.012, (count, 3))
    return [anchor, np.stack([-np.sin(tilt), -np.cos(tilt), np.zeros(count)], axis=1),
            np.tile([0.0, 0.0, 1.0], (count, 1)), -normal + generator.normal(0, 0.25, (count, 3)),
            generator.normal(size=(count, 3))]


def _pinch_aim(joints: np.ndarray, normal: np.ndarray, generator: np.random.Generator) -> list[np.ndarray]:
    """Walls, rims and handles: the gap between thumb and fingers comes to the point along the surface, more often
    downwards; the normal points across the gap.  Arguments and results as in _palm_aim.
    """
    count = len(normal)
    fingers = joints[:, [3, 6]].mean(axis=1)
    gap = (joints[:, 15] + fingers) / 2
    tangent = generator.normal(size=(count, 3)) - [0, 0, 0.7]
    tangent -= np.einsum("bi,bi->b", tangent, normal)[:, None] * normal
    side = normal * generator.choice([-1.0, 1.0], (count, 1)) + generator.normal(0, 0.15, (count, 3))
    return [gap, gap - joints[:, [1, 4, 13]].mean(axis=1), fingers - joints[:, 15], tangent, side]


def place_hands(
    hands: Hands, closer: Closer, pinch: np.ndarray, generator: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Turn each hand towards a random surface point and put it START_DISTANCE before it.

    pinch    (B,) bool: how each hand goes about it, see _pinch_aim and _palm_aim
    returns  direction of motion (B, 3) and how far to go at most (B,), metres.  Changes hands.rotation and hands.wrist
    """
    field, count = closer.field, len(pinch)
    _, joints = closer.pose(hands)
    index = _targets(field, count, generator)
    target, normal = field.samples[index], field.normals[field.sample_face[index]]
    aims = zip(_pinch_aim(joints, normal, generator), _palm_aim(joints, normal, generator), strict=True)
    anchor, motion_hand, side_hand, motion, side = (np.where(pinch[:, None], a, b) for a, b in aims)
    to_object = _frame(motion, side)
    hands.rotation = to_object @ np.swapaxes(_frame(motion_hand, side_hand), 1, 2)
    motion = to_object[:, :, 0]
    hands.wrist = target - np.einsum("bij,bj->bi", hands.rotation, anchor) - START_DISTANCE * motion
    deeper = np.where(pinch, generator.uniform(-0.005, 0.03, count), 0.1)
    return motion, START_DISTANCE + deeper


def forearm_free(hands: Hands, field: DistanceField) -> np.ndarray:
    """(B,) bool: a forearm of 30 mm radius behind the wrist clears the object."""
    along = np.linspace(0.04, 0.24, 6)
    points = hands.wrist[:, None] + along[:, None] * hands.rotation[:, None, :, 0]
    return field.signed_distance(points).min(axis=1) > 0.03
