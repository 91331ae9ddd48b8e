"""Grasps without learned weights.  Object mesh + hand -> list[Grasp].  Stands in for GrabNet (paper Sec. 3.2).

The file reads in the order of a try; some 64 tries make a round and go through each step together:

open     hands of slightly different people, their fingers opened by different amounts
place    each before a point of the surface, turned to it; whatever no arm from above the table could reach goes at
         once, before the costly steps
move in  until something touches
close    every finger until the object or its own joints stop it; fingers that met nothing relax
measure  on the complete hand model, and keep what holds (hoi/geometry/grasp.py)

Moving and closing take steps as long as they can be without any skin point passing the surface (conservative
advancement): the distance field bounds how far a point may go, the skinning weights bound how far it goes per radian.
So nothing tunnels through a thin wall, and one evaluation moves all fingers of all hands.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from scipy.spatial.transform import Rotation

from hoi.geometry.contact import DistanceField
from hoi.geometry.grasp import POOL, SHARE_OF_KIND, Grasp, cached_search, choose_grasps, measure_grasp
from hoi.geometry.hand import FINGER_JOINTS, JOINT_ROWS, HandModel, HandParams, rotation_matrices
from hoi.geometry.objects import ObjectMesh

# Numbers were chosen by trial.  What they do is counted in accepted grasps over 3,072 tries, a quarter each on a mug, a
# bowl, a bottle and a can: 252 (57, 11, 89, 95) as they are.
TRIES_PER_ROUND = 64  # hands in one batch: enough to work on together, few enough for arrays of some MB
DRAWS_PER_TRY = 4  # of which a third passes arm_can_reach, so that a round is nearly always full
# Place
STAND_OFF = 0.25  # metres before the surface point aimed at: the open hand is clear of the object there but for 3 of
# 2,000 before a tall bottle, which are dropped after moving in; 0.15 and 0.35 give as many grasps
FOREARM = 0.25  # metres from wrist to elbow
PALM_DEPTH = 0.1  # metres that a palm may go beyond the point aimed at; it stops where it touches
ROD_SHARE = 0.4  # of the hands that go for a handle or grip, where there is one
PINCH_MOST = 0.08  # metres between thumb and fingers at most
FINGER_THICK = 0.015  # metres from the middle of one fingertip to that of another when they meet
FEW_SHARE = 0.35  # of the hands that use the thumb and one or two fingers; they are accepted less often than others
# Move in and close
STOP_DISTANCE = 0.0008  # metres: skin stops here; the triangles between skin points then stay outside too.  Nearer they
# cross the surface (0.3 mm: 132 accepted, 0: 31), farther off contacts are missed (2 mm: 218)
STOP_BESIDE = 0.0003  # for the skin beside a joint, which the next joint drags along a little (0.8 mm: 196)
TOLERANCE = 0.0003  # metres: so near to its stop is stopped (0.1 mm: 260 in a fifth more time, 1 mm: 215)
MOVE_STEPS, CLOSE_STEPS = 40, 60  # at most; 20 and 30 already give all but one of the grasps
MAX_TURN = 0.2  # radians in one step, for speeds are those of the pose at its beginning; 0.05 finds the same
# Thumb, then fingers, base to tip, counted from the preshape: what a healthy hand can do, seldom reached.  Nineteen of
# twenty accepted grasps bend their fingers by less than 59, 77 and 59 degrees.
FLEXION_LIMITS = np.deg2rad([[35, 50, 65], [80, 100, 65], [80, 100, 65], [80, 100, 65], [80, 100, 65]])
THUMB_CLEARANCE = 0.013  # metres between the thumb's bones and another finger's, which are some 15 mm thick (0: 261)


@dataclass
class Hands:
    """B hands on their way to the object; arrays are replaced as they move.

    rest_vertices (B, V, 3) and rest_joints (B, 16, 3)  flat hand with the wrist joint at the origin, metres
    rotation      (B, 3, 3)   hand to object frame; in the hand's frame the forearm lies along +x, fingers along -x, the
                              back of the hand faces +y, the thumb lies towards +z
    wrist         (B, 3)      wrist joint in the object frame
    preshape      (B, 15, 3)  axis-angle of the open hand
    rates         (B, 5, 3)   how fast each joint flexes while a finger closes, relative to each other
    flexion       (B, 5, 3)   radians flexed from the preshape so far
    used          (B, 5)      bool: fingers that take part; the others stay as they are in the preshape
    hand_betas    (B, 10)     shape
    rest_wrist    (B, 3)      the wrist joint in the hand model's own rest frame
    """

    rest_vertices: np.ndarray
    rest_joints: np.ndarray
    rotation: np.ndarray
    wrist: np.ndarray
    preshape: np.ndarray
    rates: np.ndarray
    flexion: np.ndarray
    used: np.ndarray
    hand_betas: np.ndarray
    rest_wrist: np.ndarray

    def take(self, index: np.ndarray) -> "Hands":
        """The hands of these indices, as copies."""
        return Hands(*(getattr(self, name)[index] for name in self.__dataclass_fields__))


class Rig:
    """Forward kinematics of one hand model for many hands at once, in float32 (0.04 ms a hand, smplx 0.07).

    Pose blend shapes are left out: what counts is measured afterwards on the complete model.

    weights  (V, 16)    skinning weights
    axes     (5, 3, 3)  by finger and joint, about which it flexes
    follow   (V, 5, 3)  share of a joint's turn that each vertex follows
    moving   for each finger the vertices that follow it noticeably
    """

    def __init__(self, hand: HandModel):
        self.weights = hand.weights.astype(np.float32)
        self.parents = hand.parents
        self.axes = hand.flexion_axes[JOINT_ROWS]
        # The weights of the joint and of all beyond it.
        self.follow = np.zeros((len(self.weights), 5, 3), dtype=np.float32)
        for f, k in np.ndindex(5, 3):
            self.follow[:, f, k] = self.weights[:, list(FINGER_JOINTS[f][k:])].sum(axis=1)
        self.moving = [np.flatnonzero(self.follow[:, f, 0] > 0.02) for f in range(5)]

    def finger_turns(self, hands: Hands) -> np.ndarray:
        """(B, 15, 3) axis-angle, radians: the preshape plus the flexion about each joint's axis."""
        pose = hands.preshape.copy()
        pose[:, JOINT_ROWS] += hands.flexion[..., None] * self.axes
        return pose

    def bones(self, hands: Hands) -> tuple[np.ndarray, np.ndarray]:
        """Turns of all joints (B, 16, 3, 3) and joints (B, 16, 3) in the hand's own frame, metres, float32."""
        turns = rotation_matrices(self.finger_turns(hands))
        count = len(turns)
        chain = np.empty((count, 16, 3, 3), dtype=np.float32)
        joints = np.empty((count, 16, 3), dtype=np.float32)
        chain[:, 0], joints[:, 0] = np.eye(3), hands.rest_joints[:, 0]
        for k in range(1, 16):
            parent = self.parents[k]
            chain[:, k] = chain[:, parent] @ turns[:, k - 1]
            bone = hands.rest_joints[:, k] - hands.rest_joints[:, parent]
            joints[:, k] = joints[:, parent] + np.einsum("bij,bj->bi", chain[:, parent], bone)
        return chain, joints

    def pose(self, hands: Hands) -> tuple[np.ndarray, np.ndarray]:
        """Skin (B, V, 3) and joints (B, 16, 3) in the object frame, metres, float32."""
        chain, joints = self.bones(hands)
        count = len(joints)
        shift = joints - np.einsum("bkij,bkj->bki", chain, hands.rest_joints)
        blend = np.concatenate([chain.reshape(count, 16, 9), shift], axis=2)  # (B, 16, 12)
        blend = np.matmul(self.weights, blend.astype(np.float32))  # (B, V, 12)
        vertices = np.einsum("bvij,bvj->bvi", blend[..., :9].reshape(*blend.shape[:2], 3, 3), hands.rest_vertices)
        vertices += blend[..., 9:]
        turn = np.swapaxes(hands.rotation, 1, 2).astype(np.float32)
        wrist = hands.wrist[:, None].astype(np.float32)
        return vertices @ turn + wrist, joints @ turn + wrist


