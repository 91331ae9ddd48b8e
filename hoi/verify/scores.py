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

Who looks at the pictures, and what scores follow.  Records + network or prediction files -> `verification` dicts.

What a picture is held against: its pixels and its own annotation.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from hoi.common.arrays import intersection_over_union
from hoi.common.files import sha256_of
from hoi.data.folder import CONDITION_KEYS, load_depth, load_image, load_label_map
from hoi.geometry.render import HAND, OBJECT, joints_shown
from hoi.toyworld.looks import nearest_color
from hoi.toyworld.words import words_in
from hoi.verify.predictions import (
    PORTABLE_OBJECT,
    ContactPrediction,
    HandPrediction,
    check_covers,
    closest_hand,
    contact_state,
    read_contact_predictions,
    read_keypoint_predictions,
)
from hoi.verify.verifier import JOINTS, Prediction, Verifier, load_verifier, predict

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


def region_scores(label_map: np.ndarray, truth: Truth) -> dict[str, float | None]:
    true = truth.label_map
    if true is None:
        return {}
    pairs = {
        "iou_hand": (label_map == HAND, true == HAND),
        "iou_object": (label_map == OBJECT, true == OBJECT),
        "iou_foreground": (label_map > 0, true > 0),
    }
    return {name: intersection_over_union(*pair) if pair[1].any() else None for name, pair in pairs.items()}


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
    seen: Prediction | None,
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


BATCH = 16


@dataclass(frozen=True)
class Estimators:
    """Who says what the pictures show.

    verifier   the network, or None
    keypoints  predictions of another program by file_name, scored in place of the network's; or None
    contacts   of the contact detector; or None
    names      what the records and the report call them
    """

    verifier: Verifier | None
    keypoints: dict[str, list[HandPrediction]] | None = None
    contacts: dict[str, list[ContactPrediction]] | None = None
    names: dict[str, str] = field(default_factory=lambda: {"verifier": "none", "keypoints": "none"})

    def predict(self, images: list[np.ndarray]) -> list[Prediction | None]:
        """What the verifier sees in each picture (H, W, 3) uint8."""
        if self.verifier is None:
            return [None] * len(images)
        return [seen for k in range(0, len(images), BATCH) for seen in predict(self.verifier, images[k : k + BATCH])]

    def drawn(self, records: list[dict[str, Any]], images: list[np.ndarray]) -> list[tuple[Any, Any]]:
        """Of each record what was scored: label map (H, W) or None, keypoints (21, 2) or None."""
        pairs = [(None, None) if seen is None else (seen.label_map, seen.keypoints_2d) for seen in self.predict(images)]
        if self.keypoints is None:
            return pairs
        true = [true_keypoints(record) for record in records]
        hands = [None if t is None else closest_hand(self.keypoints[r["file_name"]], t)
                 for r, t in zip(records, true, strict=True)]  # fmt: skip
        return [(m, None if hand is None else hand.keypoints_2d) for (m, _), hand in zip(pairs, hands, strict=True)]


def load_estimators(
    folder: Path, records: list[dict[str, Any]], verifier: Path | None, keypoints: Path | None, contacts: Path | None
) -> Estimators:
    """Raises FileNotFoundError or ValueError when a file is absent, damaged, or of other pictures than the folder's."""
    pictures = [record["file_name"] for record in records if record["file_name"] is not None]
    if not pictures:
        what = "no records" if not records else f"{len(records)} records, none of them with a picture"
        raise ValueError(f"{folder} has {what}; sample.py --data DIR makes pictures from conditions")
    network = None if verifier is None else load_verifier(verifier)
    hands = None if keypoints is None else read_keypoint_predictions(keypoints)
    states = None if contacts is None else read_contact_predictions(contacts)
    for path, predictions in ((keypoints, hands), (contacts, states)):
        if predictions is not None:
            check_covers(predictions, pictures, path)
    name = "none" if verifier is None else f"{verifier.name} {sha256_of(verifier)[:12]}"
    names = {"verifier": name, "keypoints": name if hands is None else keypoints.name}
    return Estimators(network, hands, states, names)


def read_scored_picture(folder: Path, record: dict[str, Any]) -> tuple[np.ndarray, Truth] | str:
    """Picture and truth, or what is wrong with them."""
    try:
        return load_rgb(folder, record), load_truth(folder, record)
    except (ValueError, OSError) as error:
        return str(error)


def score_records(
    folder: Path, records: list[dict[str, Any]], witnesses: Estimators, pck_threshold: float
) -> Iterator[dict[str, Any]]:
    """`verification` of every record in turn: SCORES, how they were made, and `problem`, None or why there are none."""
    about = witnesses.names | {"pck_threshold": pck_threshold}
    with ThreadPoolExecutor(max_workers=2) as readers:
        for start in tqdm(range(0, len(records), BATCH), desc="verifying", unit="batch"):
            chunk = records[start : start + BATCH]
            read = list(readers.map(lambda record: read_scored_picture(folder, record), chunk))
            sound = [k for k, each in enumerate(read) if not isinstance(each, str)]
            seen = dict(zip(sound, witnesses.predict([read[k][0] for k in sound]), strict=True))
            for k, record in enumerate(chunk):
                scores, problem = dict.fromkeys(SCORES), read[k] if k not in seen else None
                if problem is None:
                    try:
                        scores = _scores(record["file_name"], *read[k], seen[k], witnesses, pck_threshold)
                    except ValueError as error:
                        problem = f"{record['file_name']}: {error}"
                yield scores | about | {"problem": problem}


def _scores(
    name: str, image: np.ndarray, truth: Truth, seen: Prediction | None, witnesses: Estimators, pck_threshold: float
) -> dict[str, float | None]:
    backgrounds = () if witnesses.verifier is None else witnesses.verifier.backgrounds
    hands = None if witnesses.keypoints is None else witnesses.keypoints[name]
    scores = score_picture(image, truth, seen, backgrounds, hands, pck_threshold)
    if witnesses.contacts is not None:
        scores["contact_seen"] = float(contact_state(witnesses.contacts[name]) == PORTABLE_OBJECT)
    return scores


def load_rgb(folder: Path, record: dict[str, Any]) -> np.ndarray:
    """(H, W, 3) uint8.  Raises FileNotFoundError or ValueError naming a picture that is missing, damaged or not RGB."""
    image = load_image(folder, record)
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(
            f"{record['file_name']} is {image.shape} {image.dtype}, expected (H, W, 3) uint8: an RGB picture"
        )
    return image


def true_label_map(folder: Path, record: dict[str, Any]) -> np.ndarray | None:
    """(H, W) 0/1/2 of the record's segmentation; all 0 for scenery, which has no conditions at all; None if unsaid."""
    if record.get("segmentation_file_name") is not None:
        return load_label_map(folder, record)
    if all(record.get(key) is None for key in CONDITION_KEYS):
        return np.zeros((record["height"], record["width"]), np.uint8)
    return None


def true_keypoints(record: dict[str, Any]) -> np.ndarray | None:
    """(21, 2) pixels, None when the record has none.  Raises ValueError for another number of them, or for NaN."""
    if record.get("keypoints_2d") is None:
        return None
    points = np.asarray(record["keypoints_2d"], dtype=np.float64)
    if points.shape != (2 * JOINTS,) or not np.isfinite(points).all():
        raise ValueError(f"{record['file_name']}: keypoints_2d is {points.shape}, expected {2 * JOINTS} finite numbers")
    return points.reshape(JOINTS, 2)
