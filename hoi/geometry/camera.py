"""Pinhole camera.  A place to stand and a point to look at -> Camera; 3D points -> pixels.  Paper: Sec. 3.2.

OpenCV convention everywhere: x right, y down, z forward, pixel centres at integers.  "World" is the canonical object
frame (metres, z up), so world_to_camera is also object_to_camera.  At the end, candidate_cameras chooses views that
show hand and object.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

OFFICIAL_FOV_DEG = 60.0  # vertical; gives focal length 443.405 px at 512
OFFICIAL_FOCAL = 0.5 / np.tan(np.radians(OFFICIAL_FOV_DEG) / 2)  # focal length over the picture's height
# Vertical fields of view.  nocs: the middle square of the 640x480 pictures of NOCS-CAMERA, focal length 577.5 px there
# and 616 at 512, so that pictures shrunk to 480 fit into its frames (hoi/export/nocs.py).
CAMERA_FOV_DEG = {"official": OFFICIAL_FOV_DEG, "nocs": float(np.degrees(2 * np.arctan(240 / 577.5)))}
# Where cameras stand and look: the ranges of the authors' released test-data script, but for the azimuth, which is 0 to
# 0.1 degrees there, in effect always in front.
DISTANCE_RANGE = (0.35, 0.45)  # metres from the object's centre
ELEVATION_RANGE_DEG = (5.0, 60.0)
AZIMUTH_RANGE_DEG = (0.0, 360.0)
OFFICIAL_AZIMUTH_RANGE_DEG = (0.0, 0.1)
LOOK_AT_RADIUS = 0.05  # metres
OPENGL_TO_OPENCV = np.diag([1.0, -1.0, -1.0, 1.0])  # axes of cameras: y up and looking along -z there; its own inverse
FRAMINGS = ("official", "tight")
# Tried for each grasp.  Of an approach's frames 32 % have a keypoint outside the picture with the first of them, 24, 18
# and 13 % with the best of 4, 8 and 16; each costs a projection, no rendering.
CAMERAS_PER_GRASP = 8
PALM = (5, 9, 13, 17)  # keypoints, the bases of the four fingers
WRIST_MARGIN = 0.02  # of the picture: how far inside the border a tight framing places the wrist
TIGHT_MARGINS = (1.06, 1.3)  # side of a tightly framed picture over side of the box around hand and object
SMALLEST_CROP = 8.0  # pixels of the untightened picture: what is far away would else be magnified without end


@dataclass(frozen=True)
class Camera:
    """A calibrated view.

    intrinsics       (3, 3)  pixels; u = fx x/z + cx with pixel centres at integers
    world_to_camera  (4, 4)  rigid; takes points of the canonical object frame to the OpenCV camera frame
    height, width    pixels
    up               (3,) unit, what is up in the room, in the object's frame: z unless the object is turned
    """

    intrinsics: np.ndarray
    world_to_camera: np.ndarray
    height: int
    width: int
    up: tuple[float, float, float] = (0.0, 0.0, 1.0)

    @property
    def steepness(self) -> float:
        """How far the camera looks down, in [0, 1]: over the range of elevations that scenes have."""
        low, high = ELEVATION_RANGE_DEG
        pitch_deg = np.degrees(np.arcsin(np.clip(-self.world_to_camera[2, :3] @ np.asarray(self.up), -1, 1)))
        return float(np.clip((pitch_deg - low) / (high - low), 0, 1))

    @property
    def position(self) -> np.ndarray:
        """Centre of projection in the world frame, (3,), metres."""
        rotation, translation = self.world_to_camera[:3, :3], self.world_to_camera[:3, 3]
        return -rotation.T @ translation

    def scaled(self, factor: int) -> Camera:
        """The same view with `factor` times as many pixels a side."""
        height, width = factor * self.height, factor * self.width
        intrinsics = crop_intrinsics(self.intrinsics, 0, 0, self.height, self.width, height, width)
        return replace(self, intrinsics=intrinsics, height=height, width=width)


def make_intrinsics(height: int, width: int, fov_deg: float = OFFICIAL_FOV_DEG) -> np.ndarray:
    """Square pixels, principal point in the middle of the picture.

    height, width  pixels
    fov_deg        vertical field of view, degrees, between 0 and 180
    returns        (3, 3) float64, pixels
    """
    focal = 0.5 * height / np.tan(np.radians(fov_deg) / 2.0)
    # The borders of the picture lie half a pixel outside the first and last centre, hence (n - 1) / 2.
    return np.array([[focal, 0.0, (width - 1) / 2.0], [0.0, focal, (height - 1) / 2.0], [0.0, 0.0, 1.0]])


def look_at(position: np.ndarray, target: np.ndarray, up: np.ndarray) -> np.ndarray:
    """Camera at position whose optical axis passes through target and whose picture has up upwards.

    position, target  (3,)  metres, world; two places
    up                (3,)  any length; not parallel to the view, but need not be perpendicular to it
    returns           world_to_camera (4, 4) float64
    """
    forward = target - position
    forward = forward / np.linalg.norm(forward)
    right = np.cross(forward, up)
    right = right / np.linalg.norm(right)
    world_to_camera = np.eye(4)
    world_to_camera[:3, :3] = np.stack([right, np.cross(forward, right), forward])
    world_to_camera[:3, 3] = -world_to_camera[:3, :3] @ position
    return world_to_camera


def transform_points(a_to_b: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Express points of frame a in frame b.

    a_to_b   (4, 4)    affine, last row 0 0 0 1
    points   (..., 3)  metres, frame a
    returns  (..., 3)  metres, frame b
    """
    a_to_b = np.asarray(a_to_b)
    return np.asarray(points) @ a_to_b[:3, :3].T + a_to_b[:3, 3]


