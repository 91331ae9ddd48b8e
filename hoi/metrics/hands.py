"""How well hands are found again in pictures.  Records + predictions -> PCK, MPJPE, contact recall.  Paper: Sec. 4.2.

The paper gives neither PCK's threshold nor its normaliser; here an error counts relative to the longer side of the
target joints' box, as MMPose does for hands, and an undetected hand has every joint wrong.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy.spatial.transform import Rotation

from hoi.conditions import KEYPOINTS
from hoi.data.folder import array_of
from hoi.metrics.intervals import PERCENT, SHARE, Results, mean_of, mean_of_groups, ratio_of
from hoi.verify.predictions import CONTACT_STATES, NO_HAND, PORTABLE_OBJECT, HandPrediction, closest_hand

WRIST = 0  # the root joint


def umeyama(source: np.ndarray, target: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
    """The similarity (never a reflection) that takes source (N, 3) to target (N, 3) with the least squared error.

    returns  scale, rotation (3, 3), translation (3,):  x -> scale * rotation @ x + translation
    Raises ValueError for points on a line or fewer than three, which fix no rotation.
    Source: Umeyama 1991, eq. 40 to 43; the rotation is Kabsch's, by scipy.
    """
    centred, centred_target = source - source.mean(axis=0), target - target.mean(axis=0)
    singular = np.linalg.svd(centred_target.T @ centred, compute_uv=False)
    # Of joints on a line, such as a stretched finger alone, any turn about that line fits equally well.
    if singular[1] <= 1e-9 * singular[0]:  # rank 1 or 0, up to rounding
        raise ValueError("points on a line or in one place have no rotation; at least three others are needed")
    rotation = Rotation.align_vectors(centred_target, centred)[0].as_matrix()
    scale = float((centred_target * (centred @ rotation.T)).sum() / (centred**2).sum())
    return scale, rotation, target.mean(axis=0) - scale * rotation @ source.mean(axis=0)


def errors_3d_mm(predicted: np.ndarray, target: np.ndarray) -> tuple[float, float]:
    """Mean joint error of (21, 3) metres in mm, root-aligned and after Procrustes alignment."""
    rooted = (predicted - predicted[WRIST]) - (target - target[WRIST])
    scale, rotation, translation = umeyama(predicted, target)
    aligned = scale * predicted @ rotation.T + translation - target
    return tuple(1000 * np.linalg.norm(error, axis=1).mean() for error in (rooted, aligned))


def hand_errors(record: dict[str, Any], hands: list[HandPrediction]) -> tuple[np.ndarray, np.ndarray, float, float]:
    """Compare the hand that lies nearest to a record's keypoints_2d with them.

    returns  pixels (21,); relative (21,), to the longer side of the target joints' box; both infinite without a hand;
             mean joint error in mm with both wrists at the origin, and after the best similarity; NaN without 3D
    Raises ValueError for a record whose joints have no extent.
    """
    target = array_of(record, "keypoints_2d")
    side = np.ptp(target, axis=0).max()
    if not side > 0:
        raise ValueError(f"record {record['index']}: its keypoints_2d lie in one point")
    hand = closest_hand(hands, target)
    if hand is None:
        # Infinite in 2D, so that every joint is wrong; no number in 3D, where means are over hands that were found.
        return np.full(KEYPOINTS, np.inf), np.full(KEYPOINTS, np.inf), np.nan, np.nan
    pixels = np.linalg.norm(hand.keypoints_2d - target, axis=1)
    if hand.keypoints_3d is None or record.get("keypoints_3d") is None:
        return pixels, pixels / side, np.nan, np.nan
    return pixels, pixels / side, *errors_3d_mm(hand.keypoints_3d, array_of(record, "keypoints_3d"))


def add_keypoint_numbers(
    results: Results, records: Sequence[dict[str, Any]], predictions: Mapping[str, list[HandPrediction]],
    thresholds: Sequence[float],
) -> None:  # fmt: skip
    """PCK at each threshold, detection rate, mean pixel error; MPJPE where 3D predictions are.

    Raises ValueError when no record has keypoints_2d.
    """
    marked = [record for record in records if record.get("keypoints_2d") is not None]
    if not marked:
        raise ValueError("no record has keypoints_2d, so keypoint predictions cannot be judged")
    if len(marked) < len(records):
        results.note(f"{len(records) - len(marked)} pictures without annotated keypoints count for no keypoint number")
    n, rows = len(marked), [hand_errors(record, predictions[record["file_name"]]) for record in marked]
    pixels, relative, root_mm, procrustes_mm = (np.array(column) for column in zip(*rows, strict=True))
    # Below the threshold, as MMPose and the verifier's scores have it: an error of just the threshold is wrong.
    for threshold in thresholds:
        results.add(f"PCK@{threshold:g}", mean_of((relative < threshold).mean(axis=1)), n, "higher",
                    f"share of 21 joints closer than {threshold:g} of the longer side of the target joints' box; "
                    "undetected hands have all joints wrong", SHARE)  # fmt: skip
    found = np.isfinite(pixels[:, 0])
    results.add("hand detection rate", mean_of(found), n, "higher", "share of pictures in which a hand was found",
                SHARE)  # fmt: skip
    # Infinite errors times 0 would be NaN: they are replaced before they are left out.
    total = np.where(found[:, None], pixels, 0).mean(axis=1)
    results.add("keypoint error, px", ratio_of(total, found), n, "lower", "mean distance over detected hands")
    measured = np.isfinite(root_mm)
    if not measured.any():
        return
    for name, values, how in (
        ("MPJPE, mm", root_mm, "with both wrists at the origin"),
        ("PA-MPJPE, mm", procrustes_mm, "after the best similarity (Procrustes)"),
    ):
        results.add(name, ratio_of(np.where(measured, values, 0), measured), n, "lower",
                    f"mean 3D distance over 21 joints of {measured.sum()} hands predicted in 3D, {how}")  # fmt: skip


def add_contact_numbers(results: Results, records: Sequence[dict[str, Any]], contact: Mapping[str, int] | None) -> None:
    """Contact recall of the detector, over pictures and as the mean of categories; beside it contact by geometry.

    contact  state of each picture's hand by file_name; None: geometry alone
    Pictures whose annotation says that nothing touches (an approach) are left out of recall.
    """
    known = [record for record in records if record.get("contact") is not None]
    if known:
        results.add("contact by geometry, %", mean_of(np.array([100.0 * record["contact"] for record in known])),
                    len(known), "higher", "share of records whose annotated meshes of hand and object touch",
                    PERCENT)  # fmt: skip
    if contact is None:
        return
    # Records of others, which do not say, count as touching: the paper's pictures all show final grasps.
    touching = [record for record in records if record.get("contact") is not False]
    if len(touching) < len(records):
        results.note(f"{len(records) - len(touching)} pictures annotated as not touching count for no contact recall")
    if not touching:
        raise ValueError("every record says that nothing touches, so contact recall has nothing to find")
    states = np.array([contact[record["file_name"]] for record in touching])
    n, portable = len(states), 100.0 * (states == PORTABLE_OBJECT)
    results.add("contact recall, %", mean_of(portable), n, "higher",
                "share of pictures whose most certain hand is in state 3, portable object; no hand is none",
                PERCENT)  # fmt: skip
    categories = np.array([str(record.get("category")) for record in touching])
    if len(set(categories)) > 1:  # the paper's 95.49 is the plain mean of its four categories
        results.add("contact recall, mean of categories, %", mean_of_groups(portable, categories), n, "higher",
                    f"unweighted mean over {', '.join(sorted(set(categories)))}, as in the paper", PERCENT)  # fmt: skip
    histogram = Counter("no hand" if state == NO_HAND else CONTACT_STATES[state] for state in states.tolist())
    results.note("contact states: " + ", ".join(f"{name} {count}" for name, count in histogram.most_common()))
