"""Scores of pictures against their own annotation.  Records + estimators -> `verification` dicts.

What a picture should show is its Truth, read from the record's files.  What it does show, estimators say: the verifier,
or other programs whose hands and contacts come by file.  choices.SCORES says what each number means; None stands for
"nothing to hold it against".
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from scipy import ndimage
from scipy.optimize import linear_sum_assignment
from tqdm import tqdm

from hoi.common.arrays import intersection_over_union
from hoi.common.files import sha256_of
from hoi.conditions import KEYPOINTS
from hoi.data.folder import CONDITION_KEYS, array_of, load_depth, load_image, load_label_map, load_picture, pictured
from hoi.geometry.hand import TIP_KEYPOINTS
from hoi.geometry.render import FLESH, HAND, OBJECT, joints_shown
from hoi.toyworld.looks import PALETTE
from hoi.toyworld.shading import CREAM, STRIPES, ambience
from hoi.toyworld.words import words_in
from hoi.verify import predictions as others
from hoi.verify.choices import GROUPS, PCK_THRESHOLD, SCORES, TIP_DISTANCE
from hoi.verify.verifier import Prediction, Verifier, load_verifier, predict

BATCH = 16  # pictures that are read together and shown to the verifier at once
TIP_FLESH = 0.014  # metres: more than half a finger before a fingertip, and something else covers it
LUMINANCE = np.array([0.299, 0.587, 0.114])  # of red, green, blue (Rec. 601)
FEW_PIXELS = 50  # fewer say nothing of nine harmonics
COLOR_DISTANCE = 0.17  # of colours in [0, 1]: 98 % of 310 drawn pictures are nearer to what they should be
STRIPE_SHARE, CAST_SHARE = 0.2, 0.5  # of its stripes and of the place's tint in a thing's mean colour; fitted to these
# Scores of which a perfect picture reaches a record's own best, short of 1; cuts may be given as a share of it.
RELATIVE = ("iou_hand", "iou_object", "iou_foreground", "shading_hand", "shading_object", "pck", "pck_visible",
            "fingertips", "confidence")  # fmt: skip


@dataclass(frozen=True)
class Truth:
    """What a picture should show.

    label_map     (H, W) 0/1/2, or None
    keypoints_2d  (21, 2) pixels, or None
    visible       (21,) bool: in the picture and not covered, or None without keypoints
    inside        (21,) bool: in the picture, or None without keypoints
    text          the caption
    normal        (H, W, 3) uint8, the condition picture, or None
    tips          (N, 2) pixels, fingertips from the thumb on, NaN where one cannot be seen; None without keypoints
    """

    label_map: np.ndarray | None
    keypoints_2d: np.ndarray | None
    visible: np.ndarray | None
    inside: np.ndarray | None
    text: str
    normal: np.ndarray | None = None
    tips: np.ndarray | None = None


def load_truth(folder: Path, record: dict[str, Any]) -> Truth:
    """Raises FileNotFoundError or ValueError naming a missing or damaged file."""
    text, label_map = record.get("text") or "", None
    if record.get("segmentation_file_name") is not None:
        label_map = load_label_map(folder, record)
    elif all(record.get(key) is None for key in CONDITION_KEYS):  # scenery
        label_map = np.zeros((record["height"], record["width"]), np.uint8)
    drawn = record.get("normal_file_name") is not None and label_map is not None
    normal = load_picture(folder, record, "normal_file_name") if drawn else None
    if record.get("keypoints_2d") is None:
        return Truth(label_map, None, None, None, text, normal)
    points = array_of(record, "keypoints_2d")
    size = np.array([record["width"], record["height"]])  # x first, as points are
    inside = ((points > -0.5) & (points < size - 0.5)).all(axis=1)  # pixel centres are at integers
    visible = near = inside
    if label_map is not None:  # else nobody knows what covers what
        depth = z = None
        if record.get("depth_file_name") is not None and record.get("keypoints_3d") is not None:
            depth, z = load_depth(folder, record), array_of(record, "keypoints_3d")[:, 2]
        visible, near = (inside & joints_shown(points, label_map, depth, z, flesh) for flesh in (FLESH, TIP_FLESH))
    tips = np.where(near[:, None], points, np.nan)[list(TIP_KEYPOINTS)]
    return Truth(label_map, points, visible, inside, text, normal, tips)


def region_scores(label_map: np.ndarray, truth: Truth) -> dict[str, float | None]:
    """Overlaps of a label map (H, W) with the true one; empty without one."""
    true = truth.label_map
    if true is None:
        return {}
    pairs = {
        "iou_hand": (label_map == HAND, true == HAND),
        "iou_object": (label_map == OBJECT, true == OBJECT),
        "iou_foreground": (label_map > 0, true > 0),
    }
    return {name: intersection_over_union(*pair) if pair[1].any() else None for name, pair in pairs.items()}


def luminance_explained(image: np.ndarray, normal: np.ndarray, mask: np.ndarray) -> float | None:
    """Share of the luminance inside a mask (H, W) that its normals explain: R^2 of nine real spherical harmonics.

    image, normal  (H, W, 3) uint8, the latter the condition picture (1 - n) / 2
    returns        0 to 1; 0 where all has one luminance; None of FEW_PIXELS.  A pixel of the border, which is mixed
                   with what is behind, is left out
    Source: a dull surface in distant light reflects hardly more than these nine (Ramamoorthi and Hanrahan 2001).
    """
    mask = ndimage.binary_erosion(mask)
    if mask.sum() < FEW_PIXELS:
        return None
    n = 1 - normal[mask] / 127.5
    x, y, z = (n / np.linalg.norm(n, axis=1, keepdims=True)).T
    harmonics = np.stack([np.ones_like(x), x, y, z, x * y, y * z, x * z, x * x - y * y, 3 * z * z - 1], axis=1)
    light = image[mask] @ LUMINANCE
    left = light - harmonics @ np.linalg.lstsq(harmonics, light, rcond=None)[0]
    return float(1 - left.var() / light.var()) if light.var() > 1 else 0.0  # of a grey level: rounding alone


def shading_scores(image: np.ndarray, truth: Truth) -> dict[str, float | None]:
    """How far hand and object are lit as their normals are; empty without normals."""
    if truth.normal is None:
        return {}
    parts = {"shading_hand": HAND} | ({} if words_in(truth.text)["material"] else {"shading_object": OBJECT})
    return {name: luminance_explained(image, truth.normal, truth.label_map == part) for name, part in parts.items()}


def color_seen(image: np.ndarray, label_map: np.ndarray, material: str | None) -> str | None:
    """Colour word of the object of a picture (H, W, 3) uint8 by the toy world's palette, lit as the place around is.

    label_map  (H, W), the true one, not the seen one: a green mug that was drawn elsewhere is no green mug here
    returns    the nearest word, or None where even that is farther than COLOR_DISTANCE: a brownish red is neither
    """
    around, cast = (image / 255).astype(np.float32), 1.0
    if not label_map.all():
        around[label_map > 0] = around[label_map == 0].mean(axis=0)
        cast = 1 + CAST_SHARE * (np.mean(ambience(around), axis=0) - 1)
    mean = image[label_map == OBJECT].mean(axis=0) / 255
    away = {}
    for word, color in PALETTE.items():
        share = STRIPE_SHARE if material == "striped" else 0.0
        lit = ((1 - share) * np.array(color) + share * np.array(STRIPES.get(word, CREAM))) * cast
        away[word] = float(np.linalg.norm(mean - lit))
    nearest = min(away, key=away.__getitem__)
    return nearest if away[nearest] < COLOR_DISTANCE else None


def word_scores(
    image: np.ndarray, prediction: Prediction, backgrounds: Sequence[str], materials: Sequence[str], truth: Truth
) -> dict[str, float]:
    """Whether the picture (H, W, 3) uint8 has the words of its caption, as far as that names any that we know.

    backgrounds, materials  those that the verifier tells apart
    """
    words, scores = words_in(truth.text), {}
    if words["color"] is not None and truth.label_map is not None and (truth.label_map == OBJECT).any():
        scores["color_right"] = float(color_seen(image, truth.label_map, words["material"]) == words["color"])
    if words["material"] in materials:  # one that the verifier was never shown, it cannot see
        scores["material_right"] = float(prediction.material == words["material"])
    if words["background"] in backgrounds:
        scores["background_right"] = float(prediction.background == words["background"])
    return scores


def tip_score(seen: np.ndarray, truth: Truth) -> dict[str, float]:
    """Fingertips that are seen (N, 2) against those that can be: a lost, added or fused one lowers it.

    returns  F1, 2 matched / (seen + true), each matched at most once and TIP_DISTANCE apart; 1 for none of both; empty
             where the truth is unsaid
    """
    if truth.tips is None:
        return {}
    total = len(seen) + np.isfinite(truth.tips[:, 0]).sum()
    if not total:
        return {"fingertips": 1.0}
    limit = TIP_DISTANCE * np.ptp(truth.keypoints_2d, axis=0).max()
    near = np.linalg.norm(seen[:, None] - truth.tips, axis=2) < limit  # NaN is near to nothing
    matched = near[linear_sum_assignment(near, maximize=True)].sum()
    return {"fingertips": float(2 * matched / total)}


def keypoint_scores(
    points: np.ndarray | None, confidence: np.ndarray | None, truth: Truth
) -> dict[str, float | None]:
    """points (21, 2) or None when no hand was found; confidence (21,) or None; the truth has keypoints.

    Raises ValueError when these lie in one point.
    """
    box = np.ptp(truth.keypoints_2d, axis=0).max()  # of all 21 joints, those outside the picture too: the hand's size
    if not box > 0:
        raise ValueError("its keypoints_2d lie in one point, so no error is relative to the hand")
    visible, inside = truth.visible, truth.inside
    scores = {"joints_visible": int(visible.sum()), "joints_hidden": int((inside & ~visible).sum())}
    scores["detected"] = float(points is not None)  # the verifier always places 21 points, so it is 1
    if points is None:
        points = np.full((KEYPOINTS, 2), np.inf)
    elif confidence is not None and inside.any():
        scores["confidence"] = float(confidence[inside].mean())
    error = np.linalg.norm(points - truth.keypoints_2d, axis=1)
    for group, joints in zip(GROUPS, (inside, visible, inside & ~visible), strict=True):
        if joints.any():
            found = np.isfinite(error[joints]).all()  # JSON has no infinity
            scores["keypoint_error_px" + group] = float(error[joints].mean()) if found else None
            scores["keypoint_error_relative" + group] = float(error[joints].mean() / box) if found else None
            scores["pck" + group] = float((error[joints] < PCK_THRESHOLD * box).mean())
    return scores


@dataclass(frozen=True)
class Estimators:
    """Who says what the pictures show.

    verifier   the network, or None
    keypoints  hands of another program by file_name, whose joints are scored in place of the network's; or None
    contacts   states of the contact detector by file_name; or None
    about      what the records and the report say of them: "verifier", "keypoints"
    """

    verifier: Verifier | None
    keypoints: dict[str, list[others.HandPrediction]] | None = None
    contacts: dict[str, int] | None = None
    about: dict[str, str] = field(default_factory=dict)

    def predict(self, images: list[np.ndarray]) -> list[Prediction | None]:
        """What the verifier sees in each picture (H, W, 3) uint8."""
        if self.verifier is None:
            return [None] * len(images)
        chunks = (images[k : k + BATCH] for k in range(0, len(images), BATCH))
        return [prediction for chunk in chunks for prediction in predict(self.verifier, chunk)]

    def score(
        self, name: str, image: np.ndarray, truth: Truth, prediction: Prediction | None
    ) -> dict[str, float | None]:
        """All SCORES of the picture of that file name, rounded to six digits, None where there is nothing to compare.

        image       (H, W, 3) uint8
        prediction  what the verifier sees in it, as `predict` gave it; or None
        Raises ValueError when the conditions have another size than the picture, or the true keypoints no extent.
        """
        true = truth.label_map
        if true is not None and true.shape != image.shape[:2]:
            raise ValueError(f"the picture is {image.shape[:2]}, its segmentation {true.shape} (height, width)")
        scores: dict[str, float | None] = dict.fromkeys(SCORES)
        if prediction is not None:
            scores |= region_scores(prediction.label_map, truth)
            scores |= shading_scores(image, truth) | tip_score(prediction.tips, truth)
            scores |= word_scores(image, prediction, self.verifier.backgrounds, self.verifier.materials, truth)
        if truth.keypoints_2d is not None and self.keypoints is not None:
            hand = others.closest_hand(self.keypoints[name], truth.keypoints_2d)
            joints = (None, None) if hand is None else (hand.keypoints_2d, hand.scores)
            scores |= keypoint_scores(*joints, truth)
        elif truth.keypoints_2d is not None and prediction is not None:
            scores |= keypoint_scores(prediction.keypoints_2d, prediction.confidence, truth)
        if self.contacts is not None:
            scores["contact_seen"] = float(self.contacts[name] == others.PORTABLE_OBJECT)
        # Six digits: more is rounding of float32, and records stay readable.
        return {name: None if value is None else round(value, 6) for name, value in scores.items()}


def load_estimators(
    folder: Path, records: list[dict[str, Any]], verifier: Path | None, keypoints: Path | None, contacts: Path | None,
    device: str = "cpu",
) -> Estimators:  # fmt: skip
    """Read what is given of a verifier's file and the predictions of other programs (choices.FORMATS).

    Raises FileNotFoundError or ValueError when a file is absent, damaged, or of other pictures than the folder's.
    """
    pictures = pictured(folder, records)  # before minutes are spent on a folder of conditions
    network = None if verifier is None else load_verifier(verifier).to(device)
    hands = None if keypoints is None else others.read_keypoint_predictions(keypoints)
    states = None if contacts is None else others.read_contact_states(contacts)
    for path, predictions in ((keypoints, hands), (contacts, states)):
        if predictions is not None:
            others.check_covers(predictions, pictures, path)
    # The hash, since several verifiers may have one name.
    name = "none" if verifier is None else f"{verifier.name} {sha256_of(verifier)[:12]}"
    about = {"verifier": name, "keypoints": name if hands is None else keypoints.name}
    return Estimators(network, hands, states, about)


def score_records(folder: Path, records: list[dict[str, Any]], estimators: Estimators) -> Iterator[dict[str, Any]]:
    """`verification` of every record in turn: SCORES, how they were made, and `problem`, None or why there are none."""

    def read(record: dict[str, Any]) -> tuple[np.ndarray, Truth] | str:
        try:
            return load_image(folder, record), load_truth(folder, record)
        except (ValueError, OSError) as error:
            return str(error)

    with ThreadPoolExecutor(max_workers=2) as readers:  # PNG decoding leaves Python's lock free
        for start in tqdm(range(0, len(records), BATCH), desc="verifying", unit="batch"):
            chunk = records[start : start + BATCH]
            inputs = list(readers.map(read, chunk))
            predictions = iter(estimators.predict([each[0] for each in inputs if not isinstance(each, str)]))
            for record, each in zip(chunk, inputs, strict=True):
                scores, problem = dict.fromkeys(SCORES), each
                if not isinstance(each, str):
                    try:
                        scores = estimators.score(record["file_name"], *each, next(predictions))
                        problem = None
                    except ValueError as error:
                        problem = f"{record['file_name']}: {error}"
                yield scores | estimators.about | {"problem": problem}
