"""hoi/verify/predictions.py: predictions of other programs are read exactly or refused by name."""

import json

import numpy as np
import pytest

from hoi.verify import predictions as predictions_module
from hoi.verify.predictions import HandPrediction

POINTS = [[float(joint), 2.0 * joint] for joint in range(21)]
NAME = "images/000000.png"


def written(folder, predictions) -> str:
    path = folder / "predictions.json"
    path.write_text(json.dumps({"predictions": predictions}))
    return str(path)


def test_keypoints_and_what_is_optional_are_read_as_they_were_written(tmp_path):
    full = {"keypoints_2d": POINTS, "scores": [0.5] * 21, "hand_side": "left", "keypoints_3d": [[0, 1, 2]] * 21}
    path = written(tmp_path, {NAME: [full, {"keypoints_2d": POINTS, "scores": None}], "images/000001.png": []})
    first, second = predictions_module.read_keypoint_predictions(path)[NAME]
    np.testing.assert_array_equal(first.keypoints_2d, POINTS)
    np.testing.assert_array_equal(first.keypoints_3d[20], [0, 1, 2])
    assert first.hand_side == "left" and first.scores.tolist() == [0.5] * 21
    assert second.scores is None and second.hand_side is None and second.keypoints_3d is None
    assert predictions_module.read_keypoint_predictions(path)["images/000001.png"] == []


@pytest.mark.parametrize(
    "entry, message",
    [
        ({"keypoints_2d": POINTS[:20]}, r"000000.png hand 0 keypoints_2d is \(20, 2\), expected \(21, 2\)"),
        ({"keypoints_2d": [*POINTS[:20], [0.0, float("nan")]]}, "hand 0 keypoints_2d holds 1 numbers .* not finite"),
        ({"keypoints_2d": [*POINTS[:20], [0.0]]}, r"keypoints_2d is \(21,\), expected \(21, 2\)"),
        ({"keypoints_2d": POINTS, "scores": [0.5] * 20 + ["1"]}, "scores holds '1', expected numbers"),
        ({"keypoints_2d": POINTS, "scores": [True] * 21}, "scores holds True, expected numbers"),
        ({"keypoints_2d": POINTS, "scores": [10**400] * 21}, "scores holds 1000.*, expected numbers"),
        ({"keypoints_2d": POINTS, "scores": [1.0]}, r"scores is \(1,\), expected \(21,\)"),
        ({"keypoints_2d": POINTS, "hand_side": "Right"}, 'hand_side is \'Right\', expected "left", "right" or null'),
        ({"keypoints_2d": POINTS, "keypoints3d": []}, "keypoints3d.*optional .*keypoints_3d"),
        ({"points": POINTS}, "expected an object with .*keypoints_2d"),
    ],
)
def test_a_wrong_hand_is_refused_with_its_place(tmp_path, entry, message):
    with pytest.raises(ValueError, match=message):
        predictions_module.read_keypoint_predictions(written(tmp_path, {NAME: [entry]}))


@pytest.mark.parametrize(
    "content, message", [("{", "not JSON"), ("[]", "expected"), ('{"predictions": []}', "expected")]
)
def test_another_file_is_refused(tmp_path, content, message):
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        predictions_module.read_keypoint_predictions(tmp_path / "x.json")
    with pytest.raises(FileNotFoundError, match="convert_keypoints.py --help"):
        predictions_module.read_keypoint_predictions(tmp_path / "absent.json")


@pytest.mark.parametrize("state", [5, -1, True, 3.0, "3"])
def test_a_contact_state_is_one_of_five(tmp_path, state):
    entry = {"box": [0, 0, 1, 1], "score": 0.9, "state": state}
    with pytest.raises(ValueError, match="state is .*, expected 0 to 4"):
        predictions_module.read_contact_states(written(tmp_path, {NAME: [entry]}))


def test_the_state_of_a_picture_is_that_of_the_surest_hand_above_the_threshold(tmp_path):
    hands = [
        {"box": [0, 0, 9, 9], "score": 0.6, "state": 0},
        {"box": [1, 1, 5, 5], "score": 0.9, "state": 3, "hand_side": "right", "offset": [0.1, 1, 0]},
    ]
    unsure = [hand | {"score": 0.49} for hand in hands]
    pictures = {"a": hands, "b": hands[::-1], "c": hands[:1], "d": unsure, "e": []}
    states = predictions_module.read_contact_states(written(tmp_path, pictures))
    assert list(states.values()) == [3, 3, 0, -1, -1]
    assert predictions_module.CONTACT_STATES[predictions_module.PORTABLE_OBJECT] == "portable object"


def test_predictions_must_be_of_exactly_the_pictures():
    records = [{"file_name": name} for name in "abcde"]
    predictions_module.check_covers({"a": [], "b": []}, records[1::-1], "f.json")
    predictions_module.check_covers({"a": [], "x": []}, records[:1], "f.json", others=["x", "y"])  # damaged pictures
    with pytest.raises(ValueError, match=r"f.json: 1 pictures are not in the dataset \(c\)"):
        predictions_module.check_covers({"a": [], "c": []}, records[:1], "f.json")
    with pytest.raises(ValueError, match=r"4 pictures of the dataset have no entry \(b, c, d and 1 more\); write \[\]"):
        predictions_module.check_covers({"a": []}, records, "f.json")


def test_the_closest_of_several_hands_is_taken():
    target = np.array(POINTS)
    hands = [HandPrediction(target + offset) for offset in (9.0, -1.0, 4.0)]
    assert predictions_module.closest_hand(hands, target) is hands[1]
    assert predictions_module.closest_hand([], target) is None
