"""What a grasp is: how well it holds, which of many are taken, and their cache on disk.  Paper: Sec. 3.2.

HandParams + object -> Grasp (measure_grasp) -> some good and different ones (choose_grasps).  The built-in search
(grasp_search.py) and GrabNet (grabnet.py) both end here, so the same acceptance holds for both.
"""

import hashlib
import io
import json
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.spatial.transform import Rotation

from hoi.common.files import read_npz, write_whole
from hoi.geometry.contact import DistanceField, closure_effort, crossing_edges, mesh_edges
from hoi.geometry.hand import JOINT_ROWS, PARAM_SIZES, HandModel, HandParams, rotation_matrices, stack_params
from hoi.geometry.objects import ObjectMesh

# The numbers below were chosen by trial.  What they do is counted over 3,072 tries of the built-in search, a quarter
# each on a mug, a bowl, a bottle and a can: 692 hands come to be measured, 252 of them are accepted.
MAX_PENETRATION_MM = 2.0  # flesh gives way as much.  Hands from the search never need it, those of GrabNet may
CONTACT_DISTANCE = 0.0025  # metres: skin nearer than this counts as touching (flesh gives way).  The search stops skin
# 0.8 to 1.1 mm before the surface; at a contact distance of 1.5 mm 194 are accepted
MAX_EFFORT = 20.0  # of closure_effort; above it a grasp holds on paper only (without a limit: 305, at 10: 214)
PATCH = 0.008  # metres: skin that touches in one cell of this size is one contact (4 mm: 279, 16 mm: 222)
NEAR = 0.006  # metres: skin measured exactly, all that the contact distance or the penetration can concern
POOL = 4  # accepted grasps to choose one from: mean score of eight chosen 1.56, 1.75, 1.86, 1.91 for 1, 2, 4, 8
SHARE_OF_KIND = 4  # one of so many chosen grasps is by thumb and one or two fingers, and one by a handle, if there are
LEAST_APART = 0.4  # of one object's grasps: 40 mm or 24 degrees, see choose_grasps
NUMBERS = ("penetration_mm", "crossing_edges", "force_closure", "score", "on_rod")  # fields kept as they are
CACHE_VERSION = 2  # raise it when the search changes, so that old caches are not taken for new results


@dataclass(frozen=True)
class Grasp:
    """A hand that holds an object, and how well.

    hand_params         right hand in the object's canonical frame
    penetration_mm      depth of the deepest skin point inside the object, 0 if none is
    crossing_edges      edges of the hand mesh that pass through the object's surface
    fingers_in_contact  thumb, index, middle, ring, little: skin within CONTACT_DISTANCE of the surface
    force_closure       the contacts resist any small push or twist (friction 0.6)
    score               higher is better: comfortable, well-distributed contacts
    on_rod              share of the contacts on a handle or grip, see contact.rod_parts
    """

    hand_params: HandParams
    penetration_mm: float
    crossing_edges: int
    fingers_in_contact: tuple[bool, ...]
    force_closure: bool
    score: float
    on_rod: float = 0.0

    @property
    def accepted(self) -> bool:
        """Thumb and another finger touch, it holds, and nothing goes into or through the object."""
        return not self.faults

    @property
    def faults(self) -> tuple[str, ...]:
        """Why it is not accepted, as ends of "the hand ..."; empty when it is."""
        tests = {
            f"goes more than {MAX_PENETRATION_MM:g} mm into the object": self.penetration_mm > MAX_PENETRATION_MM,
            "passes through the surface": self.crossing_edges > 0,
            "does not touch with the thumb": not self.fingers_in_contact[0],
            "touches with no finger but the thumb": not any(self.fingers_in_contact[1:]),
            "does not hold against every push": not self.force_closure,
        }
        return tuple(reason for reason, failed in tests.items() if failed)

    @property
    def few_fingers(self) -> bool:
        """Whether only thumb, index and middle finger touch."""
        return not any(self.fingers_in_contact[3:])

    @property
    def by_rod(self) -> bool:
        """Whether most contacts are on a handle or grip."""
        return self.on_rod > 0.5


