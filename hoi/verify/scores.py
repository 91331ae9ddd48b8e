"""What a picture is held against: its pixels and its own annotation."""

from pathlib import Path
from typing import Any

import numpy as np

from hoi.data.folder import CONDITION_KEYS, load_image, load_label_map
from hoi.verify.verifier import JOINTS


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
