"""Where the conditions of a job come from.  A dataset folder, or object meshes -> Geometry number k.  Paper: Sec. 3.2.

Both sources are sequences: geometry k does not depend on which others were asked for.
"""

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

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
from hoi.geometry.hand import HandModel
from hoi.geometry.objects import ObjectMesh
from hoi.geometry.render import Renderer
from hoi.geometry.scene import (
    GraspedObject,
    annotate,
    compose_scene,
    grasp_object,
    noun,
    render_scene,
    scene_conditions,
)

# What belongs to one picture of a geometry, not to the geometry.
PICTURE_KEYS = (
    "file_name", "index", "text", "look", "seed", "guidance_scale", "sampler", "num_inference_steps", "checkpoint",
    "negative_prompt", "verification",
)  # fmt: skip


@dataclass(frozen=True)
class Geometry:
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
    if target.exists():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        shutil.copyfile(source, temporary)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


class FolderGeometries:
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

    def __getitem__(self, number: int) -> Geometry:
        """Raises ValueError naming a damaged file or one of another size."""
        source = self._first[number]
        record = {key: value for key, value in source.items() if key not in (*PICTURE_KEYS, *PICTURE_FOLDERS)}
        if not self.has_conditions(number):
            return Geometry(record, None)
        conditions = load_conditions(self.folder, source)
        for key in CONDITION_KEYS:
            shape = getattr(conditions, PICTURE_FOLDERS[key]).shape
            if shape != (source["height"], source["width"], 3):
                expected = (source["height"], source["width"], 3)
                raise ValueError(f"{self.folder / source[key]} has shape {shape}, its record says {expected}")
        return Geometry(
            record,
            conditions,
            load_depth(self.folder, source) if source.get("depth_file_name") else None,
            load_object_mask(self.folder, source) if source.get("object_mask_file_name") else None,
            self.folder / source["object_path"] if source.get("object_path") else None,
        )


class SceneGeometries:
    """Endless new views: geometry k shows object k modulo their number, in a grasp and from a camera of its own.

    Everything random comes from (seed, k).  Grasps are searched by `prepare` and cached on disk.
    """

    def __init__(
        self, meshes: Sequence[ObjectMesh], hand: HandModel, size: int, seed: int, hand_side: str, framing: str,
        grasps_per_object: int, cache_dir: str | Path,
    ) -> None:
        self.meshes, self.hand, self.size, self.seed = list(meshes), hand, size, seed
        self.hand_side, self.framing = hand_side, framing
        self.grasps_per_object, self.cache_dir = grasps_per_object, cache_dir
        self.renderer: Renderer | None = None
        self._grasped: dict[int, GraspedObject] = {}

    def renderer_used(self) -> str:
        """What draws the conditions, and why."""
        self.renderer = self.renderer or Renderer()
        return str(self.renderer)

    def prepare(self, k: int) -> int:
        """Search or read the grasps of object k; returns how many.  Raises ValueError when there is none."""
        sides = ("right", "left") if self.hand_side == "random" else (self.hand_side,)
        if k not in self._grasped:
            item = grasp_object(self.meshes[k], self.hand, self.grasps_per_object, self.seed, self.cache_dir, sides)
            if not all(item.grasps(side) for side in sides):
                raise ValueError(f"no grasp was found for {self.meshes[k].object_id}: is it 1 to 20 cm in size?")
            self._grasped[k] = item
        return sum(len(self._grasped[k].grasps(side)) for side in sides)

    def __len__(self) -> int:
        return len(self.meshes)

    def has_conditions(self, number: int) -> bool:
        return True

    def noun(self, number: int) -> str:
        return noun(self.meshes[number % len(self.meshes)])

    def source_index(self, number: int) -> None:
        return None

    def __getitem__(self, number: int) -> Geometry:
        k = number % len(self.meshes)
        self.prepare(k)
        self.renderer_used()
        generator = np.random.default_rng([self.seed, number])
        scene = compose_scene(
            [self._grasped[k]], self.hand, self.renderer, generator, self.size, self.size, "hand_object",
            self.hand_side, self.framing,
        )  # fmt: skip
        if scene is None:
            raise ValueError(f"no camera sees both the hand and {self.meshes[k].object_id} (geometry {number})")
        gbuffer = render_scene(scene, 0, self.hand, self.renderer)
        record = annotate(scene, 0, self.hand)
        conditions = scene_conditions(gbuffer, record)
        return Geometry(record, conditions, gbuffer.depth, gbuffer.object_mask, scene.object_mesh)
