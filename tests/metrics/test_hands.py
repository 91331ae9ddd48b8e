"""Numbers of predicted hands: hand-computed PCK, alignment by Umeyama's formula, contact by the published rule."""

import numpy as np
import pytest
from scipy.optimize import least_squares
from scipy.spatial.transform import Rotation

from hoi.metrics.hands import add_contact_numbers, add_keypoint_numbers, errors_3d_mm, hand_errors, umeyama
from hoi.metrics.intervals import Results, as_table
from hoi.verify.predictions import HandPrediction


def record(index: int, keypoints_2d=None, **more) -> dict:
    """Joints on a grid of 100 x 40 pixels."""
    grid = np.stack([np.linspace(0, 100, 21), np.tile([0, 20, 40], 7)], axis=1)
    points = grid if keypoints_2d is None else keypoints_2d
    return {"index": index, "file_name": f"images/{index:06d}.png", "keypoints_2d": np.ravel(points).tolist(), **more}


def target(of: dict) -> np.ndarray:
    return np.reshape(of["keypoints_2d"], (21, 2))


def numbers(results: Results) -> dict[str, float]:
    return {item.name: item.value for item in results.measurements}


def test_pck_counts_joints_within_a_share_of_the_longer_side_and_a_missed_hand_is_all_wrong():
    records = [record(0), record(1), record(2)]
    off = target(records[0]) + 0.0
    off[:7, 0] += 9  # of 100 pixels
    off[7:14, 1] += 15
    predictions = {
        "images/000000.png": [HandPrediction(off)],
        "images/000001.png": [HandPrediction(target(records[1]))],
        "images/000002.png": [],
    }
    results = Results(0, 0)
    add_keypoint_numbers(results, records, predictions, [0.05, 0.1, 0.2])
    found = numbers(results)
    assert found["PCK@0.05"] == pytest.approx((1 / 3 + 1 + 0) / 3)
    assert found["PCK@0.1"] == pytest.approx((2 / 3 + 1 + 0) / 3)
    assert found["PCK@0.2"] == pytest.approx((1 + 1 + 0) / 3)
    assert found["hand detection rate"] == pytest.approx(2 / 3)
    assert found["keypoint error, px"] == pytest.approx((9 / 3 + 15 / 3 + 0) / 2)
    assert "MPJPE, mm" not in found


def test_a_joint_at_the_threshold_is_wrong_as_in_mmpose_and_in_the_verifier():
    one = record(0)
    results = Results(0, 0)
    add_keypoint_numbers(results, [one], {one["file_name"]: [HandPrediction(target(one) + [0, 25])]}, [0.25, 0.26])
    assert [numbers(results)[f"PCK@{threshold}"] for threshold in (0.25, 0.26)] == [0, 1]


def test_of_several_hands_the_nearest_counts():
    one = record(0)
    hands = [HandPrediction(target(one) + 300, hand_side="left"), HandPrediction(target(one) + [3, 4])]
    pixels, relative, *_ = hand_errors(one, hands)
    np.testing.assert_allclose(pixels, 5)
    np.testing.assert_allclose(relative, 0.05)


def test_umeyama_of_a_quarter_turn_twice_as_large_and_moved_is_that():
    source = np.array([[0.0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]])
    target = np.array([[1.0, 2, 3], [1, 4, 3], [-1, 2, 3], [1, 2, 5]])  # x -> y, y -> -x, doubled, + (1, 2, 3)
    scale, rotation, translation = umeyama(source, target)
    assert scale == pytest.approx(2)
    np.testing.assert_allclose(rotation, [[0, -1, 0], [1, 0, 0], [0, 0, 1]], atol=1e-12)
    np.testing.assert_allclose(translation, [1, 2, 3], atol=1e-12)
    np.testing.assert_allclose(scale * source @ rotation.T + translation, target, atol=1e-12)


def test_umeyama_never_mirrors_and_takes_points_of_a_plane():
    source = np.random.default_rng(0).normal(size=(10, 3))
    scale, rotation, _ = umeyama(source, source * [1, 1, -1])
    assert np.linalg.det(rotation) == pytest.approx(1)
    assert scale < 0.99
    flat = source * [1, 1, 0]
    turn = Rotation.from_euler("xyz", [30, 40, 50], degrees=True).as_matrix()
    np.testing.assert_allclose(umeyama(flat, flat @ turn.T)[1], turn, atol=1e-9)


def test_umeyama_is_the_least_squares_fit():
    generator = np.random.default_rng(1)
    source = generator.normal(size=(21, 3))
    target = 0.7 * source @ Rotation.from_rotvec([0.3, 2, -1]).as_matrix().T + 0.1 * generator.normal(size=(21, 3))

    def residuals(numbers: np.ndarray) -> np.ndarray:  # scale, rotation vector, translation
        return (numbers[0] * Rotation.from_rotvec(numbers[1:4]).apply(source) + numbers[4:] - target).ravel()

    best = least_squares(residuals, [1, 0.2, 1.8, -0.8, 0, 0, 0], xtol=1e-14, ftol=1e-14).x
    scale, rotation, translation = umeyama(source, target)
    assert scale == pytest.approx(best[0], rel=1e-5)
    np.testing.assert_allclose(rotation, Rotation.from_rotvec(best[1:4]).as_matrix(), atol=1e-5)
    np.testing.assert_allclose(translation, best[4:], atol=1e-5)


