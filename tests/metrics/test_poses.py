"""Poses of objects: hand-computed cases, and the published protocol written out plainly."""

import json

import numpy as np
import pytest
import trimesh
from scipy.spatial.transform import Rotation

from hoi.metrics.intervals import Results
from hoi.metrics.poses import (
    Hits,
    Objects,
    add_pose_numbers,
    average_precision,
    average_precisions,
    box_overlap,
    corners,
    iou_3d,
    match,
    pose_error,
    read_poses,
)

BOTTLE, MUG = 1, 6


def pose(angles_deg=(0, 0, 0), translation=(0, 0, 1), scale: float = 0.2) -> np.ndarray:
    matrix = np.eye(4)
    matrix[:3, :3] = scale * Rotation.from_euler("xyz", angles_deg, degrees=True).as_matrix()
    matrix[:3, 3] = translation
    return matrix


def objects(*entries, scores=None) -> Objects:
    """Entries are (class, pose)."""
    count = len(entries)
    ids, poses = zip(*entries, strict=True) if entries else ((), ())
    return Objects(
        np.array(ids, dtype=int),
        np.reshape(poses, (count, 4, 4)),
        np.tile([0.5, 0.7, 0.5], (count, 1)),
        np.ones(count) if scores is None else np.array(scores),
    )


def value(statistics: dict) -> dict[int, float]:
    return {class_id: float(ap(np.ones((1, 2)))[0]) for class_id, ap in statistics.items()}


# --- boxes and poses ---


def test_overlap_of_shifted_boxes_as_published_and_as_it_should_be():
    first = corners(pose(translation=(1, 1, 1), scale=1), np.array([0.3, 0.2, 0.25]))
    second = first + [0.05, 0, 0]
    assert box_overlap(first, second, "aabb") == pytest.approx(0.25 / 0.35)  # 0.714
    assert box_overlap(first, second, "nocs") == pytest.approx(0.176, abs=5e-4)
    cube = corners(pose(translation=(1, 1, 1), scale=1), np.full(3, 0.2))
    assert (box_overlap(cube, cube, "aabb"), box_overlap(cube, cube, "nocs")) == (pytest.approx(1), 0)  # 0/0 there
    assert box_overlap(first, first + [0.5, 0, 0], "aabb") == 0


def test_a_symmetric_object_may_be_turned_about_y_and_a_mug_may_not():
    size = np.array([[0.7, 0.5, 0.2]])  # far from round, to see the turn
    for class_id, expected in ((BOTTLE, 1), (MUG, 0.2 / 1.2)):
        true = Objects(np.array([class_id]), pose()[None], size, np.ones(1))
        turned = Objects(np.array([class_id]), pose((0, 90, 0))[None], size, np.ones(1))
        assert iou_3d(turned, 0, true, 0, "aabb") == pytest.approx(expected, abs=1e-6)


def test_pose_errors_are_degrees_and_centimetres_whatever_the_scale():
    true, predicted = pose(scale=0.2), pose((0, 0, 8), (0.03, 0, 1.04), scale=0.5)
    assert pose_error(predicted, true, False) == pytest.approx((8, 5))
    about_y = pose((0, 33, 0))
    assert pose_error(about_y, true, True) == pytest.approx((0, 0), abs=1e-5)
    assert pose_error(about_y, true, False)[0] == pytest.approx(33)
    assert pose_error(pose((180, 0, 0)), true, True)[0] == pytest.approx(180)


def test_boxes_are_matched_by_score_then_overlap_and_strictly_above_the_threshold():
    iou = np.array([[0.6, 0.9], [0.8, 0.85], [0.5, 0.5]])
    assert match(-iou, iou > 0.5).tolist() == [1, 0, -1]
    assert match(-iou, iou > 0.85).tolist() == [1, -1, -1]
    assert match(-iou[2:], iou[2:] > 0.5).tolist() == [-1]


def test_average_precision_of_a_hand_computed_ranking():
    # Four objects; by score right, wrong, right, right, wrong: precision 1, 1/2, 2/3, 3/4, 3/5, made 1, 3/4, 3/4, 3/4.
    hits = Hits(np.array([3.0, 1.0]), np.array([3.0, 1.0]))
    hits.extend(0, np.array([0.9, 0.7, 0.2]), np.array([0, 1, -1]))
    hits.extend(1, np.array([0.8, 0.5]), np.array([-1, 0]))
    ap = average_precision(hits)
    assert ap(np.ones((1, 2)))[0] == pytest.approx((1 + 0.75 + 0.75) / 4)
    # The first picture twice: right, right, wrong, right, right, right, ... of 7.
    assert ap(np.array([[2.0, 1.0]]))[0] == pytest.approx((2 + 3 * 5 / 6) / 7)


def test_perfect_poses_have_all_columns_full_and_a_turned_mug_fails_by_degrees_alone():
    true = [objects((BOTTLE, pose()), (MUG, pose((20, 30, 0), (0.3, 0, 1)))), objects((MUG, pose()))]
    for boxes in ("nocs", "aabb"):
        table = average_precisions(true, true, boxes)
        assert list(table) == ["IoU25", "IoU50", "IoU75", "5deg2cm", "5deg5cm", "10deg2cm", "10deg5cm"]
        for statistics in table.values():
            assert value(statistics) == {BOTTLE: pytest.approx(1), MUG: pytest.approx(1)}
    turned = [true[0], objects((MUG, pose((0, 7, 0), (0, 0, 1.03))))]
    table = average_precisions(true, turned, "aabb")
    columns = {column: value(statistics)[MUG] for column, statistics in table.items()}
    assert columns["5deg2cm"] == columns["5deg5cm"] == columns["10deg2cm"] == pytest.approx(0.5)
    assert columns["10deg5cm"] == pytest.approx(1)


