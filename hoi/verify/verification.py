"""Scores of one picture against its own conditions.  What is seen + what should be -> a flat dict of numbers or None.

    iou_hand, iou_object, iou_foreground   of label maps; None where the conditions show no such thing
    color_right, background_right          1 when the object's colour and the background are those of the text, else 0
    keypoint_error_px                      mean distance of the joints, pixels
    keypoint_error_relative                the same over the longer side of the box around the 21 true joints
    pck                                    share of joints closer than `pck_threshold` (0.2) times that side
        ..._visible, ..._hidden            the same over joints that can be seen, and over those that something covers
    joints_visible, joints_hidden          how many there are; joints outside the picture are not scored
    confidence                             mean over the scored joints, 0 to 1
    detected                               0 when another program (--keypoints) found no hand: its pck is 0, errors None
    contact_seen                           1 when the detector (--contacts) says that the hand holds something
None is "nothing to hold it against".
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hoi.data.folder import load_depth
from hoi.geometry.render import HAND, OBJECT, joints_shown
from hoi.toyworld.looks import nearest_color
from hoi.toyworld.words import words_in
from hoi.verify.estimators import HandPrediction, closest_hand
from hoi.verify.scores import true_keypoints, true_label_map
from hoi.verify.verifier import Seen

PCK_THRESHOLD = 0.2  # of the hand box, the usual choice for hands in pictures (MMPose)
GROUPS = ("", "_visible", "_hidden")
KEYPOINT_SCORES = tuple(
    name + group for name in ("keypoint_error_px", "keypoint_error_relative", "pck") for group in GROUPS
)
SCORES = (
    "iou_hand", "iou_object", "iou_foreground", "color_right", "background_right", *KEYPOINT_SCORES,
    "joints_visible", "joints_hidden", "confidence", "detected", "contact_seen",
)  # fmt: skip


@dataclass(frozen=True)
class Truth:
    """What a picture should show.

    label_map     (H, W) 0/1/2, or None
    keypoints_2d  (21, 2) pixels, or None
    visible       (21,) bool: in the picture and not covered, or None without keypoints
    inside        (21,) bool: in the picture, or None without keypoints
    text          the caption
    """

    label_map: np.ndarray | None
    keypoints_2d: np.ndarray | None
    visible: np.ndarray | None
    inside: np.ndarray | None
    text: str


def load_truth(folder: Path, record: dict[str, Any]) -> Truth:
    """Raises FileNotFoundError or ValueError naming a missing or damaged file."""
    label_map, text = true_label_map(folder, record), record.get("text") or ""
    points = true_keypoints(record)
    if points is None:
        return Truth(label_map, None, None, None, text)
    size = np.array([record["width"], record["height"]])
    inside = ((points > -0.5) & (points < size - 0.5)).all(axis=1)
    depth = z = None
    if record.get("depth_file_name") is not None and record.get("keypoints_3d") is not None:
        depth, z = load_depth(folder, record), np.reshape(record["keypoints_3d"], (21, 3))[:, 2]
    visible = inside if label_map is None else inside & joints_shown(points, label_map, depth, z)
    return Truth(label_map, points, visible, inside, text)


def intersection_over_union(predicted: np.ndarray, true: np.ndarray) -> float | None:
    """Of two boolean masks; None when the true one is empty."""
    return float((predicted & true).sum() / (predicted | true).sum()) if true.any() else None


def region_scores(label_map: np.ndarray, truth: Truth) -> dict[str, float | None]:
    true = truth.label_map
    if true is None:
        return {}
    return {
        "iou_hand": intersection_over_union(label_map == HAND, true == HAND),
        "iou_object": intersection_over_union(label_map == OBJECT, true == OBJECT),
        "iou_foreground": intersection_over_union(label_map > 0, true > 0),
    }


def word_scores(image: np.ndarray, background: str, backgrounds: Sequence[str], truth: Truth) -> dict[str, float]:
    """Whether the picture has the words of its caption, as far as that names any that we know."""
    words, scores = words_in(truth.text), {}
    if words["color"] is not None and truth.label_map is not None and (truth.label_map == OBJECT).any():
        mean = image[truth.label_map == OBJECT].mean(axis=0) / 255
        scores["color_right"] = float(nearest_color(mean) == words["color"])
    if words["background"] in backgrounds:
        scores["background_right"] = float(background == words["background"])
    return scores


def keypoint_scores(
    points: np.ndarray | None, confidence: np.ndarray | None, truth: Truth, pck_threshold: float
) -> dict[str, float | None]:
    """points (21, 2) or None when no hand was found; confidence (21,) or None.  Empty without true keypoints.

    Raises ValueError when these lie in one point.
    """
    if truth.keypoints_2d is None:
        return {}
    box = np.ptp(truth.keypoints_2d, axis=0).max()
    if not box > 0:
        raise ValueError("its keypoints_2d lie in one point, so no error is relative to the hand")
    visible, inside = truth.visible, truth.inside
    scores = {"joints_visible": int(visible.sum()), "joints_hidden": int((inside & ~visible).sum())}
    scores["detected"] = float(points is not None)
    if points is None:
        points = np.full((21, 2), np.inf)
    elif confidence is not None and inside.any():
        scores["confidence"] = float(confidence[inside].mean())
    error = np.linalg.norm(points - truth.keypoints_2d, axis=1)
    for group, joints in zip(GROUPS, (inside, visible, inside & ~visible), strict=True):
        if joints.any():
            found = np.isfinite(error[joints]).all()
            scores["keypoint_error_px" + group] = float(error[joints].mean()) if found else None
            scores["keypoint_error_relative" + group] = float(error[joints].mean() / box) if found else None
            scores["pck" + group] = float((error[joints] < pck_threshold * box).mean())
    return scores


def score_picture(
    image: np.ndarray,
    truth: Truth,
    seen: Seen | None,
    backgrounds: Sequence[str] = (),
    hands: list[HandPrediction] | None = None,
    pck_threshold: float = PCK_THRESHOLD,
) -> dict[str, float | None]:
    """All SCORES of one picture but contact_seen, rounded to six digits, None where there is nothing to compare.

    image   (H, W, 3) uint8
    seen    what the verifier sees, backgrounds the words that it knows; or None
    hands   what another program sees; its keypoints are scored in place of the verifier's, the closest hand of several
    Raises ValueError when the conditions have another size than the picture, or the true keypoints no extent.
    """
    if truth.label_map is not None and truth.label_map.shape != image.shape[:2]:
        raise ValueError(f"the picture is {image.shape[:2]}, its segmentation {truth.label_map.shape} (height, width)")
    scores: dict[str, float | None] = dict.fromkeys(SCORES)
    if seen is not None:
        scores |= region_scores(seen.label_map, truth) | word_scores(image, seen.background, backgrounds, truth)
    if hands is not None and truth.keypoints_2d is not None:
        hand = closest_hand(hands, truth.keypoints_2d)
        found = (None, None) if hand is None else (hand.keypoints_2d, hand.scores)
        scores |= keypoint_scores(*found, truth, pck_threshold)
    elif hands is None and seen is not None:
        scores |= keypoint_scores(seen.keypoints_2d, seen.confidence, truth, pck_threshold)
    return {name: None if value is None else round(value, 6) for name, value in scores.items()}


def mean_scores(rows: Sequence[dict[str, float | None]], names: Sequence[str]) -> dict[str, float | None]:
    """Mean of each score over the rows that have it; None where none has."""
    values = {name: [row[name] for row in rows if row[name] is not None] for name in names}
    return {name: float(np.mean(numbers)) if numbers else None for name, numbers in values.items()}
