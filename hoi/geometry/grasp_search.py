"""Grasps without learned weights.  Object mesh + hand -> list[Grasp].  Stands in for GrabNet (paper Sec. 3.2)."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from scipy.spatial.transform import Rotation

from hoi.geometry.closing import Closer, Hands
from hoi.geometry.contact import DistanceField
from hoi.geometry.grasp import CONTACT_DISTANCE, POOL, Grasp, choose_grasps, measure_grasp, remembered
from hoi.geometry.hand import FINGER_JOINTS, HandModel, HandPose
from hoi.geometry.objects import ObjectMesh
from hoi.geometry.placing import START_DISTANCE, forearm_free, open_hands, place_hands, reachable, too_wide

TRIES_PER_ROUND = 64


def reach_faults(hand_pose: HandPose, hand: HandModel, field: DistanceField, table: float) -> tuple[str, ...]:
    """What an arm above the table could not do; what the built-in search never proposes.

    table    metres, height of the surface that the object stands on
    returns  reasons as in Grasp.faults, empty when there are none
    """
    mesh = hand(hand_pose)
    rotation = Rotation.from_rotvec(hand_pose.global_orient).as_matrix()[None]
    none = np.zeros((1, 5, 3))
    at_grasp = Hands(mesh.vertices[None], mesh.joints[None], rotation, mesh.joints[:1], hand_pose.hand_pose.reshape(
        1, 15, 3), none, none, hand_pose.hand_betas[None], mesh.joints[:1] - hand_pose.transl)
    tests = {
        "comes from where no arm can": not reachable(at_grasp, table)[0],
        "goes below the table": mesh.vertices[:, 2].min() <= table,
        "has its forearm in the object": not forearm_free(at_grasp, field)[0],
        "has its thumb in another finger": _fingers_collide(mesh.joints[None])[0],
    }
    return tuple(reason for reason, failed in tests.items() if failed)


def _try_grasps(object_mesh: ObjectMesh, hand: HandModel, closer: Closer, generator: np.random.Generator,
                pinch_share: float) -> list[Grasp]:
    """One round: draw, filter, move in, close, measure.  Returns the accepted grasps."""
    hands = open_hands(hand, 4 * TRIES_PER_ROUND, generator)
    pinch = generator.random(4 * TRIES_PER_ROUND) < pinch_share
    approach, limit = place_hands(hands, closer, pinch, generator)
    table = object_mesh.vertices[:, 2].min()
    at_target = hands.take(np.arange(len(pinch)))
    at_target.wrist = at_target.wrist + START_DISTANCE * approach
    keep = np.flatnonzero(reachable(at_target, table))[:TRIES_PER_ROUND]
    hands, approach, limit = hands.take(keep), approach[keep], limit[keep]
    if not len(keep):
        return []
    travelled = closer.advance(hands, approach, limit)
    vertices, _ = closer.pose(hands)
    free = (closer.field.signed_distance(vertices).min(axis=1) > 0) & reachable(hands, table)
    free &= (vertices[..., 2].min(axis=1) > table) & forearm_free(hands, closer.field)
    keep = np.flatnonzero(free & ((travelled < limit - 1e-6) | pinch[keep]))
    hands = hands.take(keep)
    if not len(keep):
        return []
    touched = closer.close(hands)
    _relax_idle_fingers(hands, touched)
    vertices, joints = closer.pose(hands)
    good = touched[:, 0] & (touched[:, 1:].sum(axis=1) >= 2) & (vertices[..., 2].min(axis=1) > table)
    good &= ~_fingers_collide(joints)
    measured = [measure_grasp(hand_pose, hand, closer.field)
                for hand_pose in _hand_poses(hands.take(np.flatnonzero(good)), closer)]
    return [grasp for grasp in measured if grasp.accepted]


def _relax_idle_fingers(hands: Hands, touched: np.ndarray) -> None:
    """A finger that met nothing follows the mean of those that did, instead of making a fist beside the object.

    It only opens again; should it touch something on the way, the measures that follow will tell.
    """
    bend = hands.flexion[:, 1:].sum(axis=2)
    weight = touched[:, 1:].astype(float)
    mean = (bend * weight).sum(axis=1) / np.maximum(weight.sum(axis=1), 1)
    share = np.minimum(1, mean[:, None] / np.maximum(bend, 1e-6))
    hands.flexion[:, 1:] *= np.where(touched[:, 1:], 1, share)[..., None]


def _fingers_collide(joints: np.ndarray) -> np.ndarray:
    """(B,) bool: the thumb is inside another finger.  joints (B, 16, 3)."""
    def points(chain: Sequence[int]) -> np.ndarray:
        ends = joints[:, list(chain)]
        tip = ends[:, 2] + 0.5 * (ends[:, 2] - ends[:, 1])
        ends = np.concatenate([ends, tip[:, None]], axis=1)
        share = np.linspace(0, 1, 5)[:, None]
        return np.concatenate([ends[:, k:k + 1] * (1 - share) + ends[:, k + 1:k + 2] * share for k in range(3)], axis=1)
    thumb = points(FINGER_JOINTS[0])[:, 5:]
    others = np.concatenate([points(chain) for chain in FINGER_JOINTS[1:]], axis=1)
    gap = np.linalg.norm(thumb[:, :, None] - others[:, None], axis=3).min(axis=(1, 2))
    return gap < 0.013


def _hand_poses(hands: Hands, closer: Closer) -> list[HandPose]:
    """The same in the hand model's parameters: its translation moves the hand from where the wrist is at rest."""
    global_orient = Rotation.from_matrix(hands.rotation).as_rotvec() if len(hands.wrist) else []
    return [HandPose(*row) for row in zip(global_orient, closer.hand_pose(hands).reshape(-1, 45),
                                          hands.wrist - hands.rest_wrist, hands.hand_betas, strict=True)]


