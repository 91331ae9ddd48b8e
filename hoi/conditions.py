"""Condition images: keypoints, label map, surface normals -> Conditions.  Paper: Sec. 3.3, 4.3, 5.

The one file that geometry and network both know.  Colours and strokes are those of the official release, so its weights
know them.  Photographs and rendered scenes both pass through here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image
from scipy.ndimage import sobel

from hoi.common.arrays import resized_points

SEGMENTATION_COLORS = np.array([[0, 0, 0], [128, 128, 128], [153, 51, 51]], dtype=np.uint8)  # background, hand, object
FINGER_COLORS = ((139, 53, 255), (0, 56, 255), (43, 140, 237), (37, 168, 36), (147, 147, 0), (70, 17, 145))
KEYPOINTS = 21  # of a hand, in OpenPose order: the wrist, then four of each finger from its base to its tip
# Parent and child of each bone: a finger's first joint hangs on the wrist, the others on the joint before them.
BONES = tuple((0 if joint % 4 == 1 else joint - 1, joint) for joint in range(1, KEYPOINTS))
# Strokes have a width in pixels that is made for pictures of this side; in smaller ones they would cover the hand, so
# these are drawn at this side and averaged.
STROKE_SIDE = 512
JOINT_HALF_WIDTHS = (0, 2, 2, 3, 2, 2, 0)  # columns beside the centre, row by row: OpenCV's filled circle of radius 3
BONE_HALF_WIDTH = 3
# Of 0..450 degrees, to seven decimals in float32: the precision at which OpenCV turns its ellipses.
SINES = np.round(np.sin(np.radians(np.arange(451))), 7).astype(np.float32).astype(np.float64)
# Pixels at STROKE_SIDE: a bone is drawn only when its length lies strictly between.  The release's upper limit suits
# small hands; a hand that fills the picture would lose its palm, so there it is more than any bone inside is long.
BONE_LENGTHS = {"official": (5.0, 150.0), "all": (5.0, 1024.0)}
SOBEL_GZ = 2.0 * math.pi  # the constant z part of the release's normals


@dataclass(frozen=True)
class Conditions:
    """The three pictures that steer the network, each (H, W, 3) uint8."""

    skeleton: np.ndarray
    normal: np.ndarray
    segmentation: np.ndarray


def stroke_color(index: int) -> tuple[int, ...]:
    """Colour of bone or joint `index`: four shades to a palette entry, 35 apart, saturated.

    Bones group by finger. Joints do not, in the release: the wrist takes the thumb's first cell, so every fingertip has
    the next finger's first colour.
    """
    return tuple(min(value + 35 * (index % 4), 255) for value in FINGER_COLORS[index // 4])


# Of joints 0 to 20; the first 20 also of the bones.
SKELETON_COLORS = np.array([stroke_color(index) for index in range(KEYPOINTS)], dtype=np.uint8)


def _ellipse_spans(
    center: tuple[int, int], half_length: int, angle_deg: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pixels of a filled ellipse with half axes (half_length, 3): rows (R,), first column (R,), last column (R,).

    The outline is a polygon with a corner a degree, each rounded to a pixel (halves to even) and joined by lines of
    pixels, as OpenCV's ellipse2Poly and fillConvexPoly have it.
    """
    finer = max(1, math.ceil(half_length / 75))  # for "all" bones, whose corners would lie too far apart
    degree = np.arange(360 * finer + 1) / finer
    cosine_turn, sine_turn = SINES[90 + angle_deg % 360], SINES[angle_deg % 360]
    along = half_length * np.interp(450 - degree, np.arange(451), SINES)
    across = BONE_HALF_WIDTH * np.interp(degree, np.arange(451), SINES)
    x = np.rint(center[0] + along * cosine_turn - across * sine_turn).astype(np.int64)
    y = np.rint(center[1] + along * sine_turn + across * cosine_turn).astype(np.int64)
    # Corners lie at most two pixels apart. The pixel between them is chosen as OpenCV does: a flat step stays on the
    # row of its left end, a steep one takes the columns of both ends.
    step_x, step_y = np.diff(x), np.diff(y)
    flat, steep = np.abs(step_x) > 1, np.abs(step_y) > 1
    row_of_left = np.where(np.abs(step_y) > 1, y[:-1] + step_y // 2, np.where(step_x > 0, y[:-1], y[1:]))
    x = np.concatenate([x, (x[:-1] + step_x // 2)[flat], x[:-1][steep], x[1:][steep]])
    y = np.concatenate([y, row_of_left[flat], np.tile((y[:-1] + step_y // 2)[steep], 2)])
    top = y.min()
    first, last = np.full(y.max() - top + 1, np.iinfo(np.int64).max), np.full(y.max() - top + 1, np.iinfo(np.int64).min)
    np.minimum.at(first, y - top, x)
    np.maximum.at(last, y - top, x)
    return np.arange(top, top + len(first)), first, last


def _fill_spans(canvas: np.ndarray, rows: np.ndarray, first: np.ndarray, last: np.ndarray, color: np.ndarray) -> None:
    height, width = canvas.shape[:2]
    for row, begin, end in zip(rows.tolist(), first.tolist(), last.tolist(), strict=True):
        if 0 <= row < height and end >= 0:
            canvas[row, max(begin, 0) : end + 1] = color


def _draw_strokes(keypoints_2d: np.ndarray, height: int, width: int, rule: str) -> np.ndarray:
    """Joints, then bones over them, without scaling: (21, 2) pixels -> (H, W, 3) uint8."""
    canvas = np.zeros((height, width, 3), dtype=np.uint8)
    joints = np.rint(keypoints_2d).astype(np.int64)
    reach, (shortest, longest) = np.array(JOINT_HALF_WIDTHS), BONE_LENGTHS[rule]
    for (x, y), color in zip(joints, SKELETON_COLORS, strict=True):
        _fill_spans(canvas, np.arange(y - 3, y + 4), x - reach, x + reach, color)
    for bone, (parent, child) in enumerate(BONES):
        # In this order: the angle is cut to whole degrees towards zero, so the reverse may lie a degree aside.
        dx, dy = (joints[parent] - joints[child]).tolist()
        length = math.hypot(dx, dy)
        if shortest < length < longest:
            center = tuple(int(total / 2) for total in (joints[parent] + joints[child]).tolist())
            spans = _ellipse_spans(center, int(length / 2), int(math.degrees(math.atan2(dy, dx))))
            _fill_spans(canvas, *spans, SKELETON_COLORS[bone])
    return canvas


def draw_skeleton(keypoints_2d: np.ndarray, height: int, width: int, rule: str | None = "official") -> np.ndarray:
    """The 21 joints and 20 bones of a hand in the release's strokes.

    keypoints_2d  (21, 2)       pixels, OpenPose order; points outside the picture are allowed
    rule          which bones: "official", those shorter than 150 px at 512, or "all"; None, of a record that does not
                  say by which rule it was drawn, is "official"
    returns       (H, W, 3) uint8
    A picture whose longer side is below 512 is drawn at 512 and reduced by area averages.
    Raises ValueError when the keypoints have another shape or are not finite, and for another rule.
    """
    rule = rule or "official"
    if rule not in BONE_LENGTHS:
        raise ValueError(f"skeleton_rule is {rule!r}, expected one of {', '.join(BONE_LENGTHS)}")
    keypoints_2d = np.asarray(keypoints_2d, dtype=np.float64)
    if keypoints_2d.shape != (KEYPOINTS, 2):
        raise ValueError(f"keypoints_2d is {keypoints_2d.shape}; expected (21, 2) pixels in OpenPose order")
    if not np.isfinite(keypoints_2d).all():
        joint = int(np.argmin(np.isfinite(keypoints_2d).all(axis=1)))
        raise ValueError(f"keypoints_2d of joint {joint} is {keypoints_2d[joint]}; expected finite pixels")
    side = max(height, width)
    if side >= STROKE_SIDE:
        return _draw_strokes(keypoints_2d, height, width, rule)
    large_height, large_width = round(height * STROKE_SIDE / side), round(width * STROKE_SIDE / side)
    enlarged = resized_points(keypoints_2d, (height, width), (large_height, large_width))
    return _area_reduced(_draw_strokes(enlarged, large_height, large_width, rule), height, width)


def _area_reduced(picture: np.ndarray, height: int, width: int) -> np.ndarray:
    """Average over the area of each small pixel, rounded to the nearest grey level: (H2, W2, 3) -> (H, W, 3) uint8."""
    large_height, large_width = picture.shape[:2]
    if large_height % height == 0 and large_width % width == 0:
        return np.asarray(Image.fromarray(picture).reduce((large_width // width, large_height // height)))
    rows, columns = _area_weights(height, large_height), _area_weights(width, large_width)
    return np.rint(np.einsum("ar,rcx,bc->abx", rows, picture, columns, optimize=True)).astype(np.uint8)


def _area_weights(small: int, large: int) -> np.ndarray:
    """Share of each large pixel in each small one along one side, rows summing to 1: (small, large)."""
    edges = np.arange(small + 1) * (large / small)
    covered = np.clip(edges[:, None] - np.arange(large), 0.0, 1.0)  # of each large pixel, left of each edge
    return np.diff(covered, axis=0) * (small / large)


def draw_segmentation(label_map: np.ndarray) -> np.ndarray:
    """Labels (H, W) 0, 1, 2 -> (H, W, 3) uint8: background black, hand 128,128,128, object 153,51,51.

    Raises ValueError for another shape or other labels.
    """
    label_map = np.asarray(label_map)
    if label_map.ndim != 2 or label_map.min() < 0 or label_map.max() > 2:
        raise ValueError(
            f"label_map is {label_map.shape} with values up to {label_map.max()}; expected (H, W) of 0, 1, 2"
        )
    return SEGMENTATION_COLORS.take(label_map, axis=0)


def read_segmentation(segmentation: np.ndarray) -> np.ndarray:
    """Back: (H, W, 3) uint8 -> labels (H, W) uint8, those of the nearest colours, as JPEG moves colours a little.

    Raises ValueError for a picture of another shape.
    """
    pixels = np.asarray(segmentation).astype(np.int16)
    if pixels.ndim != 3 or pixels.shape[2] != 3:
        raise ValueError(f"the segmentation picture is {pixels.shape}, expected (H, W, 3)")
    return np.argmin([np.abs(pixels - color).sum(axis=2) for color in SEGMENTATION_COLORS], axis=0).astype(np.uint8)


def draw_normal(surface_normals: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Picture (1 - n) / 2 of outward camera-frame normals: what faces left is red, up green, the camera blue.

    surface_normals  (H, W, 3)  unit, x right, y down, z forward
    mask             (H, W) bool; black outside
    returns          (H, W, 3) uint8, 255 (1 - n) / 2 rounded to nearest, halves to even (a zero component gives 128)
    Raises ValueError when the two differ in size.
    """
    if surface_normals.shape != (*mask.shape, 3):
        raise ValueError(
            f"surface_normals is {surface_normals.shape} but mask is {mask.shape}; expected (H, W, 3) and (H, W)"
        )
    picture = np.zeros(surface_normals.shape, dtype=np.uint8)
    picture[mask] = np.rint(np.clip((1.0 - surface_normals[mask]) * 127.5, 0.0, 255.0))  # the rest is most of it
    return picture


def scale_inverse_depth(depth: np.ndarray, nearest_value: float = 1000.0) -> np.ndarray:
    """Metric depth to inverse depth of a stated range: 0 where nothing is, else nearest_value * (least depth) / depth.

    depth          (H, W)  metres, 0 = nothing
    nearest_value  the recipe below compares gradients of its input with 2 pi, so the range decides how steep its
                   normals are. Networks of the MiDaS family give hundreds to thousands; 2 pi f / 8 (f the focal length,
                   pixels) gives the true slopes at the nearest depth
    returns        (H, W) float64 in [0, nearest_value]
    """
    seen = depth > 0
    if not seen.any():
        return np.zeros(depth.shape)
    inverse_depth = np.divide(1.0, depth, out=np.zeros(depth.shape), where=seen)
    return nearest_value * inverse_depth / inverse_depth.max()


def normals_from_inverse_depth(inverse_depth: np.ndarray, background_threshold: float = 0.1) -> np.ndarray:
    """Surface normals from a relative inverse-depth picture: Sobel gradients against a constant z part of 2 pi.

    inverse_depth         (H, W)     larger = nearer, unnormalised, in MiDaS's range (see scale_inverse_depth)
    background_threshold  below it, on the picture scaled to [0, 1], gradients count as zero; so they do everywhere in a
                          constant picture
    returns               (H, W, 3)  unit, outward, camera frame: the sign of GBuffer.surface_normals
    Raises ValueError when the picture is not (H, W) or not finite.
    Source: the official release's recipe for MiDaS. Its vector n' is the negative of ours and its picture (n' + 1) / 2,
    so draw_normal gives the release's picture.
    """
    if inverse_depth.ndim != 2 or not np.isfinite(inverse_depth).all():
        raise ValueError(f"inverse_depth is {inverse_depth.shape}; expected a finite picture (H, W)")
    gradient = np.stack([sobel(inverse_depth.astype(np.float64), axis, mode="mirror") for axis in (1, 0)], axis=-1)
    lowest, span = inverse_depth.min(), np.ptp(inverse_depth)
    gradient[(inverse_depth - lowest) < background_threshold * span if span > 0 else ...] = 0.0
    towards_camera = np.concatenate([gradient, np.full((*inverse_depth.shape, 1), SOBEL_GZ)], axis=-1)
    return -towards_camera / np.linalg.norm(towards_camera, axis=-1, keepdims=True)


def draw_conditions(
    keypoints_2d: np.ndarray | None, label_map: np.ndarray, surface_normals: np.ndarray, rule: str | None = "official"
) -> Conditions:
    """The three condition images of one picture.

    keypoints_2d     (21, 2) pixels, OpenPose order, or None for an object alone (black skeleton)
    label_map        (H, W)     0 background, 1 hand, 2 object
    surface_normals  (H, W, 3)  unit, outward, camera frame; cut to hand and object here
    rule             of the skeleton, see draw_skeleton
    Raises ValueError as the three drawings do.
    """
    height, width = label_map.shape
    black = np.zeros((height, width, 3), dtype=np.uint8)
    skeleton = black if keypoints_2d is None else draw_skeleton(keypoints_2d, height, width, rule)
    return Conditions(skeleton, draw_normal(surface_normals, label_map > 0), draw_segmentation(label_map))
