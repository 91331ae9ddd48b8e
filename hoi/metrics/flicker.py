"""How much a video flickers.  Dataset folder of frames -> colour changes of known surface points.  Paper: Sec. 4.4.

No optical flow: hand, object and camera are known in every frame, so where a surface point goes is known, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.ndimage import map_coordinates, maximum_filter, minimum_filter

from hoi.data.folder import array_of, hand_of, load_depth, load_image, load_label_map, load_mesh, read_records
from hoi.geometry.camera import project, transform_points
from hoi.geometry.contact import sample_faces
from hoi.geometry.hand import HandModel, load_hand
from hoi.geometry.render import HAND, OBJECT
from hoi.metrics.intervals import Results, mean_of

SPACING = 0.004  # metres between points of the object: about a pixel at 128 px
DEPTH_TOLERANCE = 0.004  # metres from the depth map, which is in whole millimetres, to a point that is seen
FOLD = 5 * DEPTH_TOLERANCE  # within 3 x 3 pixels; more is a fold or a finger in between


PARTS = ("hand", "object", "background")


def find_points(
    points: np.ndarray, intrinsics: np.ndarray, depth: np.ndarray, own: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Where surface points are in a picture, and whether it shows them.

    points      (N, 3) camera frame, metres
    depth       (H, W) metres, 0 = nothing
    own         (H, W) bool, pixels of the thing that the points lie on
    returns     pixels (N, 2), shown (N,) bool: inside, at the depth map's distance, and with the pixels around it on
                the same thing (a pixel on the outline mixes two things)
    """
    pixels = project(points, intrinsics)
    nearest = np.nan_to_num(np.rint(pixels), nan=-1.0).astype(np.int64)  # NaN: behind the camera
    height, width = depth.shape
    inside = ((nearest >= 1) & (nearest < [width - 1, height - 1])).all(axis=1) & (points[:, 2] > 0)
    column, row = np.where(inside[:, None], nearest, 0).T
    interior = minimum_filter(own, 3)
    flat = maximum_filter(depth, 3) - minimum_filter(depth, 3) < FOLD
    fits = np.abs(depth[row, column] - points[:, 2]) < DEPTH_TOLERANCE
    return pixels, inside & fits & interior[row, column] & flat[row, column]


def colors_at(picture: np.ndarray, pixels: np.ndarray) -> np.ndarray:
    """(H, W, 3) picture, (N, 2) pixels -> (N, 3) colours, bilinear."""
    place = [pixels[:, 1], pixels[:, 0]]
    return np.stack([map_coordinates(picture[..., c].astype(np.float64), place, order=1) for c in range(3)], axis=1)


def video_flicker(
    folder: str | Path, hand: HandModel, pictures: Sequence[np.ndarray] | None = None
) -> dict[str, float]:
    """Measure a folder that video.py made, or any trajectory whose records have pictures, depth and segmentation.

    hand      the model that the records' hand parameters are of
    pictures  (H, W, 3) uint8 each, in place of the folder's: another version of the same frames
    returns   of each of PARTS the mean absolute colour difference in 8-bit levels over all pairs of neighbouring frames
              and all that is the same in both: surface points of hand and object that both show, pixels that are
              background in both; NaN where nothing was, of the background where camera or object moves
    Raises ValueError for a single frame, FileNotFoundError or ValueError naming a missing or damaged file.
    """
    records = sorted(read_records(folder), key=lambda record: record.get("frame") or 0)
    if len(records) < 2 or (pictures is not None and len(pictures) != len(records)):
        raise ValueError(f"{folder} has {len(records)} frames; flicker needs two at least, and a picture for each")
    pictures = [load_image(folder, record) for record in records] if pictures is None else list(pictures)
    vertices, faces = load_mesh(folder, records[0])
    on_object = sample_faces(vertices[faces], SPACING)[0]
    frames = [_points_of(folder, record, hand, on_object) for record in records]
    levels: dict[str, list[np.ndarray]] = {part: [np.zeros(0)] for part in PARTS}
    for i in range(len(records) - 1):
        before, after = frames[i], frames[i + 1]
        for name in ("hand", "object"):
            both = before[name][1] & after[name][1]
            colors = [colors_at(pictures[k], frames[k][name][0][both]) for k in (i, i + 1)]
            levels[name].append(np.abs(colors[1] - colors[0]).ravel())
        if np.allclose(records[i]["object_to_camera"], records[i + 1]["object_to_camera"], atol=1e-6):
            both = before["background"] & after["background"]
            change = pictures[i + 1][both].astype(int) - pictures[i][both].astype(int)
            levels["background"].append(np.abs(change).ravel())
    joined = {part: np.concatenate(values) for part, values in levels.items()}
    return {part: float(values.mean()) if len(values) else float("nan") for part, values in joined.items()}


def _points_of(folder: str | Path, record: dict[str, Any], hand: HandModel, on_object: np.ndarray) -> dict[str, Any]:
    """Of "hand" and "object" pixels and whether shown, the same points in every frame; "background" is (H, W) bool."""
    mesh = hand(hand_of(record))
    skin = np.concatenate([mesh.vertices, mesh.vertices[mesh.faces].mean(axis=1)])  # denser: the faces' centres too
    surface = transform_points(array_of(record, "object_to_camera"), on_object)
    depth, intrinsics = load_depth(folder, record), array_of(record, "intrinsics")
    label_map = load_label_map(folder, record)
    return {
        "hand": find_points(skin, intrinsics, depth, label_map == HAND),
        "object": find_points(surface, intrinsics, depth, label_map == OBJECT),
        "background": minimum_filter(label_map == 0, 5),  # two pixels from any outline
    }


def add_flicker(results: Results, folders: Sequence[Path], mano: str | None) -> None:
    """Colour changes along videos; what is drawn anew for the interval are videos.

    folders  of video.py;  mano  the official MANO file, for videos made with it
    """
    hand = load_hand(mano)
    flickers = [video_flicker(folder, hand) for folder in folders]
    for part in PARTS:
        values = np.array([flicker[part] for flicker in flickers])
        values = values[np.isfinite(values)]  # a video with a moving camera has no steady background
        if len(values):
            results.add(f"flicker of the {part}, levels", mean_of(values), len(values), "lower",
                        "mean absolute colour change of the same points in neighbouring frames, 8-bit levels; n, and "
                        "what is drawn anew, are clips")  # fmt: skip