def project(points_camera: np.ndarray, intrinsics: np.ndarray) -> np.ndarray:
    """Perspective projection to pixels; (0, 0) is the centre of the top left pixel.

    points_camera  (..., 3)  metres, camera frame, z > 0
    intrinsics     (3, 3)    pixels
    returns        (..., 2)  x right, y down; NaN for points with z <= 0, which have no picture
    """
    points_camera = np.asarray(points_camera, dtype=np.float64)
    depth = points_camera[..., 2:3]
    in_front = depth > 0.0
    rays = points_camera[..., :2] / np.where(in_front, depth, np.nan)
    return rays @ np.asarray(intrinsics)[:2, :2].T + np.asarray(intrinsics)[:2, 2]


def unproject(columns: np.ndarray, rows: np.ndarray, depth: np.ndarray, intrinsics: np.ndarray) -> np.ndarray:
    """Back from pixels to points: columns, rows (...) int, depth (...) metres -> (..., 3) metres, camera frame."""
    rays = np.stack([columns, rows, np.ones_like(rows)], axis=-1) @ np.linalg.inv(intrinsics).T
    return rays * depth[..., None]


def crop_intrinsics(
    intrinsics: np.ndarray, left: float, top: float, crop_height: float, crop_width: float, height: int, width: int
) -> np.ndarray:
    """Intrinsics after cutting out a box and resizing it.

    left, top                first column and row of the box, pixels of the old picture
    crop_height, crop_width  size of the box, pixels of the old picture, above 0
    height, width            size of the new picture, pixels
    returns                  (3, 3) float64
    A pixel's area, not its centre, is what a resize maps: the half-pixel shift below keeps centres at integers.
    """
    x_ratio, y_ratio = width / crop_width, height / crop_height
    x_shift, y_shift = (0.5 - left) * x_ratio - 0.5, (0.5 - top) * y_ratio - 0.5
    old_to_new = np.array([[x_ratio, 0.0, x_shift], [0.0, y_ratio, y_shift], [0.0, 0.0, 1.0]])
    return old_to_new @ np.asarray(intrinsics, dtype=np.float64)


def sample_camera(
    generator: np.random.Generator, height: int, width: int, official: bool = False, fov_deg: float = OFFICIAL_FOV_DEG
) -> Camera:
    """A random view of an object at the origin, z up.

    generator      source of all randomness
    height, width  pixels
    official       azimuth 0 to 0.1 degrees, as in the authors' test-data script, instead of all around
    fov_deg        vertical field of view, degrees
    returns        Camera 0.35 to 0.45 m away, 5 to 60 degrees above the horizon, aimed at a point on a sphere of
                   radius 0.05 m around the origin (so the object is not always in the middle)
    Source: the authors' released test-data script (paper Sec. 3.2 renders along such views).
    """
    distance = generator.uniform(*DISTANCE_RANGE)
    elevation = np.radians(generator.uniform(*ELEVATION_RANGE_DEG))
    azimuth = np.radians(generator.uniform(*(OFFICIAL_AZIMUTH_RANGE_DEG if official else AZIMUTH_RANGE_DEG)))
    direction = generator.normal(size=3)
    target = LOOK_AT_RADIUS * direction / np.linalg.norm(direction)
    level = np.cos(elevation)
    position = distance * np.array([level * np.cos(azimuth), level * np.sin(azimuth), np.sin(elevation)])
    world_to_camera = look_at(position, target, np.array([0.0, 0.0, 1.0]))
    return Camera(make_intrinsics(height, width, fov_deg), world_to_camera, height, width)


def inside_picture(keypoints_2d: np.ndarray, height: int, width: int) -> np.ndarray:
    """keypoints_2d (..., 21, 2) pixels -> (...) bool: all lie in the picture (NaN, behind the camera, does not)."""
    return ((keypoints_2d >= 0) & (keypoints_2d <= np.array([width - 1, height - 1]))).all(axis=(-1, -2))


def arm_direction(keypoints_3d: np.ndarray) -> np.ndarray:
    """Where the arm goes from the wrist, straight on from the palm: (..., 21, 3) -> (..., 3) unit."""
    along = keypoints_3d[..., 0, :] - keypoints_3d[..., PALM, :].mean(axis=-2)
    return along / np.linalg.norm(along, axis=-1, keepdims=True)