def measure_grasp(hand_params: HandParams, hand: HandModel, field: DistanceField) -> Grasp:
    """Measure a right hand, in the object's frame, on the complete hand model.

    field    distance field of the object
    returns  Grasp with its penetration, crossings, contacts, force closure and score; all zero when it touches nothing
    """
    mesh = hand(hand_params)
    near = np.flatnonzero(np.abs(field.signed_distance(mesh.vertices)) < NEAR)
    if not len(near):
        return Grasp(hand_params, 0.0, 0, (False,) * 5, False, 0.0)
    distance, normals = field.exact(mesh.vertices[near])
    touching = distance < CONTACT_DISTANCE
    points, fingers = mesh.vertices[near][touching], hand.finger_of_vertex[near][touching]
    ranked = np.argsort(distance[touching], kind="stable")  # the nearest first, which stands for its patch
    cells = np.round(points[ranked] / PATCH).astype(int)
    one_per_patch = ranked[np.unique(cells, axis=0, return_index=True)[1]]
    effort = closure_effort(points[one_per_patch], normals[touching][one_per_patch])
    contact = tuple(bool((fingers == f).any()) for f in range(5))
    score = _score(hand_params, hand, contact, len(one_per_patch), effort)
    crossing = crossing_edges(mesh.vertices, mesh_edges(mesh.faces), field)
    tree, rods, _ = field.rods
    on_rod = float(rods[tree.query(points[one_per_patch])[1]].mean()) if len(one_per_patch) else 0.0
    depth = max(0.0, -1000 * float(distance.min()))
    return Grasp(hand_params, depth, crossing, contact, effort <= MAX_EFFORT, score, on_rod)


def _score(hand_params: HandParams, hand: HandModel, contact: tuple[bool, ...], patches: int, effort: float) -> float:
    """How good a grasp looks and holds; higher is better, 0 without force closure.

    The weights were chosen by trial.  Beside each stands what its term is in 1,122 accepted grasps of eight built-in
    objects (mean and standard deviation), and what the best of twelve loses when the term is left out.
    """
    if not np.isfinite(effort):
        return 0.0
    flexion = np.einsum("fki,fki->fk", hand_params.hand_pose.reshape(15, 3)[JOINT_ROWS], hand.flexion_axes[JOINT_ROWS])
    uneven = np.abs(np.diff(flexion[1:].sum(axis=1))).mean()  # neighbouring fingers of a relaxed hand bend alike
    rotation = Rotation.from_rotvec(hand_params.global_orient).as_matrix()
    return float(
        # 0.66 (0.19), so firmness decides most: without it the best has an effort of 6.9 instead of 2.9.  The root
        # keeps one extremely firm grasp from outweighing all else.
        1.5 / effort**0.5
        + 0.15 * sum(contact)  # 0.70 (0.09): a finger more is worth an effort of 3.5 instead of 5.2, the median
        # 0.39 (0.10): contacts spread over the skin.  From 25 on, a quarter of the grasps, the hand lies on enough.
        + 0.02 * min(patches, 25)
        - 0.4 * uneven  # -0.11 (0.09): 15 degrees between neighbours instead of 12
        # -0.01 (0.03) and -0.04 (0.05): a thumb below the palm, a forearm that comes from below; arm_can_reach has cut
        # off the worst, so what is left is a matter of taste.
        - 0.3 * max(0.0, -rotation[2, 2]) - 0.3 * max(0.0, -rotation[2, 0])
    )  # fmt: skip


def choose_grasps(found: list[Grasp], hand: HandModel, count: int) -> list[Grasp]:
    """Best grasp first, then always the one that is best after adding its difference from those chosen (0 to 1).

    found    accepted grasps of one object
    count    at most so many come back; fewer when the others are nearly the same (LEAST_APART)
    Difference is a distance between 18 numbers: where the wrist is, which way the hand's x and y point, and the same
    once more after turning the object until the hand is at azimuth 0, since a can held from another side looks alike;
    and five more for the fingers that touch.
    """
    if len(found) <= 1:
        return found[:count]
    rotation = Rotation.from_rotvec([grasp.hand_params.global_orient for grasp in found]).as_matrix()
    _, joints, _ = hand.pose_batch(**stack_params([grasp.hand_params for grasp in found]))
    # 0.1 m apart counts as much as an axis turned by 60 degrees (both give 1).
    place = joints[:, 0] / 0.1
    turn = rotation_matrices(-np.arctan2(place[:, 1], place[:, 0])[:, None] * np.array([0.0, 0.0, 1.0]))
    turned = turn @ np.concatenate([place[:, :, None], rotation[:, :, :2]], axis=2)
    touching = np.array([grasp.fingers_in_contact for grasp in found])
    # 0.7 = sqrt(1/2): each half counts half of the squared distance.
    feature = 0.7 * np.concatenate([place, rotation[:, :, 0], rotation[:, :, 1], turned.reshape(-1, 9),
                                    0.15 * touching], axis=1)  # fmt: skip
    score = np.array([grasp.score for grasp in found])
    few, on_rod = np.array([(grasp.few_fingers, grasp.by_rod) for grasp in found]).T
    kinds = {1: few, 2: on_rod, 5: few & ~touching[:, 2], 6: on_rod}  # by place; the sixth by thumb and index alone
    chosen, far = [int(score.argmax())], np.full(len(found), np.inf)
    while len(chosen) < count:
        far = np.minimum(far, np.linalg.norm(feature - feature[chosen[-1]], axis=1))
        left = far >= LEAST_APART
        if not left.any():
            break
        kind = left & kinds.get(len(chosen) % (2 * SHARE_OF_KIND), left)
        # Beyond 2 a hand is simply elsewhere.  Four of sixteen grasps are then 90 mm apart on average (mean of their
        # joints) at a mean score of 1.83; by score alone 81 mm at 1.88.
        value = np.where(kind if kind.any() else left, score + np.minimum(far, 2.0) / 2.0, -np.inf)
        chosen.append(int(value.argmax()))
    return [found[i] for i in chosen]


