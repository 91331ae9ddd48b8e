"""COCO: records of a dataset folder -> images/ and annotations.json with keypoints, boxes and masks.

What its keys are is said by assets/exports/coco.md, which goes with every export.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from hoi.common.arrays import box_of
from hoi.conditions import BONES
from hoi.data.folder import array_of, load_depth, load_label_map
from hoi.export.folder import copy_picture, hand_annotation
from hoi.geometry.hand import FINGER_NAMES
from hoi.geometry.render import HAND, OBJECT, joints_shown

KEYPOINT_NAMES = ("wrist", *(f"{name}_{part}" for name in FINGER_NAMES for part in ("mcp", "pip", "dip", "tip")))
KEYPOINT_SIGMA = 0.05  # of each, as in DexYCB's evaluation: COCO itself measured those of the body alone
HAND_CATEGORY = 1
MISSING, HIDDEN, VISIBLE = 0, 1, 2  # COCO's v


def write_annotations(
    folder: Path, records: list[dict[str, Any]], out: Path, whole: list[dict[str, Any]] | None = None
) -> None:
    """Write records that have a picture into an empty folder, scenery as pictures without annotation.

    whole  the records of all splits, so that categories have the same numbers in each; None: there are no others
    """
    nouns = sorted({_noun(record) for record in whole or records if record.get("segmentation_file_name") is not None})
    category_ids = {noun: number for number, noun in enumerate(nouns, start=HAND_CATEGORY + 1)}
    images, count = [], 0
    # Annotations go straight to disk: of 50,000 pictures they would take half a gigabyte of memory.
    with open(out / "annotations.json", "w") as stream:
        stream.write('{"annotations": [')
        for record in tqdm(records, unit="picture"):
            name = f"images/{record['index']:06d}.png"
            copy_picture(folder, record, "file_name", out / name)
            image = {"id": record["index"], "file_name": name, "width": record["width"], "height": record["height"]}
            images.append(image | {"text": record.get("text"), "intrinsics": record.get("intrinsics")})
            for annotation in annotations_of(folder, record, category_ids):
                count += 1
                line = {"id": count, "image_id": record["index"], **annotation}
                stream.write(("," if count > 1 else "") + "\n" + json.dumps(line))
        # COCO's readers want the key, but terms that go with every source need more room than it has.
        rest = {"images": images, "categories": categories(category_ids), "licenses": []}
        rest["info"] = {"description": "hands and objects; sources and licences: README.md"}
        stream.write("\n], " + json.dumps(rest)[1:] + "\n")


def categories(category_ids: dict[str, int]) -> list[dict[str, Any]]:
    """The hand with keypoints, bones (pairs that count from 1) and sigmas for scores, then the objects' nouns."""
    skeleton = [[start + 1, end + 1] for start, end in BONES]
    hand = {"id": HAND_CATEGORY, "name": "hand", "supercategory": "person", "keypoints": list(KEYPOINT_NAMES)}
    objects = [{"id": number, "name": noun, "supercategory": "object"} for noun, number in category_ids.items()]
    return [hand | {"skeleton": skeleton, "sigmas": [KEYPOINT_SIGMA] * len(KEYPOINT_NAMES)}, *objects]


def annotations_of(folder: Path, record: dict[str, Any], category_ids: dict[str, int]) -> Iterator[dict[str, Any]]:
    """The hand's annotation, then the object's, without ids; what cannot be seen at all has none."""
    if record.get("segmentation_file_name") is None:
        return
    labels = load_label_map(folder, record)
    hand, hand_mask, object_mask = hand_annotation(record), labels == HAND, labels == OBJECT
    # Keys of ours that COCO has not stand behind its own.
    if hand_mask.any():
        yield {"category_id": HAND_CATEGORY, **region(hand_mask), **_keypoints(folder, record, labels), **(hand or {})}
    if object_mask.any():
        annotation = {key: record.get(key) for key in ("object_path", "object_to_camera")}
        yield {"category_id": category_ids[_noun(record)], **region(object_mask), **annotation}


def _noun(record: dict[str, Any]) -> str:
    """Name of the object's category."""
    return record.get("category") or "object"


def region(mask: np.ndarray) -> dict[str, Any]:
    """Box, area and run lengths of a mask (H, W) bool that is not empty."""
    left, top, right, bottom = box_of(mask)
    return {
        "bbox": [left, top, right - left, bottom - top],
        "area": int(mask.sum()),
        "iscrowd": 0,
        "segmentation": {"size": list(mask.shape), "counts": run_lengths(mask)},
    }


def run_lengths(mask: np.ndarray) -> str:
    """COCO's compressed run lengths of a mask (H, W) bool.

    Runs of zeros and ones in turn, zeros first, down the columns; from the fourth on each is stored as its difference
    to the last run of its kind but one.  Numbers are cut into groups of five bits, the lowest first, with a sixth bit
    that says that more follow, plus 48 to be printable.  Source: the format's C library, maskApi.c.
    """
    pixels = mask.ravel(order="F")
    changes = np.flatnonzero(np.diff(pixels)) + 1
    runs = np.diff(np.concatenate([[0], changes, [pixels.size]]))
    if pixels[0]:
        runs = np.insert(runs, 0, 0)  # zeros come first, were there any or not
    numbers = runs.copy()
    numbers[3:] -= runs[1:-2]
    characters = []
    for number in numbers.tolist():
        while True:
            group, number = number & 31, number >> 5
            more = number != (-1 if group & 16 else 0)  # the highest bit of the last group is the sign
            characters.append(chr(group + 32 * more + 48))
            if not more:
                break
    return "".join(characters)


def _keypoints(folder: Path, record: dict[str, Any], labels: np.ndarray) -> dict[str, Any]:
    """COCO's x, y, v of the 21 keypoints, zeros where one is missing, and how many are not."""
    if record.get("keypoints_2d") is None:
        return {"keypoints": [0] * 63, "num_keypoints": 0}
    keypoints_2d, keypoints_3d = array_of(record, "keypoints_2d"), record.get("keypoints_3d")
    depth = load_depth(folder, record) if record.get("depth_file_name") else None
    z = None if keypoints_3d is None else np.reshape(keypoints_3d, (21, 3))[:, 2]
    states = keypoint_states(keypoints_2d, labels, depth, z)
    rows = np.column_stack([keypoints_2d, states])
    rows[states == MISSING] = 0
    return {"keypoints": rows.ravel().round(3).tolist(), "num_keypoints": int((states > MISSING).sum())}


def keypoint_states(
    keypoints_2d: np.ndarray, labels: np.ndarray, depth: np.ndarray | None = None, z: np.ndarray | None = None
) -> np.ndarray:
    """COCO's v of each keypoint: 0 outside the picture, 1 hidden by the object or by the hand itself, 2 visible.

    keypoints_2d (21, 2) pixels; labels (H, W) 0/1/2; depth (H, W) metres; z (21,) metres, depth of the joints
    """
    height, width = labels.shape
    # Pixel centres lie at integers, so the picture reaches half a pixel farther.
    inside = ((keypoints_2d > -0.5) & (keypoints_2d < np.array([width, height]) - 0.5)).all(axis=1)
    return np.where(inside, np.where(joints_shown(keypoints_2d, labels, depth, z), VISIBLE, HIDDEN), MISSING)