def open_hands(hand: HandModel, count: int, generator: np.random.Generator) -> Hands:
    """`count` hands of slightly different people, opened by different amounts, not placed yet."""
    # One unit of the built-in hand's three coefficients: 5 % of its size, 3 % of its length, 2 % of its thickness.
    hand_betas = np.zeros((count, 10))
    hand_betas[:, :3] = np.clip(generator.normal(0, 0.5, (count, 3)), -1, 1)
    zero = np.zeros((count, 3))
    vertices, joints, _ = hand.pose_batch(zero, np.zeros((count, 45)), zero, hand_betas)
    # Fingers from slightly bent back to loosely curved; flat ones alone would give 311 grasps, but only 6 of the bowl.
    preshape = np.zeros((count, 15, 3))
    start = np.deg2rad(generator.uniform([-5, 0, 0], [25, 20, 10], (count, 1, 3)))
    preshape[:, JOINT_ROWS[1:]] = start[..., None] * hand.flexion_axes[JOINT_ROWS[1:]]
    # The thumb stands opposite the fingers by 20 to 65 degrees, its other joints nearly straight.
    thumb = np.deg2rad(generator.uniform([20, -15, 0], [65, 10, 10], (count, 3)))
    preshape[:, 12] = thumb[:, :1] * hand.thumb_abduction_axis + thumb[:, 1:2] * hand.flexion_axes[12]
    preshape[:, 13] = thumb[:, 2:] * hand.flexion_axes[13]
    # The middle joints of a closing finger lead, its last one follows; equal rates would give as many grasps (253), but
    # less relaxed ones (mean score of the bowl's 1.13 instead of 1.27).
    rates = np.ones((count, 5, 3))
    rates[:, 1:] = generator.uniform([0.7, 0.8, 0.4], [1.1, 1.3, 0.8], (count, 1, 3))
    rates[:, 0] = generator.uniform([0.3, 0.6, 0.6], [1.0, 1.1, 1.1], (count, 3))
    return Hands(
        rest_vertices=(vertices - joints[:, :1]).astype(np.float32), rest_joints=joints - joints[:, :1],
        rotation=np.tile(np.eye(3), (count, 1, 1)), wrist=np.zeros((count, 3)), preshape=preshape, rates=rates,
        flexion=np.zeros((count, 5, 3)), used=np.ones((count, 5), dtype=bool), hand_betas=hand_betas,
        rest_wrist=joints[:, 0],
    )