def cached_search(
    search: Callable[[np.random.Generator], tuple[list[Grasp], str]], object_mesh: ObjectMesh, hand: HandModel,
    count: int, seed: int, cache_dir: str | Path, method: str = "",
) -> tuple[list[Grasp], str]:
    """The result of a search, from the cache folder if this search was made before.

    search   generator seeded with `seed` -> grasps and a sentence on how it went
    method   names the kind of search with everything else that it depends on (weight files); "" is find_grasps
    A file's name holds a hash of everything that the result depends on.  One that cannot be read is searched anew and
    replaced; any number of processes may share the folder (files appear whole).
    """
    digest = hashlib.sha256()
    for part in (object_mesh.vertices, object_mesh.faces, hand.weights, hand.faces("right"), hand.flexion_axes):
        digest.update(np.ascontiguousarray(part).tobytes())
    rest = hand(HandParams(np.zeros(3), np.zeros(45), np.zeros(3), np.zeros(10))).vertices
    digest.update(np.round(rest, 7).tobytes())  # 0.1 um: float32's last digits differ between processors
    key = [CACHE_VERSION, hand.name, object_mesh.category, count, seed] + ([method] if method else [])
    digest.update(json.dumps(key).encode())
    name = re.sub(r"[^\w.-]", "_", object_mesh.object_id)
    path = Path(cache_dir) / f"{name}_{digest.hexdigest()[:20]}.npz"
    found = _read_cache(path)
    if found is None:
        found = search(np.random.default_rng(seed))
        try:
            _write_cache(path, *found)
        except OSError as error:  # a cache only saves time
            why = f"{path.parent} cannot be written to ({error.strerror or error}); choose another folder with --cache"
            warnings.warn(f"found grasps are not kept for the next time: {why}", RuntimeWarning, stacklevel=2)
    return found


def _write_cache(path: Path, grasps: list[Grasp], note: str) -> None:
    """One .npz: a column for each field of the grasps and of their hands, and the note; N may be 0."""
    columns = stack_params([grasp.hand_params for grasp in grasps])
    columns |= {name: np.array([getattr(grasp, name) for grasp in grasps]) for name in NUMBERS}
    columns["fingers_in_contact"] = np.array([g.fingers_in_contact for g in grasps], dtype=bool).reshape(-1, 5)
    columns["note"] = np.array(note)
    stream = io.BytesIO()
    np.savez_compressed(stream, **columns)
    write_whole(path, stream.getvalue())


def _read_cache(path: Path) -> tuple[list[Grasp], str] | None:
    """What _write_cache wrote; None when there is no such file or it cannot be read."""
    if not path.exists():
        return None
    try:
        c = read_npz(path, "cache of grasps", words=["note"])
        poses = [HandParams(*row) for row in zip(*(c[name] for name in PARAM_SIZES), strict=True)]
        grasps = [Grasp(pose, fingers_in_contact=tuple(c["fingers_in_contact"][i].tolist()),
                        **{name: c[name][i].item() for name in NUMBERS}) for i, pose in enumerate(poses)]
        return grasps, str(c["note"])
    except (ValueError, LookupError, TypeError):  # numbers of other shapes than were written
        return None
