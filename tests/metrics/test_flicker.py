"""The flicker measure on videos whose flicker is known: painted surfaces, moved cameras, added noise."""

import json
from pathlib import Path

import numpy as np
import pytest
import trimesh
from PIL import Image

from hoi.geometry.camera import Camera
from hoi.geometry.hand import HandModel, HandParams
from hoi.geometry.render import Renderer
from hoi.metrics.flicker import colors_at, find_points, video_flicker

SIDE, FOCAL = 128, 220.0
INTRINSICS = np.array([[FOCAL, 0, 63.5], [0, FOCAL, 63.5], [0, 0, 1]])
COLORS = {0: (0, 0, 0), 1: (128, 128, 128), 2: (153, 51, 51)}  # of the segmentation


@pytest.fixture(scope="module")
def video(tmp_path_factory, hand: HandModel, renderer: Renderer) -> Path:
    """A hand passes a box in five frames; camera and box stand still.  The pictures are black."""
    folder = tmp_path_factory.mktemp("video")
    for name in ("images", "segmentation", "depth", "objects"):
        (folder / name).mkdir()
    box = trimesh.creation.box((0.06, 0.06, 0.04))
    box.export(folder / "objects" / "box.ply")
    object_to_camera = np.eye(4)
    object_to_camera[:3, 3] = [0.05, 0.05, 0.4]
    camera, lines = Camera(INTRINSICS, np.eye(4), SIDE, SIDE), []
    for frame in range(5):
        transl = np.array([-0.12 + 0.004 * frame, -0.06, 0.38])
        pose = HandParams(np.array([1.5, 0, 0]), np.zeros(45), transl, np.zeros(10))
        mesh = hand(pose)
        placed = np.asarray(box.vertices) + object_to_camera[:3, 3]
        gbuffer = renderer.render(mesh.vertices, mesh.faces, placed, np.asarray(box.faces), camera)
        segmentation = np.array([COLORS[k] for k in range(3)], dtype=np.uint8)[gbuffer.label_map]
        Image.fromarray(segmentation).save(folder / "segmentation" / f"{frame}.png")
        Image.fromarray(np.rint(gbuffer.depth * 1000).astype(np.uint16)).save(folder / "depth" / f"{frame}.png")
        Image.fromarray(np.zeros((SIDE, SIDE, 3), np.uint8)).save(folder / "images" / f"{frame}.png")
        record = {"file_name": f"images/{frame}.png", "index": frame, "frame": frame, "height": SIDE, "width": SIDE,
                  "segmentation_file_name": f"segmentation/{frame}.png", "depth_file_name": f"depth/{frame}.png",
                  "object_path": "objects/box.ply", "intrinsics": INTRINSICS.ravel().tolist(), "hand_side": "right",
                  "object_to_camera": object_to_camera.ravel().tolist()}  # fmt: skip
        for key in ("global_orient", "hand_pose", "transl", "hand_betas"):
            record[key] = getattr(pose, key).tolist()
        lines.append(json.dumps(record))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def labels(video: Path) -> list[np.ndarray]:
    pictures = [np.asarray(Image.open(video / "segmentation" / f"{frame}.png"))[..., 0] for frame in range(5)]
    return [np.select([picture == 128, picture == 153], [1, 2], 0) for picture in pictures]


def test_things_of_constant_colour_do_not_flicker_though_they_move(video, hand):
    palette = np.array([[10, 200, 30], [220, 180, 160], [90, 20, 20]], dtype=np.uint8)
    measured = video_flicker(video, hand, [palette[label_map] for label_map in labels(video)])
    assert max(measured["hand"], measured["object"], measured["background"]) < 1e-9


def test_each_thing_is_measured_by_its_own_change_of_colour(video, hand):
    pictures = []
    for frame, label_map in enumerate(labels(video)):
        palette = np.array([[100] * 3, [50 + 6 * frame] * 3, [100 + 20 * (frame % 2)] * 3], dtype=np.uint8)
        pictures.append(palette[label_map])
    measured = video_flicker(video, hand, pictures)
    assert (measured["hand"], measured["object"], measured["background"]) == pytest.approx((6, 20, 0), abs=1e-9)


def test_a_pattern_that_moves_with_the_hand_is_steady_and_one_that_stays_behind_is_not(video, hand):
    """4 mm at about 0.4 m are 2.2 pixels a frame."""
    columns = np.arange(SIDE)[None, :, None] * np.ones((SIDE, 1, 3))

    def striped(offset: np.ndarray) -> list[np.ndarray]:
        return [(128 + 60 * np.sin((columns - shift) / 3)).round().astype(np.uint8) for shift in offset]

    depth = np.median([np.asarray(Image.open(video / "depth" / "0.png"))[labels(video)[0] == 1]]) / 1000
    along = video_flicker(video, hand, striped(np.arange(5) * FOCAL * 0.004 / depth))
    behind = video_flicker(video, hand, striped(np.zeros(5)))
    assert along["hand"] < 4 and behind["hand"] > 20
    assert along["object"] > 20 and behind["object"] < 1e-9 and behind["background"] == 0


def test_independent_noise_gives_the_flicker_that_its_spread_predicts(video, hand):
    generator = np.random.default_rng(0)
    noise = [np.clip(128 + generator.normal(0, 20, (SIDE, SIDE, 3)), 0, 255).round().astype(np.uint8) for _ in range(5)]
    measured = video_flicker(video, hand, noise)
    assert measured["background"] == pytest.approx(20 * 2 / np.pi**0.5, rel=0.03)  # mean |a - b| of two normal numbers


def test_hidden_points_do_not_count():
    depth = np.full((20, 20), 1.0)
    depth[:, 10:] = 0.5  # something nearer hides the right half
    points = np.array([[-0.2, 0, 1.0], [0.2, 0, 1.0], [0.1, 0, 0.5], [0.0, 0, -1.0], [9.0, 0, 1.0]])
    own = np.ones((20, 20), dtype=bool)
    _, shown = find_points(points, np.array([[20.0, 0, 9.5], [0, 20, 9.5], [0, 0, 1]]), depth, own)
    assert shown.tolist() == [True, False, True, False, False]


def test_colours_are_read_between_pixels():
    ramp = np.tile(np.arange(10, dtype=np.uint8)[None, :, None] * 10, (4, 1, 3))
    np.testing.assert_allclose(colors_at(ramp, np.array([[2.5, 1.0], [3.0, 0.5]])), [[25] * 3, [30] * 3])


def test_one_frame_has_no_flicker_to_measure(tmp_path, video, hand):
    line = (video / "metadata.jsonl").read_text().splitlines()[0]
    (tmp_path / "metadata.jsonl").write_text(line + "\n")
    with pytest.raises(ValueError, match="has 1 frames; flicker needs two at least"):
        video_flicker(tmp_path, hand)
