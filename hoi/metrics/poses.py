"""Object poses, measured as NOCS does.  Dataset folder + JSON -> Objects -> mean AP.  Paper: Table 3.

A pose is 4x4 [sR|t]: it takes the model (box centre at the origin, box diagonal 1, y up, a mug's handle along x) to the
OpenCV camera, metres.  A size is the model's box, so that its corners lie at sR (+-size / 2) + t.  Files are read into
Objects, predictions are matched with true objects by overlap or by error, and what is matched makes average precision.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from trimesh.transformations import rotation_matrix

from hoi.common.arrays import numbers
from hoi.common.files import read_json
from hoi.data.folder import array_of, load_mesh
from hoi.export.nocs import Normalization
from hoi.metrics.choices import BOXES
from hoi.metrics.intervals import PERCENT, Results, Statistic, mean_of_parts
from hoi.verify.predictions import check_covers

CLASS_NAMES = ("background", "bottle", "bowl", "camera", "can", "laptop", "mug")  # by NOCS's class id
# About y.  To NOCS so is a mug whose handle is hidden; records do not say whether it shows, so a mug's turn counts, the
# stricter rule.
SYMMETRIC = ("bottle", "bowl", "can")
TURNS = 20  # of a symmetric object, tried for the best overlap, as published
IOU_COLUMNS = {"IoU25": 0.25, "IoU50": 0.5, "IoU75": 0.75}
POSE_COLUMNS = {"5deg2cm": (5, 2), "5deg5cm": (5, 5), "10deg2cm": (10, 2), "10deg5cm": (10, 5)}
POSE_IOU = 0.1  # poses are compared among boxes that overlap by more
PREDICTION_KEYS = {"category", "score", "model_to_camera", "size"}


@dataclass(frozen=True)
class Objects:
    """K objects of one picture.

    class_ids  (K,)       index into CLASS_NAMES
    poses      (K, 4, 4)  [sR|t]
    sizes      (K, 3)     of the model's box
    scores     (K,)       of predictions; ones for the truth
    """

    class_ids: np.ndarray
    poses: np.ndarray
    sizes: np.ndarray
    scores: np.ndarray

    def of_class(self, class_id: int) -> Objects:
        """Those of one class, the most certain first."""
        chosen = np.flatnonzero(self.class_ids == class_id)
        return self.pick(chosen[np.argsort(-self.scores[chosen], kind="stable")])

    def pick(self, chosen: np.ndarray) -> Objects:
        """Those of some indices, in their order, or where a mask (K,) is true."""
        return Objects(*(values[chosen] for values in vars(self).values()))

    def is_symmetric(self, k: int) -> bool:
        """Whether object k may be turned about y without a difference."""
        return CLASS_NAMES[self.class_ids[k]] in SYMMETRIC


def objects_of(class_ids: list[int], poses: Any, sizes: Any, scores: Any, place: str) -> Objects:
    """Check K objects; `place` names file and picture in messages.

    Raises ValueError for other shapes, numbers that are not finite and matrices without a rotation.
    """
    count = len(class_ids)
    if not count:  # [] has the shape (0,)
        return Objects(np.zeros(0, int), np.zeros((0, 4, 4)), np.zeros((0, 3)), np.zeros(0))
    poses = numbers(poses, (count, 4, 4), f"{place} model_to_camera")
    if np.abs(np.linalg.det(poses[:, :3, :3])).min() < 1e-12:
        raise ValueError(f"{place}: a pose has no rotation, its determinant is 0")
    sizes, scores = numbers(sizes, (count, 3), f"{place} size"), numbers(scores, (count,), f"{place} score")
    return Objects(np.array(class_ids), poses, sizes, scores)


def read_poses(
    path: str | Path, folder: Path, records: Sequence[dict[str, Any]], others: Sequence[str] = ()
) -> tuple[list[Objects], list[Objects]]:
    """True and predicted objects of each picture, from a file as POSE_FORMAT has it.

    folder, records  that predictions are about
    others           file names that may have predictions, too: pictures that are not measured
    Raises FileNotFoundError, or ValueError naming file and picture.
    """
    content = read_json(path, "pose file", kind=object)
    if not isinstance(content, dict) or not isinstance(content.get("predictions"), dict):
        raise ValueError(f'{path}: expected {{"predictions": {{file_name: [object, ...]}}}}')
    predictions = content["predictions"]
    check_covers(predictions, records, path, others)
    # Other categories are left out, as NOCS's protocol knows none; their predictions, if any, count for nothing.
    records = [record for record in records
               if record.get("category") in CLASS_NAMES[1:] and record.get("object_to_camera") is not None]  # fmt: skip
    if not records:
        known = ", ".join(CLASS_NAMES[1:])
        raise ValueError(f"{folder} has no record of a category that NOCS has ({known}) with a pose")
    models: dict[str, tuple[Normalization, np.ndarray]] = {}  # many records share a mesh
    names = [record["file_name"] for record in records]
    return ([true_objects(folder, record, models) for record in records],
            [_guess(predictions[name], f"{path}: {name}") for name in names])  # fmt: skip


def _guess(entries: Any, place: str) -> Objects:
    if not isinstance(entries, list):
        raise ValueError(f"{place} is a {type(entries).__name__}, expected a list with one entry an object")
    for entry in entries:
        if not isinstance(entry, dict) or set(entry) != PREDICTION_KEYS or entry["category"] not in CLASS_NAMES[1:]:
            expected = f"{sorted(PREDICTION_KEYS)}, category of {CLASS_NAMES[1:]}"
            raise ValueError(f"{place}: got {entry}, expected {expected}")
    class_ids = [CLASS_NAMES.index(entry["category"]) for entry in entries]
    poses, sizes, scores = ([entry[key] for entry in entries] for key in ("model_to_camera", "size", "score"))
    return objects_of(class_ids, poses, sizes, scores, place)


def true_objects(folder: Path, record: dict[str, Any], models: dict[str, tuple[Normalization, np.ndarray]]) -> Objects:
    """The one object of a record; models keeps what was read of each mesh for further records."""
    path = record["object_path"]
    if path not in models:
        vertices, _ = load_mesh(folder, record)
        normalization = Normalization.of(vertices)
        models[path] = normalization, np.ptp(normalization.model(vertices), axis=0)
    normalization, size = models[path]
    rotation, translation = normalization.pose(array_of(record, "object_to_camera"))
    model_to_camera = np.eye(4)
    model_to_camera[:3, :3], model_to_camera[:3, 3] = normalization.diagonal * rotation, translation
    class_id = CLASS_NAMES.index(record["category"])
    return objects_of([class_id], [model_to_camera], [size], [1.0], f"{folder} record {record['index']}")


def corners(model_to_camera: np.ndarray, size: np.ndarray) -> np.ndarray:
    """(8, 3) of a box of size (3,) in the camera frame."""
    signs = np.array(list(product((1, -1), repeat=3)))
    return signs * size / 2 @ model_to_camera[:3, :3].T + model_to_camera[:3, 3]


def box_overlap(first: np.ndarray, second: np.ndarray, boxes: str) -> float:
    """Intersection over union of two boxes given by their corners (8, 3); 0 where it is undefined.

    boxes  one of BOXES
    """
    # aabb: three intervals over the eight corners.  nocs: eight intervals, each over a corner's x, y and z, which is no
    # box at all; the published numbers are made with it, so it is here to compare with them.
    axis = 1 if boxes == "nocs" else 0
    low = np.maximum(first.min(axis=axis), second.min(axis=axis))
    high = np.minimum(first.max(axis=axis), second.max(axis=axis))
    volumes = [np.prod(np.ptp(points, axis=axis)) for points in (first, second)]
    common = np.prod(high - low) if (high >= low).all() else 0.0
    union = sum(volumes) - common
    return float(common / union) if union > 0 else 0.0


def iou_3d(predicted: Objects, i: int, true: Objects, k: int, boxes: str) -> float:
    """Of prediction i with true object k, the best over turns about y where the object is symmetric."""
    target, size = corners(true.poses[k], true.sizes[k]), predicted.sizes[i]
    if not true.is_symmetric(k):
        return box_overlap(corners(predicted.poses[i], size), target, boxes)
    turns = (rotation_matrix(2 * np.pi * turn / TURNS, [0, 1, 0]) for turn in range(TURNS))
    return max(box_overlap(corners(predicted.poses[i] @ turn, size), target, boxes) for turn in turns)


def pose_error(predicted: np.ndarray, true: np.ndarray, symmetric: bool) -> tuple[float, float]:
    """Degrees and centimetres between two [sR|t]; of a symmetric object the angle between the y axes."""
    # The determinant of sR is the cube of the scale.
    rotations = [pose[:3, :3] / np.cbrt(np.linalg.det(pose[:3, :3])) for pose in (predicted, true)]
    if symmetric:
        axes = [rotation[:, 1] / np.linalg.norm(rotation[:, 1]) for rotation in rotations]
        cosine = axes[0] @ axes[1]
    else:
        cosine = (np.trace(rotations[0] @ rotations[1].T) - 1) / 2
    shift = np.linalg.norm(predicted[:3, 3] - true[:3, 3])
    return float(np.degrees(np.arccos(np.clip(cosine, -1, 1)))), float(100 * shift)


def match(costs: np.ndarray, allowed: np.ndarray) -> np.ndarray:
    """Greedily match predictions, the most certain first, each with the allowed true object of the smallest cost.

    costs    (P, G);  allowed (P, G) bool
    returns  (P,) index of each prediction's true object, -1 for none
    """
    matched = np.full(len(costs), -1)
    for i, order in enumerate(np.argsort(costs, axis=1, kind="stable")):
        matched[i] = next((k for k in order if allowed[i, k] and k not in matched), -1)
    return matched


@dataclass
class Hits:
    """Predictions of one class over all pictures.

    true    (N,) objects of each picture that count as to be found
    there   (N,) objects of each picture
    rows    picture, score, whether right, of each prediction
    """

    true: np.ndarray
    there: np.ndarray
    rows: list[tuple[int, float, bool]] = field(default_factory=list)

    def extend(self, picture: int, scores: np.ndarray, matched: np.ndarray) -> None:
        """Add a picture's predictions: scores (P,), and matched (P,) as `match` gives it."""
        self.rows += [(picture, score, index >= 0) for score, index in zip(scores, matched, strict=True)]


