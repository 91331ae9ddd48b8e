"""Where the conditions of a job come from.  A dataset folder, or object meshes -> Geometry number k.  Paper: Sec. 3.2.

Both sources are sequences: geometry k does not depend on which others were asked for.

Frames of a clip.  A grasp and its approach, or a trajectory of a folder -> Geometry i.  Paper: Sec. 3.2, 4.4.

Both sources are sequences of geometries: conditions and annotation of one frame each, drawn when asked for.

Which pictures to make.  Geometries + prompts -> requests, numbered for good.  Paper: Sec. 4.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from hoi.common.files import write_whole
from hoi.conditions import Conditions, blank_conditions
from hoi.data.folder import (
    CONDITION_KEYS,
    PICTURE_FOLDERS,
    load_conditions,
    load_depth,
    load_object_mask,
    missing_files,
    read_records,
)
from hoi.data.writer import write_object, write_pictures
from hoi.geometry.contact import DistanceField
from hoi.geometry.grasp import MAX_PENETRATION_MM
from hoi.geometry.hand import HandModel
from hoi.geometry.objects import ObjectMesh
from hoi.geometry.render import Renderer
from hoi.geometry.scene import (
    GraspedObject,
    Scene,
    ViewSettings,
    annotate,
    compose_scene,
    grasp_object,
    graspable,
    noun,
    pictures_of,
)
from hoi.geometry.trajectory import bend_approach
from hoi.toyworld.words import fill

# What belongs to one picture of a geometry, not to the geometry.
PICTURE_KEYS = (
    "file_name", "index", "text", "look", "seed", "guidance_scale", "sampler", "num_inference_steps", "checkpoint",
    "negative_prompt", "verification",
)  # fmt: skip


@dataclass(frozen=True)
class View:
    """Conditions and annotation of one view.

    record        annotation under the keys of hoi/data/folder.py, without file names
    conditions    None where the record has none (scenery)
    depth         (H, W) metres or None
    object_mask   (H, W) bool or None
    mesh          the object: a mesh, or the path of one already in a dataset folder
    """

    record: dict[str, Any]
    conditions: Conditions | None
    depth: np.ndarray | None = None
    object_mask: np.ndarray | None = None
    mesh: ObjectMesh | Path | None = None

    def conditions_or_blank(self, height: int, width: int) -> Conditions:
        """What the encoders see: all black where there are no conditions, as in the paper's regularisation term."""
        return blank_conditions(height, width) if self.conditions is None else self.conditions

    def write(self, folder: Path, index: int) -> dict[str, Any]:
        """Write the geometry's files under the number `index`; returns its record with their names.

        Writing twice, or from two processes at once, gives the same files.
        """
        record = dict(self.record)
        if isinstance(self.mesh, ObjectMesh):
            record["object_path"] = write_object(folder, self.mesh)
        elif self.mesh is not None:
            record["object_path"] = f"objects/{self.mesh.name}"
            _copy_once(self.mesh, folder / record["object_path"])
        full = write_pictures(
            folder, index, record, conditions=self.conditions, depth=self.depth, object_mask=self.object_mask
        )
        return {key: value for key, value in full.items() if key not in PICTURE_KEYS}


def _copy_once(source: Path, target: Path) -> None:
    if not target.exists():
        write_whole(target, source.read_bytes())


class FolderViews:
    """The distinct geometries of a dataset folder: records that share condition files are one geometry.

    records      all of the folder, in order of index
    numbers      geometry number of each record
    """

    def __init__(self, folder: str | Path, size: int) -> None:
        """size: height and width in pixels that the model takes.

        Raises FileNotFoundError or ValueError naming the first missing file, or a record of another size.
        """
        self.folder = Path(folder)
        self.records = read_records(self.folder)
        if not self.records:
            raise ValueError(f"{self.folder} holds no records; make them with make_dataset.py")
        self.numbers: list[int] = []
        self._first: list[dict[str, Any]] = []  # the first record of each geometry
        seen: dict[tuple[Any, ...], int] = {}
        for record in self.records:
            self._check(record, size)
            # Scenery has no conditions: blank ones, one geometry for all of it.
            key = tuple(record.get(name) for name in CONDITION_KEYS)
            if key not in seen:
                seen[key] = len(self._first)
                self._first.append(record)
            self.numbers.append(seen[key])

    def _check(self, record: dict[str, Any], size: int) -> None:
        where = f"{self.folder} record {record['index']}"
        if (record.get("height"), record.get("width")) != (size, size):
            raise ValueError(
                f"{where} is {record.get('width')} x {record.get('height')} px, the checkpoint takes {size} x {size}; "
                f"make the folder with --size {size}"
            )
        absent = [name for name in CONDITION_KEYS if record.get(name) is None]
        if 0 < len(absent) < len(CONDITION_KEYS):
            raise ValueError(f"{where} has no {', '.join(absent)}; the condition encoders need all three images")
        # Its own picture is not read: a conditions-only folder has none.
        needed = {key: value for key, value in record.items() if key != "file_name"}
        if missing := missing_files(self.folder, needed):
            raise FileNotFoundError(f"{self.folder / missing[0]} is missing ({where}); make the folder again")

    def __len__(self) -> int:
        return len(self._first)

    def has_conditions(self, number: int) -> bool:
        return self._first[number].get(CONDITION_KEYS[0]) is not None

    def noun(self, number: int) -> str:
        return (self._first[number].get("category") or "object").replace("_", " ")

    def source_index(self, number: int) -> int:
        """Index, in the folder, of the first record of a geometry."""
        return self._first[number]["index"]

    def __getitem__(self, number: int) -> View:
        """Raises ValueError naming a damaged file or one of another size."""
        source = self._first[number]
        record = {key: value for key, value in source.items() if key not in (*PICTURE_KEYS, *PICTURE_FOLDERS)}
        if not self.has_conditions(number):
            return View(record, None)
        conditions = load_conditions(self.folder, source)
        for key in CONDITION_KEYS:
            shape = getattr(conditions, PICTURE_FOLDERS[key]).shape
            if shape != (source["height"], source["width"], 3):
                expected = (source["height"], source["width"], 3)
                raise ValueError(f"{self.folder / source[key]} has shape {shape}, its record says {expected}")
        return View(
            record,
            conditions,
            load_depth(self.folder, source) if source.get("depth_file_name") else None,
            load_object_mask(self.folder, source) if source.get("object_mask_file_name") else None,
            self.folder / source["object_path"] if source.get("object_path") else None,
        )


