"""How much a clip flickers.  Dataset folder of a clip -> colour changes of known surface points.  Paper: Sec. 4.4.

    python -m hoi.metrics.flicker clip clip_without_anchor        # one line a folder, 8-bit levels

No optical flow: hand, object and camera are known in every frame, so where a surface point goes is known, too.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.ndimage import map_coordinates, maximum_filter, minimum_filter

from hoi.data.folder import load_depth, load_image, load_label_map, load_mesh, read_records
from hoi.geometry.camera import project, transform_points
from hoi.geometry.contact import sample_faces
from hoi.geometry.hand import HandModel, HandParams, load_hand
from hoi.geometry.render import HAND, OBJECT

SPACING = 0.004  # metres between points of the object
DEPTH_TOLERANCE = 0.004  # metres from the depth map to a point that is seen


@dataclass(frozen=True)
class Flicker:
    """Mean absolute colour difference of what is the same in neighbouring frames, 8-bit levels; NaN: nothing was.

    hand, object  surface points seen in both frames
    background    pixels that are background in both; NaN where the camera or the object moves
    """

    hand: float
    object: float
    background: float


def seen(points: np.ndarray, intrinsics: np.ndarray, depth: np.ndarray, own: np.ndarray) -> tuple[np.ndarray, ...]:
    """Where surface points are in a picture, and whether it shows them.

    points      (N, 3) camera frame, metres
    depth       (H, W) metres, 0 = nothing
    own         (H, W) bool, pixels of the thing that the points lie on
    returns     pixels (N, 2), shown (N,) bool: inside, at the depth map's distance, and with the pixels around it on
                the same thing (a pixel on the outline mixes two things)
    """
    pixels = project(points, intrinsics)
    nearest = np.nan_to_num(np.rint(pixels), nan=-1.0).astype(np.int64)
    height, width = depth.shape
    inside = ((nearest >= 1) & (nearest < [width - 1, height - 1])).all(axis=1) & (points[:, 2] > 0)
    column, row = np.where(inside[:, None], nearest, 0).T
    interior = minimum_filter(own, 3)
    flat = maximum_filter(depth, 3) - minimum_filter(depth, 3) < 5 * DEPTH_TOLERANCE  # no fold or finger in between
    fits = np.abs(depth[row, column] - points[:, 2]) < DEPTH_TOLERANCE
    return pixels, inside & fits & interior[row, column] & flat[row, column]


def colors_at(picture: np.ndarray, pixels: np.ndarray) -> np.ndarray:
    """(H, W, 3) picture, (N, 2) pixels -> (N, 3) colours, bilinear."""
    place = [pixels[:, 1], pixels[:, 0]]
    return np.stack([map_coordinates(picture[..., c].astype(np.float64), place, order=1) for c in range(3)], axis=1)


def video_flicker(folder: str | Path, hand: HandModel, pictures: Sequence[np.ndarray] | None = None) -> Flicker:
    """Measure a folder that video.py made, or any trajectory whose records have pictures, depth and segmentation.

    hand      the model that the records' hand parameters are of
    pictures  (H, W, 3) uint8 each, in place of the folder's: another version of the same frames
    Raises ValueError for a single frame, FileNotFoundError or ValueError naming a missing or damaged file.
    """
    records = sorted(read_records(folder), key=lambda record: record.get("frame") or 0)
    if len(records) < 2 or (pictures is not None and len(pictures) != len(records)):
        raise ValueError(f"{folder} has {len(records)} frames; flicker needs two at least, and a picture for each")
    pictures = [load_image(folder, record) for record in records] if pictures is None else list(pictures)
    on_object = _object_points(folder, records[0])
    frames = [_points_of(folder, record, hand, on_object) for record in records]
    levels: dict[str, list[np.ndarray]] = {"hand": [], "object": [], "background": []}
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
    joined = {name: np.concatenate(values) if values else np.zeros(0) for name, values in levels.items()}
    return Flicker(**{name: float(values.mean()) if len(values) else float("nan") for name, values in joined.items()})


def _object_points(folder: str | Path, record: dict[str, Any]) -> np.ndarray:
    vertices, faces = load_mesh(folder, record)
    return sample_faces(vertices[faces], SPACING)[0]


def _points_of(folder: str | Path, record: dict[str, Any], hand: HandModel, on_object: np.ndarray) -> dict[str, Any]:
    """Of "hand" and "object" pixels and whether shown, the same points in every frame; "background" is (H, W) bool."""
    pose = HandParams(
        *(np.array(record[key]) for key in ("global_orient", "hand_pose", "transl", "hand_betas")), record["hand_side"]
    )
    mesh = hand(pose)
    skin = np.concatenate([mesh.vertices, mesh.vertices[mesh.faces].mean(axis=1)])  # denser: the faces' centres too
    surface = transform_points(np.reshape(record["object_to_camera"], (4, 4)), on_object)
    depth, intrinsics = load_depth(folder, record), np.reshape(record["intrinsics"], (3, 3))
    label_map = load_label_map(folder, record)
    return {
        "hand": seen(skin, intrinsics, depth, label_map == HAND),
        "object": seen(surface, intrinsics, depth, label_map == OBJECT),
        "background": minimum_filter(label_map == 0, 5),
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m hoi.metrics.flicker", description=__doc__.split("\n\n")[0])
    parser.add_argument("clips", nargs="+", type=Path, help="dataset folders of video.py")
    parser.add_argument("--mano", metavar="FILE", help="official MANO_RIGHT.pkl, for clips made with it")
    args = parser.parse_args()
    hand = load_hand(args.mano)
    print("| clip | hand | object | background |\n|---|---|---|---|")
    for folder in args.clips:
        measured = video_flicker(folder, hand)
        print(f"| {folder} | {measured.hand:.1f} | {measured.object:.1f} | {measured.background:.1f} |")


if __name__ == "__main__":
    main()