def test_objects_without_an_overlapping_prediction_leave_the_pose_columns_but_not_the_boxes():
    true = [objects((MUG, pose()), (MUG, pose(translation=(0.6, 0, 1)))), objects()]
    table = average_precisions(true, [objects((MUG, pose())), objects()], "aabb")
    assert value(table["IoU50"])[MUG] == pytest.approx(0.5)
    assert value(table["5deg2cm"])[MUG] == pytest.approx(1)
    table = average_precisions(true, [objects(), objects()], "aabb")
    assert value(table["5deg2cm"])[MUG] == value(table["IoU25"])[MUG] == 0


def test_predictions_of_another_class_are_wrong_and_the_mean_is_over_classes():
    true = [objects((MUG, pose())), objects((BOTTLE, pose()))]
    results = Results(resamples=50, seed=0)
    by_class = add_pose_numbers(
        results, true, [objects((BOTTLE, pose())), objects((BOTTLE, pose()), scores=[0.5])], "nocs"
    )
    assert by_class["IoU75"] == {"bottle": pytest.approx(50), "mug": 0}  # the first bottle is no mug
    first = results.measurements[0]
    assert (first.name, first.value, first.n) == ("IoU25 mAP, % (nocs)", pytest.approx(25), 2)
    assert first.low <= 25 <= first.high


# --- files ---


def test_a_dataset_folders_truth_is_the_box_of_its_mesh_in_nocs_axes(tmp_path):
    """A mug of 4 x 2 x 6 cm (z up, handle along x), whose box is not centred, in a turned pose."""
    mesh = trimesh.creation.box(extents=[0.04, 0.02, 0.06])
    mesh.apply_translation([0.01, 0, 0.03])
    (tmp_path / "objects").mkdir()
    mesh.export(tmp_path / "objects" / "mug.ply")
    object_to_camera = pose((10, 20, 30), (0.05, 0.02, 0.5), scale=1)
    record = {"index": 0, "file_name": "images/000000.png", "category": "mug", "object_path": "objects/mug.ply",
              "object_to_camera": object_to_camera.ravel().tolist()}  # fmt: skip
    diagonal = np.linalg.norm([0.04, 0.02, 0.06])
    upright = np.array([[1.0, 0, 0], [0, 0, -1], [0, 1, 0]])  # NOCS (x, y up, z) -> ours (x, y, z up)
    expected = np.eye(4)
    expected[:3, :3] = diagonal * object_to_camera[:3, :3] @ upright
    expected[:3, 3] = object_to_camera[:3, :3] @ [0.01, 0, 0.03] + object_to_camera[:3, 3]
    size = np.array([0.04, 0.06, 0.02]) / diagonal
    entry = {"category": "mug", "score": 0.9, "model_to_camera": expected.tolist(), "size": size.tolist()}
    path = tmp_path / "poses.json"
    path.write_text(json.dumps({"predictions": {"images/000000.png": [entry]}}))
    true, predicted = read_poses(path, tmp_path, [record])
    np.testing.assert_allclose(true[0].poses, predicted[0].poses, atol=1e-8)
    np.testing.assert_allclose(true[0].sizes, predicted[0].sizes, atol=1e-6)
    path.write_text(json.dumps({"predictions": {"images/000000.png": [], "images/000009.png": []}}))
    with pytest.raises(ValueError, match="poses.json: 1 pictures are not in the dataset .images/000009.png"):
        read_poses(path, tmp_path, [record])
    path.write_text(json.dumps({"predictions": {"images/000000.png": [{**entry, "category": "plate"}]}}))
    with pytest.raises(ValueError, match="poses.json: images/000000.png: got .*expected .*model_to_camera"):
        read_poses(path, tmp_path, [record])
    for false, message in (
        (None, "is a NoneType, expected a list"), ([3], "got 3, expected"),
        ([entry | {"model_to_camera": np.eye(3).tolist()}], r"model_to_camera is \(1, 3, 3\), expected \(1, 4, 4\)"),
        ([entry | {"model_to_camera": np.zeros((4, 4)).tolist()}], "a pose has no rotation"),
        ([entry | {"score": float("nan")}], "score holds 1 numbers that are not finite"),
        ([entry, entry | {"size": [1, 2]}], "size .*expected"),
    ):
        path.write_text(json.dumps({"predictions": {"images/000000.png": false}}))
        with pytest.raises(ValueError, match=f"poses.json: images/000000.png:? {message}"):
            read_poses(path, tmp_path, [record])
    path.write_text("[]")
    with pytest.raises(ValueError, match="poses.json: expected .\"predictions\": .file_name: .object, ...]"):
        read_poses(path, tmp_path, [record])
    with pytest.raises(ValueError, match="no record of a category that NOCS has"):
        path.write_text(json.dumps({"predictions": {"images/000000.png": []}}))
        read_poses(path, tmp_path, [record | {"category": "plate"}])