class SceneViews:
    """Endless new views: geometry k shows object k modulo their number, in a grasp and from a camera of its own.

    Everything random comes from (seed, k).  Grasps are searched by `prepare` and cached on disk.
    """

    def __init__(
        self, meshes: Sequence[ObjectMesh], hand: HandModel, settings: ViewSettings, seed: int,
        grasps_per_object: int, cache_dir: str | Path,
    ) -> None:
        self.meshes, self.hand, self.settings, self.seed = list(meshes), hand, settings, seed
        self.grasps_per_object, self.cache_dir = grasps_per_object, cache_dir
        self.renderer: Renderer | None = None
        self._grasped: dict[int, GraspedObject] = {}

    def renderer_used(self) -> str:
        """What draws the conditions, and why."""
        self.renderer = self.renderer or Renderer()
        return str(self.renderer)

    def prepare(self, k: int) -> int:
        """Search or read the grasps of object k; returns how many.  Raises ValueError when there is none."""
        sides = self.settings.sides
        if k not in self._grasped:
            item = grasp_object(self.meshes[k], self.hand, self.grasps_per_object, self.seed, self.cache_dir, sides)
            (self._grasped[k],) = graspable([item], sides)
        return sum(len(self._grasped[k].grasps(side)) for side in sides)

    def __len__(self) -> int:
        return len(self.meshes)

    def has_conditions(self, number: int) -> bool:
        return True

    def noun(self, number: int) -> str:
        return noun(self.meshes[number % len(self.meshes)])

    def source_index(self, number: int) -> None:
        return None

    def __getitem__(self, number: int) -> View:
        k = number % len(self.meshes)
        self.prepare(k)
        self.renderer_used()
        generator = np.random.default_rng([self.seed, number])
        scene = compose_scene([self._grasped[k]], self.hand, self.renderer, generator, self.settings)
        if scene is None:
            raise ValueError(f"no camera sees both the hand and {self.meshes[k].object_id} (geometry {number})")
        record = annotate(scene, 0, self.hand)
        return View(record, mesh=scene.object_mesh, **pictures_of(scene, 0, record, self.hand, self.renderer))


GRASPS = 3  # searched, as many as sample.py searches by default, so that both read the same cache


def approach_scene(
    object_mesh: ObjectMesh, hand: HandModel, renderer: Renderer, settings: ViewSettings, seed: int,
    cache_dir: str | Path,
) -> Scene:
    """One grasp of the object, a camera that sees it, and the approach; everything random comes from `seed`.

    Raises ValueError when no grasp is found or no camera sees hand and object.
    """
    item = grasp_object(object_mesh, hand, GRASPS, seed, cache_dir, settings.sides)
    objects = graspable([item], settings.sides)
    scene = compose_scene(objects, hand, renderer, np.random.default_rng([seed, 0]), settings)
    if scene is None:
        raise ValueError(f"no camera sees both the hand and {object_mesh.object_id}; try another --seed")
    return scene


