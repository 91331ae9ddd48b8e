"""Where conditions come from, and which pictures are asked for: a folder, meshes or an approach -> views -> requests.

A view is what one picture is made from: condition images and their annotation.  Five sources give views by number, each
drawn or read when it is asked for and independent of the others: FolderViews, SceneViews and FileViews for single
pictures (paper Sec. 3.2, 4), ApproachFrames and TrajectoryFrames for the frames of a video (Sec. 3.2, 4.4).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from hoi.common.files import short_hash, write_whole
from hoi.conditions import Conditions
from hoi.data import folder as dataset
from hoi.data.scenes import SceneFile
from hoi.data.writer import write_object, write_pictures
from hoi.geometry.contact import DistanceField
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

# What belongs to one picture of a view, not to the view.
PICTURE_KEYS = (
    "file_name", "index", "text", "look", "seed", "guidance_scale", "sampler", "num_inference_steps", "checkpoint",
    "negative_prompt", "verification",
)  # fmt: skip


@dataclass(frozen=True)
class View:
    """Conditions and annotation of one view.

    record        annotation under the keys of a dataset folder's records, without file names
    conditions    None: none (scenery); the network then sees black
    depth         (H, W) metres or None
    object_mask   (H, W) bool or None
    mesh          the object: a mesh, or the path of one in the dataset folder that the record is of
    """

    record: dict[str, Any]
    conditions: Conditions | None
    depth: np.ndarray | None = None
    object_mask: np.ndarray | None = None
    mesh: ObjectMesh | Path | None = None

    def write(self, folder: Path, index: int) -> dict[str, Any]:
        """Write the view's files under the number `index`; returns its record with their names.

        Writing twice, or from two processes at once, gives the same files.
        """
        record = dict(self.record)
        if isinstance(self.mesh, ObjectMesh):
            record["object_path"] = write_object(folder, self.mesh)
        elif self.mesh is not None:
            record["object_path"] = dataset.mesh_file_name(record["object_path"])
            if not (folder / record["object_path"]).exists():  # as bytes: the mesh stays exactly the same
                write_whole(folder / record["object_path"], self.mesh.read_bytes())
        full = write_pictures(
            folder, index, record, conditions=self.conditions, depth=self.depth, object_mask=self.object_mask
        )
        return {key: value for key, value in full.items() if key not in PICTURE_KEYS}


def view_of(
    scene: Scene, frame: int, hand: HandModel, renderer: Renderer, where: str, field: DistanceField | None = None,
    number: int | None = None,
) -> View:  # fmt: skip
    """One frame of a scene with a hand, as annotate says it, with the scene's number where it has one.

    Raises ValueError, beginning with `where`, when the hand is behind the camera.
    """
    record = annotate(scene, frame, hand, field) | ({} if number is None else {"scene": number})
    if not np.isfinite(record["keypoints_2d"]).all():
        raise ValueError(f"{where}: the hand is behind the camera")
    return View(record, mesh=scene.written_mesh, **pictures_of(scene, frame, record, hand, renderer))


def content_of(records: Sequence[dict[str, Any]]) -> str:
    """A hash of all that records say of their views, so that another folder with the same texts is told apart."""
    told = [{key: value for key, value in record.items() if key == "text" or key not in PICTURE_KEYS}
            for record in records]  # fmt: skip
    return short_hash(json.dumps(told, sort_keys=True))


# --- single pictures ---


class FolderViews:
    """The distinct views of dataset folders: records that share condition files are one view.

    records      all of the folders, of several as of one (folder.read_folders), in order of index
    numbers      number of each record's view
    """

    def __init__(self, *folders: str | Path) -> None:
        """Raises FileNotFoundError or ValueError naming the first missing file."""
        self.folder, self.records = dataset.read_folders(folders)
        # Its own picture is not read: a conditions-only folder has none.
        files = [key for key in dataset.FILE_KEYS if key != "file_name"]
        dataset.require(self.folder, self.records, files)
        # Scenery has no conditions: one view, without any, for all of it.
        keys = [tuple(record.get(name) for name in dataset.CONDITION_KEYS) for record in self.records]
        number_of = {key: number for number, key in enumerate(dict.fromkeys(keys))}
        self.numbers = [number_of[key] for key in keys]
        self._first = [self.records[i] for i in np.unique(self.numbers, return_index=True)[1]]  # record of each view

    def __len__(self) -> int:
        return len(self._first)

    def size(self, number: int) -> tuple[int, int]:
        """Height and width of a view, pixels."""
        return self._first[number]["height"], self._first[number]["width"]

    def has_conditions(self, number: int) -> bool:
        """Whether the view shows anything; scenery does not."""
        return self._first[number].get(dataset.CONDITION_KEYS[0]) is not None

    def noun(self, number: int) -> str:
        """What a prompt calls the view's object."""
        return (self._first[number].get("category") or "object").replace("_", " ")

    def source_index(self, number: int) -> int:
        """Index, in the folder, of the first record of a view."""
        return self._first[number]["index"]

    def __getitem__(self, number: int) -> View:
        """Raises ValueError naming a damaged file or one of another size."""
        source = self._first[number]
        record = {key: value for key, value in source.items() if key not in (*PICTURE_KEYS, *dataset.PICTURE_FOLDERS)}
        conditions = dataset.load_conditions(self.folder, source)
        if conditions is None:
            return View(record, None)
        return View(
            record,
            conditions,
            dataset.load_depth(self.folder, source) if source.get("depth_file_name") else None,
            dataset.load_object_mask(self.folder, source) if source.get("object_mask_file_name") else None,
            dataset.file_of(self.folder, source, "object_path") if source.get("object_path") else None,
        )


