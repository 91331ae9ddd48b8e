"""What exports share: what a record must have, its pictures copied whole, the hand where a format knows of none."""

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from hoi.common.files import write_whole
from hoi.data.folder import file_of, load_picture, mesh_file_name

# Annotation that formats without hands have no place for, in the units and frames of hoi/data/folder.py.
HAND_KEYS = (
    "hand_side", "hand_model", "hand_betas", "global_orient", "hand_pose", "transl", "keypoints_3d", "keypoints_2d",
    "keypoint_convention", "contact", "penetration_mm",
)  # fmt: skip
# What a format needs of a record to give an object with its pose.
OBJECT_KEYS = ("segmentation_file_name", "object_path", "object_to_camera", "intrinsics")


def lacking(record: dict[str, Any], keys: Iterable[str]) -> str:
    """Which of the keys a record leaves open, as a reason; empty when none."""
    if record.get("file_name") is None:
        return "they have no picture: make_dataset.py --shade draws them, sample.py generates them"
    absent = [key for key in keys if record.get(key) is None]
    return f"they have no {', '.join(absent)}" if absent else ""


def model_name(object_path: str) -> str:
    """What a model's folder and every mention of it are called: one name a mesh, whatever sub-folder it is from."""
    return Path(mesh_file_name(object_path)).stem


def copy_picture(folder: Path, record: dict[str, Any], key: str, target: Path) -> np.ndarray:
    """Copy a picture of a record as it is and return its pixels.

    Every picture is decoded on the way, so that a damaged one is named now, not by whoever reads the export.
    """
    pixels = load_picture(folder, record, key)
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(file_of(folder, record, key), target)  # not encoded anew: bytes and text chunks stay
    return pixels


def copy_mesh(folder: Path, record: dict[str, Any], out: Path) -> str:
    """Copy the mesh of a record as it is, unless it is there; returns its path in the export."""
    name = mesh_file_name(record["object_path"])
    if not (out / name).exists():  # many pictures show one object
        write_whole(out / name, file_of(folder, record, "object_path").read_bytes())
    return name


def save_mask(path: Path, mask: np.ndarray) -> None:
    """Write a mask (H, W) bool as an 8-bit PNG, 0 or 255; its folder is made."""
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(mask.astype(np.uint8) * 255).save(path, compress_level=1)


def hand_annotation(record: dict[str, Any]) -> dict[str, Any] | None:
    """The hand of a record under HAND_KEYS, None where it shows none."""
    return {key: record.get(key) for key in HAND_KEYS} if record.get("keypoints_2d") is not None else None


def lines_of_json(items: Iterable[tuple[str, Any]]) -> str:
    """One JSON object, one entry a line, so that people and line tools can read large files."""
    return "{\n" + ",\n".join(f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in items) + "\n}\n"
