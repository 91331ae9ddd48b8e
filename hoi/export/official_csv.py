"""The CSVs of the authors' release: records of a dataset folder -> pictures, label files, train, test and reg.csv.

What the columns are is said by assets/exports/csv.md, which goes with every export.
"""

import csv
from pathlib import Path
from typing import Any

import numpy as np
from scipy.spatial.transform import Rotation
from tqdm import tqdm

from hoi.data.folder import CONDITION_KEYS, array_of, load_label_map
from hoi.export.folder import copy_mesh, copy_picture, lacking, save_mask
from hoi.geometry.camera import OPENGL_TO_OPENCV
from hoi.geometry.hand import MANO_TO_OPENPOSE
from hoi.sources.official_csv import SCENERY_COLUMNS, TRAIN_COLUMNS

COLUMNS = {
    "train": TRAIN_COLUMNS, "test": (*TRAIN_COLUMNS, "depth", "label", "objpath"), "reg": SCENERY_COLUMNS,
}  # fmt: skip
# All that a label file is made of: an array of None could only be read back by running a pickle.
FOR_LABELS = (
    "hand_side", "hand_model", "global_orient", "hand_pose", "transl", "keypoints_3d", "object_to_camera",
    "object_path", "depth_file_name", "intrinsics",
)  # fmt: skip


def unfit_for_csv(record: dict[str, Any]) -> str:
    """Why a record cannot be a row of any of the CSVs; empty when it can.  Scenery needs its picture alone."""
    is_scenery = all(record.get(key) is None for key in CONDITION_KEYS)
    return lacking(record, () if is_scenery else CONDITION_KEYS[:2])


def write_tables(folder: Path, records: list[dict[str, Any]], out: Path) -> None:
    """Write records that are fit for a CSV into an empty folder."""
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in COLUMNS}
    for record in tqdm(records, unit="picture"):
        row = _write_pictures(folder, record, out)
        rows["train" if "mask" in row else "reg"].append(row)
        if "mask" in row and all(record.get(key) is not None for key in FOR_LABELS):
            rows["test"].append(row | _write_label(folder, record, out))
    for name, columns in COLUMNS.items():
        with open(out / f"{name}.csv", "w", newline="", encoding="utf-8") as stream:
            table = csv.DictWriter(stream, columns, extrasaction="ignore")
            table.writeheader()
            table.writerows(rows[name])


def _write_pictures(folder: Path, record: dict[str, Any], out: Path) -> dict[str, Any]:
    """Write the pictures of a record; returns the columns of train.csv, or of reg.csv for scenery."""
    name = f"{record['index']:06d}.png"
    copy_picture(folder, record, "file_name", out / "images" / name)
    row = {"image": f"images/{name}", "sentence": record.get("text") or ""}
    if record.get("segmentation_file_name") is None:
        return row
    copy_picture(folder, record, "skeleton_file_name", out / "skeleton" / name)
    copy_picture(folder, record, "segmentation_file_name", out / "mask" / name)
    # Their reader cuts normals with it; ours are cut already.
    save_mask(out / "seg" / name, load_label_map(folder, record) > 0)
    row |= {key: f"{key}/{name}" for key in ("skeleton", "seg", "mask")}
    return row | {"top": 0, "bottom": record["height"], "left": 0, "right": record["width"]}


def _write_label(folder: Path, record: dict[str, Any], out: Path) -> dict[str, Any]:
    """Write depth, label and mesh of a record; returns the columns that test.csv has beside those of train.csv."""
    stem = f"{record['index']:06d}"
    copy_picture(folder, record, "depth_file_name", out / "depth" / f"{stem}.png")
    (out / "label").mkdir(exist_ok=True)
    np.savez(out / "label" / f"{stem}.npz", **label_arrays(record))
    return {"depth": f"depth/{stem}.png", "label": f"label/{stem}.npz", "objpath": copy_mesh(folder, record, out)}


def label_arrays(record: dict[str, Any]) -> dict[str, np.ndarray]:
    """The arrays of a label file of the release, and three that it lacks: hand_betas, hand_side, hand_model.

    There the camera looks along -z and y is up; R_obj turns the object, the hand is given in the turned object's frame,
    and t_obj is added to both.  joint3d is in MANO's order followed by the five tips, before t_obj is added.
    """
    flip = OPENGL_TO_OPENCV[:3, :3]  # and back
    object_to_camera = array_of(record, "object_to_camera")
    keypoints_3d, transl = array_of(record, "keypoints_3d"), np.array(record["transl"])
    obj_trans = flip @ object_to_camera[:3, 3]
    # The model turns about its wrist, which at rest lies at w0: v = R (v0 - w0) + w0 + transl, and w0 + transl is
    # keypoint 0.  Turned and moved as a whole, R becomes flip R and the wrist moves with the frame.
    wrist, wrist_at_rest = keypoints_3d[0], keypoints_3d[0] - transl
    orient = Rotation.from_matrix(flip) * Rotation.from_rotvec(record["global_orient"])
    joint3d = np.empty((21, 3))
    joint3d[list(MANO_TO_OPENPOSE)] = keypoints_3d @ flip - obj_trans
    return {
        "joint3d": joint3d,
        "handparam": np.concatenate([orient.as_rotvec(), record["hand_pose"]])[None],
        "trans": (flip @ wrist - obj_trans - wrist_at_rest)[None],
        "obj_pose": flip @ object_to_camera[:3, :3],
        "obj_trans": obj_trans,
        "intrinsics": array_of(record, "intrinsics"),
        "extrinsics": OPENGL_TO_OPENCV,
        "hand_betas": np.array(record["hand_betas"] or [0.0] * 10)[None],  # none: a hand of mean shape
        "hand_side": np.array(record["hand_side"]),
        "hand_model": np.array(record["hand_model"]),
    }
