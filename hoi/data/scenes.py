"""Scenes that people bring: a file of JSON lines -> the same Scenes that are otherwise composed at random.

One object a line; docs/data.md says what its keys mean, and what is left out is chosen as everywhere.  Users speak in
a world of their own (metres), which is the mesh file's own frame unless object_to_world says otherwise.  Inside, grasps
are searched in the canonical frame, z up and the box centred; `to_canonical` leads there, and what is written is in the
mesh's own frame again.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from scipy.spatial.transform import Rotation

from hoi.common.arrays import numbers
from hoi.common.choices import CATEGORIES
from hoi.common.files import parse_json, read_json
from hoi.data.writer import BUILT_IN
from hoi.geometry.camera import OPENGL_TO_OPENCV, Camera, arm_direction, project, transform_points
from hoi.geometry.contact import DistanceField
from hoi.geometry.grasp import POOL, Grasp, measure_grasp
from hoi.geometry.grasp_search import FOREARM
from hoi.geometry.hand import HandMesh, HandModel, HandParams, hand_in_camera, mirrored_hand, pca_to_hand_pose
from hoi.geometry.hand_fit import JOINT_ORDERS, fit_fault, fit_joints, joints_fault
from hoi.geometry.mano import MIRROR, read_pca
from hoi.geometry.objects import ObjectMesh, collect_objects, with_distinct_ids
from hoi.geometry.raster import Recent
from hoi.geometry.render import Renderer
from hoi.geometry.scene import (
    GraspedObject,
    Scene,
    ViewSettings,
    compose_scene,
    frame_poses,
    grasp_object,
    mirror_mesh,
    noun,
)
from hoi.geometry.trajectory import UP

ANY, MATRIX, POINT = None, (4, 4), (3,)
# What each part of a line may have, and the shape of its numbers.
LINE_KEYS = {
    "object": ANY, "units": ANY, "up": ANY, "category": ANY, "object_to_world": MATRIX, "camera": ANY, "hand": ANY,
    "trajectory": ANY, "grasps": ANY, "start": ANY, "support": ANY,
}  # fmt: skip
CAMERA_KEYS = {
    "intrinsics": ANY, "width": (), "height": (), "world_to_camera": MATRIX, "object_to_camera": MATRIX,
    "convention": ANY, "cropped": ANY,
}  # fmt: skip
LENS_KEYS = {"fx": (), "fy": (), "cx": (), "cy": ()}
JOINTS_KEYS = {"joints": (21, 3), "order": ANY, "side": ANY, "frame": ANY}
MANO_KEYS = {
    "global_orient": POINT, "transl": POINT, "hand_pose": (45,), "pca": ANY, "flat_hand_mean": ANY, "betas": (10,),
    "side": ANY, "frame": ANY,
}  # fmt: skip
SUPPORT_KEYS = {"point": POINT, "normal": POINT}
RIGID = 1e-3  # how far a rotation's columns may be from unit length and right angles: numbers are often rounded
CENTRAL = 0.2  # of a side: principal points farther from the middle are another size's (half or double: 0.25 or more)
UNDER = 0.002  # metres that a mesh may reach below the support: scans are not exact
LEAST_PIXELS = 4  # that an object covers at least, in width or height
FLOAT_STEP = 1e-5  # metres: as coarse as stored vertices (float32) may be, 0.01 mm


def part(value: Any, known: Mapping[str, tuple | None], needed: Iterable[str], where: str) -> dict[str, Any]:
    """A JSON object without its nulls, numbers as arrays.

    known   keys that it may have, and the shapes of their numbers (row after row will do); ANY: as it is
    Raises ValueError naming keys that are unknown, missing or of another shape.
    """
    if not isinstance(value, dict):
        raise ValueError(f"{where} is {value!r:.40}, expected an object with {', '.join(known)}")
    if unknown := [key for key in value if key not in known]:
        raise ValueError(f"{where} has unknown keys {', '.join(unknown)}; it may have {', '.join(known)}")
    if missing := [key for key in needed if value.get(key) is None]:
        raise ValueError(f"{where} has no {', '.join(missing)}")
    found = {key: given for key, given in value.items() if given is not None}
    for key in found.keys() & {key for key, shape in known.items() if shape is not ANY}:
        flat = isinstance(found[key], list) and len(found[key]) == np.prod(known[key])
        array = numbers(found[key], (len(found[key]),) if flat else known[key], f"{where} {key}")
        found[key] = array.reshape(known[key])
    return found


def chosen(value: Any, choices: Iterable[str], where: str) -> str:
    """The value, one of the choices.  Raises ValueError for another."""
    if value not in tuple(choices):
        raise ValueError(f"{where} is {value!r}, expected one of {', '.join(choices)}")
    return value


def rigid(matrix: np.ndarray, where: str) -> np.ndarray:
    """A matrix (4, 4) that turns and moves, its rotation made exact.

    Raises ValueError, saying what is wrong, for one that mirrors, scales or shears.
    """
    rotation = matrix[:3, :3]
    scale = np.cbrt(abs(np.linalg.det(rotation)))
    faults = {
        f"has the last row {matrix[3].tolist()}, expected 0 0 0 1 (row after row)":
            np.abs(matrix[3] - [0, 0, 0, 1]).max() > RIGID,
        f"scales by {scale:.4g}, expected a rotation: the mesh's unit is said by units": abs(scale - 1) > RIGID,
        "has a rotation whose rows are not at right angles":
            np.abs(rotation @ rotation.T - np.eye(3)).max() > 2 * RIGID,
        "is left-handed (its determinant is -1): one axis has the wrong sign": np.linalg.det(rotation) < 0,
    }  # fmt: skip
    if fault := next((words for words, holds in faults.items() if holds), None):
        raise ValueError(f"{where} {fault}")
    matrix[:3, :3] = Rotation.from_matrix(rotation).as_matrix()
    return matrix


def read_camera(value: Any, object_to_world: np.ndarray, where: str) -> tuple[np.ndarray, int, int, np.ndarray | None]:
    """Intrinsics (3, 3), height, width, and world_to_camera (4, 4) in OpenCV axes or None where the view is ours.

    Raises ValueError for what no pinhole camera can have.
    """
    given = part(value, CAMERA_KEYS, ("intrinsics", "width", "height"), where)
    height, width, k = float(given["height"]), float(given["width"]), given["intrinsics"]
    if not (height >= 1 and width >= 1 and height.is_integer() and width.is_integer()):
        raise ValueError(f"{where} is {width:g} x {height:g}, expected whole pixels")
    if isinstance(k, dict):
        lens = part(k, LENS_KEYS, LENS_KEYS, f"{where} intrinsics")
        k = [[lens["fx"], 0, lens["cx"]], [0, lens["fy"], lens["cy"]], [0, 0, 1]]
    k = part({"intrinsics": k}, {"intrinsics": (3, 3)}, (), where)["intrinsics"]
    if k[0, 0] <= 0 or k[1, 1] <= 0 or np.abs(k[[0, 1, 2, 2, 2], [1, 0, 0, 1, 2]] - [0, 0, 0, 0, 1]).max() > 1e-9:
        raise ValueError(f"{where} intrinsics are {k.tolist()}, expected [[fx, 0, cx], [0, fy, cy], [0, 0, 1]]")
    if np.abs(k[:2, 2] / [width, height] - 0.5).max() > CENTRAL and given.get("cropped") is not True:
        raise ValueError(
            f"{where} intrinsics have the principal point ({k[0, 2]:g}, {k[1, 2]:g}), far from the middle of {width:g} "
            f'x {height:g}: they are those of pictures of another size; of cut pictures say "cropped": true'
        )
    axes = chosen(given.get("convention", "opencv"), ("opencv", "opengl"), f"{where} convention")
    poses = [key for key in ("world_to_camera", "object_to_camera") if key in given]
    if len(poses) > 1:
        raise ValueError(f"{where} has world_to_camera and object_to_camera; give one")
    pose = None
    if poses:
        pose = (OPENGL_TO_OPENCV if axes == "opengl" else np.eye(4)) @ rigid(given[poses[0]], f"{where} {poses[0]}")
        pose = pose if poses[0] == "world_to_camera" else pose @ np.linalg.inv(object_to_world)
    return k, int(height), int(width), pose


def read_hand(value: Any, where: str, hand: HandModel, posed: bool) -> dict[str, Any]:
    """A checked hand: keys, sizes, unit and order.

    posed  whether the camera has a pose, so that the hand may be in its frame
    """
    with_joints = isinstance(value, dict) and "joints" in value
    keys, needed = (JOINTS_KEYS, ("joints", "order")) if with_joints else (MANO_KEYS, ("global_orient", "transl"))
    given = part(value, keys, needed, where)
    chosen(given.get("side"), ("right", "left"), f"{where} side")
    if chosen(given.get("frame", "world"), ("world", "object", "camera"), f"{where} frame") == "camera" and not posed:
        raise ValueError(f"{where} is in the camera's frame, but the line's camera has no pose")
    if with_joints:
        order = chosen(given["order"], JOINT_ORDERS, f"{where} order")
        if fault := joints_fault(given["joints"], order, hand):
            raise ValueError(f"{where} joints {fault}")
        return given
    if ("hand_pose" in given) == ("pca" in given):
        raise ValueError(f"{where} needs hand_pose (45 radians) or pca (coefficients), one of them")
    if "pca" in given:
        given["pca"] = numbers(given["pca"], (min(np.size(given["pca"]) or 1, 45),), f"{where} pca")
    if given.setdefault("flat_hand_mean", None if "pca" in given else True) not in (True, False):
        raise ValueError(f"{where} needs flat_hand_mean, true or false: whether MANO's mean pose is left out")
    if hand.name != "mano" and ("pca" in given or not given["flat_hand_mean"] or np.any(given.get("betas", 0))):
        raise ValueError(f"{where} has pca, a mean pose or betas, which only MANO's own file explains: pass --mano")
    return given


@dataclass(frozen=True)
class Line:
    """One line, checked: the mesh is turned so that a support is level, lengths are metres.

    to_canonical     (4, 4) world -> frame of the mesh           object_to_world (4, 4)
    camera           as of read_camera, or None                  support  point (3,) and unit normal (3,), world
    hands            as of read_hand, the grasp last; empty: `grasps` are searched
    is_path          whether the hands are a trajectory          start  a hand, a wrist (3,) in the world, or None
    """

    where: str
    mesh: ObjectMesh
    to_canonical: np.ndarray
    object_to_world: np.ndarray
    camera: tuple[np.ndarray, int, int, np.ndarray | None] | None
    support: tuple[np.ndarray, np.ndarray] | None
    hands: list[dict[str, Any]]
    is_path: bool
    start: dict[str, Any] | np.ndarray | None
    grasps: int

    @property
    def world_to_camera(self) -> np.ndarray | None:
        """(4, 4), where it is given."""
        return None if self.camera is None else self.camera[3]

    @property
    def support_height(self) -> float | None:
        """Of the support, along z of the canonical frame, where it is level; metres."""
        return None if self.support is None else float(transform_points(self.to_canonical, self.support[0])[2])

    def below_mm(self, mesh: HandMesh) -> float | None:
        """How deep the deepest of skin and forearm lies below the support, 0 when none does; None without one.

        mesh  in the canonical frame
        """
        if self.support is None:
            return None
        elbow = mesh.keypoints_3d[:1] + FOREARM * arm_direction(mesh.keypoints_3d)
        points = transform_points(np.linalg.inv(self.to_canonical), np.concatenate([mesh.vertices, elbow]))
        return round(1000 * max(0.0, -float(((points - self.support[0]) @ self.support[1]).min())), 3)


class SceneFile:
    """The scenes of a file: line after line, a line without a hand once for each of its `grasps`.

    Lines are read again when a scene is asked for, so a file of any length takes little memory, and scene k depends on
    its line, the settings and k alone.

    path    of the file
    lines   (N,) the line of each scene, from 1 on        frames  (N,) of each scene
    sizes   height and width of each scene, pixels        nouns   what a prompt calls its object
    meshes  as they are written, in their own frames, metres
    """

    def __init__(
        self, path: str | Path, hand: HandModel, view: ViewSettings, seed: int, cache: str | Path,
        camera: str | Path | None = None, mano_path: str | Path | None = None,
    ) -> None:  # fmt: skip
        """Read and check every line, and load every mesh.

        hand    in which joints must make sense       view  what holds where a line says nothing
        camera  a file that holds one for all lines without their own      mano_path  for poses given as PCA
        Raises ValueError naming file, line and key of the first fault; FileNotFoundError.
        """
        self.path, self.view, self.seed, self.cache, self.mano_path = Path(path), view, seed, cache, mano_path
        self.camera = None if camera is None else read_json(camera, "camera")
        if not self.path.is_file():
            raise FileNotFoundError(f"no scenes file at {path}: expected JSON objects, one a line (docs/data.md)")
        self._meshes: dict[tuple, ObjectMesh] = {}  # canonical, by what a line says of them
        self._offsets, self.sizes, self.nouns, lines, frames, offset = [], [], [], [], [], 0
        with open(self.path, "rb") as stream:
            for number, text in enumerate(stream, start=1):
                if text.strip():
                    line = self._read(text, number, hand)
                    count = 1 if line.hands else line.grasps
                    lines += [number] * count
                    frames += [len(line.hands) if line.is_path else view.frames] * count
                    self.sizes += [line.camera[1:3] if line.camera else (view.height, view.width)] * count
                    self.nouns += [noun(line.mesh)] * count
                self._offsets.append(offset)
                offset += len(text)
        if not lines:
            raise ValueError(f"{path} holds no scene")
        self.lines, self.frames, self._ends = np.array(lines), np.array(frames), np.cumsum(frames)
        self._meshes = dict(zip(self._meshes, with_distinct_ids(self._meshes.values()), strict=True))
        self.meshes = [own_mesh(mesh) for mesh in self._meshes.values()]

    def __len__(self) -> int:
        return len(self.lines)

    def frame_range(self, number: int) -> range:
        """Numbers of a scene's frames among those of all scenes."""
        return range(int(self._ends[number] - self.frames[number]), int(self._ends[number]))

    def line(self, number: int, hand: HandModel) -> Line:
        """The line of a scene."""
        line = int(self.lines[number])
        with open(self.path, "rb") as stream:
            stream.seek(self._offsets[line - 1])
            return self._read(stream.readline(), line, hand)

    @cached_property
    def fields(self) -> Recent:
        """Distance fields of the last few meshes, by their vertices and faces."""
        return Recent(DistanceField, 16)

    def _read(self, text: bytes, number: int, hand: HandModel) -> Line:
        """A line, every key checked, without the costly steps."""
        where = f"{self.path} line {number}"
        try:
            given = parse_json(text.decode())
        except ValueError as error:
            raise ValueError(f"{where} is not JSON ({error})") from error
        given = part(given, LINE_KEYS, ("object",), where)
        sources = [key for key in ("hand", "trajectory", "grasps") if key in given]
        if len(sources) > 1:
            raise ValueError(f"{where} has {' and '.join(sources)}; give one of hand, trajectory, grasps")
        mesh = self._mesh(given, where)
        world = rigid(given.get("object_to_world", np.eye(4)), f"{where} object_to_world")
        camera = given.get("camera", self.camera)
        camera = None if camera is None else read_camera(camera, world, f"{where} camera")
        posed = camera is not None and camera[3] is not None
        hands = given.get("trajectory", [given["hand"]] if "hand" in given else [])
        if not isinstance(hands, list) or ("trajectory" in given and not hands):
            raise ValueError(f"{where} trajectory is {hands!r:.40}, expected a list of hands")
        names = [f"{where} {sources[0]}" + f" {k}" * ("trajectory" in given) for k in range(len(hands))]
        hands = [read_hand(one, name, hand, posed) for one, name in zip(hands, names, strict=True)]
        start, grasps = given.get("start"), given.get("grasps", 1)
        if start is not None:
            start = read_hand(start, f"{where} start", hand, posed) if isinstance(start, dict) else (
                numbers(start, POINT, f"{where} start"))  # fmt: skip
        if len({one["side"] for one in (*hands, *[start] * isinstance(start, dict))}) > 1:
            raise ValueError(f"{where} has a right and a left hand; a scene has one")
        if type(grasps) is not int or grasps < 1:
            raise ValueError(f"{where} grasps is {grasps!r}, expected a whole number from 1 on")
        to_canonical, support = own_to_canonical(mesh) @ np.linalg.inv(world), None
        if "support" in given:
            plane = part(given["support"], SUPPORT_KEYS, SUPPORT_KEYS, f"{where} support")
            if not (length := np.linalg.norm(plane["normal"])) > 1e-9:
                raise ValueError(f"{where} support normal is {plane['normal'].tolist()}, expected a direction")
            support = plane["point"], plane["normal"] / length
            turn = np.eye(4)
            turn[:3, :3] = Rotation.align_vectors([UP], [to_canonical[:3, :3] @ support[1]])[0].as_matrix()
            vertices = (mesh.vertices @ turn[:3, :3].T).astype(np.float32).astype(np.float64)
            mesh = replace(mesh, vertices=vertices, file_to_canonical=turn @ mesh.file_to_canonical)
            to_canonical = turn @ to_canonical
        line = Line(where, mesh, to_canonical, world, camera, support, hands, "trajectory" in given, start, grasps)
        _check_place(line)
        return line

    def _mesh(self, given: dict[str, Any], where: str) -> ObjectMesh:
        """The line's mesh in the canonical frame; a path is looked for beside the scenes file."""
        key = tuple(given.get(name) for name in ("object", "units", "up", "category"))
        if not all(isinstance(each, str | float | int | None) for each in key) or not isinstance(key[0], str):
            raise ValueError(f"{where} object, units, up, category are {key!r}, expected a mesh file or built-in name")
        if key not in self._meshes:
            name, units, up, category = key
            word = name if name in CATEGORIES else str(self.path.parent / name)
            try:
                meshes = collect_objects([word], category=category, units=units, up=up)
            except ValueError as error:
                raise ValueError(f"{where} object: {error}") from error
            if len(meshes) > 1:
                raise ValueError(f"{where} object is a folder of {len(meshes)} meshes; name the file")
            self._meshes[key] = meshes[0]
        return self._meshes[key]

    def scene(self, number: int, hand: HandModel, renderer: Renderer) -> Scene | None:
        """Scene `number`; None when no further grasp is found or no camera of ours sees hand and object.

        Raises ValueError, naming the line, when our hand does not fit given joints.
        """
        line, generator = self.line(number, hand), np.random.default_rng([self.seed, number])
        view, cameras = replace(self.view, frames=int(self.frames[number])), ()
        places = {"world": line.to_canonical, "object": line.to_canonical @ line.object_to_world}
        if line.camera is not None:
            view = replace(view, intrinsics=line.camera[0], height=line.camera[1], width=line.camera[2])
        if line.world_to_camera is not None:
            pose = line.world_to_camera @ np.linalg.inv(line.to_canonical)
            cameras, places["camera"] = (Camera(line.camera[0], pose, view.height, view.width),), np.linalg.inv(pose)
        fits = [self._posed(one, line.where, hand, places) for one in line.hands]
        side = fits[-1][0].hand_side if fits else view.sides[generator.integers(len(view.sides))]
        view = replace(view, hand_side=side)
        grasp = self._measured(fits[-1][0], line.mesh, hand) if fits else self._found(line, number, hand, side)
        if grasp is None:
            return None
        poses = tuple(pose for pose, _ in fits) if line.is_path else ()
        if not line.is_path and (fits or cameras or line.support or line.start is not None):
            poses = frame_poses(grasp, side, view, UP, self._start(line, hand, places, grasp, side))
        view = replace(view, upright=1.0 if poses else view.upright)
        item = GraspedObject(line.mesh, **{side: (grasp,)})
        scene = compose_scene([item], hand, renderer, generator, view, cameras=cameras, poses=poses)
        if scene is None:
            return None
        entries = [{"scene_line": int(self.lines[number]), "object_frame": "file", "joint_residual_mm": None,
                    "below_support_mm": line.below_mm(hand(pose))} for pose in scene.hand_params]  # fmt: skip
        for entry, (_, off) in zip(entries[-len(fits) :], fits, strict=True) if fits else ():  # others are approaches
            entry["joint_residual_mm"] = None if off is None else (1000 * off).round(3).tolist()
        own = next(mesh for mesh in self.meshes if mesh.object_id == line.mesh.object_id)
        return replace(scene, file_mesh=own, file_to_world=own_to_canonical(line.mesh), entries=tuple(entries),
                       keep_outside=bool(fits or cameras), support=line.support_height)  # fmt: skip

    def _posed(
        self, given: dict[str, Any], where: str, hand: HandModel, places: dict[str, np.ndarray]
    ) -> tuple[HandParams, np.ndarray | None]:
        """One hand in the canonical frame, and how far each joint is off (21,), metres, where joints were given."""
        place, side = places[given.get("frame", "world")], given["side"]
        if "joints" in given:
            joints = transform_points(place, given["joints"][list(JOINT_ORDERS[given["order"]])])
            pose, off = fit_joints(joints, hand, side)
            if fault := fit_fault(pose, off, hand):
                raise ValueError(f"{where}: {fault}")
            return pose, off
        pose = given.get("hand_pose", np.zeros(45))
        if "pca" in given or not given["flat_hand_mean"]:
            components, mean = read_pca(self.mano_path, side)
            coefficients = given.get("pca", np.zeros(1))
            pose = pose + pca_to_hand_pose(coefficients, components, 0 * mean if given["flat_hand_mean"] else mean)
        params = HandParams(given["global_orient"], pose, given["transl"], given.get("betas", np.zeros(10)), side)
        return hand_in_camera(params, hand, place), None

    def _measured(self, pose: HandParams, mesh: ObjectMesh, hand: HandModel) -> Grasp:
        """How well a given hand holds the object; as in GraspedObject a left hand becomes a right one at the mirror."""
        right, target = (pose, mesh) if pose.hand_side == "right" else (mirrored_hand(pose), mirror_mesh(mesh))
        return measure_grasp(right, hand, self.fields(target.vertices, target.faces))

    def _found(self, line: Line, number: int, hand: HandModel, side: str) -> Grasp | None:
        """The grasp searched for a scene without a given hand; none that crosses the support."""
        count = line.grasps if line.support is None else POOL * line.grasps
        found = grasp_object(line.mesh, hand, count, self.seed, self.cache, (side,)).grasps(side)
        poses = [mirrored_hand(one.hand_params) if side == "left" else one.hand_params for one in found]
        found = [one for one, pose in zip(found, poses, strict=True) if not line.below_mm(hand(pose))]
        turn = number - int(np.searchsorted(self.lines, self.lines[number]))  # among the scenes of the line
        return found[turn] if turn < len(found) else None

    def _start(
        self, line: Line, hand: HandModel, places: dict[str, np.ndarray], grasp: Grasp, side: str
    ) -> HandParams | None:
        """Where the approach begins, as a right hand in the frame of the grasp; None: where ours do."""
        if line.start is None:
            return None
        if isinstance(line.start, dict):
            pose = self._posed(line.start, line.where, hand, places)[0]
            return pose if side == "right" else mirrored_hand(pose)
        wrist = transform_points(line.to_canonical, line.start) * (MIRROR if side == "left" else 1)
        flat = replace(grasp.hand_params, hand_pose=np.zeros(45))
        return replace(flat, transl=flat.transl + wrist - hand(flat).joints[0])