@pytest.mark.parametrize("points", [np.arange(5)[:, None] * np.ones(3), np.zeros((4, 3)), np.eye(3)[:2]])
def test_points_on_a_line_have_no_similarity(points):
    with pytest.raises(ValueError, match="points on a line or in one place have no rotation"):
        umeyama(points, points)


def similarity_as_published(source: np.ndarray, target: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
    """Umeyama 1991, eq. 38 to 43, letter by letter."""
    x, y = source - source.mean(axis=0), target - target.mean(axis=0)
    u, d, vt = np.linalg.svd(y.T @ x / len(x))
    s = np.diag([1.0, 1.0, np.sign(np.linalg.det(u) * np.linalg.det(vt))])
    rotation = u @ s @ vt
    scale = np.trace(np.diag(d) @ s) / (x**2).sum(axis=1).mean()
    return scale, rotation, target.mean(axis=0) - scale * rotation @ source.mean(axis=0)


@pytest.mark.parametrize("mirrored", [False, True])
def test_umeyama_is_the_published_formula(mirrored):
    for seed in range(100):
        generator = np.random.default_rng(seed)
        source = generator.normal(size=(21, 3))
        target = generator.uniform(0.1, 3) * Rotation.random(random_state=seed).apply(source) + generator.normal(size=3)
        target = (target * [1, 1, -1] if mirrored else target) + 0.2 * generator.normal(size=(21, 3))
        found = umeyama(source, target)
        for ours, published in zip(found, similarity_as_published(source, target), strict=True):
            np.testing.assert_allclose(ours, published, atol=1e-13)


def test_3d_errors_ignore_what_each_alignment_takes_away():
    generator = np.random.default_rng(0)
    hand = generator.normal(0, 0.05, (21, 3))
    assert errors_3d_mm(hand + [0.1, 0.2, 0.9], hand) == pytest.approx((0, 0), abs=1e-9)
    turned = 1.3 * Rotation.from_rotvec([0.2, 0.5, 1]).apply(hand) + 0.4
    rooted, aligned = errors_3d_mm(turned, hand)
    assert rooted > 20 and aligned == pytest.approx(0, abs=1e-9)
    further = hand.copy()
    further[4] += [0.021, 0, 0]  # one of 21 joints, 21 mm
    rooted, aligned = errors_3d_mm(further, hand)
    assert rooted == pytest.approx(1) and aligned > 0.5  # the others move to meet it
    one = record(0, keypoints_3d=hand.ravel().tolist())
    results = Results(0, 0)
    add_keypoint_numbers(
        results,
        [one, record(1)],
        {
            one["file_name"]: [HandPrediction(target(one), keypoints_3d=further)],
            "images/000001.png": [HandPrediction(target(one))],
        },
        [0.2],
    )
    assert numbers(results)["MPJPE, mm"] == pytest.approx(1)


def test_contact_is_state_3_of_the_most_certain_hand_over_all_pictures():
    states = {0: 3, 1: 4, 2: -1, 3: -1, 4: 3, 5: 3}
    records = [record(i, category="mug" if i < 4 else "can", contact=True) for i in range(5)]
    records.append(record(5, category="can", contact=False))  # an approach: the detector's hand counts for nothing
    results = Results(0, 0)
    add_contact_numbers(results, records, {f"images/{i:06d}.png": state for i, state in states.items()})
    found = numbers(results)
    assert found["contact recall, %"] == pytest.approx(100 * 2 / 5)
    assert found["contact recall, mean of categories, %"] == pytest.approx((25 + 100) / 2)
    assert found["contact by geometry, %"] == pytest.approx(100 * 5 / 6)
    assert any("1 pictures annotated as not touching" in note for note in results.notes)
    assert any("no hand 2" in note and "portable object 2" in note for note in results.notes)


def test_records_without_keypoints_are_counted_and_a_hand_in_one_point_is_named():
    bare = record(1) | {"keypoints_2d": None}
    results = Results(0, 0)
    add_keypoint_numbers(results, [record(0), bare], {"images/000000.png": [], "images/000001.png": []}, [0.2])
    assert numbers(results)["PCK@0.2"] == 0 and np.isnan(numbers(results)["keypoint error, px"])
    assert results.measurements[0].n == 1
    assert results.notes == ["1 pictures without annotated keypoints count for no keypoint number"]
    assert "| -     |" in as_table(results.measurements)
    assert results.measurements[-1].as_json()["value"] is None
    with pytest.raises(ValueError, match="no record has keypoints_2d"):
        add_keypoint_numbers(results, [bare], {"images/000001.png": []}, [0.2])
    with pytest.raises(ValueError, match="record 3: its keypoints_2d lie in one point"):
        hand_errors(record(3, np.ones((21, 2))), [])
    with pytest.raises(ValueError, match="every record says that nothing touches"):
        add_contact_numbers(results, [record(0, contact=False)], {"images/000000.png": -1})
