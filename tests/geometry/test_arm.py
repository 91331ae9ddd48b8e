"""The forearm of pictures: it goes on from the hand and covers nothing that the conditions show."""

from dataclasses import replace

import numpy as np
import pytest
import trimesh

from hoi.geometry.arm import SLEEVE, forearm
from hoi.geometry.camera import arm_direction, project, transform_points
from hoi.geometry.grasp import Grasp
from hoi.geometry.hand import HandParams, mirrored_hand
from hoi.geometry.objects import make_object
from hoi.geometry.scene import GraspedObject, ViewSettings, compose_scene, render_picture, render_scene

POSE = HandParams(np.array([0.1, 0.2, -0.4]), np.full(45, 0.1), np.array([0.14, 0.02, 0.06]), np.zeros(10))


@pytest.mark.parametrize("side", ["right", "left"])
def test_the_arm_goes_on_from_the_wrist_and_faces_outward(hand, side):
    mesh = hand(mirrored_hand(POSE) if side == "left" else POSE)
    vertices, faces = forearm(mesh)
    along = arm_direction(mesh.keypoints_3d)
    beyond = (vertices - mesh.keypoints_3d[0]) @ along
    assert beyond.min() > -0.02 and 1.1 < beyond.max() < 1.3
    assert (mesh.vertices - mesh.keypoints_3d[0]).dot(along).max() > beyond.min(), "there is a gap"
    first = vertices[beyond < beyond.min() + 1e-6]
    assert 0.015 < np.linalg.norm(first - first.mean(0), axis=1).mean() < 0.035  # metres
    tube = trimesh.Trimesh(vertices, faces, process=False)
    radial = tube.triangles_center - mesh.keypoints_3d[0]
    radial -= np.outer(radial @ along, along)
    assert (tube.face_normals * radial).sum(axis=1).min() > -1e-9


@pytest.mark.parametrize("framing", ["official", "tight"])
def test_an_arm_covers_neither_hand_nor_object_and_reaches_the_border(hand, renderer, framing):
    grasp = Grasp(POSE, 0.2, 0, (True, True, True, False, False), True, 1.0)
    objects = [GraspedObject(make_object("can", 0), (grasp,), (grasp,))]
    reached, caps, sleeves = [], [], 0
    for seed in range(8):
        generator = np.random.default_rng(seed)
        scene = compose_scene(objects, hand, renderer, generator, ViewSettings(96, 96, framing=framing))
        bare, shown = render_scene(scene, 0, hand, renderer, factor=2), render_picture(scene, 0, hand, renderer)
        seen = bare.label_map > 0
        np.testing.assert_array_equal(bare.label_map[seen], shown.label_map[seen])
        # But for the cap behind the wrist, which the arm goes on from, nothing of hand and object has changed.
        changed = seen & (bare.depth != shown.depth)
        assert (bare.label_map[changed] == 1).all() and changed.sum() < 0.25 * (bare.label_map == 1).sum()
        caps.append(changed.sum())
        np.testing.assert_array_equal(bare.surface_normals[seen & ~changed], shown.surface_normals[seen & ~changed])
        skin = np.isin(shown.label_map, (1, SLEEVE))
        border = np.concatenate([part.ravel() for part in (skin[0], skin[-1], skin[:, 0], skin[:, -1])])
        reached.append(border.any())
        sleeves += (shown.label_map == SLEEVE).any()
    assert np.mean(reached) > 0.8
    assert framing == "tight" or (sleeves >= 6 and sum(caps) > 0)


def test_tight_framing_pushes_the_border_towards_the_arm(hand, renderer):
    grasp = Grasp(POSE, 0.2, 0, (True, True, True, False, False), True, 1.0)
    objects, gaps = [GraspedObject(make_object("can", 0), (grasp,), (grasp,))], []
    for seed in range(12):
        settings = ViewSettings(96, 96, framing="tight")
        scene = compose_scene(objects, hand, renderer, np.random.default_rng(seed), settings)
        keypoints = hand(POSE).keypoints_3d
        arm = np.stack([keypoints[0], keypoints[0] + 0.01 * arm_direction(keypoints)])
        wrist, behind = project(transform_points(scene.camera.world_to_camera, arm), scene.camera.intrinsics)
        axis = np.abs(behind - wrist).argmax()
        gaps.append((wrist[axis] if behind[axis] < wrist[axis] else 95 - wrist[axis]) / 96)
    assert np.median(gaps) < 0.06, np.round(gaps, 2)


def test_a_scene_without_a_hand_has_no_arm(hand, renderer):
    scene = compose_scene([GraspedObject(make_object("can", 0))], hand, renderer, np.random.default_rng(0),
                          ViewSettings(96, 96), "object")  # fmt: skip
    shown = render_picture(replace(scene, last_gbuffer=None), 0, hand, renderer)
    assert set(np.unique(shown.label_map)) == {0, 2}
