"""tools/convert_keypoints.py: joints of other programs end in OpenPose order, at the right pixels, on the right
side."""

import builtins
import json
import sys
from types import SimpleNamespace

import convert_keypoints
import numpy as np
import pytest
from smplx.vertex_ids import vertex_ids
from verifier_world import SIDE, make_folder

from hoi.data.folder import read_records
from hoi.verify.predictions import check_covers, read_keypoint_predictions

NAME = "images/000000.png"
POINTS = np.random.default_rng(0).uniform(-0.4, 0.4, (21, 2))


def through_file(tmp_path, predictions):
    convert_keypoints.write_predictions(tmp_path / "k.json", predictions)
    return read_keypoint_predictions(tmp_path / "k.json")


def test_frankmocap_hands_of_either_side_keep_their_pixels(tmp_path):
    joints = np.random.default_rng(1).uniform(0, 500, (21, 3))
    hands = ({"pred_joints_img": values.tolist(), "faces": []} for values in (joints, joints + 1))
    people = [None, {"left_hand": None, "right_hand": next(hands)}, {"left_hand": next(hands)}]
    right, left = through_file(tmp_path, convert_keypoints.convert("frankmocap", {NAME: people, "b": []}, "f"))[NAME]
    np.testing.assert_array_equal(right.keypoints_2d, joints[:, :2])
    np.testing.assert_array_equal(left.keypoints_2d, joints[:, :2] + 1)
    assert (right.hand_side, left.hand_side) == ("right", "left")


def test_hamer_hands_come_back_from_their_box_and_left_ones_are_mirrored(tmp_path):
    hand = {"pred_keypoints_2d": POINTS.tolist(), "box_center": [100, 50], "box_size": 200, "right": 1}
    points_3d = [[0.1, 0.2, 0.3]] * 21
    hands = [hand, hand | {"right": 0.0, "pred_keypoints_3d": points_3d}]
    right, left = through_file(tmp_path, convert_keypoints.convert("hamer", {NAME: hands}, "f"))[NAME]
    np.testing.assert_allclose(right.keypoints_2d, POINTS * 200 + [100, 50])
    np.testing.assert_allclose(left.keypoints_2d[:, 0], 200 - right.keypoints_2d[:, 0])  # about the box's centre
    np.testing.assert_array_equal(left.keypoints_2d[:, 1], right.keypoints_2d[:, 1])
    assert (right.hand_side, left.hand_side) == ("right", "left") and right.keypoints_3d is None
    np.testing.assert_allclose(left.keypoints_3d[0], [-0.1, 0.2, 0.3])


def test_mano_joints_are_put_in_openpose_order(tmp_path):
    # smplx names MANO's joints and the tips that it appends in its own order of fingers.
    names = ["wrist", *(f"{finger}{k}" for finger in ("index", "middle", "pinky", "ring", "thumb") for k in (1, 2, 3))]
    names += [f"{finger}_tip" for finger in vertex_ids["mano"]]
    points = {name: [float(k), 2.0 * k] for k, name in enumerate(names)}
    hand = {"keypoints_2d": [points[name] for name in names], "scores": list(range(21)), "hand_side": "left"}
    read = through_file(tmp_path, convert_keypoints.convert("mano", {NAME: [hand]}, "f"))[NAME][0]
    expected = ["wrist"]
    for finger in ("thumb", "index", "middle", "ring", "pinky"):
        expected += [f"{finger}{k}" for k in (1, 2, 3)] + [f"{finger}_tip"]
    assert read.keypoints_2d.tolist() == [points[name] for name in expected]
    assert read.scores.tolist() == [points[name][0] for name in expected] and read.hand_side == "left"


@pytest.mark.parametrize(
    "tool, content, message",
    [
        ("hamer", [], "f holds a list, expected"),
        ("hamer", {NAME: {}}, "000000.png is a dict, expected a list"),
        ("hamer", {NAME: [{"right": 1}]}, "000000.png hand 0 has no pred_keypoints_2d"),
        ("hamer", {NAME: [{"right": 2}]}, "hand 0 right is 2, expected 0 or 1"),
        ("frankmocap", {NAME: [{"left_hand": {"faces": 1}}]}, "person 0 left_hand has no pred_joints_img"),
        ("frankmocap", {NAME: [{"right_hand": {"pred_joints_img": [[1, 2, 3]] * 20}}]}, r"is \(20, 2\), expected"),
        ("mano", {NAME: [{"keypoints_2d": [[0, float("inf")]] * 21}]}, "21 numbers that are not finite"),
    ],
)
def test_what_a_tool_did_not_return_is_refused_with_its_place(tool, content, message):
    with pytest.raises(ValueError, match=message):
        convert_keypoints.convert(tool, content, "f")


