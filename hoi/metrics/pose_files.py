"""Object poses by file.  JSON, or JSON with a dataset folder -> true and predicted objects of each picture.

Predictions for a dataset folder; one list a picture, one entry an object, [] where none was found:

    {"predictions": {"images/000000.png": [{"category": "mug", "score": 0.9, "model_to_camera": [[sR, t], [0, 0, 0, 1]],
                                            "size": [0.5, 0.6, 0.7]}]}}

Or truth and predictions together, a list with one entry a picture, in the names of NOCS's own result files (arrays as
nested lists; read a pickle of theirs where you trust it, and write it as JSON):

    [{"gt_class_ids": [6], "gt_RTs": [[[...]]], "gt_scales": [[...]], "gt_handle_visibility": [1],
      "pred_class_ids": [6], "pred_RTs": [[[...]]], "pred_scales": [[...]], "pred_scores": [0.9]}]

model_to_camera and RTs are [sR|t] of hoi/metrics/pose_metrics.py; size and scales are the model's box.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hoi.common.files import read_json
from hoi.data.folder import load_mesh
from hoi.export.nocs import Normalization
from hoi.metrics.pose_metrics import CLASSES, Objects
from hoi.verify.predictions import check_covers, numbers

PREDICTION_KEYS = {"category", "score", "model_to_camera", "size"}


def objects_of(class_ids: Any, poses: Any, sizes: Any, handle_visible: Any, scores: Any, place: str) -> Objects:
    """Check K objects; `place` names file and picture in messages.

    Raises ValueError for an unknown class, other shapes, numbers that are not finite and matrices without a rotation.
    """
    ids = _column(class_ids, f"{place} class_ids")
    count = len(ids)
    poses = numbers(poses, (count, 4, 4), f"{place} poses") if count else np.zeros((0, 4, 4))
    sizes = numbers(sizes, (count, 3), f"{place} sizes") if count else np.zeros((0, 3))
    if not set(ids.tolist()) <= set(range(len(CLASSES))):
        raise ValueError(f"{place} has classes {class_ids}, expected whole numbers from 0 to {len(CLASSES) - 1}")
    if count and np.abs(np.linalg.det(poses[:, :3, :3])).min() < 1e-12:
        raise ValueError(f"{place}: a pose has no rotation, its determinant is 0")
    handles = numbers(handle_visible, (count,), f"{place} handle_visibility") > 0
    return Objects(ids.astype(int), poses, sizes, handles, numbers(scores, (count,), f"{place} scores"))


def _column(values: Any, place: str) -> np.ndarray:
    """A list of numbers, of any length."""
    if not isinstance(values, list):
        raise ValueError(f"{place} is {values!r}, expected a list")
    return numbers(values, (len(values),), place)


def read_nocs_list(path: str | Path, content: Sequence[dict[str, Any]]) -> tuple[list[Objects], list[Objects]]:
    """Truth and predictions of each picture."""
    true, predicted = [], []
    for number, entry in enumerate(content):
        place = f"{path} picture {number}"
        try:
            gt = [entry[f"gt_{key}"] for key in ("class_ids", "RTs", "scales", "handle_visibility")]
            guess = [entry[f"pred_{key}"] for key in ("class_ids", "RTs", "scales", "scores")]
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"{place} has no {error}; python -m hoi.metrics --help says where the format is"
            ) from error
        ones = [np.ones(np.size(class_ids)) for class_ids in (gt[0], guess[0])]
        true.append(objects_of(*gt, ones[0], f"{place} gt"))
        predicted.append(objects_of(*guess[:3], ones[1], guess[3], f"{place} pred"))
    return true, predicted


def read_folder_poses(
    path: str | Path,
    content: dict[str, Any],
    folder: Path,
    records: Sequence[dict[str, Any]],
    others: Sequence[str] = (),
) -> tuple[list[Objects], list[Objects]]:
    """Truth from the records of a dataset folder whose category NOCS has, predictions from the file.

    others  file names that may have predictions, too: pictures that are not measured
    """
    predictions = content["predictions"]
    names = [record["file_name"] for record in records]
    check_covers(predictions, [*names, *(name for name in others if name in predictions)], path)
    true, predicted, sizes = [], [], {}
    for record in records:
        if record.get("category") not in CLASSES[1:] or record.get("object_to_camera") is None:
            continue
        true.append(_truth(folder, record, sizes))
        place, entries = f"{path}: {record['file_name']}", predictions[record["file_name"]]
        if not isinstance(entries, list):
            raise ValueError(f"{place} is a {type(entries).__name__}, expected a list with one entry an object")
        for entry in entries:
            if not isinstance(entry, dict) or set(entry) != PREDICTION_KEYS or entry["category"] not in CLASSES[1:]:
                raise ValueError(f"{place}: got {entry}, expected {sorted(PREDICTION_KEYS)}, category of {CLASSES[1:]}")
        class_ids = [CLASSES.index(entry["category"]) for entry in entries]
        columns = ([entry[key] for entry in entries] for key in ("model_to_camera", "size"))
        predicted.append(objects_of(class_ids, *columns, [True] * len(entries), [e["score"] for e in entries], place))
    if not true:
        raise ValueError(f"{folder} has no record of a category that NOCS has ({', '.join(CLASSES[1:])}) with a pose")
    return true, predicted


def _truth(folder: Path, record: dict[str, Any], known: dict[str, tuple[Normalization, np.ndarray]]) -> Objects:
    path = record["object_path"]
    if path not in known:
        vertices, _ = load_mesh(folder, record)
        normalization = Normalization.of(vertices)
        known[path] = normalization, np.ptp(normalization.model(vertices), axis=0)
    normalization, size = known[path]
    rotation, translation = normalization.pose(np.reshape(record["object_to_camera"], (4, 4)))
    model_to_camera = np.eye(4)
    model_to_camera[:3, :3], model_to_camera[:3, 3] = normalization.diagonal * rotation, translation
    class_id = CLASSES.index(record["category"])
    return objects_of([class_id], [model_to_camera], [size], [True], [1.0], f"{folder} record {record['index']}")


def read_poses(
    path: str | Path, folder: Path | None, records: Sequence[dict[str, Any]] | None, others: Sequence[str] = ()
) -> tuple[list[Objects], list[Objects]]:
    """True and predicted objects of each picture, from either form.

    Raises FileNotFoundError, or ValueError naming file and picture.
    """
    content = read_json(path)
    if isinstance(content, list) and content:
        return read_nocs_list(path, content)
    if not isinstance(content, dict) or not isinstance(content.get("predictions"), dict):
        raise ValueError(f'{path}: expected {{"predictions": {{file_name: [object, ...]}}}} or a list of pictures')
    if records is None:
        raise ValueError(f"{path} holds no truth; give the dataset folder that it is about as --fake DIR")
    return read_folder_poses(path, content, folder, records, others)
