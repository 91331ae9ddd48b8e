"""Faults of fingers: what is painted is what the label map and the fingertips say afterwards."""

import numpy as np
import pytest

from hoi.geometry.hand import TIP_KEYPOINTS
from hoi.verify.faults import FAULTS, Fingers, with_fault

SIDE, SKIN, GROUND = 96, (200, 150, 120), (20, 60, 20)


def hand(gap: int = 13) -> Fingers:
    """A palm with five straight fingers upward, `gap` pixels apart."""
    labels, points = np.zeros((SIDE, SIDE), np.uint8), np.zeros((21, 2))
    labels[60:90, 12:80] = 1
    points[0] = (45, 88)
    for finger in range(5):
        x = 18 + gap * finger
        labels[25:61, x - 3 : x + 4] = 1
        points[4 * finger + 1 : 4 * finger + 5] = [(x, y) for y in (60, 50, 40, 26)]
    image = np.where(labels[..., None] == 1, SKIN, GROUND).astype(np.uint8)
    return Fingers(image, labels, points, np.concatenate([points[list(TIP_KEYPOINTS)], [[np.nan, np.nan]]]))


@pytest.mark.parametrize(("name", "count"), [("erased", 4), ("added", 6), ("fused", 4)])
def test_a_fault_changes_fingertips_labels_and_picture_together(name, count):
    before = hand()
    for seed in range(5):
        after = FAULTS[name](before, np.random.default_rng(seed))
        assert np.isfinite(after.tips[:, 0]).sum() == count
        changed = after.labels != before.labels
        assert 10 < changed.sum() < 400
        skin = np.abs(after.image.astype(int) - SKIN).sum(2) < np.abs(after.image.astype(int) - GROUND).sum(2)
        assert (skin == (after.labels == 1)).mean() > 0.99
        lost = np.isfinite(before.tips[:, 0]) & ~np.isfinite(after.tips[:, 0])
        assert not np.isfinite(after.points[list(TIP_KEYPOINTS)][lost[:-1]]).any()
        assert before.tips[-1, 0] != before.tips[-1, 0]  # the picture given stays as it was


def test_an_added_fingertip_stands_apart_from_the_others_and_outside_the_hand():
    for seed in range(5):
        after = FAULTS["added"](hand(), np.random.default_rng(seed))
        assert np.linalg.norm(after.tips[:-1] - after.tips[-1], axis=1).min() > 3 * after.radius
        x, y = np.rint(after.tips[-1]).astype(int)
        assert hand().labels[y, x] == 0 and after.labels[y, x] == 1


def test_where_nothing_can_be_painted_the_picture_stays():
    generator = np.random.default_rng(0)
    nothing = Fingers(hand().image, np.zeros((SIDE, SIDE), np.uint8), hand().points, hand().tips)
    assert with_fault(nothing, generator) is nothing  # no label map of a hand
    unseen = Fingers(hand().image, hand().labels, hand().points, np.full((6, 2), np.nan))
    assert all(paint(unseen, generator) is None for paint in FAULTS.values())
    apart = hand()
    apart.tips[[1, 3]] = np.nan
    assert FAULTS["fused"](apart, generator) is None  # no neighbours are seen
