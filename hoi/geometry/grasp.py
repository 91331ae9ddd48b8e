"""Stable, natural grasps without learned weights.  Object mesh + hand -> list[Grasp].  Paper: Sec. 3.2 (for GrabNet).

Many tries at once: draw a wrist pose that an arm could reach, move in until something touches, close the fingers, then
measure on the complete hand model and keep what holds.  Among the accepted ones, good and different ones are chosen.
"""

import hashlib
import io
import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.spatial.transform import Rotation

from hoi.common.files import read_npz, write_whole
from hoi.geometry.contact import DistanceField, closure_effort, crossing_edges, mesh_edges
from hoi.geometry.hand import JOINT_ROWS, PARAM_SIZES, HandModel, HandParams, rotation_matrices, stack_params
from hoi.geometry.objects import ObjectMesh

MAX_PENETRATION_MM = 2.0
CONTACT_DISTANCE = 0.0025  # metres: skin nearer than this counts as touching (flesh gives way)
MAX_EFFORT = 20.0  # of closure_effort; above it a grasp holds on paper only
POOL = 4  # accepted grasps to choose one from
CACHE_VERSION = 1  # raise it when the search changes, so that old caches are not taken for new results


@dataclass(frozen=True)
class Grasp:
    """A hand that holds an object, and how well.

    hand_params         right hand in the object's canonical frame
    penetration_mm      depth of the deepest skin point inside the object, 0 if none is
    crossing_edges      edges of the hand mesh that pass through the object's surface
    fingers_in_contact  thumb, index, middle, ring, little: skin within CONTACT_DISTANCE of the surface
    force_closure       the contacts resist any small push or twist (friction 0.6)
    score               higher is better: comfortable, well-distributed contacts
    """

    hand_params: HandParams
    penetration_mm: float
    crossing_edges: int
    fingers_in_contact: tuple[bool, ...]
    force_closure: bool
    score: float

    @property
    def accepted(self) -> bool:
        """Thumb and two fingers touch, it holds, and nothing goes into or through the object."""
        return not self.faults

    @property
    def faults(self) -> tuple[str, ...]:
        """Why it is not accepted, as ends of "the hand ..."; empty when it is."""
        tests = {
            f"goes more than {MAX_PENETRATION_MM:g} mm into the object": self.penetration_mm > MAX_PENETRATION_MM,
            "passes through the surface": self.crossing_edges > 0,
            "does not touch with the thumb": not self.fingers_in_contact[0],
            "touches with fewer than two fingers": sum(self.fingers_in_contact[1:]) < 2,
            "does not hold against every push": not self.force_closure,
        }
        return tuple(reason for reason, failed in tests.items() if failed)


def measure_grasp(hand_params: HandParams, hand: HandModel, field: DistanceField) -> Grasp:
    """Measure a grasp on the complete hand model: penetration, crossings, contacts, force closure, score."""
    mesh = hand(hand_params)
    near = np.flatnonzero(np.abs(field.signed_distance(mesh.vertices)) < 0.006)
    if not len(near):
        return Grasp(hand_params, 0.0, 0, (False,) * 5, False, 0.0)
    distance, normals = field.exact(mesh.vertices[near])
    touching = distance < CONTACT_DISTANCE
    points, fingers = mesh.vertices[near][touching], hand.finger_of_vertex[near][touching]
    one_per_patch = _first_of_each(np.round(points / 0.008).astype(int), distance[touching])
    effort = closure_effort(points[one_per_patch], normals[touching][one_per_patch])
    contact = tuple(bool((fingers == f).any()) for f in range(5))
    score = _score(hand_params, hand, contact, len(one_per_patch), effort)
    crossing = crossing_edges(mesh.vertices, mesh_edges(mesh.faces), field)
    return Grasp(hand_params, max(0.0, -1000 * float(distance.min())), crossing, contact, effort <= MAX_EFFORT, score)


