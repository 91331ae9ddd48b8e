"""Move a batch of hands in until they touch, then close their fingers.  Wrist poses + DistanceField -> finger poses.

Every step is as long as it can be without any skin point passing the surface (conservative advancement): the distance
field bounds how far a point may go, the skinning weights bound how far it goes per radian.  So nothing tunnels through
a thin wall, and one evaluation moves all fingers of all hands.  Paper: Sec. 3.2 (stands in for GrabNet).
"""

from dataclasses import dataclass

import numpy as np

from hoi.geometry.contact import DistanceField
from hoi.geometry.hand import FINGER_JOINTS, JOINT_ROWS, HandModel, rotation_matrices

STOP_DISTANCE = 0.0008  # metres: skin stops here; the triangles between skin points then stay outside too
STOP_BESIDE = 0.0003  # for the skin beside a joint, which the next joint drags along a little
TOLERANCE = 0.0003
MAX_TURN = 0.2  # radians in one step
FLEXION_LIMITS = np.deg2rad([[35, 50, 65], [80, 100, 65], [80, 100, 65], [80, 100, 65], [80, 100, 65]])


@dataclass
class Hands:
    """B hands on their way to the object; arrays are replaced as they move.

    rest_vertices (B, V, 3) and rest_joints (B, 16, 3)  flat hand with the wrist joint at the origin, metres
    rotation      (B, 3, 3)   hand to object frame
    wrist         (B, 3)      wrist joint in the object frame
    preshape      (B, 15, 3)  axis-angle of the open hand
    rates         (B, 5, 3)   how fast each joint flexes while a finger closes, relative to each other
    flexion       (B, 5, 3)   radians flexed from the preshape so far
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
    hand_betas: np.ndarray
    rest_wrist: np.ndarray

    def take(self, index: np.ndarray) -> "Hands":
        """The hands of these indices."""
        return Hands(*(getattr(self, name)[index] for name in self.__dataclass_fields__))


class Closer:
    """Small forward kinematics of one hand model, and the two motions built on it.

    Pose blend shapes are left out: what counts is measured afterwards on the complete model.
    """

    def __init__(self, hand: HandModel, field: DistanceField):
        self.field = field
        self.weights = hand.weights.astype(np.float32)
        self.parents = hand.parents
        self.axes = hand.flexion_axes[JOINT_ROWS]  # (5, 3, 3)
        self.finger = hand.finger_of_vertex
        # Share of a joint's turn that each vertex follows: the weights of the joint and of all beyond it.
        self.follow = np.zeros((len(self.weights), 5, 3), dtype=np.float32)
        for f, joints in enumerate(FINGER_JOINTS):
            for k in range(3):
                self.follow[:, f, k] = self.weights[:, list(joints[k:])].sum(axis=1)
        self.moving = [np.flatnonzero(self.follow[:, f, 0] > 0.02) for f in range(5)]

    def hand_pose(self, hands: Hands) -> np.ndarray:
        """(B, 15, 3) axis-angle: the preshape plus the flexion about each joint's axis."""
        pose = hands.preshape.copy()
        pose[:, JOINT_ROWS] += hands.flexion[..., None] * self.axes
        return pose

    def pose(self, hands: Hands) -> tuple[np.ndarray, np.ndarray]:
        """Skin (B, V, 3) and joints (B, 16, 3) in the object frame, float32."""
        turns = rotation_matrices(self.hand_pose(hands))
        count = len(turns)
        chain = np.empty((count, 16, 3, 3), dtype=np.float32)
        joints = np.empty((count, 16, 3), dtype=np.float32)
        chain[:, 0], joints[:, 0] = np.eye(3), hands.rest_joints[:, 0]
        for k in range(1, 16):
            parent = self.parents[k]
            chain[:, k] = chain[:, parent] @ turns[:, k - 1]
            bone = hands.rest_joints[:, k] - hands.rest_joints[:, parent]
            joints[:, k] = joints[:, parent] + np.einsum("bij,bj->bi", chain[:, parent], bone)
        shift = joints - np.einsum("bkij,bkj->bki", chain, hands.rest_joints)
        blend = np.concatenate([chain.reshape(count, 16, 9), shift], axis=2)  # (B, 16, 12)
        blend = np.matmul(self.weights, blend.astype(np.float32))  # (B, V, 12)
        vertices = np.einsum("bvij,bvj->bvi", blend[..., :9].reshape(*blend.shape[:2], 3, 3), hands.rest_vertices)
        vertices += blend[..., 9:]
        turn = np.swapaxes(hands.rotation, 1, 2).astype(np.float32)
        wrist = hands.wrist[:, None].astype(np.float32)
        return vertices @ turn + wrist, joints @ turn + wrist

    def advance(self, hands: Hands, direction: np.ndarray, limit: np.ndarray, steps: int = 40) -> np.ndarray:
        """Push every hand along its direction (B, 3) until it touches or has gone limit (B,) metres.

        Changes hands.wrist.  Returns the distance travelled (B,).
        """
        vertices, _ = self.pose(hands)
        travelled = np.zeros(len(vertices))
        active = np.arange(len(vertices))
        for _ in range(steps):
            moved = vertices[active] + (travelled[active, None] * direction[active])[:, None].astype(np.float32)
            gap = self.field.signed_distance(moved).min(axis=1) - STOP_DISTANCE
            travelled[active] = np.minimum(travelled[active] + np.maximum(gap, 0), limit[active])
            active = active[(gap > TOLERANCE) & (travelled[active] < limit[active])]
            if not len(active):
                break
        hands.wrist = hands.wrist + travelled[:, None] * direction
        return travelled

    def close(self, hands: Hands, steps: int = 60) -> np.ndarray:
        """Flex all fingers until their links touch or reach their limits.

        A link that touches holds its joint and all before it; the joints beyond go on, so fingers wrap around.
        Changes hands.flexion.  Returns (B, 5) bool: the finger was stopped by the object.
        """
        count = len(hands.wrist)
        held = np.zeros((count, 5), dtype=int)  # number of joints that may not move any more, from the base
        touched = np.zeros((count, 5), dtype=bool)
        active = np.arange(count)
        for _ in range(steps):
            part = hands.take(active)
            vertices, joints = self.pose(part)
            running = (np.arange(3) >= held[active][:, :, None]) & (part.flexion < FLEXION_LIMITS - 1e-6)
            rates = part.rates * running
            for f in range(5):
                step, hit = self._finger_step(vertices, joints, rates[:, f], f)
                left = np.where(rates[:, f] > 0, (FLEXION_LIMITS[f] - part.flexion[:, f]) / np.maximum(
                    rates[:, f], 1e-9), np.inf).min(axis=1)
                turn = np.minimum(step, np.where(np.isfinite(left), left, 0))[:, None] * rates[:, f]
                hands.flexion[active, f] += turn
                held[active, f] = np.maximum(held[active, f], hit)
                touched[active, f] |= hit > 0
            open_joints = (np.arange(3) >= held[active][:, :, None]) & (
                hands.flexion[active] < FLEXION_LIMITS - 1e-6) & (part.rates > 0)
            active = active[open_joints.any(axis=(1, 2))]
            if not len(active):
                break
        return touched

    def _finger_step(self, vertices: np.ndarray, joints: np.ndarray, rates: np.ndarray, finger: int,
                     ) -> tuple[np.ndarray, np.ndarray]:
        """Time (B,) that finger may run at these joint rates (B, 3), and how many joints a contact now holds (B,)."""
        rows = self.moving[finger]
        skin = vertices[:, rows]
        follow = self.follow[rows, finger]  # (M, 3)
        distance = self.field.signed_distance(skin)
        speed = np.zeros(distance.shape, dtype=np.float32)
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
        step = np.where(hold > 0, 0.0, np.minimum(step, MAX_TURN / np.maximum(rates.max(axis=1), 1e-9)))
        return np.where(rates.max(axis=1) > 0, step, 0.0), np.where(rates.max(axis=1) > 0, hold, 0)