class SceneViews:
    """Endless new views: view k shows object k modulo their number, in a grasp and from a camera of its own.

    Everything random comes from (seed, k).  Grasps are searched by `prepare` and cached on disk.
    """

    def __init__(
        self, meshes: Sequence[ObjectMesh], hand: HandModel, settings: ViewSettings, seed: int,
        grasps_per_object: int, cache_dir: str | Path,
    ) -> None:  # fmt: skip
        self.meshes, self.hand, self.settings, self.seed = list(meshes), hand, settings, seed
        self.grasps_per_object, self.cache_dir = grasps_per_object, cache_dir
        self._grasped: dict[int, GraspedObject] = {}

    @cached_property
    def renderer(self) -> Renderer:
        """What draws the conditions; started when first needed, for a finished job needs none."""
        return Renderer()

    def prepare(self, k: int) -> GraspedObject:
        """Search or read the grasps of object k.  Raises ValueError when there is none."""
        if k not in self._grasped:
            sides = self.settings.sides
            item = grasp_object(self.meshes[k], self.hand, self.grasps_per_object, self.seed, self.cache_dir, sides)
            (self._grasped[k],) = graspable([item], sides)
        return self._grasped[k]

    def __len__(self) -> int:
        return len(self.meshes)

    def size(self, _: int) -> tuple[int, int]:
        """Height and width of a view, pixels."""
        return self.settings.height, self.settings.width

    def noun(self, number: int) -> str:
        """What a prompt calls the view's object."""
        return noun(self.meshes[number % len(self.meshes)])

    def scene(self, number: int) -> Scene:
        """Everything random comes from the seed and the number.  Raises ValueError when no camera sees both."""
        item = self.prepare(number % len(self.meshes))
        generator = np.random.default_rng([self.seed, number])  # whatever views were asked for before
        scene = compose_scene([item], self.hand, self.renderer, generator, self.settings)
        if scene is None:
            raise ValueError(f"no camera sees both the hand and {item.object_mesh.object_id} (view {number}); try "
                             "another --seed")  # fmt: skip
        return scene

    def __getitem__(self, number: int) -> View:
        """Raises ValueError when no camera sees hand and object."""
        return view_of(self.scene(number), 0, self.hand, self.renderer, f"view {number}", number=number)


class FileViews(SceneViews):
    """Views of a scenes file, one a scene: of an approach or a trajectory the last frame."""

    def __init__(self, scenes: SceneFile, hand: HandModel) -> None:
        super().__init__(scenes.meshes, hand, scenes.view, scenes.seed, 1, scenes.cache)
        self.scenes = scenes

    def __len__(self) -> int:
        return len(self.scenes)

    def prepare(self, k: int) -> None:
        """Nothing: grasps are searched for the lines that give no hand, when they are needed."""

    def size(self, number: int) -> tuple[int, int]:
        """Height and width of a view, pixels."""
        return self.scenes.sizes[number % len(self)]

    def noun(self, number: int) -> str:
        """What a prompt calls the view's object."""
        return self.scenes.nouns[number % len(self)]

    def __getitem__(self, number: int) -> View:
        """Raises ValueError naming the line when it gives no picture."""
        scene = self.scenes.scene(number % len(self), self.hand, self.renderer)
        where = f"{self.scenes.path} line {self.scenes.lines[number % len(self)]}"
        if scene is None:
            raise ValueError(f"{where}: no (further) grasp was found, or no camera sees hand and object")
        return view_of(scene, scene.frames - 1, self.hand, self.renderer, where, number=number % len(self))


@dataclass(frozen=True, slots=True)
class Request:
    """One picture to make.

    index          of the record
    view           number in the source of views; None without conditions
    prompt         complete, no placeholder
    source_index   index of the record in the source folder, None where there is no folder
    """

    index: int
    view: int | None
    prompt: str
    source_index: int | None = None