def average_precision(hits: Hits) -> Statistic:
    """Area under the precision-recall curve, all points, with precision made non-increasing.

    0 when there are objects of which none counts (no prediction overlaps any), NaN without any.
    """
    ranked = sorted(hits.rows, key=lambda row: -row[1])
    pictures, right = np.array([row[0] for row in ranked], int), np.array([row[2] for row in ranked], bool)

    def statistic(draws: np.ndarray) -> np.ndarray:
        weights, true = draws[:, pictures], draws @ hits.true
        found = np.cumsum(weights * right, axis=1)
        precision = found / np.maximum(np.cumsum(weights, axis=1), 1e-300)  # a draw may begin with weights of 0
        precision = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
        area = (np.diff(found, axis=1, prepend=0) * precision).sum(axis=1)
        nothing = np.where(draws @ hits.there > 0, 0.0, np.nan)
        return np.divide(area, true, out=nothing, where=true > 0)

    return statistic


def average_precisions(
    true: Sequence[Objects], predicted: Sequence[Objects], boxes: str
) -> dict[str, dict[int, Statistic]]:
    """Average precision of every column of the paper's table for every class that occurs in the truth.

    true, predicted  one entry a picture
    boxes            one of BOXES
    returns          "IoU25" ... "10deg5cm" -> class id -> statistic over pictures
    Poses are compared among predictions and objects that overlap by more than 0.1; others leave the denominator, as
    published.
    """
    table: dict[str, dict[int, Statistic]] = {column: {} for column in (*IOU_COLUMNS, *POSE_COLUMNS)}
    for class_id in sorted({int(class_id) for objects in true for class_id in objects.class_ids} - {0}):
        there = np.array([(objects.class_ids == class_id).sum() for objects in true], dtype=float)
        hits = {column: Hits(there if column in IOU_COLUMNS else np.zeros(len(true)), there) for column in table}
        for picture, (truth, guess) in enumerate(zip(true, predicted, strict=True)):
            _add_picture(hits, picture, truth.of_class(class_id), guess.of_class(class_id), boxes)
        for column in table:
            table[column][class_id] = average_precision(hits[column])
    return table


