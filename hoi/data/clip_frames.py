"""Frames of a clip.  A grasp and its approach, or a trajectory of a folder -> Geometry i.  Paper: Sec. 3.2, 4.4.

Both sources are sequences of geometries: conditions and annotation of one frame each, drawn when asked for.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from hoi.data.geometry import FolderGeometries, Geometry
from hoi.geometry.contact import DistanceField
from hoi.geometry.hand import HandModel
from hoi.geometry.objects import ObjectMesh
from hoi.geometry.render import Renderer
from hoi.geometry.scene import Scene, annotate, compose_scene, grasp_object, noun, render_scene, scene_conditions
from hoi.geometry.trajectory import bend_approach

GRASPS = 3  # searched, as many as sample.py searches by default, so that both read the same cache
MAX_PENETRATION_MM = 2.0  # that any frame should have


def approach_scene(
    object_mesh: ObjectMesh,
    hand: HandModel,
    renderer: Renderer,
    size: int,
    seed: int,
    hand_side: str,
    framing: str,
    frames: int,
    start_distance: float | None,
    cache_dir: str | Path,
) -> Scene:
    """One grasp of the object, a camera that sees it, and the approach; everything random comes from `seed`.

    size            height and width in pixels
    frames          of the approach, at least 1, the last one the grasp
    start_distance  metres above the grasp; None: the paper's
    Raises ValueError when no grasp is found or no camera sees hand and object.
    """
    item = grasp_object(object_mesh, hand, GRASPS, seed, cache_dir, (hand_side,))
    if not item.grasps(hand_side):
        raise ValueError(f"no grasp was found for {object_mesh.object_id}: is it 1 to 20 cm in size?")
    scene = compose_scene(
        [item], hand, renderer, np.random.default_rng([seed, 0]), size, size, "hand_object", hand_side, framing,
        frames=frames, start_distance=start_distance,
    )  # fmt: skip
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
        poses = list(scene.hand_poses)
        if not straight:
            poses = bend_approach(poses, hand, self.field, MAX_PENETRATION_MM / 1000)
        self.bent = any(pose is not before for pose, before in zip(poses, scene.hand_poses, strict=True))
        self.scene = replace(scene, hand_poses=(*poses, *poses[-1:] * hold))
        self.noun = noun(scene.object_mesh)

    def __len__(self) -> int:
        return self.scene.frames

    def __getitem__(self, frame: int) -> Geometry:
        """Raises ValueError when the hand is behind the camera."""
        record = annotate(self.scene, frame, self.hand, self.field)
        if not np.isfinite(record["keypoints_2d"]).all():
            raise ValueError(f"in frame {frame} the hand is behind the camera; take a smaller --start-distance")
        gbuffer = render_scene(self.scene, frame, self.hand, self.renderer)
        conditions = scene_conditions(gbuffer, record)
        return Geometry(record, conditions, gbuffer.depth, gbuffer.object_mask, self.scene.object_mesh)

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
        self.source = FolderGeometries(folder, size)
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

    def __getitem__(self, frame: int) -> Geometry:
        return self.source[self.source.numbers[self.positions[frame]]]
