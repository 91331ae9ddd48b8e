"""The dataset folder, what every script reads and writes: disk -> records, pictures.  (Back:
hoi/data/writer.py.)

    out/metadata.jsonl             one JSON object a picture, first key `file_name` (a Hugging Face image folder)
    out/images/000000.png          RGB, absent in a conditions-only folder
    out/skeleton, segmentation, normal/000000.png   condition images (hoi/conditions.py)
    out/depth/000000.png           16 bit, millimetres, 0 = nothing
    out/object_mask/000000.png     whole object silhouette, the hand ignored, 0 or 255
    out/objects/mug_0003.ply       each mesh once, metres, in the canonical frame that `object_to_camera` refers to
    out/dataset.json, out/grid.png how it was made; a contact sheet to look at first

Hand parameters and keypoints_3d are in the camera frame: the hand model called with them gives camera coordinates.
A record is complete or absent: its pictures are renamed into place first, its line is appended last.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import trimesh
from PIL import Image

from hoi.common.files import read_json, read_json_lines
from hoi.conditions import Conditions, blank_conditions, read_segmentation

# Numbers in a record, with how many of them: matrices row-major, points one after the other.
NUMBER_KEYS = {
    "intrinsics": 9, "object_to_camera": 16, "hand_betas": 10, "global_orient": 3, "hand_pose": 45, "transl": 3,
    "keypoints_3d": 63, "keypoints_2d": 42,
}  # fmt: skip
PICTURE_FOLDERS = {
    "file_name": "images", "skeleton_file_name": "skeleton", "segmentation_file_name": "segmentation",
    "normal_file_name": "normal", "depth_file_name": "depth", "object_mask_file_name": "object_mask",
}  # fmt: skip
CONDITION_KEYS = ("skeleton_file_name", "segmentation_file_name", "normal_file_name")
# Every record has all of these, null where unknown: readers of the folder want one schema.
RECORD_KEYS = (
    "file_name", "index", "text", *list(PICTURE_FOLDERS)[1:], "height", "width", "category", "object_path",
    "intrinsics", "object_to_camera", "hand_side", "hand_model", "hand_betas", "global_orient", "hand_pose", "transl",
    "keypoints_3d", "keypoints_2d", "hand_in_picture", "trajectory", "frame", "contact", "penetration_mm", "grasp",
    "normal_source", "keypoint_convention", "source", "look",
    "seed", "guidance_scale", "sampler", "num_inference_steps", "checkpoint", "negative_prompt", "verification",
)  # fmt: skip


def _records_of(path: Path, keys: Sequence[str] | None) -> Iterator[dict[str, Any]]:
    """Records of one metadata file; keys as of read_records."""
    for number, record in read_json_lines(path):
        if not isinstance(record, dict) or not isinstance(record.get("index"), int) or "file_name" not in record:
            raise ValueError(f"{path} line {number}: expected an object with file_name and an integer index")
        yield record if keys is None else {key: record.get(key) for key in keys}


def read_records(folder: str | Path, keys: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """All complete records of a folder in order of `index`; lines of ranks that were not merged yet are included.

    keys  keep these alone, `index` among them; None: all.  Half a million whole records take gigabytes
    Raises FileNotFoundError without any metadata file, ValueError naming file and line for a broken line.  A last line
    cut short by an interruption counts as absent.  When an index appears twice the later line holds.
    """
    folder = Path(folder)
    paths = sorted(folder.glob("metadata*.jsonl"), key=lambda path: (path.name != "metadata.jsonl", path.name))
    if not paths:
        raise FileNotFoundError(f"{folder} has no metadata.jsonl: it is no dataset folder (make_dataset.py makes one)")
    by_index = {record["index"]: record for path in paths for record in _records_of(path, keys)}
    return [by_index[index] for index in sorted(by_index)]


def read_description(folder: str | Path) -> dict[str, Any]:
    """dataset.json, {} where there is none.  Raises ValueError naming a damaged one."""
    path = Path(folder) / "dataset.json"
    advice = "; delete it: the command that made it writes it anew"
    return read_json(path, "description", advice) if path.is_file() else {}


def missing_files(folder: Path, record: dict[str, Any]) -> list[str]:
    """Relative paths that a record names and the folder does not have."""
    paths = [record.get(key) for key in (*PICTURE_FOLDERS, "object_path")]
    return [path for path in paths if path is not None and not (folder / path).is_file()]


def load_picture(folder: str | Path, record: dict[str, Any], key: str) -> np.ndarray:
    """The picture that record[key] names, as its PNG holds it: uint8 (H, W, 3) or (H, W), or uint16 (H, W).

    Raises ValueError when the record has none, FileNotFoundError or ValueError naming a missing or damaged file.
    """
    if record.get(key) is None:
        raise ValueError(f"record {record.get('index')} of {folder} has no {key}")
    path = Path(folder) / record[key]
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing ({key} of record {record.get('index')})")
    try:
        with Image.open(path) as picture:
            return np.array(picture)
    except (OSError, SyntaxError) as error:
        raise ValueError(f"{path} is damaged: {error}; delete it and run the command that made it again") from error


def load_conditions(folder: str | Path, record: dict[str, Any]) -> Conditions:
    """Condition images of a record; all black where it has none (scenery), as the paper's regularisation uses."""
    if all(record.get(key) is None for key in CONDITION_KEYS):
        return blank_conditions(record["height"], record["width"])
    skeleton, segmentation, normal = (load_picture(folder, record, key) for key in CONDITION_KEYS)
    return Conditions(skeleton=skeleton, normal=normal, segmentation=segmentation)


def load_image(folder: str | Path, record: dict[str, Any]) -> np.ndarray:
    """(H, W, 3) uint8."""
    return load_picture(folder, record, "file_name")


def load_depth(folder: str | Path, record: dict[str, Any]) -> np.ndarray:
    """(H, W) float32 metres, 0 = nothing."""
    return load_picture(folder, record, "depth_file_name").astype(np.float32) / 1000


def load_label_map(folder: str | Path, record: dict[str, Any]) -> np.ndarray:
    """(H, W) uint8: 0 background, 1 hand, 2 object, from the segmentation picture."""
    return read_segmentation(load_picture(folder, record, "segmentation_file_name"))


def load_object_mask(folder: str | Path, record: dict[str, Any]) -> np.ndarray:
    """(H, W) bool, the whole object with the hand ignored."""
    return load_picture(folder, record, "object_mask_file_name") > 0


def load_mesh(folder: str | Path, record: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Vertices (V, 3) float64 metres and faces (F, 3) of a record's object, in its canonical frame, exactly as stored.

    Raises FileNotFoundError or ValueError naming a missing or damaged file.
    """
    path = Path(folder) / record["object_path"]
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing (object_path of record {record.get('index')})")
    try:
        mesh = trimesh.load(path, process=False, force="mesh")
        vertices, faces = np.array(mesh.vertices, dtype=np.float64), np.array(mesh.faces, dtype=np.int64)
    except (ValueError, IndexError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"{path} is damaged: {error}; delete it and run the command that made it again") from error
    if not len(faces) or not np.isfinite(vertices).all():
        raise ValueError(f"{path} is damaged: {len(faces)} faces, or vertices that are not finite")
    return vertices, faces