def use_few_fingers(hands: Hands, few: np.ndarray, hand: HandModel, generator: np.random.Generator) -> None:
    """Hands of `few` (B,) bool use thumb and index, half of them the middle finger too; seven of ten curl the others
    into the palm, three stretch them away.  Changes hands.used and hands.preshape.
    """
    count = len(few)
    with_middle, curled = generator.random(count) < 0.5, generator.random((count, 1)) < 0.7
    hands.used[few, 2:] = with_middle[few, None] & np.array([True, False, False])
    bend = np.deg2rad(np.where(curled, generator.uniform([55, 65, 30], [75, 90, 50], (count, 3)),
                               generator.uniform([-8, 0, 0], [10, 12, 8], (count, 3))))  # fmt: skip
    turns = bend[:, None, :, None] * hand.flexion_axes[JOINT_ROWS]
    hands.preshape[:, JOINT_ROWS] = np.where(hands.used[..., None, None], hands.preshape[:, JOINT_ROWS], turns)


def place_hands(
    hands: Hands, pinch: np.ndarray, rig: Rig, field: DistanceField, generator: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Turn each hand towards a random surface point and put it STAND_OFF before it.  Some go for a handle.

    pinch    (B,) bool: how each hand goes about it, see _pinch_aim and _palm_aim
    returns  direction of motion (B, 3) and how far to go at most (B,), metres.  Changes hands.rotation and hands.wrist
    """
    count = len(pinch)
    target, normal, axis = _targets(field, count, generator)
    outward = np.where(axis.any(axis=1, keepdims=True), target - field.samples.mean(axis=0), 0.0)
    outward /= np.maximum(np.linalg.norm(outward, axis=1, keepdims=True), 1e-9)
    thick = _thickness(target, normal, field)
    target = target - np.where(pinch, thick / 2, 0.0)[:, None] * normal
    aims = zip(_pinch_aim(hands, rig, thick, normal, outward, generator),
               _palm_aim(rig.bones(hands)[1], normal, axis, generator), strict=True)  # fmt: skip
    anchor, motion_hand, side_hand, motion, side = (np.where(pinch[:, None], a, b) for a, b in aims)
    to_object = _frame(motion, side)
    hands.rotation = to_object @ np.swapaxes(_frame(motion_hand, side_hand), 1, 2)
    motion = to_object[:, :, 0]
    hands.wrist = target - np.einsum("bij,bj->bi", hands.rotation, anchor) - STAND_OFF * motion
    # A pinch stops by itself, within a fingertip's length of the point.
    deeper = np.where(pinch, generator.uniform(-0.005, 0.03, count), PALM_DEPTH)
    return motion, STAND_OFF + deeper


def _targets(
    field: DistanceField, count: int, generator: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Surface points (B, 3) to aim at, their normals, and the axis of the handle that they are on (zero elsewhere).

    ROD_SHARE of them lie on handles, where there are any.  Of the others half lie anywhere, half on what sticks out
    (rims): that is the one of six that lies farthest from the vertical axis.  Aiming anywhere gives more grasps of the
    can (131), but fewer of mug and bowl (52 and 9).
    """
    index = generator.integers(0, len(field.samples), (count, 6))
    out = np.linalg.norm((field.samples - field.samples.mean(axis=0))[index][..., :2], axis=2)
    index = np.where(generator.random(count) < 0.5, index[:, 0], index[np.arange(count), out.argmax(axis=1)])
    tree, on_rod, axes = field.rods
    axis, by_rod = np.zeros((count, 3)), generator.random(count) < ROD_SHARE
    if on_rod.any():
        row = generator.choice(np.flatnonzero(on_rod), count)
        index = np.where(by_rod, field.tree.query(tree.data[row])[1], index)
        axis[by_rod] = axes[row[by_rod]]
    return field.samples[index], field.normals[field.sample_face[index]], axis


def _thickness(points: np.ndarray, normals: np.ndarray, field: DistanceField) -> np.ndarray:
    """Metres (B,) from surface points (B, 3) straight through to the other side; 0 when farther than a hand opens."""
    depth = np.arange(0.002, PINCH_MOST, 0.002)
    outside = field.signed_distance(points[:, None] - depth[:, None] * normals[:, None]) > 0
    return np.where(outside.any(axis=1), depth[outside.argmax(axis=1)], 0.0)


def _pinch_aim(
    hands: Hands, rig: Rig, thick: np.ndarray, normal: np.ndarray, outward: np.ndarray, generator: np.random.Generator
) -> list[np.ndarray]:
    """Walls, rims and handles: the gap between thumb and fingers comes to the point along the surface, more often
    downwards, to a handle from outside; the normal points across the gap.

    The gap is that of a hand closed until what is `thick` (B,) metres fits between thumb and fingers.
    normal (B, 3) of the surface, outward (B, 3) from the object's middle to a handle, zero elsewhere
    returns  five arrays (B, 3): anchor, direction of motion and a direction across it in the hand's frame; then the
             same two directions in the object's frame
    """
    count = len(normal)
    closed = [replace(hands, flexion=np.minimum(t * hands.rates, FLEXION_LIMITS)) for t in np.linspace(0, 1.2, 7)]
    joints = np.stack([rig.bones(each)[1] for each in closed])  # (7, B, 16, 3)
    tips = joints[:, :, [15, 3, 6]] + 0.6 * (joints[:, :, [15, 3, 6]] - joints[:, :, [14, 2, 5]])  # of the last links
    tips[:, ~hands.used[:, 2], 2] = tips[:, ~hands.used[:, 2], 1]  # opposite the thumb are index and middle, if used
    thumb, fingers = tips[:, :, 0], tips[:, :, 1:].mean(axis=2)
    fit = np.abs(np.linalg.norm(fingers - thumb, axis=2) - thick - FINGER_THICK).argmin(axis=0), np.arange(count)
    joints, thumb, fingers = joints[fit], thumb[fit], fingers[fit]
    gap = (thumb + fingers) / 2
    # Mostly downwards, as rims are taken; 2 instead of 0.7 gives 223 grasps, 0 gives 282.
    tangent = generator.normal(size=(count, 3)) - [0, 0, 0.7] - 2 * outward
    tangent -= np.einsum("bi,bi->b", tangent, normal)[:, None] * normal
    side = normal * generator.choice([-1.0, 1.0], (count, 1)) + generator.normal(0, 0.15, (count, 3))
    return [gap, gap - joints[:, [1, 4, 13]].mean(axis=1), fingers - thumb, tangent, side]


def _palm_aim(
    joints: np.ndarray, normal: np.ndarray, axis: np.ndarray, generator: np.random.Generator
) -> list[np.ndarray]:
    """Wrap around from any side: the palm comes to the point along its normal, with any roll; across a handle's axis
    (B, 3), so that the fingers close around it.

    Other arguments and results as in _pinch_aim.
    """
    count = len(normal)
    # The direction of motion lies between the palm's normal (-y) and the fingers' (-x); straight along the normal 201
    # grasps are found, up to 90 degrees off it 166.
    tilt = np.deg2rad(generator.uniform(0, 50, count))
    # The palm's middle, give or take 12 mm: 0.65 of the way from the wrist to the knuckles (0.4: 238, 0.9: 208).
    anchor = 0.65 * joints[:, [1, 4, 7, 10]].mean(axis=1) + generator.normal(0, 0.012, (count, 3))
    side = generator.normal(size=(count, 3))
    along = np.where(np.einsum("bi,bi->b", side, axis)[:, None] < 0, -axis, axis)  # the thumb at either end
    side = np.where(axis.any(axis=1, keepdims=True), along + 0.2 * side, side)
    return [anchor, np.stack([-np.sin(tilt), -np.cos(tilt), np.zeros(count)], axis=1),
            np.tile([0.0, 0.0, 1.0], (count, 1)), -normal + generator.normal(0, 0.25, (count, 3)), side]


def _frame(forward: np.ndarray, side: np.ndarray) -> np.ndarray:
    """(B, 3, 3) rotations whose columns are forward, side made orthogonal to it, and their cross product."""
    forward = forward / np.linalg.norm(forward, axis=1, keepdims=True)
    side = side - np.einsum("bi,bi->b", side, forward)[:, None] * forward
    side /= np.maximum(np.linalg.norm(side, axis=1, keepdims=True), 1e-9)
    return np.stack([forward, side, np.cross(forward, side)], axis=2)


def arm_can_reach(rotation: np.ndarray, wrist: np.ndarray, table: float) -> np.ndarray:
    """(B,) bool: an arm that comes from above the table could hold the hand like this.

    rotation, wrist  (B, 3, 3), (B, 3)  as in Hands
    table            metres, height of the surface that the object stands on
    About a third of the drawn hands pass.
    """
    x, y, z = rotation[:, 2, 0], rotation[:, 2, 1], rotation[:, 2, 2]  # how far up forearm, back and thumb point
    # The wrist may bend by 25 degrees to lift the elbow, a third of what it can; 35 and 25 mm are their own thickness.
    elbow = wrist[:, 2] + FOREARM * np.sin(np.arcsin(np.clip(x, -1, 1)) + np.deg2rad(25)) - 0.035
    above = (elbow > table) & (wrist[:, 2] > table + 0.025)
    # No forearm from more than 30 degrees below, no palm up by more than 27, no thumb down by more than 20: such hands
    # hold as well (262 grasps without these three), but nobody takes things from a table like this.
    return above & (x > -0.5) & (y > -0.45) & (z > -0.35)


def move_in(hands: Hands, direction: np.ndarray, limit: np.ndarray, rig: Rig, field: DistanceField) -> np.ndarray:
    """Push every hand along its direction (B, 3) until it touches or has gone limit (B,) metres.

    Changes hands.wrist.  Returns the distance travelled (B,).
    """
    vertices, _ = rig.pose(hands)
    travelled = np.zeros(len(vertices))
    active = np.arange(len(vertices))
    for _ in range(MOVE_STEPS):
        moved = vertices[active] + (travelled[active, None] * direction[active])[:, None].astype(np.float32)
        gap = field.signed_distance(moved).min(axis=1) - STOP_DISTANCE
        travelled[active] = np.minimum(travelled[active] + np.maximum(gap, 0), limit[active])
        active = active[(gap > TOLERANCE) & (travelled[active] < limit[active])]
        if not len(active):
            break
    hands.wrist = hands.wrist + travelled[:, None] * direction
    return travelled


def forearm_free(rotation: np.ndarray, wrist: np.ndarray, field: DistanceField) -> np.ndarray:
    """(B,) bool: a forearm of 30 mm radius behind the wrist clears the object.

    rotation, wrist  as in Hands;  field  distance to the object
    Seldom fails: 5 of the bowl's 105 hands, none of which would have been accepted.
    """
    along = np.linspace(0.04, 0.24, 6)  # nearer to the wrist the skin itself is looked at; spheres 40 mm apart overlap
    points = wrist[:, None] + along[:, None] * rotation[:, None, :, 0]
    return field.signed_distance(points).min(axis=1) > 0.03


def close_fingers(hands: Hands, rig: Rig, field: DistanceField) -> np.ndarray:
    """Flex all fingers until their links touch or reach their limits.

    A link that touches holds its joint and all before it; the joints beyond go on, so fingers wrap around.
    Fingers that are not used stay.  Changes hands.flexion.  Returns (B, 5) bool: the object stopped the finger.
    """
    held = np.where(hands.used, 0, 3)  # number of joints that may not move any more, from the base
    for _ in range(CLOSE_STEPS):
        running = (np.arange(3) >= held[..., None]) & (hands.flexion < FLEXION_LIMITS - 1e-6)
        active = np.flatnonzero(running.any(axis=(1, 2)))
        if not len(active):
            break
        part = hands.take(active)
        vertices, joints = rig.pose(part)
        for f in range(5):
            rates = part.rates[:, f] * running[active, f]
            step, hold = _finger_step(f, rates, vertices, joints, rig, field)
            left = np.divide(FLEXION_LIMITS[f] - part.flexion[:, f], rates, out=np.full(rates.shape, np.inf),
                             where=rates > 0).min(axis=1)
            hands.flexion[active, f] += np.minimum(step, left)[:, None] * rates
            held[active, f] = np.maximum(held[active, f], hold)
    return hands.used & (held > 0)


def _finger_step(finger: int, rates: np.ndarray, vertices: np.ndarray, joints: np.ndarray, rig: Rig,
                 field: DistanceField) -> tuple[np.ndarray, np.ndarray]:
    """Time (B,) that finger may run at these joint rates (B, 3), and how many joints a contact now holds (B,)."""
    rows = rig.moving[finger]
    skin = vertices[:, rows]
    follow = rig.follow[rows, finger]  # (M, 3)
    distance = field.signed_distance(skin)
    speed = np.zeros(distance.shape, dtype=np.float32)
    # A point moves at most by its distance from each turning joint, times that joint's rate and its share in it.
    for k, joint in enumerate(FINGER_JOINTS[finger]):
        reach = np.linalg.norm(skin - joints[:, joint][:, None], axis=2)
        speed += rates[:, k, None].astype(np.float32) * follow[:, k] * reach
    link = (follow > 0.5).sum(axis=1)  # 0: palm side of the first joint, 3: last link
    first_running = np.where(rates > 0, np.arange(3), 3).min(axis=1)
    beside = link[None] <= first_running[:, None]
    room = distance - np.where(beside, STOP_BESIDE, STOP_DISTANCE)
    relevant = speed > 1e-6
    step = np.where(relevant, np.maximum(room, 0) / np.maximum(speed, 1e-6), np.inf).min(axis=1)
    blocked = relevant & (room < TOLERANCE)
    # A blocked point holds its own link; one beside the running joint holds that joint.
    hold = np.where(blocked, np.maximum(link[None], first_running[:, None] + 1), 0).max(axis=1)
    return np.where(hold > 0, 0.0, np.minimum(step, MAX_TURN / np.maximum(rates.max(axis=1), 1e-9))), hold


def _relax_idle_fingers(hands: Hands, touched: np.ndarray) -> None:
    """A finger that met nothing follows the mean of those that did, instead of making a fist beside the object.

    It only opens again; should it touch something on the way, the measures that follow will tell.  Grasps score 0.04 to
    0.14 higher for it.
    """
    bend = hands.flexion[:, 1:].sum(axis=2)
    weight = touched[:, 1:].astype(float)
    mean = (bend * weight).sum(axis=1) / np.maximum(weight.sum(axis=1), 1)
    share = np.minimum(1, mean[:, None] / np.maximum(bend, 1e-6))
    hands.flexion[:, 1:] *= np.where(touched[:, 1:], 1, share)[..., None]


def _fingers_collide(joints: np.ndarray) -> np.ndarray:
    """(B,) bool: the thumb is inside another finger.  joints (B, 16, 3).

    Compares points along the bones, five to a bone; the thumb's first bone lies in the palm and is left out.
    """
    def points(chain: Sequence[int]) -> np.ndarray:
        ends = joints[:, list(chain)]
        tip = ends[:, 2] + 0.5 * (ends[:, 2] - ends[:, 1])  # inside the last link, which has no joint at its end
        ends = np.concatenate([ends, tip[:, None]], axis=1)
        return np.linspace(ends[:, :-1], ends[:, 1:], 5, axis=2).reshape(-1, 15, 3)
    thumb = points(FINGER_JOINTS[0])[:, 5:]
    others = np.concatenate([points(chain) for chain in FINGER_JOINTS[1:]], axis=1)
    gap = np.linalg.norm(thumb[:, :, None] - others[:, None], axis=3).min(axis=(1, 2))
    return gap < THUMB_CLEARANCE


def _try_grasps(hand: HandModel, rig: Rig, field: DistanceField, table: float, pinch_share: float,
                generator: np.random.Generator) -> list[Grasp]:
    """One round of tries, from open hands to the accepted grasps among them."""
    count = DRAWS_PER_TRY * TRIES_PER_ROUND
    hands, few = open_hands(hand, count, generator), generator.random(count) < FEW_SHARE
    use_few_fingers(hands, few, hand, generator)
    pinch = few | (generator.random(count) < pinch_share)
    approach, limit = place_hands(hands, pinch, rig, field, generator)
    keep = np.flatnonzero(arm_can_reach(hands.rotation, hands.wrist + STAND_OFF * approach, table))[:TRIES_PER_ROUND]
    hands, pinch, approach, limit = hands.take(keep), pinch[keep], approach[keep], limit[keep]

    travelled = move_in(hands, approach, limit, rig, field)
    vertices, _ = rig.pose(hands)
    free = (field.signed_distance(vertices).min(axis=1) > 0) & (vertices[..., 2].min(axis=1) > table)
    free &= arm_can_reach(hands.rotation, hands.wrist, table) & forearm_free(hands.rotation, hands.wrist, field)
    # A palm that went all the way has met nothing; a pinch may, with the wall between thumb and fingers.
    hands = hands.take(np.flatnonzero(free & ((travelled < limit - 1e-6) | pinch)))

    touched = close_fingers(hands, rig, field)
    _relax_idle_fingers(hands, touched)
    vertices, joints = rig.pose(hands)
    # Cheap signs of what the exact measures will ask: thumb and fingers touch, nothing below the table.
    enough = touched[:, 1:].sum(axis=1) >= np.minimum(hands.used[:, 1:].sum(axis=1), 2)
    good = touched[:, 0] & enough & (vertices[..., 2].min(axis=1) > table)
    hands = hands.take(np.flatnonzero(good & ~_fingers_collide(joints)))
    measured = [measure_grasp(hand_params, hand, field) for hand_params in _hand_params(hands, rig)]
    return [grasp for grasp in measured if grasp.accepted]


def _hand_params(hands: Hands, rig: Rig) -> list[HandParams]:
    """The same in the hand model's parameters: its translation moves the hand from where the wrist is at rest."""
    global_orient = Rotation.from_matrix(hands.rotation).as_rotvec() if len(hands.wrist) else []
    return [HandParams(*row) for row in zip(global_orient, rig.finger_turns(hands).reshape(-1, 45),
                                            hands.wrist - hands.rest_wrist, hands.hand_betas, strict=True)]


def find_grasps(object_mesh: ObjectMesh, hand: HandModel, count: int, generator: np.random.Generator,
                max_tries: int = 6400, field: DistanceField | None = None) -> list[Grasp]:
    """Search until there is enough to choose from, then choose good and different grasps.

    count      grasps wanted, at least 1
    max_tries  hands moved in at most; fewer grasps than count come back when they are used up.  Of 6,400 hands some 90
               hold a bowl, the hardest of the built-in objects
    field      distance field of object_mesh, if there is one already
    returns    accepted grasps (see Grasp.accepted), best first, then for variety
    """
    field = field or DistanceField(object_mesh.vertices, object_mesh.faces)
    rig, table = Rig(hand), object_mesh.vertices[:, 2].min()
    # A bowl is taken by its wall, though as many grasps of it are found whatever the share (10 to 12 of 768 tries).  Of
    # the others more are found without pinches (82, 110, 127), but handles and rims are pinched as well.
    pinch_share = 0.9 if object_mesh.category == "bowl" else 0.25
    found: list[Grasp] = []
    for tries in range(TRIES_PER_ROUND, max(max_tries, TRIES_PER_ROUND) + 1, TRIES_PER_ROUND):
        found += _try_grasps(hand, rig, field, table, pinch_share, generator)
        # A hard object ends early: after a quarter of the tries what was asked for is enough, without a choice.
        # Nor does one wait long for two fingers, or for a handle that is out of reach.
        kinds = sum(grasp.few_fingers for grasp in found), sum(grasp.by_rod for grasp in found)
        wanted = 0 if tries >= max_tries / 8 else (count + 1) // SHARE_OF_KIND
        enough = kinds[0] >= wanted and (kinds[1] >= wanted or not field.rods[1].any())
        if enough and len(found) >= (POOL * count if tries < max_tries / 4 else count):
            chosen = choose_grasps(found, hand, count)
            if len(chosen) == count:
                return chosen
    return choose_grasps(found, hand, count)


def cached_grasps(object_mesh: ObjectMesh, hand: HandModel, count: int, seed: int, cache_dir: str | Path,
                  ) -> list[Grasp]:
    """find_grasps with a memory: the same mesh, hand, count and seed give the same grasps, searched once.

    cache_dir  folder, made if missing; any number of processes may share it (files appear whole, by renaming)
    A file that cannot be read is searched anew and replaced.
    """
    return cached_search(lambda generator: (find_grasps(object_mesh, hand, count, generator), ""), object_mesh, hand,
                         count, seed, cache_dir)[0]


def reach_faults(hand_params: HandParams, hand: HandModel, field: DistanceField, table: float) -> tuple[str, ...]:
    """What the built-in search never proposes, asked of a grasp from elsewhere (GrabNet).

    table    metres, height of the surface that the object stands on
    returns  reasons as in Grasp.faults, empty when there are none
    """
    mesh = hand(hand_params)
    rotation, wrist = Rotation.from_rotvec(hand_params.global_orient).as_matrix()[None], mesh.joints[:1]
    tests = {
        "comes from where no arm can": not arm_can_reach(rotation, wrist, table)[0],
        "goes below the table": mesh.vertices[:, 2].min() <= table,
        "has its forearm in the object": not forearm_free(rotation, wrist, field)[0],
        "has its thumb in another finger": _fingers_collide(mesh.joints[None])[0],
    }
    return tuple(reason for reason, failed in tests.items() if failed)