def plan(
    views: FolderViews | SceneViews | None, prompts: Sequence[str] | None, count: int | None = None
) -> list[Request]:
    """Requests 0 to count - 1, those of one view side by side (so they share its features), else by index.

    prompts   templates: every view with every prompt; None: each record of the folder with its own text
    count     None makes each combination once; more go on with other noise (and, from meshes, other views)
    Request i is the same for every count.
    """
    text_of = lru_cache(fill)  # of a million requests many share a text, which is held once
    if views is None:
        count = count or len(prompts)
        return [Request(i, None, text_of(prompts[i % len(prompts)], None)) for i in range(count)]
    requests = []
    if prompts is None:
        for i in range(count or len(views.records)):
            record, number = (of[i % len(views.records)] for of in (views.records, views.numbers))
            requests.append(Request(i, number, record["text"] or "", record["index"]))
    else:
        from_folder = isinstance(views, FolderViews)
        usable = [k for k in range(len(views)) if not from_folder or views.has_conditions(k)]
        if not usable:
            raise ValueError(f"{views.folder} has no condition images; use --no-conditions for text alone")
        for i in range(count or len(usable) * len(prompts)):
            turn = i // len(prompts)  # all prompts for a view, then the next view; a folder's begin again
            number = usable[turn % len(usable)] if from_folder else turn
            prompt = text_of(prompts[i % len(prompts)], views.noun(number))
            requests.append(Request(i, number, prompt, views.source_index(number) if from_folder else None))
    return sorted(requests, key=lambda request: request.view)  # which keeps the order of index


# --- frames of a video ---


class ApproachFrames:
    """Frames of a scene: view i is frame i with the annotation of its own hand.

    scene   as it is, or with its approach bent
    bent    whether the straight approach cut deeper than a grasp may, so that it was bent
    noun    what a prompt calls the object
    size    height and width, pixels
    """

    def __init__(
        self, scene: Scene, hand: HandModel, renderer: Renderer, hold: int = 0, straight: bool = False
    ) -> None:
        """hold: frames more that stay on the grasp; straight: never bend the approach."""
        self.hand, self.renderer = hand, renderer
        self.field = DistanceField(scene.object_mesh.vertices, scene.object_mesh.faces)
        hands = list(scene.hand_params)
        if not straight:
            hands = bend_approach(hands, hand, self.field, scene.up)
        # bend_approach hands back the very hands that it did not have to move.
        self.bent = any(after is not before for after, before in zip(hands, scene.hand_params, strict=True))
        entries = (*scene.entries, *scene.entries[-1:] * hold)
        self.scene = replace(scene, hand_params=(*hands, *hands[-1:] * hold), entries=entries)
        self.noun = noun(scene.object_mesh)
        self.size = (scene.camera.height, scene.camera.width)

    def __len__(self) -> int:
        return self.scene.frames

    def __getitem__(self, frame: int) -> View:
        """Raises ValueError when the hand is behind the camera."""
        where = f"frame {frame} (a smaller --start-distance may help)"
        return view_of(self.scene, frame, self.hand, self.renderer, where, self.field)

    def penetration_mm(self) -> list[float]:
        """How deep the hand is in the object, each frame."""
        records = (annotate(self.scene, frame, self.hand, self.field) for frame in range(len(self)))
        return [record["penetration_mm"] for record in records]


class TrajectoryFrames:
    """Frames of one trajectory of a dataset folder, in order; of several looks of a frame the first.

    records  of the frames
    noun     what a prompt calls the object
    size     height and width, pixels
    """

    def __init__(self, folder: str | Path, trajectory: int | None = None) -> None:
        """trajectory: number of the trajectory in the folder; None: the first.

        Raises FileNotFoundError or ValueError: no such trajectory, frames without conditions, of different sizes or
        of different objects.
        """
        self._views = FolderViews(folder)
        wanted = _chosen_trajectory(folder, self._views.records, trajectory)
        frames: dict[int, tuple[dict[str, Any], int]] = {}  # frame -> record, number of its view
        for record, number in zip(self._views.records, self._views.numbers, strict=True):
            if record.get("trajectory") == wanted:
                frames.setdefault(record.get("frame") or 0, (record, number))
        self.records, self._numbers = zip(*(frames[frame] for frame in sorted(frames)), strict=True)
        objects = list(dict.fromkeys(record.get("object_path") for record in self.records))
        if len(objects) > 1:
            raise ValueError(f"{folder}: frames of one clip show one object, these show {', '.join(map(str, objects))}")
        for record in self.records:
            if record.get("skeleton_file_name") is None:
                raise ValueError(f"{folder} record {record['index']} has no condition images; a clip needs them")
        self.noun, self.size = self._views.noun(self._numbers[0]), self._views.size(self._numbers[0])
        if others := [n for n in self._numbers if self._views.size(n) != self.size]:
            shown = sorted({self.size, *map(self._views.size, others)})
            raise ValueError(f"{folder}: frames of one clip have one size, these have (height, width) {shown}")

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, frame: int) -> View:
        return self._views[self._numbers[frame]]


def _chosen_trajectory(folder: str | Path, records: list[dict[str, Any]], trajectory: int | None) -> int | None:
    """The asked or else the first number; None for a folder of one picture, which is a video of one frame."""
    numbers = sorted({record["trajectory"] for record in records if record.get("trajectory") is not None})
    if not numbers and len(records) == 1 and trajectory is None:
        return None
    if not numbers:
        raise ValueError(f"{folder} holds no trajectory; make one with: python make_dataset.py --frames 12")
    if trajectory is not None and trajectory not in numbers:
        raise ValueError(f"{folder} has no trajectory {trajectory}; it has {', '.join(map(str, numbers[:20]))}")
    return numbers[0] if trajectory is None else trajectory