def _add_picture(hits: dict[str, Hits], picture: int, true: Objects, predicted: Objects, boxes: str) -> None:
    """Add the objects of one class in one picture to the hits of every column."""
    shape = (len(predicted.scores), len(true.scores))
    iou = np.array([iou_3d(predicted, i, true, k, boxes) for i, k in np.ndindex(shape)]).reshape(shape)
    for column, threshold in IOU_COLUMNS.items():
        hits[column].extend(picture, predicted.scores, match(-iou, iou > threshold))
    overlapping = match(-iou, iou > POSE_IOU)
    predicted, true = predicted.pick(overlapping >= 0), true.pick(np.sort(overlapping[overlapping >= 0]))
    shape = (len(predicted.scores), len(true.scores))
    pairs = [pose_error(predicted.poses[i], true.poses[k], true.is_symmetric(k)) for i, k in np.ndindex(shape)]
    errors = np.reshape(pairs, (*shape, 2))
    for column, limits in POSE_COLUMNS.items():
        # Published: degrees and centimetres are added, as if they were of one kind.
        hits[column].extend(picture, predicted.scores, match(errors.sum(axis=2), (errors <= limits).all(axis=2)))
        hits[column].true[picture] = len(true.scores)


def add_pose_numbers(
    results: Results, true: Sequence[Objects], predicted: Sequence[Objects], boxes: str
) -> dict[str, dict[str, float]]:
    """Mean AP of the paper's columns, in percent over classes; returns the AP of each, column -> class -> percent.

    true, predicted  one entry a picture;  boxes  one of BOXES
    Raises ValueError when no picture has a true object.
    """
    table = average_precisions(true, predicted, boxes)
    classes = {class_id: CLASS_NAMES[class_id] for class_id in table["IoU25"]}
    if not classes:
        raise ValueError("no picture has a true object, so poses cannot be judged")
    for column, statistics in table.items():
        kind = "3D IoU" if column in IOU_COLUMNS else f"poses of objects that overlap by more than {POSE_IOU}"
        mean = mean_of_parts(list(statistics.values()))
        results.add(f"{column} mAP, % ({boxes})", lambda draws, mean=mean: 100 * mean(draws), len(true), "higher",
                    f"{kind}, mean over {', '.join(classes.values())}; {BOXES[boxes]}", PERCENT)  # fmt: skip
    once = np.ones((1, len(true)))
    return {column: {classes[c]: 100 * float(ap(once)[0]) for c, ap in of.items()} for column, of in table.items()}
