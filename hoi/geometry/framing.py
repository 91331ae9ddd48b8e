"""Framings: points of hand and object -> cameras that show them.  Paper: Sec. 3.2 (views of the grasp)."""

from dataclasses import replace

import numpy as np

from hoi.geometry.camera import OFFICIAL_FOV_DEG, Camera, crop_intrinsics, project, sample_camera, transform_points

FRAMINGS = ("official", "tight")
CAMERAS_PER_GRASP = 8
WRIST_MARGIN = 0.02  # of the picture: how far inside the border a tight framing places the wrist


def scale_camera(camera: Camera, factor: int) -> Camera:
    """The same view with `factor` times as many pixels a side."""
    height, width = factor * camera.height, factor * camera.width
    intrinsics = crop_intrinsics(camera.intrinsics, 0, 0, camera.height, camera.width, height, width)
    return Camera(intrinsics, camera.world_to_camera, height, width)


def inside_picture(keypoints_2d: np.ndarray, height: int, width: int) -> np.ndarray:
    """keypoints_2d (..., 21, 2) pixels -> (...) bool: all lie in the picture (NaN, behind the camera, does not)."""
    return ((keypoints_2d >= 0) & (keypoints_2d <= np.array([width - 1, height - 1]))).all(axis=(-1, -2))


def tighten(camera: Camera, points: np.ndarray, wrist: np.ndarray | None, margin: float) -> tuple[Camera, float]:
    """Zoom a square camera in on points, the wrist pushed against the border: what lies beyond the wrist is cut off.

    points   (N, 3) world; all stay in the picture
    wrist    (3,) world, or None
    margin   side of the picture over side of the points' box
    returns  the camera and how far the wrist stays from the border, as a fraction of the picture (0 without a hand)
    """
    pixels = project(transform_points(camera.world_to_camera, points), camera.intrinsics)
    if not np.isfinite(pixels).all():
        return camera, np.inf
    low, high = pixels.min(axis=0), pixels.max(axis=0)
    side = max(margin * (high - low).max(), 8.0)
    corner = (low + high - side) / 2  # top left of the square box
    gap = 0.0
    if wrist is not None:
        position = project(transform_points(camera.world_to_camera, wrist), camera.intrinsics)
        # Move the box along the axis where that brings a border nearest to the wrist, while the points stay inside.
        slack = 0.01 * side
        candidates = []
        for axis in (0, 1):
            to_low = min(position[axis] - WRIST_MARGIN * side, low[axis] - slack)
            to_high = max(position[axis] + WRIST_MARGIN * side, high[axis] + slack) - side
            candidates.append(((position[axis] - to_low) / side, axis, to_low))
            candidates.append(((to_high + side - position[axis]) / side, axis, to_high))
        gap, axis, start = min(candidates)
        corner[axis] = start
    # Pixel centres are integers, so the box of pixel areas begins half a pixel earlier.
    left, top = corner + 0.5
    intrinsics = crop_intrinsics(camera.intrinsics, left, top, side, side, camera.height, camera.width)
    return replace(camera, intrinsics=intrinsics), float(gap)


def candidate_cameras(
    generator: np.random.Generator, height: int, width: int, official: bool, framing: str, points: np.ndarray,
    hand_keypoints: np.ndarray, fov_deg: float = OFFICIAL_FOV_DEG,
) -> list[Camera]:
    """Cameras in order of preference: most frames with the whole hand in the picture, then the wrist at the border.

    points  (N, 3) object;  hand_keypoints (frames, 21, 3), frames may be 0; world
    fov_deg of the official framing; the tight one zooms in from there
    """
    cameras, costs = [], []
    everything = np.concatenate([points, hand_keypoints.reshape(-1, 3)])
    wrist = hand_keypoints[-1, 0] if len(hand_keypoints) else None
    for _ in range(CAMERAS_PER_GRASP):
        camera, gap = sample_camera(generator, height, width, official, fov_deg), 0.0
        margin = generator.uniform(1.06, 1.3)
        if framing == "tight":
            camera, gap = tighten(camera, everything, wrist, margin)
        keypoints_2d = project(transform_points(camera.world_to_camera, hand_keypoints), camera.intrinsics)
        outside = int((~inside_picture(keypoints_2d, height, width)).sum())
        cameras.append(camera)
        # Any view with the wrist near the border will do: always taking the best one would favour a few directions.
        costs.append((outside, max(gap, 2 * WRIST_MARGIN)))
    return [cameras[i] for i in sorted(range(len(cameras)), key=lambda i: costs[i])]