class ApproachFrames:
    """Frames of a scene: geometry i is frame i with the annotation of its own hand pose.

    scene   as it is, or with its approach bent
    bent    whether the straight approach cut deeper than MAX_PENETRATION_MM, so that it was bent
    """

    def __init__(
        self, scene: Scene, hand: HandModel, renderer: Renderer, hold: int = 0, straight: bool = False
    ) -> None:
        """hold: frames more that stay on the grasp; straight: never bend the approach."""
        self.hand, self.renderer = hand, renderer
        self.field = DistanceField(scene.object_mesh.vertices, scene.object_mesh.faces)
        poses = list(scene.hand_params)
        if not straight:
            poses = bend_approach(poses, hand, self.field, MAX_PENETRATION_MM / 1000)
        self.bent = any(pose is not before for pose, before in zip(poses, scene.hand_params, strict=True))
        self.scene = replace(scene, hand_params=(*poses, *poses[-1:] * hold))
        self.noun = noun(scene.object_mesh)

    def __len__(self) -> int:
        return self.scene.frames

    def __getitem__(self, frame: int) -> View:
        """Raises ValueError when the hand is behind the camera."""
        record = annotate(self.scene, frame, self.hand, self.field)
        if not np.isfinite(record["keypoints_2d"]).all():
            raise ValueError(f"in frame {frame} the hand is behind the camera; take a smaller --start-distance")
        pictures = pictures_of(self.scene, frame, record, self.hand, self.renderer)
        return View(record, mesh=self.scene.object_mesh, **pictures)

    def penetration_mm(self) -> list[float]:
        """How deep the hand is in the object, each frame."""
        records = (annotate(self.scene, frame, self.hand, self.field) for frame in range(len(self)))
        return [record["penetration_mm"] for record in records]


class TrajectoryFrames:
    """Frames of one trajectory of a dataset folder, in order; of several looks of a frame the first."""

    def __init__(self, folder: str | Path, size: int, trajectory: int | None = None) -> None:
        """trajectory: number of the trajectory in the folder; None: the first.

        Raises FileNotFoundError or ValueError: no such trajectory, frames without conditions, of another size than
        the model's or of different objects.
        """
        self.source = FolderViews(folder, size)
        records = self._of(Path(folder), self.source.records, trajectory)
        frames: dict[int, int] = {}  # frame -> position in the folder
        for position, record in enumerate(self.source.records):
            if record in records:
                frames.setdefault(record.get("frame") or 0, position)
        self.positions = [frames[frame] for frame in sorted(frames)]
        self.records = [self.source.records[position] for position in self.positions]
        objects = list(dict.fromkeys(record.get("object_path") for record in self.records))
        if len(objects) > 1:
            raise ValueError(f"{folder}: frames of one clip show one object, these show {', '.join(map(str, objects))}")
        for record in self.records:
            if record.get("skeleton_file_name") is None:
                raise ValueError(f"{folder} record {record['index']} has no condition images; a clip needs them")
        self.noun = self.source.noun(self.source.numbers[self.positions[0]])

    @staticmethod
    def _of(folder: Path, records: list[dict[str, Any]], trajectory: int | None) -> list[dict[str, Any]]:
        numbers = sorted({record["trajectory"] for record in records if record.get("trajectory") is not None})
        if not numbers and len(records) == 1 and trajectory is None:
            return records  # a single picture is a clip of one frame
        if not numbers:
            raise ValueError(f"{folder} holds no trajectory; make one with: python make_dataset.py --frames 12")
        wanted = numbers[0] if trajectory is None else trajectory
        if wanted not in numbers:
            raise ValueError(f"{folder} has no trajectory {wanted}; it has {', '.join(map(str, numbers[:20]))}")
        return [record for record in records if record.get("trajectory") == wanted]

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, frame: int) -> View:
        return self.source[self.source.numbers[self.positions[frame]]]


@dataclass(frozen=True)
class Request:
    """One picture to make.

    index          of the record
    view           number in the source of conditions; None without conditions
    prompt         complete, no placeholder
    source_index   index of the record in the source folder, None where there is no folder
    """

    index: int
    view: int | None
    prompt: str
    source_index: int | None = None


def plan(
    geometries: FolderViews | SceneViews | None, prompts: Sequence[str] | None, count: int | None = None
) -> list[Request]:
    """Requests 0 to count - 1, those of one geometry side by side (so they share its features), else by index.

    prompts   templates: every geometry with every prompt; None: each record of the folder with its own text
    count     None makes each combination once; more go on with other noise (and, from meshes, other views)
    Request i is the same for every count.
    """
    if geometries is None:
        count = count or len(prompts)
        return [Request(i, None, fill(prompts[i % len(prompts)], None)) for i in range(count)]
    if prompts is None:
        records = geometries.records
        chosen = [(i, records[i % len(records)], geometries.numbers[i % len(records)])
                  for i in range(count or len(records))]  # fmt: skip
        requests = [Request(i, number, record["text"] or "", record["index"]) for i, record, number in chosen]
    else:
        usable = [k for k in range(len(geometries)) if geometries.has_conditions(k)]
        if not usable:
            raise ValueError(f"{geometries.folder} has no condition images; use --no-conditions for text alone")
        requests = []
        for i in range(count or len(usable) * len(prompts)):
            turn = i // len(prompts)
            number = usable[turn % len(usable)] if isinstance(geometries, FolderViews) else turn
            prompt = fill(prompts[i % len(prompts)], geometries.noun(number))
            requests.append(Request(i, number, prompt, geometries.source_index(number)))
    return sorted(requests, key=lambda request: (request.view, request.index))