def find_grasps(object_mesh: ObjectMesh, hand: HandModel, count: int, generator: np.random.Generator,
                max_tries: int = 6400, field: DistanceField | None = None) -> list[Grasp]:
    """Search until there is enough to choose from, then choose good and different grasps.

    count      grasps wanted
    max_tries  hands moved in at most; fewer grasps than count come back when they are used up
    field      distance field of object_mesh, if there is one already
    returns    accepted grasps (see Grasp.accepted), best first, then for variety
    Raises ValueError for a count below 1.
    What is too wide for any hand (placing.too_wide) is not searched.
    A hard object ends the search early: after a quarter of max_tries, count grasps are enough.
    """
    if count < 1:
        raise ValueError(f"count is {count}, expected at least 1 grasp")
    field = field or DistanceField(object_mesh.vertices, object_mesh.faces)
    if too_wide(field, CONTACT_DISTANCE):
        return []
    closer = Closer(hand, field)
    pinch_share = 0.9 if object_mesh.category == "bowl" else 0.25
    found: list[Grasp] = []
    for tries in range(TRIES_PER_ROUND, max(max_tries, TRIES_PER_ROUND) + 1, TRIES_PER_ROUND):
        found += _try_grasps(object_mesh, hand, closer, generator, pinch_share)
        if len(found) >= (POOL * count if tries < max_tries / 4 else count):
            break
    return choose_grasps(found, hand, count)


def cached_grasps(object_mesh: ObjectMesh, hand: HandModel, count: int, seed: int, cache_dir: str | Path,
                  ) -> list[Grasp]:
    """find_grasps with a memory: the same mesh, hand, count and seed give the same grasps, searched once.

    cache_dir  folder, made if missing; any number of processes may share it (files appear whole, by renaming)
    A file that cannot be read is searched anew and replaced.
    """
    def search(generator: np.random.Generator) -> tuple[list[Grasp], str]:
        return find_grasps(object_mesh, hand, count, generator), ""
    return remembered(search, object_mesh, hand, count, seed, cache_dir)[0]