def mark(x: float, y: float, z: float = 0.0) -> SimpleNamespace:
    return SimpleNamespace(x=x, y=y, z=z)


class Landmarker:
    """MediaPipe's hand landmarker as its documentation describes it: finds one hand in the first picture only."""

    calls = 0

    @classmethod
    def create_from_options(cls, options):
        assert options.num_hands == 2 and options.base_options.model_asset_path.endswith("hand_landmarker.task")
        return cls()

    def __enter__(self):
        return self

    def __exit__(self, *problem):
        return None

    def detect(self, image):
        assert image.data.shape == (SIDE, SIDE, 3) and image.data.flags.c_contiguous
        self.calls += 1
        if self.calls > 1:
            return SimpleNamespace(hand_landmarks=[], hand_world_landmarks=[], handedness=[])
        return SimpleNamespace(
            hand_landmarks=[[mark(0.5, 0.25)] * 21],
            hand_world_landmarks=[[mark(0.01, 0.02, 0.03)] * 21],
            handedness=[[SimpleNamespace(score=0.75, category_name="Right")]],
        )


def test_mediapipe_runs_on_every_picture_and_its_shares_become_pixels(tmp_path, monkeypatch):
    folder = make_folder(tmp_path / "data", 3)
    vision = SimpleNamespace(HandLandmarker=Landmarker, HandLandmarkerOptions=SimpleNamespace)
    tasks = SimpleNamespace(vision=vision, BaseOptions=SimpleNamespace)
    image_format = SimpleNamespace(SRGB=1)
    fake = SimpleNamespace(tasks=tasks, Image=SimpleNamespace, ImageFormat=image_format)
    monkeypatch.setitem(sys.modules, "mediapipe", fake)
    with pytest.raises(FileNotFoundError, match="hand_landmarker.task is linked from https"):
        convert_keypoints.run_mediapipe(folder, tmp_path / "hand_landmarker.task")
    (tmp_path / "hand_landmarker.task").write_bytes(b"")
    read = through_file(tmp_path, convert_keypoints.run_mediapipe(folder, tmp_path / "hand_landmarker.task"))
    check_covers(read, read_records(folder), "k.json")
    hand = read[NAME][0]
    # The middle of a picture 32 pixels wide lies between pixels 15 and 16.
    assert hand.keypoints_2d[20].tolist() == [15.5, 7.5] and hand.hand_side == "right"
    assert hand.keypoints_3d[0].tolist() == [0.01, 0.02, 0.03] and hand.scores[3] == 0.75
    assert read["images/000001.png"] == []


def test_without_mediapipe_the_message_says_what_to_install(tmp_path, monkeypatch):
    real_import = builtins.__import__

    def no_mediapipe(name, *rest, **more):
        if name == "mediapipe":
            raise ImportError(name)
        return real_import(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", no_mediapipe)
    with pytest.raises(ValueError, match="pip install mediapipe"):
        convert_keypoints.run_mediapipe(tmp_path, tmp_path / "x")


def test_the_command_writes_what_the_reader_reads(tmp_path, monkeypatch, capsys):
    hand = {"pred_keypoints_2d": POINTS.tolist(), "box_center": [100, 50], "box_size": 200, "right": 1}
    (tmp_path / "dump.json").write_text(json.dumps({NAME: [hand], "images/000001.png": []}))
    out = tmp_path / "new" / "out.json"
    monkeypatch.setattr(sys, "argv", ["x", "hamer", str(tmp_path / "dump.json"), "--out", str(out)])
    convert_keypoints.main(convert_keypoints.parse_args())
    assert "1 hands in 2 pictures" in capsys.readouterr().out
    assert len(read_keypoint_predictions(out)[NAME]) == 1
