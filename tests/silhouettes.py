"""An independent renderer for read-back tests: triangles in the camera frame -> depth, by plain numpy."""

import numpy as np


def depth_of(points: np.ndarray, faces: np.ndarray, intrinsics: np.ndarray, height: int, width: int) -> np.ndarray:
    """points (V, 3) camera frame, z > 0 -> (H, W) depth of the nearest face at each pixel's centre, inf where none is.

    Pixel centres are integers.  A centre lies in a face when it is on the same side of its three edges.
    """
    depth = np.full((height, width), np.inf)
    pixels = points[:, :2] / points[:, 2:] * intrinsics[[0, 1], [0, 1]] + intrinsics[:2, 2]
    for corners, z in zip(pixels[faces], points[:, 2][faces], strict=True):
        low = np.maximum(np.ceil(corners.min(axis=0)), 0).astype(int)
        high = np.minimum(np.floor(corners.max(axis=0)), [width - 1, height - 1]).astype(int)
        (ax, ay), (bx, by), (cx, cy) = corners
        area = (bx - ax) * (cy - ay) - (by - ay) * (cx - ax)
        if (low > high).any() or area == 0:
            continue
        x, y = np.arange(low[0], high[0] + 1)[None], np.arange(low[1], high[1] + 1)[:, None]
        b = ((x - ax) * (cy - ay) - (y - ay) * (cx - ax)) / area
        c = ((bx - ax) * (y - ay) - (by - ay) * (x - ax)) / area
        inside = (b >= 0) & (c >= 0) & (b + c <= 1)
        nearness = (1 - b - c) / z[0] + b / z[1] + c / z[2]  # 1/z is linear in the picture
        part = depth[low[1] : high[1] + 1, low[0] : high[0] + 1]
        np.minimum(part, 1 / np.where(inside, nearness, 1e-30), out=part, where=inside)
    return depth


def iou(a: np.ndarray, b: np.ndarray) -> float:
    return (a & b).sum() / (a | b).sum()
