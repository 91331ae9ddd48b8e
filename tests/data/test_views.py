"""Frames of videos: how deep the hand gets on its way, measured by an independent library."""

from pathlib import Path

import numpy as np
import pytest
import trimesh

import video
from hoi.data.views import ApproachFrames
from hoi.geometry.hand import HandModel
from hoi.network.config import tiny_config

NEAR = 0.005  # metres around the object within which points are measured


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


def frames_of(cache: Path, *words: str) -> ApproachFrames:
    """Of `python video.py words`, without the pictures."""
    return video.choose_frames(video.parse_args([*words, "--cache", str(cache)]), tiny_config())


def depths_by_trimesh(frames: ApproachFrames, hand: HandModel) -> np.ndarray:
    """Of each frame the deepest skin point, vertices and middles of faces; metres, negative outside, at least -NEAR."""
    mesh = frames.scene.object_mesh
    bodies = trimesh.Trimesh(mesh.vertices, mesh.faces, process=False).split(only_watertight=False)
    assert all(body.is_watertight for body in bodies)
    depths = []
    for pose in frames.scene.hand_params:
        skin = hand(pose)
        points = np.concatenate([skin.vertices, skin.vertices[skin.faces].mean(axis=1)])
        deepest = -NEAR
        for body in bodies:
            near = points[((points > body.bounds[0] - NEAR) & (points < body.bounds[1] + NEAR)).all(axis=1)]
            if len(near):
                deepest = max(deepest, trimesh.proximity.signed_distance(body, near).max())
        depths.append(deepest)
    return np.array(depths)


def test_no_frame_of_the_default_clip_cuts_more_than_2_mm_and_the_last_one_touches(cache, hand):
    depths = depths_by_trimesh(frames_of(cache), hand)
    assert len(depths) == 16 and depths.max() < 0.002
    assert depths[0] == -NEAR and depths[-1] > -0.001


def test_a_straight_path_that_cuts_more_is_bent_and_said_to_be(cache, hand, capsys):
    words = ["--object", "bottle", "--seed", "2"]
    straight = depths_by_trimesh(frames_of(cache, *words, "--straight"), hand)
    out = capsys.readouterr().out
    assert straight.max() > 0.002 and "the hand comes from the side" not in out
    assert "hint: that is more than 2 mm; another --seed" in out
    bent = depths_by_trimesh(frames_of(cache, *words), hand)
    out = capsys.readouterr().out
    assert bent.max() < 0.002 and "the straight path cuts more than 2 mm deep: the hand comes from the side" in out
    assert bent[-1] == straight[-1] > -0.001  # the grasp is the same