def _check_place(line: Line) -> None:
    """Raise ValueError for a mesh that lies below the support, or a camera that does not see it."""
    points = transform_points(np.linalg.inv(line.to_canonical), line.mesh.vertices)
    if line.support is not None:
        depth = -float(((points - line.support[0]) @ line.support[1]).min())
        if depth > UNDER:
            raise ValueError(f"{line.where}: the mesh reaches {1000 * depth:.1f} mm below its support; move the point, "
                             "or turn the normal so that it points to the object's side")  # fmt: skip
    if line.world_to_camera is not None:
        intrinsics, height, width, pose = line.camera
        pixels = project(transform_points(pose, points), intrinsics)
        if not ((pixels > -0.5) & (pixels < np.array([width, height]) - 0.5)).all(axis=1).any():
            raise ValueError(f"{line.where} camera looks away: no point of the mesh is in its picture; is the pose "
                             "that takes the object to the camera (not back), in metres and OpenCV axes?")  # fmt: skip
        if np.nanmax(np.nanmax(pixels, axis=0) - np.nanmin(pixels, axis=0)) < LEAST_PIXELS:
            raise ValueError(f"{line.where} camera sees the object smaller than {LEAST_PIXELS} pixels; is its place in "
                             "metres?")  # fmt: skip


def own_to_canonical(mesh: ObjectMesh) -> np.ndarray:
    """From the file's own frame, in metres, to the mesh's canonical one: rigid (4, 4)."""
    if mesh.source == BUILT_IN:
        turned = np.eye(4)
        turned[:3, :3] = mesh.file_to_canonical[:3, :3]  # by a support alone: its own frame is the canonical one
        return turned
    return mesh.file_to_canonical @ np.diag([1 / metres_per_unit(mesh)] * 3 + [1])


def metres_per_unit(mesh: ObjectMesh) -> float:
    """Of the file's coordinates."""
    return float(np.cbrt(np.linalg.det(mesh.file_to_canonical[:3, :3])))


def own_mesh(mesh: ObjectMesh) -> ObjectMesh:
    """The mesh in its file's own frame, metres; of a built-in one the canonical frame is its own.

    Raises ValueError where that is too far from its origin for what a mesh file can hold.
    """
    if mesh.source == BUILT_IN:
        return mesh
    vertices = transform_points(np.linalg.inv(own_to_canonical(mesh)), mesh.vertices)
    far = np.abs(vertices).max()
    if np.spacing(np.float32(far)) > FLOAT_STEP:
        raise ValueError(f"{mesh.source} lies {far:.4g} m from its origin, too far to keep its vertices exactly: move "
                         "it there, and poses with it")  # fmt: skip
    kept = "Kept in its own frame: it is turned and moved only while grasps are searched."
    return replace(mesh, vertices=vertices.astype(np.float32).astype(np.float64), notes=(*mesh.notes, kept),
                   file_to_canonical=np.diag([metres_per_unit(mesh)] * 3 + [1]))  # fmt: skip