def tighten(camera: Camera, points: np.ndarray, arm: np.ndarray | None, margin: float) -> tuple[Camera, float]:
    """Zoom a camera in on points, the border that the arm points to pushed against the wrist.

    points   (N, 3) world; all stay in the picture
    arm      (2, 3) world: the wrist and a point behind it on the arm; or None
    margin   side of the picture over side of the points' box, along the axis where the box is wider
    returns  the camera and how far the wrist stays from that border, as a fraction of the picture (0 without a hand)
    """
    pixels = project(transform_points(camera.world_to_camera, points), camera.intrinsics)
    if not np.isfinite(pixels).all():  # something is behind the camera: the worst view there is
        return camera, np.inf
    low, high = pixels.min(axis=0), pixels.max(axis=0)
    shape = np.array([camera.width, camera.height]) / max(camera.width, camera.height)
    side = max(margin * ((high - low) / shape).max(), SMALLEST_CROP) * shape  # (2,) of a box of the picture's shape
    corner = (low + high - side) / 2  # its top left
    gap = 0.0
    if arm is not None:
        position, behind = project(transform_points(camera.world_to_camera, arm), camera.intrinsics)
        towards = behind - position
        # Move the box along an axis until the border there lies at the wrist, while the points stay inside.
        slack = 0.01 * side  # skin reaches a little beyond the keypoints among the points
        candidates = [(np.inf, 0, corner[0])]
        for axis in (0, 1):
            if not abs(towards[axis]) >= 0.5 * np.linalg.norm(towards):
                continue
            if towards[axis] < 0:
                start = min(position[axis] - WRIST_MARGIN * side[axis], low[axis] - slack[axis])
                gap = (position[axis] - start) / side[axis]
            else:
                start = max(position[axis] + WRIST_MARGIN * side[axis], high[axis] + slack[axis]) - side[axis]
                gap = (start + side[axis] - position[axis]) / side[axis]
            candidates.append((gap, axis, start))
        gap, axis, start = min(candidates)
        corner[axis] = start
    # Pixel centres are integers, so the box of pixel areas begins half a pixel earlier.
    left, top = corner + 0.5
    intrinsics = crop_intrinsics(camera.intrinsics, left, top, side[1], side[0], camera.height, camera.width)
    return replace(camera, intrinsics=intrinsics), float(gap)


def candidate_cameras(
    generator: np.random.Generator, height: int, width: int, official: bool, framing: str, points: np.ndarray,
    hand_keypoints: np.ndarray, fov_deg: float = OFFICIAL_FOV_DEG, intrinsics: np.ndarray | None = None,
) -> list[Camera]:
    """Cameras in order of preference: most frames with the whole hand in the picture, then the wrist at the border.

    height, width, official, fov_deg  as in sample_camera; a tight framing zooms in from there
    framing         one of FRAMINGS
    points          (N, 3) of the object's surface, world
    hand_keypoints  (frames, 21, 3) world; frames may be 0
    intrinsics      (3, 3) of a camera that is given: it is not zoomed in, but stands where the object is as large in
                    the picture as official views have it
    """
    cameras, costs = [], []
    everything = np.concatenate([points, hand_keypoints.reshape(-1, 3)])
    arm = None
    if len(hand_keypoints):  # the wrist, and a centimetre behind it
        wrist = hand_keypoints[-1, 0]
        arm = np.stack([wrist, wrist + 0.01 * arm_direction(hand_keypoints[-1])])
    for _ in range(CAMERAS_PER_GRASP):
        camera, gap = sample_camera(generator, height, width, official, fov_deg), 0.0
        margin = generator.uniform(*TIGHT_MARGINS)
        if intrinsics is not None:
            world_to_camera = camera.world_to_camera.copy()
            world_to_camera[2, 3] *= min(intrinsics[0, 0] / width, intrinsics[1, 1] / height) / OFFICIAL_FOCAL
            camera = replace(camera, intrinsics=intrinsics, world_to_camera=world_to_camera)
        elif framing == "tight":
            camera, gap = tighten(camera, everything, arm, margin)
        keypoints_2d = project(transform_points(camera.world_to_camera, hand_keypoints), camera.intrinsics)
        outside = int((~inside_picture(keypoints_2d, height, width)).sum())
        cameras.append(camera)
        # Any view with the wrist near the border will do: always taking the best one would favour a few directions.
        # An arm within 50 degrees of the way to the camera would hide the hand, and is passed over as well.
        facing = 0.0 if arm is None else -100 * camera.world_to_camera[2, :3] @ (arm[1] - arm[0])
        costs.append((outside, facing > 0.64, max(gap, 2 * WRIST_MARGIN)))
    return [cameras[i] for i in sorted(range(len(cameras)), key=lambda i: costs[i])]