def _first_of_each(keys: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Index of the smallest `order` for each distinct row of keys (N, K)."""
    ranked = np.argsort(order, kind="stable")
    return ranked[np.unique(keys[ranked], axis=0, return_index=True)[1]]


def _score(hand_params: HandParams, hand: HandModel, contact: tuple[bool, ...], patches: int, effort: float) -> float:
    if not np.isfinite(effort):
        return 0.0
    flexion = np.einsum("fki,fki->fk", hand_params.hand_pose.reshape(15, 3)[JOINT_ROWS], hand.flexion_axes[JOINT_ROWS])
    uneven = np.abs(np.diff(flexion[1:].sum(axis=1))).mean()  # neighbouring fingers of a relaxed hand bend alike
    rotation = Rotation.from_rotvec(hand_params.global_orient).as_matrix()
    return float(1.5 / effort ** 0.5 + 0.15 * sum(contact) + 0.02 * min(patches, 25) - 0.4 * uneven
                 - 0.3 * max(0.0, -rotation[2, 2]) - 0.3 * max(0.0, -rotation[2, 0]))


def choose_grasps(found: list[Grasp], hand: HandModel, count: int) -> list[Grasp]:
    """Best grasp first, then always the one that is best after adding its distance from those chosen (0 to 1)."""
    if len(found) <= 1:
        return found[:count]
    rotation = Rotation.from_rotvec([grasp.hand_params.global_orient for grasp in found]).as_matrix()
    _, joints, _ = hand.pose_batch(**stack_params([grasp.hand_params for grasp in found]))
    place = joints[:, 0] / 0.1
    # Half by where the hand is, half by how it would look if the object were turned until the hand is at azimuth 0.
    turn = rotation_matrices(-np.arctan2(place[:, 1], place[:, 0])[:, None] * np.array([0.0, 0.0, 1.0]))
    turned = turn @ np.concatenate([place[:, :, None], rotation[:, :, :2]], axis=2)
    feature = 0.7 * np.concatenate([place, rotation[:, :, 0], rotation[:, :, 1], turned.reshape(-1, 9)], axis=1)
    score = np.array([grasp.score for grasp in found])
    chosen, far = [int(score.argmax())], np.full(len(found), np.inf)
    while len(chosen) < min(count, len(found)):
        far = np.minimum(far, np.linalg.norm(feature - feature[chosen[-1]], axis=1))
        value = score + np.minimum(far, 2.0) / 2.0
        value[chosen] = -np.inf
        chosen.append(int(value.argmax()))
    return [found[i] for i in chosen]


def default_cache() -> Path:
    """Where found grasps are kept unless the user says otherwise."""
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "hoidiffusion" / "grasps"


def cached_search(search: Callable[[np.random.Generator], tuple[list[Grasp], str]], object_mesh: ObjectMesh,
               hand: HandModel, count: int, seed: int, cache_dir: str | Path, method: str = "",
               ) -> tuple[list[Grasp], str]:
    """The result of a search, from the cache folder if this search was made before.

    search   generator seeded with `seed` -> grasps and a sentence on how it went
    method   names the kind of search with everything else that it depends on (weight files); "" is find_grasps
    """
    digest = hashlib.sha256()
    for part in (object_mesh.vertices, object_mesh.faces, hand.weights, hand.faces("right"), hand.flexion_axes):
        digest.update(np.ascontiguousarray(part).tobytes())
    rest = hand(HandParams(np.zeros(3), np.zeros(45), np.zeros(3), np.zeros(10))).vertices
    digest.update(np.round(rest, 7).tobytes())
    key = [CACHE_VERSION, hand.name, object_mesh.category, count, seed] + ([method] if method else [])
    digest.update(json.dumps(key).encode())
    name = re.sub(r"[^\w.-]", "_", object_mesh.object_id)
    path = Path(cache_dir) / f"{name}_{digest.hexdigest()[:20]}.npz"
    found = _read_cache(path)
    if found is None:
        found = search(np.random.default_rng(seed))
        _write_cache(path, *found)
    return found


def _write_cache(path: Path, grasps: list[Grasp], note: str) -> None:
    columns = stack_params([grasp.hand_params for grasp in grasps])
    columns |= {name: np.array([getattr(grasp, name) for grasp in grasps])
                for name in ("penetration_mm", "crossing_edges", "force_closure", "score")}
    columns["fingers_in_contact"] = np.array([g.fingers_in_contact for g in grasps], dtype=bool).reshape(-1, 5)
    columns["note"] = np.array(note)
    stream = io.BytesIO()
    np.savez_compressed(stream, **columns)
    write_whole(path, stream.getvalue())


def _read_cache(path: Path) -> tuple[list[Grasp], str] | None:
    if not path.exists():
        return None
    try:
        c = read_npz(path, "cache of grasps")
        poses = [HandParams(*row) for row in zip(*(c[name] for name in PARAM_SIZES), strict=True)]
        grasps = [Grasp(pose, float(c["penetration_mm"][i]), int(c["crossing_edges"][i]),
                        tuple(bool(x) for x in c["fingers_in_contact"][i]), bool(c["force_closure"][i]),
                        float(c["score"][i])) for i, pose in enumerate(poses)]
        return grasps, str(c.get("note", ""))
    except (ValueError, KeyError, IndexError):
        return None
