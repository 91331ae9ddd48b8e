"""What several test files need: the built-in hand, a renderer, and a dataset folder to export."""

import hoi  # noqa: F401 - before torch: says how its threads wait

# isort: split
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from hoi.data.writer import DatasetWriter, write_object, write_pictures
from hoi.geometry.grasp import Grasp
from hoi.geometry.hand import HandModel, HandParams, load_hand
from hoi.geometry.objects import make_object
from hoi.geometry.render import Renderer
from hoi.geometry.scene import GraspedObject, ViewSettings, annotate, compose_scene, pictures_of

NOCS_FOV_DEG = float(np.degrees(2 * np.arctan(240 / 577.5)))  # of 480 rows at a focal length of 577.5 px


@pytest.fixture(scope="session")
def hand() -> HandModel:
    return load_hand()


@pytest.fixture(scope="session")
def renderer() -> Renderer:
    return Renderer()


@pytest.fixture(scope="session")
def export_source(tmp_path_factory, hand, renderer) -> Path:
    """A dataset folder seen by the camera of NOCS, with pictures: a mug in a right hand, a bowl in a left one, a bottle
    alone, a hand alone, scenery, and (seen by another camera) a can that leaves the picture."""
    folder = tmp_path_factory.mktemp("export_source")
    pose = HandParams(np.array([0.2, 0.4, -0.3]), np.full(45, 0.12), np.array([0.12, 0.03, 0.05]), np.zeros(10))
    grasp = Grasp(pose, 0.5, 0, (True, True, True, False, False), True, 1.0)
    writer = DatasetWriter(folder, {"licences": {"objects": ["built-in family"]}})
    for index, (name, content, side) in enumerate(
        [("mug", "hand_object", "right"), ("bowl", "hand_object", "left"), ("bottle", "object", "right"),
         ("can", "hand", "right"), ("can", "scenery", "right"), ("can", "hand_object", "right")]
    ):  # fmt: skip
        mesh = make_object(name, 3)
        size, generator = 160, np.random.default_rng([5, index])
        picture = generator.integers(0, 255, (size, size, 3), dtype=np.uint8)
        graspable = [GraspedObject(mesh, (grasp,), (grasp,))]
        settings = ViewSettings(size, size, side, fov_deg=NOCS_FOV_DEG)
        scene = compose_scene(graspable, hand, renderer, generator, settings, content)
        if index == 5:
            aside = scene.camera.intrinsics + np.array([[0, 0, -85.0], [0, 0, 0], [0, 0, 0]])
            scene = replace(scene, camera=replace(scene.camera, intrinsics=aside), last_gbuffer=None)
        record = annotate(scene, 0, hand) | {"text": f"a {name}, drawn"}
        drawn = pictures_of(scene, 0, record, hand, renderer)
        if "object_mask" in drawn:
            record["object_path"] = write_object(folder, mesh)
        writer.append(write_pictures(folder, index, record, picture, **drawn))
    writer.finish()
    return folder
